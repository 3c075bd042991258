//! The guest's groups of checks, and how it and its machine end.

use super::{Bench, FAILED, HUNG};

/// Runs a group that only reads, on a scratch disk, with further arguments of skiff.
fn reading_group(group: &str, more: &[&str]) {
    let Some(bench) = Bench::new() else { return };
    let disk = bench.disk("disk.img");
    let option = disk.option();
    bench.run(&format!("test={group}"), &[&["--disk", &option], more].concat()).assert_passed(group, 0);
    disk.assert_untouched();
}

#[test]
fn pci() {
    reading_group("pci", &[]);
}

#[test]
fn virtio() {
    reading_group("virtio", &[]);
}

#[test]
fn bar() {
    reading_group("bar", &[]);
}

/// The 64-bit window lies above all memory, so it is elsewhere on a machine with memory past the hole.
#[test]
fn bar_with_memory_past_the_hole() {
    reading_group("bar", &["--memory", "5G"]);
}

#[test]
fn msix() {
    reading_group("msix", &[]);
}

/// The second CPU waits for the start-up messages of an operating system, which never come.
#[test]
fn msix_beside_an_idle_cpu() {
    reading_group("msix", &["--cpus", "2"]);
}

#[test]
fn notify() {
    reading_group("notify", &[]);
}

#[test]
fn reset() {
    reading_group("reset", &[]);
}

#[test]
fn rng() {
    reading_group("rng", &[]);
}

#[test]
fn doorbells_without_ioeventfd() {
    let Some(bench) = Bench::new() else { return };
    let disk = bench.disk("disk.img");
    let option = format!("{},ioeventfd=off", disk.option());
    for group in ["notify", "bar"] {
        bench.run(&format!("test={group}"), &["--disk", &option]).assert_passed(group, 0);
    }
    disk.assert_untouched();
}

/// What is wrong is told as such: another pattern than the disk's, another serial number, a group that does not exist.
#[test]
fn failures_are_told() {
    let Some(bench) = Bench::new() else { return };
    let option = format!("{},serial=one", bench.disk("disk.img").option());
    let wrong = [
        ("test=blk seed=3", "not ok blk: the first MiB reads as the host wrote it"),
        ("test=blk serial=another", "not ok blk: identifies itself"),
        ("test=nonsense", "not ok command line: there is no test nonsense"),
    ];
    for (cmdline, line) in wrong {
        let report = bench.run(cmdline, &["--disk", &option]);
        assert_eq!((report.code, report.count(|said| said.starts_with(line))), (Some(FAILED), 1), "{cmdline}");
    }
}

/// The exit codes that `skiff run --help` promises.
#[test]
fn ends_of_the_machine() {
    let Some(bench) = Bench::new() else { return };
    let disk = bench.disk("disk.img").option();
    for (end, code) in [("poweroff", 0), ("panic", 4), ("triple-fault", 6), ("reset", 0)] {
        let report = bench.run(&format!("test=pci end={end}"), &["--no-reboot", "--disk", &disk]);
        assert_eq!((report.code, report.count(|line| line.starts_with("not ok"))), (Some(code), 0), "{end}");
    }
}

/// Three times through all of it: what one run leaves behind must not disturb the next.
#[test]
fn a_reset_starts_the_machine_again() {
    let Some(bench) = Bench::new() else { return };
    let disk = bench.disk("disk.img").option();
    let (mut child, receiver) = bench.start("test=blk,msix end=reset", &["--disk", &disk]);
    let mut summaries = Vec::new();
    while let Ok(line) = receiver.recv_timeout(HUNG) {
        println!("{line}");
        if line.ends_with(" skipped") {
            summaries.push(line);
        }
        if summaries.len() == 3 {
            break;
        }
    }
    child.kill().expect("skiff is killed");
    child.wait().expect("skiff ends");
    assert_eq!(summaries, vec!["# 21 passed, 0 failed, 1 skipped"; 3]);
}
