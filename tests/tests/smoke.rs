//! `skiff smoke` from outside, with the bare-metal guest as the machine.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use tests::assets;

/// For whatever a busy host delays.
const PATIENCE: Duration = Duration::from_secs(120);

/// The guest has read and written its disk, and says that a blank one is not what it should read: `(v << 1) | 1`.
const WROTE: u8 = (guest::FAILED << 1) | 1;

/// A folder of scenarios.
struct Scenarios {
    folder: TempDir,
    files: Vec<PathBuf>,
}

impl Scenarios {
    fn new() -> Self {
        Self { folder: TempDir::new().unwrap(), files: Vec::new() }
    }

    /// Adds one whose guest gets `cmdline`.
    fn with(self, name: &str, cmdline: &str, rest: &str) -> Self {
        self.with_timeout("100s", name, cmdline, rest)
    }

    fn with_timeout(self, timeout: &str, name: &str, cmdline: &str, rest: &str) -> Self {
        let kernel = guest::PATH;
        let machine = format!("kernel = '{kernel}'\ncmdline = '{cmdline}'\nmemory = '64M'\ndebug-exit = true\n");
        self.with_text(name, &format!("timeout = '{timeout}'\n[machine]\n{machine}{rest}"))
    }

    fn with_text(mut self, name: &str, text: &str) -> Self {
        let path = self.folder.path().join(format!("{name}.toml"));
        fs::write(&path, text).unwrap();
        self.files.push(path);
        self
    }

    fn command(&self, flags: &[&str]) -> Command {
        let mut command = Command::new(assets::skiff());
        command.arg("smoke").args(&self.files).args(flags).stdin(Stdio::null());
        command
    }

    /// Runs them: the exit code and the results.
    fn run(&self, flags: &[&str]) -> (i32, Value) {
        let output = self.command(&[flags, &["--json", "-"]].concat()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let results = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}{}", said(&output)));
        (output.status.code().unwrap(), results)
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The tests of the results, whatever the object around them is called.
fn tests_of(results: &Value) -> &Vec<Value> {
    results["tests"].as_array().unwrap_or_else(|| panic!("{results:#}"))
}

fn verdicts(results: &Value) -> Vec<&str> {
    tests_of(results).iter().map(|test| test["verdict"].as_str().unwrap()).collect()
}

fn summary(test: &Value) -> &str {
    test["failure"]["summary"].as_str().unwrap_or_else(|| panic!("{test:#}"))
}

#[test]
fn every_way_to_end() {
    let scenarios = Scenarios::new()
        .with("poweroff", "test=none end=poweroff", "[[step]]\nexpect = 'poweroff'\n")
        .with("exit", "test=none end=exit", "[[step]]\nexit-code = 33\n")
        .with("panic", "test=none end=panic", "[[step]]\nexpect = 'panic'\n")
        .with(
            "asked",
            "test=none end=ask",
            "[[step]]\nwait = 'end? '\n[[step]]\nsend = 'poweroff'\n[[step]]\nexpect = 'poweroff'\n",
        )
        .with(
            "again",
            "test=none end=reset",
            "[[step]]\nexpect = 'reboot'\n[[step]]\nwait = 'guest:'\n[[step]]\nexpect = 'reboot'\n",
        )
        .with("reset", "test=none end=reset", "no-reboot = true\n[[step]]\nexpect = 'reboot'\n");
    let (code, results) = scenarios.run(&["-j", "2"]);
    assert_eq!(verdicts(&results), ["passed"; 6], "{results:#}");
    assert_eq!(code, 0);
}

#[test]
fn a_guest_that_panics_hangs_loops_or_ends() {
    let wait = "[[step]]\nwait = 'login: '\n";
    // Its first words are waited for longer: the host may be busy.
    let hangs = format!("[[step]]\nwait = 'skiff guest'\ntimeout = '90s'\n{wait}");
    let scenarios = Scenarios::new()
        .with("panics", "test=none end=panic", wait)
        .with("hangs", "test=none end=hang", &format!("{hangs}timeout = '2s'\n"))
        .with("loops", "test=none end=reset", wait)
        .with("ends", "test=none end=poweroff", wait)
        // Nothing is said about how long it may be silent: half of its time.
        .with_timeout("12s", "silent", "test=none end=hang", &hangs);
    let (code, results) = scenarios.run(&[]);
    assert_eq!((verdicts(&results), code), (vec!["failed"; 5], 1));
    let summaries: Vec<_> = tests_of(&results).iter().map(summary).collect();
    let expected = [
        "the guest kernel panicked (exit code 4) (step: wait for \"login: \")",
        "no \"login: \" within 2 s",
        "the guest reset the machine (step: wait for \"login: \")",
        "the guest powered off (step: wait for \"login: \")",
        "the console was silent for 6 s, half of the scenario's timeout; if it may be, write silence = \"off\" \
         (step: wait for \"login: \")",
    ];
    assert_eq!(summaries, expected);
}

#[test]
fn a_host_that_cannot_is_3_and_a_failure_beside_it_1() {
    let error = Scenarios::new().with_text("error", "[machine]\nkernel = '/dev/null'\n[[step]]\nwait = 'x'\n");
    let (code, results) = error.run(&[]);
    assert_eq!((verdicts(&results), code), (vec!["error"], 3));
    assert!(summary(&tests_of(&results)[0]).contains("--kernel /dev/null"), "{results:#}");
    let both = error.with("failed", "test=none end=poweroff", "[[step]]\nwait = 'login: '\n");
    assert_eq!(both.run(&[]).0, 1);
}

#[test]
fn mistakes_are_told_at_once_and_nothing_starts() {
    let disk = "disk = [{ path = '/dev/null' }]";
    let matrix =
        format!("[machine]\nkernel = '/dev/null'\n{disk}\n[matrix]\naio = ['native']\ncache = ['writeback']\n");
    let scenarios = Scenarios::new()
        .with_text("a", "[machine]\nkernel = 'gone'\n[[step]]\nwait-regex = '('\n")
        .with_text("b", "[machine]\nkernel = '/dev/null'\n[[step]]\nexpct = 'x'\n")
        .with_text("c", &format!("{matrix}[[step]]\nwait = 'x'\n"))
        .with_text("d", "[machine]\nkernel = '/dev/null'\n[[step]]\nwait = \n");
    let output = scenarios.command(&[]).output().unwrap();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0));
    let said = said(&output);
    let folder = format!("skiff: {}/", scenarios.folder.path().display());
    let places: Vec<_> =
        said.lines().map(|line| line.trim_start_matches(&folder).split(": ").next().unwrap()).collect();
    assert_eq!(places, ["a.toml:2", "a.toml:4", "b.toml:4", "c.toml:4", "d.toml:4"], "{said}");
    let wrong = Scenarios::new().with("a", "test=none", "[[step]]\nexit-code = 33\n");
    for flags in [
        &["--filter", "b"][..],
        &["--json", "-", "--tap", "-"],
        &["--json", "same", "--tap", "same"],
        &["-j", "0"],
        &["--repeat", "0"],
    ] {
        assert_eq!(wrong.command(flags).output().unwrap().status.code(), Some(2), "{flags:?}");
    }
}

#[test]
fn names_filters_and_repetitions() {
    let scenarios = Scenarios::new()
        .with("one", "test=none", "[matrix]\ncpus = [1, 2]\n[[step]]\nexit-code = 33\n")
        .with("two", "test=none end=poweroff", "[[step]]\nexit-code = 33\n");
    let list = scenarios.command(&["--list"]).output().unwrap();
    assert_eq!(String::from_utf8(list.stdout).unwrap(), "one [cpus=1]\none [cpus=2]\ntwo\n");
    let (code, results) = scenarios.run(&["--filter", "cpus=2", "--filter", "two", "--repeat", "3"]);
    assert_eq!(code, 1);
    assert_eq!(verdicts(&results), ["passed", "passed", "passed", "failed", "failed", "failed"]);
    let rate = |name: &str, failed: usize| json!({"name": name, "runs": 3, "failed": failed});
    assert_eq!(results["flakes"], json!([rate("one [cpus=2]", 0), rate("two", 3)]));
}

/// Each machine runs on the engine and the cache mode of its cell: skiff's own messages say on what a disk runs.
#[test]
fn a_matrix_of_engines_and_cache_modes() {
    let folder = TempDir::new_in(assets::target()).unwrap();
    let disk = assets::blank_image(folder.path(), "disk.img", 4 << 20);
    let rest = format!(
        "disk = [{{ path = '{}' }}]\n[matrix]\naio = ['threads', 'native', 'io_uring']\ncache = ['none', 'writeback']\n\
         cpus = [1, 2]\nexclude = [{{ aio = 'native', cache = 'writeback' }}]\n[[step]]\nexit-code = {WROTE}\n",
        disk.display()
    );
    let (code, results) = Scenarios::new().with("disks", "test=blk", &rest).run(&[]);
    assert_eq!((verdicts(&results), code), (vec!["passed"; 10], 0), "{results:#}");
    for test in tests_of(&results) {
        let (cell, messages) = (&test["cell"], test["messages"].as_str().unwrap());
        for key in ["aio", "cache"] {
            let words = format!("{key}={}", cell[key].as_str().unwrap());
            assert!(messages.contains(&words), "{words}: {messages}");
        }
    }
    assert!(fs::read(disk).unwrap().iter().all(|byte| *byte == 0), "the image is as it was");
}

#[test]
fn an_image_is_written_to_only_when_the_scenario_says_so() {
    let folder = TempDir::new().unwrap();
    let disk = assets::blank_image(folder.path(), "disk.img", 4 << 20);
    for (key, is_written) in [("", false), (", snapshot = false", true)] {
        let rest = format!("disk = [{{ path = '{}'{key} }}]\n[[step]]\nexit-code = {WROTE}\n", disk.display());
        let (code, results) = Scenarios::new().with("writes", "test=blk", &rest).run(&[]);
        assert_eq!((verdicts(&results), code), (vec!["passed"], 0), "{results:#}");
        assert_eq!(fs::read(&disk).unwrap().iter().any(|byte| *byte != 0), is_written, "{key}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "something is left");
}

/// At most two machines at a time, by the times of their starts and ends.
#[test]
fn fifty_scenarios_two_at_a_time() {
    let mut scenarios = Scenarios::new();
    for number in 0..50 {
        scenarios = scenarios.with(&format!("n{number}"), "test=none", "[[step]]\nexit-code = 33\n");
    }
    let (code, results) = scenarios.run(&["-j", "2"]);
    assert_eq!((verdicts(&results), code), (vec!["passed"; 50], 0));
    let time = |test: &Value, key: &str| test[key].as_f64().unwrap();
    let times: Vec<_> = tests_of(&results)
        .iter()
        .map(|test| (time(test, "began"), time(test, "began") + time(test, "seconds")))
        .collect();
    // In the middle of each, so that it does not matter how times are rounded.
    let running = |at: f64| times.iter().filter(|(began, ended)| *began <= at && at <= *ended).count();
    let most = times.iter().map(|(began, ended)| running(f64::midpoint(*began, *ended))).max();
    assert_eq!(most, Some(2), "{times:?}");
}

#[test]
fn what_failed_is_kept() {
    let image = TempDir::new().unwrap();
    let disk = assets::blank_image(image.path(), "disk.img", 4 << 20);
    let machine = format!("[[machine.disk]]\npath = '{}'\nid = 'data'\n", disk.display());
    // The guest's checks of disks write its second MiB.
    let scenarios = Scenarios::new()
        .with("fails", "test=blk end=poweroff", &format!("{machine}[[step]]\nwait = 'login: '\n"))
        .with("passes", "test=none end=poweroff", "[[step]]\nexpect = 'poweroff'\n");
    let kept = image.path().join("kept");
    let (code, results) = scenarios.run(&["--keep", kept.to_str().unwrap()]);
    assert_eq!((verdicts(&results), code), (vec!["failed", "passed"], 1));
    let names: BTreeSet<_> = fs::read_dir(&kept).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, BTreeSet::from(["fails".into()]));
    let console = fs::read_to_string(kept.join("fails/console.log")).unwrap();
    assert!(console.contains("# skiff guest: test=blk"), "{console}");
    assert!(fs::read_to_string(kept.join("fails/messages.log")).unwrap().contains("exit code"));
    assert_eq!(fs::metadata(kept.join("fails/data.img")).unwrap().len(), 4 << 20);
    assert!(fs::read(disk).unwrap().iter().all(|byte| *byte == 0), "the image is as it was");
}

/// The machines of a runner, when there are as many as `count`.
fn machines(runner: u32, count: usize) -> Vec<u32> {
    let begin = Instant::now();
    loop {
        let tasks = fs::read_dir(format!("/proc/{runner}/task")).unwrap();
        // A thread that has ended meanwhile has none.
        let children = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("children")).ok());
        let children: Vec<u32> =
            children.flat_map(|line| line.split(' ').filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect();
        if children.len() == count {
            return children;
        }
        assert!(begin.elapsed() < PATIENCE, "{count} machines do not start: {children:?}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Gone, or a zombie that its new parent has not looked at.
fn is_gone(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_none_or(|state| state.is_empty() || state.starts_with('Z'))
}

fn hanging() -> Scenarios {
    let hang = |scenarios: Scenarios, name| scenarios.with(name, "test=none end=hang", "[[step]]\nwait = 'login: '\n");
    hang(hang(hang(Scenarios::new(), "a"), "b"), "c")
}

#[test]
fn no_machine_survives_a_runner_that_is_killed() {
    let mut runner = hanging().command_kept(&["-j", "2"]);
    let machines = machines(runner.0.id(), 2);
    runner.0.kill().unwrap();
    runner.0.wait().unwrap();
    let begin = Instant::now();
    while !machines.iter().all(|pid| is_gone(*pid)) {
        assert!(begin.elapsed() < PATIENCE, "{machines:?} live on");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn an_interrupted_run_writes_its_results() {
    let results = TempDir::new().unwrap();
    let file = results.path().join("results.json");
    let mut runner = hanging().command_kept(&["-j", "2", "--json", file.to_str().unwrap()]);
    let machines = machines(runner.0.id(), 2);
    assets::tool("kill", &["-s", "INT", &runner.0.id().to_string()]);
    assert_eq!(runner.0.wait().unwrap().code(), Some(3));
    assert!(machines.iter().all(|pid| is_gone(*pid)));
    let results: Value = serde_json::from_str(&fs::read_to_string(Path::new(&file)).unwrap()).unwrap();
    assert_eq!(verdicts(&results), ["skipped"; 3]);
}

impl Scenarios {
    /// Starts them, and keeps their files as long as the process.
    fn command_kept(self, flags: &[&str]) -> (std::process::Child, Self) {
        let child = self.command(flags).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        (child, self)
    }
}
