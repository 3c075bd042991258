//! A host that refuses io_uring to the whole process, as the seccomp filter of a container does.

use std::fs;
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

use super::{Bench, DISK_BYTES, Disk, MIB, finish, listen, patterned, skiff};

/// In Python: forbids io_uring_setup to itself, and becomes the program that it is told. The filter (seccomp(2)) loads the
/// number of the system call; for 425 it returns EPERM, and allows all others.
const LAUNCHER: &str = "
import ctypes, os, struct, sys
rules = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7fff0000)]
code = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *rule) for rule in rules))
class Program(ctypes.Structure):
    _fields_ = [('length', ctypes.c_ushort), ('rules', ctypes.c_void_p)]
program = Program(len(rules), ctypes.addressof(code))
libc = ctypes.CDLL(None, use_errno=True)
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
for words in [(PR_SET_NO_NEW_PRIVS, 1, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program))]:
    if libc.prctl(*map(ctypes.c_ulong, words), ctypes.c_ulong(0), ctypes.c_ulong(0)):
        sys.exit(os.strerror(ctypes.get_errno()))
os.execv(sys.argv[1], sys.argv[1:])
";

const REASON: &str = "io_uring is forbidden, most likely by the seccomp filter of a container";
const REMEDY: &str = "allow io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp profile";

/// skiff where io_uring is forbidden. Its arguments follow.
fn confined() -> Command {
    let mut command = Command::new("python3");
    command.args(["-c", LAUNCHER]).arg(skiff());
    command
}

fn explain(mut command: Command, disk: &Disk) -> Value {
    let output = command.args(["disk", "explain", "--json"]).arg(&disk.0).output().expect("skiff starts");
    assert!(output.status.success(), "{}", said(&output));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Whether there is something to forbid, and the means. If not, `test` says so.
fn can_forbid() -> bool {
    let engines = Command::new(skiff()).args(["disk", "engines", "--json"]).output().expect("skiff starts");
    let engines: Value = serde_json::from_slice(&engines.stdout).expect("JSON");
    let engines = engines["engines"].as_array().expect("engines");
    let works = engines.iter().any(|it| it["aio"] == "io_uring" && it["works"] == true);
    let confined = Command::new("python3").args(["-c", LAUNCHER, "/bin/true"]).output();
    let reason = match confined {
        _ if !works => "io_uring does not work on this host".to_owned(),
        Ok(done) if done.status.success() => return true,
        Ok(done) => format!("no seccomp filter to be had: {}", said(&done)),
        Err(error) => format!("python3: {error}"),
    };
    skip::because(reason.trim_end());
    false
}

/// What is left to skiff falls back to the next best engine, says why, and works.
#[test]
fn the_next_best_engine_is_chosen_and_said() {
    let Some(bench) = Bench::new() else { return };
    if !can_forbid() {
        return;
    }
    // In memory io_uring would be best, and where there are holes on a filesystem with O_DIRECT.
    let memory = TempDir::new_in("/dev/shm").expect("a scratch directory");
    let in_memory = Disk(memory.path().join("disk.img"));
    fs::write(&in_memory.0, patterned(1, 0, DISK_BYTES)).expect("the scratch disk is written");
    let with_holes = Disk(bench.scratch.path().join("holes.img"));
    // Its last MiB is a hole, which the guest does not look at.
    fs::write(&with_holes.0, patterned(1, 0, DISK_BYTES)).expect("the scratch disk is written");
    let file = fs::File::options().write(true).open(&with_holes.0).expect("it opens");
    file.set_len((DISK_BYTES - MIB) as u64).and_then(|()| file.set_len(DISK_BYTES as u64)).expect("it is cut");
    let log = bench.scratch.path().join("log");
    for (disk, aio) in [(in_memory, "threads"), (with_holes, "native")] {
        if explain(Command::new(skiff()), &disk)["aio"] != "io_uring" {
            let folder = disk.0.display();
            skip::because(format_args!("io_uring is not best for {folder}"));
            continue;
        }
        let explained = explain(confined(), &disk);
        assert_eq!(explained["aio"], aio, "{explained:#}");
        let missing = &explained["missing"][0];
        assert_eq!((&missing["aio"], &missing["reason"]), (&"io_uring".into(), &REASON.into()), "{explained:#}");
        assert_eq!(missing["remedy"], REMEDY, "{explained:#}");

        let before = disk.content();
        let _ = fs::remove_file(&log);
        let mut command = confined();
        bench.add_run(&mut command, "test=blk");
        command.args(["--memory", "64M", "--disk", &disk.option(), "-v", "--log-file"]).arg(&log);
        let (child, receiver) = listen(command);
        finish("test=blk", child, &receiver).assert_passed("blk", 1);
        let after = disk.content();
        assert!(after[MIB..2 * MIB] == patterned(2, MIB, MIB), "the second MiB is not what the guest wrote");
        assert!(after[..MIB] == before[..MIB] && after[2 * MIB..] == before[2 * MIB..], "the rest of the disk changed");
        let log = fs::read_to_string(&log).expect("the log");
        let line = log.lines().find(|line| line.contains("disk disk0: ")).expect("a line for the disk");
        assert!(line.contains(&format!("aio={aio} (")), "{line}");
        assert!(line.contains(&format!("; aio=io_uring not: {REASON}")), "{line}");
    }
}

/// What was asked for is refused, in a line with the remedy, and never replaced.
#[test]
fn io_uring_by_name_is_refused() {
    let Some(bench) = Bench::new() else { return };
    if !can_forbid() {
        return;
    }
    let disk = bench.disk("disk.img");
    let mut command = confined();
    bench.add_run(&mut command, "test=blk");
    let refused = command.args(["--disk", &format!("{},aio=io_uring", disk.option())]).output().expect("skiff starts");
    let line = said(&refused);
    assert_eq!((refused.status.code(), line.lines().count(), refused.stdout.len()), (Some(1), 1, 0), "{line}");
    for part in ["aio=io_uring", REASON, REMEDY, "or use aio=threads"] {
        assert!(line.contains(part), "{part}: {line}");
    }
    disk.assert_untouched();
}
