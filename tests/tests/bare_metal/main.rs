//! The bare-metal guest (resources/guest) under skiff: the transport tested from inside, on every KVM, without a kernel.
//! What the guest did to the disk is checked from here.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

mod benchmark;
mod cramped;
mod disks;
mod forbidden;
mod groups;

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
    /// Nothing where there is no KVM, which is then said.
    fn new() -> Option<Self> {
        if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
            skip::because(format_args!("/dev/kvm: {error}"));
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
        let (child, receiver) = self.start(cmdline, more);
        finish(cmdline, child, &receiver)
    }
}

/// Listens to the guest that runs `cmdline` until its end.
fn finish(cmdline: &str, mut child: Child, receiver: &Receiver<String>) -> Report {
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
