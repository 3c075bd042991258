//! Machines from outside, with kernels of a few instructions: what the process does beside running its guest.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::ops::{Deref, DerefMut};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

/// `mov al, 1; mov dx, 0x505; out dx, al`, and wait: a panic told through pvpanic, exit code 4.
const PANIC: &[u8] = &[0xb0, 0x01, 0x66, 0xba, 0x05, 0x05, 0xee, 0xf4, 0xeb, 0xfd];

/// Writes '>' to COM1, waits until it has input, and writes 0x10 to the debug exit port: exit code 33.
const WAIT: &[u8] = &[
    0x66, 0xba, 0xfc, 0x03, 0xb0, 0x02, 0xee, // mov dx, 0x3fc; mov al, 2; out dx, al: ready to receive (RTS)
    0x66, 0xba, 0xf8, 0x03, 0xb0, b'>', 0xee, // mov dx, 0x3f8; mov al, '>'; out dx, al
    0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb, // mov dx, 0x3fd; in al, dx; test al, 1; jz to the in
    0x66, 0xba, 0x01, 0x05, 0xb0, 0x10, 0xee, 0xf4, // mov dx, 0x501; mov al, 0x10; out dx, al; hlt
];

/// An ELF kernel of `code` with a PVH note, both at 1 MiB (System V ABI, ELF-64; Xen: public/elfnote.h).
fn kernel(code: &[u8]) -> Vec<u8> {
    const ADDRESS: u64 = 0x10_0000;
    const CODE: u64 = 64 + 2 * 56;
    let note = [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), ADDRESS as u32].map(u32::to_le_bytes).concat();
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend([2u16, 62].map(u16::to_le_bytes).concat());
    image.extend(1u32.to_le_bytes());
    image.extend([ADDRESS, 64, 0].map(u64::to_le_bytes).concat());
    image.extend(0u32.to_le_bytes());
    image.extend([64u16, 56, 2, 0, 0, 0].map(u16::to_le_bytes).concat());
    let len = code.len() as u64;
    for (kind, offset, address, len) in [(1u32, CODE, ADDRESS, len), (4, CODE + len, 0, note.len() as u64)] {
        image.extend([kind, 7].map(u32::to_le_bytes).concat());
        image.extend([offset, address, address, len, len, 4].map(u64::to_le_bytes).concat());
    }
    [&image, code, &note].concat()
}

/// `skiff run` with a kernel of `code`, without input; nothing where there is no KVM.
fn machine(folder: &TempDir, code: &[u8]) -> Option<Command> {
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
        skip::because(format_args!("/dev/kvm: {error}"));
        return None;
    }
    let path = folder.path().join("kernel.elf");
    fs::write(&path, kernel(code)).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_skiff"));
    command.arg("run").arg("--kernel").arg(path).args(["--memory", "64M"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Some(command)
}

/// An output whose reader is gone.
fn nobody() -> Stdio {
    OwnedFd::from(UnixStream::pair().unwrap().0).into()
}

#[test]
fn a_message_that_nobody_takes_does_no_harm() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut command) = machine(&folder, PANIC) else { return };
    assert_eq!(command.stderr(nobody()).status().unwrap().code(), Some(4), "a closed stderr");
    command.args(["--log-file", "/dev/full"]);
    assert_eq!(command.status().unwrap().code(), Some(4), "a full log file, a closed stderr");
}

#[test]
fn a_start_that_fails_leaves_the_file_of_the_console_alone() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut command) = machine(&folder, PANIC) else { return };
    let old = folder.path().join("old.log");
    fs::write(&old, "what the last machine said").unwrap();
    command.arg("--serial").arg(format!("file={}", old.display())).arg("--initrd").arg("/dev/null");
    assert_eq!(command.status().unwrap().code(), Some(1));
    assert_eq!(fs::read_to_string(&old).unwrap(), "what the last machine said");

    let Some(mut command) = machine(&folder, PANIC) else { return };
    let new = folder.path().join("new.log");
    command.arg("--serial").arg(format!("file={}", new.display())).args(["--cpus", "1000000"]);
    assert_eq!(command.status().unwrap().code(), Some(1));
    assert!(!new.exists());
}

#[test]
fn the_console_does_not_overwrite_a_file_of_the_machine() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    let other_name = folder.path().join("console.log");
    fs::write(&image, [7; 512]).unwrap();
    fs::hard_link(&image, &other_name).unwrap();
    for target in [image.clone(), other_name, folder.path().join("kernel.elf")] {
        let Some(mut command) = machine(&folder, PANIC) else { return };
        command.args(["--disk", image.to_str().unwrap()]).arg("--serial").arg(format!("file={}", target.display()));
        let output = command.stderr(Stdio::piped()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", target.display());
        let line = String::from_utf8(output.stderr).unwrap();
        assert!(line.starts_with(&format!("skiff: --serial file={}: ", target.display())), "{line}");
        assert_eq!(fs::read(&image).unwrap(), [7; 512]);
        assert_ne!(fs::read(folder.path().join("kernel.elf")).unwrap(), b"");
    }
}

/// A program that ends with its test, however that ends: these guests would spin on.
struct Running(Child);

impl Deref for Running {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.0
    }
}

impl DerefMut for Running {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if it is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts [`WAIT`], and waits until the guest runs. Its input is still to come.
fn waiting(command: &mut Command) -> Running {
    command.arg("--debug-exit").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = Running(command.spawn().unwrap());
    let mut prompt = [0];
    child.stdout.as_mut().unwrap().read_exact(&mut prompt).unwrap();
    assert_eq!(prompt, *b">");
    child
}

/// A mask of signals in /proc/PID/status (proc(5)) as kill(1) numbers them, from bit 0 for signal 1.
fn signals(child: &Child, mask: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(mask)).unwrap();
    u64::from_str_radix(line.trim_start_matches(':').trim(), 16).unwrap()
}

fn send(child: &Child, signal: &str) {
    assert!(Command::new("kill").args(["-s", signal, &child.id().to_string()]).status().unwrap().success());
    while signals(child, "ShdPnd") != 0 {
        std::thread::yield_now();
    }
}

#[test]
fn every_signal_of_a_terminal_stops_in_order() {
    for signal in ["INT", "TERM", "HUP", "QUIT"] {
        let folder = tempfile::tempdir().unwrap();
        let Some(command) = machine(&folder, WAIT) else { return };
        // Whoever runs the tests may have had hang-ups ignored.
        let mut minding = Command::new("env");
        minding.arg("--default-signal=HUP").arg(command.get_program()).args(command.get_args()).args(["--grace", "0"]);
        let mut child = waiting(&mut minding);
        send(&child, signal);
        assert_eq!(child.wait().unwrap().code(), Some(10), "{signal}");
    }
}

#[test]
fn hang_ups_are_no_second_request() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut command) = machine(&folder, WAIT) else { return };
    let mut child = waiting(&mut command);
    for signal in ["HUP", "HUP", "HUP"] {
        send(&child, signal);
    }
    child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(33));
}

#[test]
fn a_hang_up_that_is_ignored_stays_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let Some(command) = machine(&folder, WAIT) else { return };
    let mut nohup = Command::new("nohup");
    nohup.arg(command.get_program()).args(command.get_args()).stderr(Stdio::null());
    let mut child = waiting(&mut nohup);
    assert_eq!(signals(&child, "SigIgn") & 1, 1);
    // With no signal to wait for, the main thread sleeps all the same.
    let stat = format!("/proc/{0}/task/{0}/stat", child.id());
    let sleeps = |_| {
        std::thread::sleep(std::time::Duration::from_millis(10));
        fs::read_to_string(&stat).unwrap().contains(") S ")
    };
    assert!((0..1000).any(sleeps), "it spins");
    child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(33));
}

/// The lines of stderr, as long as they come.
fn lines(child: &mut Child) -> impl Iterator<Item = String> + use<> {
    BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok)
}

#[test]
fn statistics_on_demand_and_at_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    fs::write(&image, [0; 512]).unwrap();
    let log = folder.path().join("skiff.log");
    for (flag, to_file) in
        [(None, false), (Some("--stats"), false), (Some("--stats=json"), false), (Some("--stats"), true)]
    {
        let Some(mut command) = machine(&folder, WAIT) else { return };
        command.args(["-q", "--disk"]).arg(format!("path={},id=root", image.display())).args(flag);
        if to_file {
            command.arg("--log-file").arg(&log);
        }
        let mut child = waiting(command.stderr(Stdio::piped()));
        let mut said = lines(&mut child);
        send(&child, "USR1");
        // No driver ran: a disk without queues.
        let head = "disk root";
        let first = if to_file { None } else { said.next() };
        match flag {
            Some("--stats=json") => {
                assert_eq!(first.as_deref(), Some(r#"{"disks":[{"id":"root","queues":[]}],"nets":[]}"#));
            }
            _ if to_file => {
                while !fs::read_to_string(&log).unwrap().starts_with(head) {
                    std::thread::yield_now();
                }
            }
            _ => assert_eq!(first.as_deref(), Some(head)),
        }
        child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(33));
        let (again, log) = (said.filter(|line| line.contains("root")).count(), fs::read_to_string(&log));
        assert_eq!(again, usize::from(flag.is_some() && !to_file), "{flag:?}");
        assert!(!to_file || log.unwrap().matches(head).count() == 2);
    }
}

/// While it waits for somebody to write its initial RAM disk into a FIFO.
#[test]
fn asking_before_the_machine_runs_does_no_harm() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("initrd");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let Some(mut command) = machine(&folder, PANIC) else { return };
    let mut child = Running(command.arg("--initrd").arg(&fifo).spawn().unwrap());
    let files = format!("/proc/{}/fd", child.id());
    let has_kernel = || {
        let mut files = fs::read_dir(&files).unwrap().flatten();
        files.any(|file| fs::read_link(file.path()).is_ok_and(|file| file.ends_with("kernel.elf")))
    };
    while !has_kernel() {
        assert_eq!(child.try_wait().unwrap(), None);
    }
    // Those that are pending together are delivered in the order of their numbers, which is this one.
    for signal in ["USR1", "USR2", "TERM"] {
        assert!(Command::new("kill").args(["-s", signal, &child.id().to_string()]).status().unwrap().success());
    }
    assert_eq!(child.wait().unwrap().signal(), Some(15));
}

#[test]
fn too_few_open_files_for_the_cpus_has_its_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let Some(command) = machine(&folder, PANIC) else { return };
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -n 50; exec \"$@\"", "sh"]).arg(command.get_program()).args(command.get_args());
    let output = limited.args(["--cpus", "64"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let line = String::from_utf8(output.stderr).unwrap();
    assert!(line.starts_with("skiff: --cpus 64: ") && line.contains("ulimit -n"), "{line}");
    assert_eq!(line.lines().count(), 1, "{line}");
}
