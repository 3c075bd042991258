//! Disks: what the guest sees of them, and what skiff says and counts.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::Instant;

use tempfile::TempDir;
use tests::{Ended, Machine};

use super::{Bench, Disk, HUNG, MIB, PASSED, skiff};

#[test]
fn blk() {
    let Some(bench) = Bench::new() else { return };
    let disk = bench.disk("disk.img");
    // The disk is not a read-only one: that check is skipped.
    bench.run("test=blk", &["--disk", &disk.option()]).assert_passed("blk", 1);
    disk.assert_written();
}

#[test]
fn read_only_disk() {
    let Some(bench) = Bench::new() else { return };
    let disk = bench.disk("disk.img");
    // The check of writes is the one skipped here.
    let report = bench.run("test=blk", &["--disk", &format!("{},readonly=on", disk.option())]);
    report.assert_passed("blk", 1);
    assert_eq!(report.count(|line| line == "ok blk: a read-only disk refuses writes"), 1);
    disk.assert_untouched();
}

#[test]
fn second_disk_and_its_serial_number() {
    let Some(bench) = Bench::new() else { return };
    let (first, second) = (bench.disk("first.img"), bench.disk("second.img"));
    let options = [format!("{},serial=first", first.option()), format!("{},serial=second", second.option())];
    let arguments = ["--disk", &options[0], "--disk", &options[1]];
    bench.run("test=blk disk=1 serial=second", &arguments).assert_passed("blk", 1);
    first.assert_untouched();
    second.assert_written();
}

/// Two machines at once, with two disks each, write to one image, and none of it is kept. The guest reads what it wrote.
#[test]
fn snapshots_of_one_image() {
    let Some(bench) = Bench::new() else { return };
    let disk = bench.disk("disk.img");
    let files = || fs::read_dir(bench.scratch.path()).expect("the scratch folder is read").count();
    let before = files();
    for options in ["", ",cache=directsync,aio=native", ",cache=none,aio=io_uring", ",cache=writeback,aio=threads"] {
        let folder = bench.scratch.path().display();
        let option = format!("{},snapshot=on,snapshot-dir={folder}{options}", disk.option());
        let arguments = ["--cpus", "2", "--disk", &option, "--disk", &option];
        thread::scope(|scope| {
            for number in 0..2 {
                let (bench, cmdline) = (&bench, format!("test=blk disk={number}"));
                scope.spawn(move || bench.run(&cmdline, &arguments).assert_passed("blk", 1));
            }
        });
        disk.assert_untouched();
        assert_eq!(files(), before, "{options}: something is left");
    }
}

/// The guest sees the same disk through every engine, in every cache mode it goes with.
#[test]
fn engines_and_cache_modes() {
    let Some(bench) = Bench::new() else { return };
    for (aio, caches) in [
        ("threads", &["none", "writethrough", "directsync", "unsafe"][..]),
        ("native", &["none", "directsync"]),
        ("io_uring", &["writeback", "none", "writethrough", "directsync", "unsafe"]),
    ] {
        for cache in caches {
            println!("aio={aio},cache={cache}");
            let disk = bench.disk("disk.img");
            let option = format!("{},aio={aio},cache={cache}", disk.option());
            bench.run("test=blk", &["--disk", &option]).assert_passed("blk", 1);
            disk.assert_written();
        }
    }
}

/// What `--stats` counts is what the guest says it did: 1 MiB written in pieces and flushed once, one look at the serial
/// number, five accesses past the end and one of an unknown type.
#[test]
fn statistics() {
    let Some(bench) = Bench::new() else { return };
    let disk = bench.disk("disk.img");
    let log = bench.scratch.path().join("skiff.log");
    let more = ["--disk", &disk.option(), "--stats=json", "-q", "--log-file", log.to_str().expect("a path of ours")];
    bench.run("test=blk", &more).assert_passed("blk", 1);
    let line = fs::read_to_string(&log).expect("the log is read");
    let all: serde_json::Value = serde_json::from_str(&line).expect("the log is one line of JSON");
    let queue = &all["disks"][0]["queues"][0];
    assert_eq!(queue["bytes"]["write"], MIB, "{queue}");
    for (kind, requests, errors) in [("flush", 1, 0), ("identify", 1, 0), ("refused", 6, 6)] {
        assert_eq!((&queue["requests"][kind], &queue["errors"][kind]), (&requests.into(), &errors.into()), "{queue}");
    }
    let requests = ["read", "write", "flush"].map(|kind| queue["requests"][kind].as_u64().expect("a number"));
    assert_eq!(queue["latency_ns"]["total"]["count"], requests.iter().sum::<u64>(), "{queue}");
    assert!(queue["interrupts"].as_u64() > Some(0) && queue["kicks"].as_u64() > Some(0), "{queue}");
}

/// Never more than the limit says, on any host: what passed is no more than 200 requests for each second that there were,
/// and one, for less than one is saved up, however many are in flight in how many queues.
#[test]
fn limits() {
    let Some(bench) = Bench::new() else { return };
    let limits = ["iops=200", "iops-rd=200", "bps=800K", "bps-rd=800K,iops=100000,bps-wr=1K"];
    for (limit, queues) in limits.iter().flat_map(|limit| [(limit, 1), (limit, 4)]) {
        let disk = bench.disk("disk.img");
        let option = format!("{},{limit},burst=2ms,queues={queues}", disk.option());
        let words = "bench rw=randread bs=4096 count=100 depth=8 verify=on seed=1";
        let start = Instant::now();
        let report = bench.run(words, &["--disk", &option]);
        let allowed = 1.0 + 200.0 * start.elapsed().as_secs_f64();
        assert_eq!(report.code, Some(PASSED), "{option}");
        report.assert_counted(100, 0, false);
        assert!(allowed >= 100.0, "{option}: 100 requests, where {allowed:.0} may pass");
        disk.assert_untouched();
    }
}

/// At 1 KiB a second the first request of 1 MiB passes, and the next would a quarter of an hour later: of all queues together,
/// and whatever may be written. How long it takes until the machine is stopped does not matter.
#[test]
fn what_a_limit_holds_back_is_not_done() {
    let Some(bench) = Bench::new() else { return };
    let disk = bench.disk("disk.img").option();
    for (limit, queues) in [("bps=1K", 1), ("bps=1K", 4), ("bps-rd=1K", 4), ("bps-rd=1K,bps-wr=100M,iops=100000", 1)] {
        let option = format!("{disk},aio=threads,{limit},queues={queues}");
        let mut command = Command::new(skiff());
        let words = format!("bench pace=on rw=randread bs=1048576 depth=8 count=1000 queues={queues}");
        bench.add_run(&mut command, &words);
        command.args(["--memory", "256M", "-v", "--stats=json", "--disk", &option]);
        let mut machine = Machine::start(command);
        machine.wait_for("# bench ready");
        let_read(&mut machine, 1);
        let ended = stopped(machine);
        let line = ended.messages.lines().find(|line| line.starts_with("{\"disks\"")).expect("statistics");
        let all: serde_json::Value = serde_json::from_str(line).expect("JSON");
        let read = all["disks"][0]["queues"].as_array().expect("queues").iter().map(|it| it["bytes"]["read"].as_u64());
        let read = read.sum::<Option<u64>>().expect("numbers");
        // The stop may come before the answer is counted.
        assert!(read <= MIB as u64, "{option}: {line}");
    }
}

/// Lets the benchmark begin, and waits until the threads of skiff have read so many MiB.
fn let_read(machine: &mut Machine, least: u64) {
    let io = format!("/proc/{}/io", machine.pid());
    let bytes = || {
        let io = fs::read_to_string(&io).expect("skiff runs");
        let bytes = io.lines().find_map(|line| line.strip_prefix("rchar: ")).expect("proc_pid_io(5)");
        bytes.parse::<u64>().expect("a number")
    };
    let (before, start) = (bytes(), Instant::now());
    machine.send("\n");
    while bytes() < before + least * MIB as u64 {
        assert!(start.elapsed() < HUNG, "nothing is read");
        thread::yield_now();
    }
}

/// A machine that is stopped by force.
fn stopped(mut machine: Machine) -> Ended {
    machine.signal("TERM");
    machine.wait_for_message("power button pressed");
    machine.signal("TERM");
    let ended = machine.wait();
    assert_eq!(ended.code, Some(10), "{}", ended.messages);
    ended
}

/// What is not asked for is chosen as `disk explain` says, works, and is logged in one line.
#[test]
fn what_a_disk_runs_on_is_chosen_and_said() {
    let Some(bench) = Bench::new() else { return };
    let (written, log) = (bench.disk("disk.img"), bench.scratch.path().join("log"));
    let memory = TempDir::new_in("/dev/shm").expect("a scratch directory");
    let in_memory = Disk(memory.path().join("disk.img"));
    fs::write(&in_memory.0, written.content()).expect("the scratch disk is written");
    for disk in [written, in_memory] {
        let explain = Command::new(skiff()).args(["disk", "explain"]).arg(&disk.0).output().expect("skiff starts");
        let explanation = String::from_utf8(explain.stdout).expect("text");
        let choice = explanation.lines().next().and_then(|line| line.split_once(": ")).expect("the choice").1;
        let (aio, cache) = choice.split_once(", ").expect("engine and cache mode");
        let _ = fs::remove_file(&log);
        let arguments = ["--disk", &disk.option(), "-v", "--log-file", log.to_str().expect("a path of ours")];
        bench.run("test=blk", &arguments).assert_passed("blk", 1);
        disk.assert_written();
        let said = fs::read_to_string(&log).expect("the log");
        let lines: Vec<_> = said.lines().filter(|line| line.contains("disk disk0: ")).collect();
        assert!(lines.len() == 1 && lines[0].contains(aio) && lines[0].contains(cache), "{choice}: {said}");
    }
}

/// With one thread nearly all that is in flight waits for it, and at ten requests a second for its turn: stopped by force, skiff
/// leaves that undone, and says so. The guest knows no power button.
#[test]
fn a_forced_stop_begins_nothing_more() {
    let Some(bench) = Bench::new() else { return };
    let disk = bench.disk("disk.img").option();
    for (slow, least) in [("thread-pool-max=1,merge=off", 200), ("iops=10", 3)] {
        let option = format!("{disk},aio=threads,{slow}");
        let mut command = Command::new(skiff());
        bench.add_run(&mut command, "bench pace=on rw=randread bs=1048576 depth=128 count=1000000000");
        command.args(["--memory", "256M", "-v", "--disk", &option]);
        let mut machine = Machine::start(command);
        machine.wait_for("# bench ready");
        let_read(&mut machine, least);
        let ended = stopped(machine);
        let said = "requests were not done: the machine is stopped by force";
        assert!(ended.messages.contains(said), "{slow}: {}", ended.messages);
    }
}
