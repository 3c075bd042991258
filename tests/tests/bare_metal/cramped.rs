//! A host that runs out of space.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::Duration;

use super::{Bench, FAILED, Report, listen, skiff};

/// A machine whose disk is on a filesystem of 1.5 MiB, in a mount namespace of its own.
struct Cramped {
    skiff: Child,
    folder: PathBuf,
    log: PathBuf,
    lines: Receiver<String>,
}

impl Cramped {
    fn start(bench: &Bench, option: &str) -> Option<Self> {
        let (folder, log) = (bench.scratch.path().join("small"), bench.scratch.path().join("skiff.log"));
        fs::create_dir(&folder).expect("a folder");
        let seed = bench.disk("full.img");
        let shell = "mount -t tmpfs -o size=1536k small \"$1\" && truncate -s 4M \"$1\"/disk.img && dd status=none \
                     if=\"$2\" of=\"$1\"/disk.img bs=1M count=1 conv=notrunc && shift 2 && exec \"$@\"";
        // Root in a user namespace of its own will do, where there is one to be had.
        let mut command = Command::new("unshare");
        command.args(["--mount", "--map-root-user", "sh", "-c", shell, "sh"]).args([&folder, &seed.0]);
        if !Command::new("unshare").args(["--mount", "--map-root-user", "true"]).status().is_ok_and(|it| it.success()) {
            skip::because("no mount namespace to be had");
            return None;
        }
        bench.add_run(command.arg(skiff()), "test=blk");
        command
            .args(["--memory", "64M", "--cpus", "2", "-vv", "--stats", "--disk"])
            .arg(format!("{}/disk.img,{option}", folder.display()));
        command.arg("--log-file").arg(&log);
        let (skiff, lines) = listen(command);
        Some(Self { skiff, folder, log, lines })
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Until the log says `what`, `times` times.
    fn wait_for(&mut self, what: &str, times: usize) {
        while self.log().matches(what).count() < times {
            assert!(self.skiff.try_wait().expect("skiff can be asked").is_none(), "skiff ended: {}", self.log());
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Until every vCPU waits in a futex (proc_pid_syscall(5)) instead of KVM_RUN, which is an ioctl.
    fn wait_until_held(&mut self) {
        const FUTEX: &str = "202 ";
        let tasks = format!("/proc/{}/task", self.skiff.id());
        let waits = |task: &Path| {
            let of = |name: &str| fs::read_to_string(task.join(name)).unwrap_or_default();
            !of("comm").starts_with("vcpu") || of("syscall").starts_with(FUTEX)
        };
        while !fs::read_dir(&tasks).expect("skiff runs").flatten().all(|task| waits(&task.path())) {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Runs `words` with the process as the last argument.
    fn tell(&self, words: &[&str]) {
        let done = Command::new(words[0]).args(&words[1..]).arg(self.skiff.id().to_string()).status();
        assert!(done.expect("a tool of every Linux").success(), "{words:?}");
    }

    fn end(mut self) -> Report {
        let lines = self.lines.iter().inspect(|line| println!("{line}")).collect();
        Report { code: self.skiff.wait().expect("skiff ends").code(), lines }
    }
}

/// The host runs out of space, really: the machine stands still until there is some, and the guest notices nothing.
#[test]
fn no_space_left_pauses_the_machine() {
    for option in ["werror=enospc", "werror=stop,aio=io_uring"] {
        let Some(bench) = Bench::new() else { return };
        let Some(mut machine) = Cramped::start(&bench, option) else { return };
        machine.wait_for("No space left on device (os error 28); the machine is paused", 1);
        machine.wait_until_held();
        // Nothing has changed, so it fails again.
        machine.tell(&["kill", "-USR2"]);
        machine.wait_for("the machine is paused", 2);
        machine.wait_until_held();
        // The power button waits for the machine; only a second signal would not.
        machine.tell(&["kill", "-TERM"]);
        machine.wait_for("power button pressed", 1);
        let folder = machine.folder.display().to_string();
        let shell = format!("nsenter --user --mount --target $0 mount -o remount,size=8M '{folder}' && kill -USR2 $0");
        machine.tell(&["sh", "-c", &shell]);
        let log = machine.log.clone();
        machine.end().assert_passed("blk", 1);
        let log = fs::read_to_string(log).expect("the log is read");
        assert!(log.contains("the machine goes on"), "{log}");
    }
}

#[test]
fn a_paused_machine_can_be_stopped() {
    let Some(bench) = Bench::new() else { return };
    let Some(mut machine) = Cramped::start(&bench, "werror=stop") else { return };
    machine.wait_for("the machine is paused", 1);
    machine.tell(&["kill", "-TERM"]);
    machine.wait_for("power button pressed", 1);
    machine.tell(&["kill", "-TERM"]);
    assert_eq!(machine.end().code, Some(10));
}

/// QEMU's default for what is not space, and ours for everything: the guest is told.
#[test]
fn no_space_left_is_reported() {
    let Some(bench) = Bench::new() else { return };
    let Some(machine) = Cramped::start(&bench, "werror=report") else { return };
    let report = machine.end();
    assert_eq!((report.code, report.count(|line| line.starts_with("not ok blk: writes"))), (Some(FAILED), 1));
}
