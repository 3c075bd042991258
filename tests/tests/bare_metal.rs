//! The bare-metal guest (resources/guest) under skiff: the transport tested from inside, on every KVM, without a kernel.
//! What the guest did to the disk is checked from here.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

const MIB: usize = 1 << 20;
const DISK_BYTES: usize = 4 * MIB;

/// The exit codes of isa-debug-exit, `(v << 1) | 1`, for the guest's two verdicts.
const PASSED: i32 = ((guest::PASSED << 1) | 1) as i32;
const FAILED: i32 = ((guest::FAILED << 1) | 1) as i32;

/// How long a guest may be silent before it counts as hung.
const HUNG: Duration = Duration::from_secs(120);

/// The word of the guest's pattern at byte `offset`: the output function of SplitMix64 (Steele, Lea, Flood 2014).
fn pattern(seed: u64, offset: usize) -> [u8; 8] {
    let mut word = seed.wrapping_add(offset as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (word ^ (word >> 31)).to_le_bytes()
}

fn patterned(seed: u64, start: usize, bytes: usize) -> Vec<u8> {
    (start..start + bytes).step_by(8).flat_map(|offset| pattern(seed, offset)).collect()
}

/// The binary under test: `SKIFF_BIN`, else the one that cargo built beside this test.
fn skiff() -> PathBuf {
    std::env::var_os("SKIFF_BIN").map_or_else(
        || {
            let test = std::env::current_exe().expect("a test has a path");
            let profile = test.ancestors().nth(2).expect("<profile>/deps/<test>");
            let binary = profile.join("skiff");
            assert!(binary.exists(), "{} is missing: run `cargo build -p skiff`, or set SKIFF_BIN", binary.display());
            binary
        },
        PathBuf::from,
    )
}

/// The guest's image and the scratch disks of one test.
struct Bench {
    scratch: TempDir,
}

impl Bench {
    /// Nothing where there is no KVM; `test` then says so on the terminal, past the capture of the test runner.
    fn new(test: &str) -> Option<Self> {
        if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
            let _ = writeln!(std::io::stderr(), "SKIPPED bare_metal::{test}: /dev/kvm: {error}");
            return None;
        }
        // Where the build is, because a temporary directory may be in memory, without O_DIRECT.
        let test = std::env::current_exe().expect("a test has a path");
        let scratch = TempDir::new_in(test.parent().expect("and a folder")).expect("a scratch directory");
        fs::write(scratch.path().join("guest.elf"), guest::ELF).expect("the guest is written");
        Some(Self { scratch })
    }

    /// A disk with the pattern of seed 1.
    fn disk(&self, name: &str) -> Disk {
        let path = self.scratch.path().join(name);
        fs::write(&path, patterned(1, 0, DISK_BYTES)).expect("the scratch disk is written");
        Disk(path)
    }

    /// Starts the guest with the command line `cmdline` and further arguments of skiff; its lines come as it says them.
    fn start(&self, cmdline: &str, more: &[&str]) -> (Child, Receiver<String>) {
        let mut command = Command::new(skiff());
        self.add_run(&mut command, cmdline);
        command.args(more);
        if !more.contains(&"--memory") {
            command.args(["--memory", "64M"]);
        }
        listen(command)
    }

    /// The arguments that run the guest.
    fn add_run(&self, command: &mut Command, cmdline: &str) {
        command.arg("run").arg("--kernel").arg(self.scratch.path().join("guest.elf"));
        command.args(["--debug-exit", "--serial", "stdio", "--cmdline", cmdline]);
    }

    /// Runs the guest to its end.
    fn run(&self, cmdline: &str, more: &[&str]) -> Report {
        let (mut child, receiver) = self.start(cmdline, more);
        let mut lines = Vec::new();
        let end = loop {
            match receiver.recv_timeout(HUNG) {
                Ok(line) => {
                    println!("{line}");
                    lines.push(line);
                }
                Err(end) => break end,
            }
        };
        if end == mpsc::RecvTimeoutError::Timeout {
            child.kill().expect("a hung skiff is killed");
            panic!("{cmdline}: the guest says no more and does not end");
        }
        Report { code: child.wait().expect("skiff ends").code(), lines }
    }
}

/// Starts skiff; the guest's lines come as it says them.
fn listen(mut command: Command) -> (Child, Receiver<String>) {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("the skiff binary can be started");
    let stdout = BufReader::new(child.stdout.take().expect("it is piped"));
    let (sender, receiver) = mpsc::channel();
    // Ends with skiff, or when nobody listens any more.
    thread::spawn(move || {
        for line in stdout.lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    (child, receiver)
}

struct Disk(PathBuf);

impl Disk {
    fn option(&self) -> String {
        format!("path={}", self.0.display())
    }

    fn content(&self) -> Vec<u8> {
        fs::read(Path::new(&self.0)).expect("the scratch disk is read")
    }

    fn assert_untouched(&self) {
        assert!(self.content() == patterned(1, 0, DISK_BYTES), "{} changed", self.0.display());
    }

    /// What the guest's blk group leaves: the second MiB has the pattern of seed 2, the rest is untouched.
    fn assert_written(&self) {
        let content = self.content();
        assert!(content.len() == DISK_BYTES, "the disk changed its size");
        assert!(content[..MIB] == patterned(1, 0, MIB), "the first MiB changed");
        assert!(content[MIB..2 * MIB] == patterned(2, MIB, MIB), "the second MiB is not what the guest wrote");
        assert!(content[2 * MIB..] == patterned(1, 2 * MIB, 2 * MIB), "the rest of the disk changed");
    }
}

struct Report {
    code: Option<i32>,
    lines: Vec<String>,
}

impl Report {
    fn count(&self, what: impl Fn(&str) -> bool) -> usize {
        self.lines.iter().filter(|line| what(line)).count()
    }

    /// The benchmark's line counts `requests`; all succeeded, each is in the histogram once, and `writes` of them were
    /// writes, or some if `mixed`.
    fn assert_counted(&self, requests: u64, writes: u64, mixed: bool) {
        let line = self.lines.iter().find_map(|line| line.strip_prefix("bench ")).expect("a line of the benchmark");
        let report: serde_json::Value = serde_json::from_str(line).expect("JSON");
        let number = |key: &str| report[key].as_u64().unwrap_or_else(|| panic!("{key} in {line}"));
        assert_eq!((number("requests"), number("started")), (requests, requests));
        assert_eq!((number("errors"), number("mismatches")), (0, 0));
        let counts = report["histogram"].as_array().expect("a histogram").iter().filter_map(|pair| pair[1].as_u64());
        assert_eq!(counts.sum::<u64>(), requests);
        let wrote = number("writes");
        assert!(if mixed { 0 < wrote && wrote < requests } else { wrote == writes }, "{wrote} writes");
        assert!((1..=requests).contains(&number("kicks")), "doorbells");
    }

    /// Every check of `group` passed, exactly `skipped` were skipped, and the guest sums up what its lines say.
    fn assert_passed(&self, group: &str, skipped: usize) {
        let begins = format!("ok {group}: ");
        let ok = self.count(|line| line.starts_with(&begins));
        let skips = self.count(|line| line.starts_with(&begins) && line.contains("# SKIP"));
        assert_eq!(self.count(|line| line.starts_with("not ok")), 0, "{group}");
        assert_eq!(skips, skipped, "{group}: skipped");
        assert!(ok > skips, "{group}: nothing was checked");
        let summary = format!("# {} passed, 0 failed, {skips} skipped", ok - skips);
        assert_eq!(self.count(|line| line == summary), 1, "{group}: no line {summary:?}");
        assert_eq!(self.code, Some(PASSED), "{group}");
    }
}

/// Runs a group that only reads, on a scratch disk, with further arguments of skiff.
fn reading_group(test: &str, group: &str, more: &[&str]) {
    let Some(bench) = Bench::new(test) else { return };
    let disk = bench.disk("disk.img");
    let option = disk.option();
    bench.run(&format!("test={group}"), &[&["--disk", &option], more].concat()).assert_passed(group, 0);
    disk.assert_untouched();
}

#[test]
fn pci() {
    reading_group("pci", "pci", &[]);
}

#[test]
fn virtio() {
    reading_group("virtio", "virtio", &[]);
}

#[test]
fn bar() {
    reading_group("bar", "bar", &[]);
}

/// The 64-bit window lies above all memory, so it is elsewhere on a machine with memory past the hole.
#[test]
fn bar_with_memory_past_the_hole() {
    reading_group("bar_with_memory_past_the_hole", "bar", &["--memory", "5G"]);
}

#[test]
fn msix() {
    reading_group("msix", "msix", &[]);
}

/// The second CPU waits for the start-up messages of an operating system, which never come.
#[test]
fn msix_beside_an_idle_cpu() {
    reading_group("msix_beside_an_idle_cpu", "msix", &["--cpus", "2"]);
}

#[test]
fn notify() {
    reading_group("notify", "notify", &[]);
}

#[test]
fn reset() {
    reading_group("reset", "reset", &[]);
}

#[test]
fn rng() {
    reading_group("rng", "rng", &[]);
}

#[test]
fn blk() {
    let Some(bench) = Bench::new("blk") else { return };
    let disk = bench.disk("disk.img");
    // The disk is not a read-only one: that check is skipped.
    bench.run("test=blk", &["--disk", &disk.option()]).assert_passed("blk", 1);
    disk.assert_written();
}

#[test]
fn read_only_disk() {
    let Some(bench) = Bench::new("read_only_disk") else { return };
    let disk = bench.disk("disk.img");
    // The check of writes is the one skipped here.
    let report = bench.run("test=blk", &["--disk", &format!("{},readonly=on", disk.option())]);
    report.assert_passed("blk", 1);
    assert_eq!(report.count(|line| line == "ok blk: a read-only disk refuses writes"), 1);
    disk.assert_untouched();
}

#[test]
fn second_disk_and_its_serial_number() {
    let Some(bench) = Bench::new("second_disk_and_its_serial_number") else { return };
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
    let Some(bench) = Bench::new("snapshots_of_one_image") else { return };
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
    let Some(bench) = Bench::new("engines_and_cache_modes") else { return };
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

/// The benchmark with verification: each block it read was right, and each it wrote is on the disk.
#[test]
fn bench_verifies() {
    let Some(bench) = Bench::new("bench_verifies") else { return };
    let engines = [("threads", "writeback"), ("threads", "none"), ("native", "none"), ("io_uring", "none")];
    for (aio, cache) in engines {
        for poll in ["on", "off"] {
            let disk = bench.disk("disk.img");
            let option = format!("{},aio={aio},cache={cache}", disk.option());
            let work =
                [("randread", 4096, 100), ("write", 64 << 10, 64), ("randrw", 4096, 300), ("randread", 512, 300)];
            let mut content = 1;
            for (rw, bs, count) in work {
                let words = format!("bench rw={rw} bs={bs} count={count} depth=8 poll={poll} verify=on seed={content}");
                let report = bench.run(&words, &["--disk", &option]);
                assert_eq!(report.code, Some(PASSED), "{option}: {words}");
                report.assert_counted(count, if rw == "write" { count } else { 0 }, rw == "randrw");
                // Sequential writes of 64 x 64 KiB: all 4 MiB have the next pattern. Random ones: every block has either.
                if rw == "write" {
                    content = 2;
                    assert!(disk.content() == patterned(2, 0, DISK_BYTES), "{option}: not what was written");
                }
                if rw == "randrw" {
                    content = 3;
                    let found = disk.content();
                    let written = (0..DISK_BYTES).step_by(4096).filter(|&at| {
                        let block = &found[at..at + 4096];
                        let is_new = block == patterned(3, at, 4096);
                        assert!(is_new || block == patterned(2, at, 4096), "{option}: the block at {at}");
                        is_new
                    });
                    assert!((50..=300).contains(&written.count()), "{option}: half of 300 requests write");
                    fs::write(&disk.0, patterned(3, 0, DISK_BYTES)).expect("the scratch disk is written");
                }
            }
        }
    }
}

/// What is wrong with a benchmark is told as such.
#[test]
fn failures_of_the_bench_are_told() {
    let Some(bench) = Bench::new("failures_of_the_bench_are_told") else { return };
    let disk = bench.disk("disk.img");
    let wrong = [
        ("count=10 verify=on seed=3", "", "not ok bench: the number of reads with wrong content is 0xa, not 0x0"),
        ("count=10 rw=randwrite", ",readonly=on", "not ok bench: not so: a disk to be written is not read-only"),
        ("count=10 rw=trim", "", "not ok bench: not so: rw= is "),
        ("count=10 bs=1000", "", "not ok bench: not so: bs= is a multiple of 512"),
        ("count=10 bs=8388608", "", "not ok bench: needs a disk with room for one block"),
        ("count=10 depth=8192", "", "not ok bench: not so: the queue has room"),
        ("runtime=100", "", "not ok bench: not so: runtime= comes with tsc_khz="),
        ("rw=read", "", "not ok bench: not so: runtime= or count="),
    ];
    for (words, option, line) in wrong {
        let report = bench.run(&format!("bench {words}"), &["--disk", &format!("{}{option}", disk.option())]);
        assert_eq!((report.code, report.count(|said| said.starts_with(line))), (Some(FAILED), 1), "{words}");
    }
    disk.assert_untouched();
}

/// What `--stats` counts is what the guest says it did: 1 MiB written in pieces and flushed once, one look at the serial
/// number, five accesses past the end and one of an unknown type.
#[test]
fn statistics() {
    let Some(bench) = Bench::new("statistics") else { return };
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

/// Never faster than the limit says, on any host: 100 requests at 200 a second, and less than one saved up, take 99
/// two-hundredths of a second or more, however many are in flight in how many queues.
#[test]
fn limits() {
    let Some(bench) = Bench::new("limits") else { return };
    let limits = ["iops=200", "iops-rd=200", "bps=800K", "bps-rd=800K,iops=100000,bps-wr=1K"];
    for (limit, queues) in limits.iter().flat_map(|limit| [(limit, 1), (limit, 4)]) {
        let disk = bench.disk("disk.img");
        let option = format!("{},{limit},burst=2ms,queues={queues}", disk.option());
        let words = "bench rw=randread bs=4096 count=100 depth=8 verify=on seed=1";
        let start = Instant::now();
        let report = bench.run(words, &["--disk", &option]);
        assert!(start.elapsed() >= Duration::from_millis(495), "{option}: {:?}", start.elapsed());
        assert_eq!(report.code, Some(PASSED), "{option}");
        disk.assert_untouched();
    }
}

/// A machine whose disk is on a filesystem of 1.5 MiB, in a mount namespace of its own.
struct Cramped {
    skiff: Child,
    folder: PathBuf,
    log: PathBuf,
    lines: Receiver<String>,
}

impl Cramped {
    fn start(bench: &Bench, test: &str, option: &str) -> Option<Self> {
        let (folder, log) = (bench.scratch.path().join("small"), bench.scratch.path().join("skiff.log"));
        fs::create_dir(&folder).expect("a folder");
        let seed = bench.disk("full.img");
        let shell = "mount -t tmpfs -o size=1536k small \"$1\" && truncate -s 4M \"$1\"/disk.img && dd status=none \
                     if=\"$2\" of=\"$1\"/disk.img bs=1M count=1 conv=notrunc && shift 2 && exec \"$@\"";
        // Root in a user namespace of its own will do, where there is one to be had.
        let mut command = Command::new("unshare");
        command.args(["--mount", "--map-root-user", "sh", "-c", shell, "sh"]).args([&folder, &seed.0]);
        if !Command::new("unshare").args(["--mount", "--map-root-user", "true"]).status().is_ok_and(|it| it.success()) {
            let _ = writeln!(std::io::stderr(), "SKIPPED bare_metal::{test}: no mount namespace to be had");
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
    let test = "no_space_left_pauses_the_machine";
    for option in ["werror=enospc", "werror=stop,aio=io_uring"] {
        let Some(bench) = Bench::new(test) else { return };
        let Some(mut machine) = Cramped::start(&bench, test, option) else { return };
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
    let Some(bench) = Bench::new("a_paused_machine_can_be_stopped") else { return };
    let Some(mut machine) = Cramped::start(&bench, "a_paused_machine_can_be_stopped", "werror=stop") else { return };
    machine.wait_for("the machine is paused", 1);
    machine.tell(&["kill", "-TERM"]);
    machine.wait_for("power button pressed", 1);
    machine.tell(&["kill", "-TERM"]);
    assert_eq!(machine.end().code, Some(10));
}

/// QEMU's default for what is not space, and ours for everything: the guest is told.
#[test]
fn no_space_left_is_reported() {
    let Some(bench) = Bench::new("no_space_left_is_reported") else { return };
    let Some(machine) = Cramped::start(&bench, "no_space_left_is_reported", "werror=report") else { return };
    let report = machine.end();
    assert_eq!((report.code, report.count(|line| line.starts_with("not ok blk: writes"))), (Some(FAILED), 1));
}

/// What is not asked for is chosen as `disk explain` says, works, and is logged in one line.
#[test]
fn what_a_disk_runs_on_is_chosen_and_said() {
    let Some(bench) = Bench::new("what_a_disk_runs_on_is_chosen_and_said") else { return };
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

#[test]
fn doorbells_without_ioeventfd() {
    let Some(bench) = Bench::new("doorbells_without_ioeventfd") else { return };
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
    let Some(bench) = Bench::new("failures_are_told") else { return };
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
    let Some(bench) = Bench::new("ends_of_the_machine") else { return };
    let disk = bench.disk("disk.img").option();
    for (end, code) in [("poweroff", 0), ("panic", 4), ("triple-fault", 6), ("reset", 0)] {
        let report = bench.run(&format!("test=pci end={end}"), &["--no-reboot", "--disk", &disk]);
        assert_eq!((report.code, report.count(|line| line.starts_with("not ok"))), (Some(code), 0), "{end}");
    }
}

/// Three times through all of it: what one run leaves behind must not disturb the next.
#[test]
fn a_reset_starts_the_machine_again() {
    let Some(bench) = Bench::new("a_reset_starts_the_machine_again") else { return };
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
