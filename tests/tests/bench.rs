//! `skiff bench` as a user meets it: small runs on scratch files. No figure is judged.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use tests::assets;

/// A folder where the build is, because a temporary one may be in memory, without O_DIRECT.
fn scratch() -> TempDir {
    let test = std::env::current_exe().expect("a test has a path");
    TempDir::new_in(test.parent().expect("and a folder")).expect("a scratch directory")
}

fn bench(words: &[&str]) -> Command {
    let mut command = Command::new(assets::skiff());
    command.arg("bench").args(words);
    command
}

/// The exit code, and what it said on stderr.
fn outcome(output: &Output) -> (Option<i32>, String) {
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Whether there is a KVM; says so where not.
fn kvm(test: &str) -> bool {
    let opened = fs::File::options().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &opened {
        let _ = writeln!(std::io::stderr(), "SKIPPED bench::{test}: /dev/kvm: {error}");
    }
    opened.is_ok()
}

fn small(folder: &Path) -> Vec<String> {
    let words = format!("--dir {} --size 4M --runtime 0.1 --repeat 1", folder.display());
    words.split(' ').map(str::to_owned).collect()
}

/// Why a measurement of a tenth of a second may fail on a host that is busy with other things.
const BUSY: &str = "no request completed";

/// Runs with `words` after those of [`small`], and `--json`; the report.
fn report(folder: &Path, words: &str) -> (Value, String) {
    let json = folder.join("report.json");
    let small = small(folder);
    let mut all: Vec<&str> = small.iter().map(String::as_str).chain(words.split_ascii_whitespace()).collect();
    all.extend(["--json", json.to_str().expect("UTF-8")]);
    let output = bench(&all).output().expect("skiff starts");
    let text = String::from_utf8(output.stdout.clone()).expect("UTF-8");
    let report: Value = serde_json::from_slice(&fs::read(&json).expect("the report")).expect("JSON");
    let errors: Vec<_> = cells(&report).iter().flat_map(|cell| cell["errors"].as_array().expect("errors")).collect();
    assert!(errors.iter().all(|error| error.as_str().is_some_and(|line| line.contains(BUSY))), "{errors:?}");
    assert_eq!(outcome(&output), (Some(i32::from(!errors.is_empty())), String::new()), "{text}");
    fs::remove_file(json).expect("the report is removed");
    assert_eq!(fs::read_dir(folder).expect("the folder").count(), 0, "nothing else is left");
    (report, text)
}

fn cells(report: &Value) -> &Vec<Value> {
    report["cells"].as_array().expect("cells")
}

/// The samples of `subject`; none only where something else kept the host busy.
fn samples<'a>(report: &'a Value, subject: &str) -> Vec<&'a Value> {
    let whole = |cell: &&Value| cell["errors"].as_array().is_some_and(Vec::is_empty);
    let samples: Vec<_> = cells(report).iter().filter(whole).map(|cell| &cell["rounds"][0][subject]).collect();
    assert!(samples.len() * 2 > cells(report).len(), "most cells are measured");
    samples
}

#[test]
fn every_engine_is_measured_with_its_yardstick() {
    if !kvm("every_engine_is_measured_with_its_yardstick") {
        return;
    }
    let folder = scratch();
    let (report, text) =
        report(folder.path(), "--depths 8 --rw randread,randwrite --content written,hole,preallocated");
    assert_eq!((&report["complete"], &report["schema"]), (&Value::Bool(true), &Value::from(2)));
    // Three engines in two cache modes, less native through the page cache.
    assert_eq!(cells(&report).len(), 5 * 2 * 3);
    for subject in ["skiff", "host"] {
        for sample in samples(&report, subject) {
            let number = |key: &str| sample[key].as_f64().unwrap_or_else(|| panic!("{key} in {sample}"));
            assert!(number("requests") > 0.0 && number("io_us") > 0.0, "{sample}");
            assert!((number("bytes_per_second") - 4096.0 * number("iops")).abs() < 1.0, "{sample}");
            assert!((number("iops") * number("seconds") - number("requests")).abs() < 1.0, "{sample}");
            assert!((number("seconds") - 0.1).abs() < 0.001, "{sample}");
            let latency =
                ["min", "p50", "p99", "p999", "max"].map(|key| sample["latency_us"][key].as_f64().expect(key));
            assert!(latency.is_sorted() && latency[0] > 0.0, "{sample}");
        }
    }
    for rw in ["randread", "randwrite"] {
        for content in ["written", "hole", "preallocated"] {
            assert_eq!(text.matches(&format!("\n{content} file, {rw} 4k, depth 8\n")).count(), 1, "{text}");
        }
    }
}

#[test]
fn every_form_of_the_results_is_written() {
    if !kvm("every_form_of_the_results_is_written") {
        return;
    }
    let (folder, results) = (scratch(), scratch());
    let [html, csv] = ["a.html", "a.csv"].map(|name| results.path().join(name).display().to_string());
    let words = format!(
        "--depths 1,4 --queues 1,2 --engines threads,io_uring --cache none --html {html} --csv {csv} --svg {}",
        results.path().display()
    );
    report(folder.path(), &words);
    let read = |path: &str| fs::read_to_string(path).expect("a form of the results");
    assert!(read(&csv).lines().count() > 1);
    let names = ["iops", "p99", "io-cpu", "submissions", "of-host"];
    let names: Vec<_> =
        (1..=2).flat_map(|q| names.map(|name| format!("written-randread-4k-q{q}-{name}.svg"))).collect();
    for name in &names {
        let chart = fs::read_to_string(results.path().join(name)).expect("a chart");
        assert!(chart.contains("<rect") && read(&html).contains(&chart), "{name}");
    }
    assert_eq!(fs::read_dir(results.path()).expect("the folder").count(), 2 + names.len());
}

#[test]
fn runs_are_compared() {
    let folder = scratch();
    let write = |name: &str, iops: [f64; 3]| {
        let iops = serde_json::json!({ "low": iops[0], "median": iops[1], "high": iops[2], "confidence": 0.75 });
        let cell = serde_json::json!({ "rw": "read", "bs": 4096, "summary": { "skiff": { "iops": iops } } });
        let path = folder.path().join(name);
        fs::write(&path, serde_json::json!({ "schema": 2, "cells": [cell] }).to_string()).expect("a report");
        path.display().to_string()
    };
    let (fast, slow) = (write("fast.json", [99.0, 100.0, 101.0]), write("slow.json", [79.0, 80.0, 81.0]));
    for (before, after, threshold, code, words) in [
        (&fast, &slow, "5", 1, "slower  -20.0 %"),
        (&slow, &fast, "5", 0, "faster  +25.0 %"),
        (&fast, &slow, "30", 0, "1 of 1 cells are alike"),
        (&fast, &fast, "0", 0, "1 of 1 cells are alike"),
    ] {
        let output = bench(&["compare", before, after, "--threshold", threshold]).output().expect("skiff starts");
        assert_eq!(outcome(&output), (Some(code), String::new()), "{before} {after}");
        assert!(String::from_utf8_lossy(&output.stdout).contains(words), "{before} {after}");
    }
    let (code, line) = outcome(&bench(&["compare", &fast, "/nonexistent"]).output().expect("skiff starts"));
    assert_eq!((code, line.starts_with("skiff: /nonexistent: ")), (Some(1), true), "{line}");
}

#[test]
fn queues_and_doorbells() {
    if !kvm("queues_and_doorbells") {
        return;
    }
    let folder = scratch();
    let words =
        "--engines io_uring --cache none --depths 4 --queues 1,3 --ioeventfd on,off --vs none --bs 512,64K --rw read";
    let (report, _) = report(folder.path(), words);
    assert_eq!(cells(&report).len(), 8);
    for sample in samples(&report, "skiff") {
        assert!(sample["kicks"].as_f64().is_some_and(|kicks| kicks > 0.0), "{sample}");
        let number = |key: &str| sample[key].as_f64().unwrap_or_else(|| panic!("{key} in {sample}"));
        // Each batch is at least one request and causes one call, if neighbours are not waited for.
        assert!((1.0..=4.0).contains(&number("batch")), "{sample}");
        assert!(number("submissions") > 0.0 && number("submissions") <= 1.01, "{sample}");
    }
}

/// One that looks all the time is not.
#[test]
fn guests_that_sleep_are_interrupted() {
    if !kvm("guests_that_sleep_are_interrupted") {
        return;
    }
    let folder = scratch();
    let words = "--engines threads --cache none --depths 1 --vs none --completion poll,interrupt";
    let (report, text) = report(folder.path(), words);
    assert!(text.contains("threads  none,completion=interrupt"), "{text}");
    for cell in cells(&report) {
        let Some(sample) = cell["rounds"][0].get("skiff") else { continue };
        assert!(sample["batch"].as_f64().is_some_and(|batch| (1.0..1.01).contains(&batch)), "one at a time: {cell}");
        assert_eq!(sample["submissions"], Value::Null, "threads make a call for each: {cell}");
        let interrupts = sample["interrupts"].as_f64().expect("interrupts");
        // One request at a time: an interrupt for each, less those that were seen before the guest slept.
        let expected = if cell["completion"] == "interrupt" { 0.01..=1.01 } else { 0.0..=0.0 };
        assert!(expected.contains(&interrupts), "{cell}");
    }
}

/// Against strace(1), which counts the system calls of the same machine: all that the guest causes, and none else.
#[test]
fn calls_of_the_kernel_are_counted_as_strace_counts_them() {
    let name = "calls_of_the_kernel_are_counted_as_strace_counts_them";
    if !kvm(name) {
        return;
    }
    if Command::new("strace").arg("-V").output().is_err() {
        let _ = writeln!(std::io::stderr(), "SKIPPED bench::{name}: strace is not installed");
        return;
    }
    let folder = scratch();
    let image = folder.path().join("image.img");
    fs::write(&image, vec![7; 1 << 20]).expect("the image");
    for (aio, call) in [("native", "io_submit"), ("io_uring", "io_uring_enter")] {
        let disk = format!("path={},aio={aio},cache=none", image.display());
        let counts = folder.path().join("counts");
        let output = Command::new("strace")
            .args(["-f", "-c", "-e", &format!("trace={call}"), "-o"])
            .arg(&counts)
            .arg(assets::skiff())
            .args([
                "run",
                "--kernel",
                guest::PATH,
                "--debug-exit",
                "--serial",
                "stdio",
                "--stats=json",
                "--disk",
                &disk,
            ])
            .args(["--cmdline", "bench rw=randread depth=8 count=500"])
            .output()
            .expect("strace");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let line = text.lines().find(|line| line.starts_with("{\"disks\"")).unwrap_or_else(|| panic!("{text}"));
        let statistics: Value = serde_json::from_str(line).expect("JSON");
        let queue = &statistics["disks"][0]["queues"][0];
        assert_eq!(queue["requests"]["read"], 500, "{line}");
        let counts = fs::read_to_string(&counts).expect("the counts");
        let row = counts.lines().find(|line| line.ends_with(call)).unwrap_or_else(|| panic!("{counts}"));
        let calls: u64 = row.split_ascii_whitespace().nth(3).and_then(|word| word.parse().ok()).expect("a number");
        assert!((1..=500).contains(&calls), "{counts}");
        assert_eq!(queue["submissions"], calls, "{counts}{line}");
    }
}

/// It is what `skiff disk explain` says, and the report names it.
#[test]
fn an_engine_may_be_left_to_skiff() {
    if !kvm("an_engine_may_be_left_to_skiff") {
        return;
    }
    let folder = scratch();
    let image = folder.path().join("image.img");
    fs::write(&image, vec![7; 1 << 20]).expect("the image");
    let path = image.to_str().expect("UTF-8");
    let explained = Command::new(assets::skiff()).args(["disk", "explain", "--json", path]).output().expect("skiff");
    let explained: Value = serde_json::from_slice(&explained.stdout).expect("JSON");
    let json = folder.path().join("report.json");
    let mut words = vec!["--disk", path, "--runtime=0.3", "--repeat=1", "--engines=auto", "--cache=none"];
    words.extend(["--depths=4", "--busy=1", "--json", json.to_str().expect("UTF-8")]);
    let output = bench(&words).output().expect("skiff starts");
    assert_eq!(outcome(&output), (Some(0), String::new()));
    let report: Value = serde_json::from_slice(&fs::read(&json).expect("the report")).expect("JSON");
    let cell = &cells(&report)[0];
    assert_eq!((&cell["aio"], &cell["busy"]), (&Value::from("auto"), &Value::from(1)));
    assert_eq!(cell["chosen"], explained["aio"], "{explained}");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains(&format!("\n  auto is {}\n", cell["chosen"].as_str().expect("a name"))), "{text}");
    assert!(text.contains("measured once: nothing tells a difference from noise"), "{text}");
}

/// An image of the user's is read, and as it was afterwards; with --destructive it is written.
#[test]
fn an_image_of_the_users() {
    if !kvm("an_image_of_the_users") {
        return;
    }
    let folder = scratch();
    let image = folder.path().join("image.img");
    fs::write(&image, vec![7; 1 << 20]).expect("the image");
    let words = ["--disk", image.to_str().expect("UTF-8"), "--runtime", "0.5", "--repeat", "1", "--engines", "threads"];
    let run = |more: &[&str]| bench(&[&words, more].concat()).output().expect("skiff starts");
    assert_eq!(run(&[]).status.code(), Some(0));
    let (code, line) = outcome(&run(&["--rw", "randwrite"]));
    assert_eq!(code, Some(2));
    assert!(line.contains("--destructive"), "{line}");
    assert!(fs::read(&image).expect("the image") == vec![7; 1 << 20], "it was written to");
    assert_eq!(run(&["--rw", "randwrite", "--destructive"]).status.code(), Some(0));
    assert!(fs::read(&image).expect("the image") != vec![7; 1 << 20], "it was not written to");
}

/// The children of a process.
fn children(process: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{process}/task/{process}/children")).unwrap_or_default();
    text.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect()
}

#[test]
fn pinned_vcpus_have_a_cpu_of_their_own() {
    let name = "pinned_vcpus_have_a_cpu_of_their_own";
    if !kvm(name) {
        return;
    }
    let folder = scratch();
    let list = |path: &Path| {
        let status = fs::read_to_string(path.join("status")).ok()?;
        Some(status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?.trim().to_owned())
    };
    let ours = list(Path::new("/proc/self")).expect("a list of CPUs");
    if ours.parse::<u32>().is_ok() {
        let _ = writeln!(std::io::stderr(), "SKIPPED bench::{name}: one CPU");
        return;
    }
    let mut words = small(folder.path());
    words.extend(["--pin", "--vs=none", "--engines=threads", "--cache=none", "--depths=1"].map(str::to_owned));
    words.iter_mut().filter(|word| *word == "0.1").for_each(|word| "2".clone_into(word));
    let mut bench = bench(&words.iter().map(String::as_str).collect::<Vec<_>>())
        .stdout(Stdio::null())
        .spawn()
        .expect("skiff starts");
    // Until a vCPU is alone on its CPU, or the end.
    let mut alone = None;
    while alone.is_none() && bench.try_wait().expect("its end").is_none() {
        for child in children(bench.id()) {
            let threads = fs::read_dir(format!("/proc/{child}/task")).into_iter().flatten().filter_map(Result::ok);
            let places: Vec<_> = threads
                .filter_map(|thread| {
                    let name = fs::read_to_string(thread.path().join("comm")).ok()?;
                    Some((name.starts_with("vcpu"), list(&thread.path())?))
                })
                .collect();
            let of = |vcpu: bool| places.iter().filter(move |place| place.0 == vcpu).map(|place| &place.1);
            if of(true).next().is_some_and(|cpu| cpu.parse::<u32>().is_ok() && of(false).all(|other| other != cpu)) {
                alone = of(true).next().cloned();
            }
        }
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(bench.wait().expect("its end").code(), Some(0));
    assert!(alone.is_some(), "no vCPU was pinned");
}

#[test]
fn an_interrupt_ends_it_with_what_there_is() {
    if !kvm("an_interrupt_ends_it_with_what_there_is") {
        return;
    }
    let folder = scratch();
    let json = folder.path().join("partial.json");
    let mut words = small(folder.path());
    let more = ["--repeat=90", "--vs=none", "--engines=threads", "--json", json.to_str().expect("UTF-8")];
    words.retain(|word| word != "--repeat" && word != "1");
    let mut command = bench(&words.iter().map(String::as_str).chain(more).collect::<Vec<_>>());
    let mut bench = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("skiff starts");
    let mut seen = Vec::new();
    // Until the third machine runs.
    while seen.len() < 3 {
        assert!(bench.try_wait().expect("its end").is_none(), "it ended before it was interrupted");
        seen.extend(children(bench.id()).into_iter().filter(|child| !seen.contains(child)).collect::<Vec<_>>());
        thread::sleep(Duration::from_millis(5));
    }
    let killed = Command::new("kill").args(["-INT", &bench.id().to_string()]).status().expect("kill");
    assert!(killed.success());
    let output = bench.wait_with_output().expect("it ends");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(outcome(&output), (Some(1), String::new()), "{text}");
    assert!(text.contains("INTERRUPTED") && text.contains("threads"), "{text}");
    let report: Value = serde_json::from_slice(&fs::read(&json).expect("the report")).expect("JSON");
    assert_eq!(report["complete"], false);
    assert!(report["cells"][0]["rounds"].as_array().is_some_and(|rounds| rounds.len() < 90));
    fs::remove_file(json).expect("the report is removed");
    assert_eq!(fs::read_dir(folder.path()).expect("the folder").count(), 0, "nothing is left");
    for child in seen {
        assert!(!PathBuf::from(format!("/proc/{child}/exe")).exists(), "{child} is left");
    }
}

/// The guest waits for skiff, at full speed: it must not do so for ever.
#[test]
fn no_machine_outlives_a_killed_bench() {
    if !kvm("no_machine_outlives_a_killed_bench") {
        return;
    }
    let folder = scratch();
    let mut words = small(folder.path());
    words.extend(["--repeat=90", "--vs=none", "--engines=threads"].map(str::to_owned));
    words.retain(|word| word != "--repeat" && word != "1");
    let mut bench = bench(&words.iter().map(String::as_str).collect::<Vec<_>>())
        .stdout(Stdio::null())
        .spawn()
        .expect("skiff starts");
    // Until a machine runs: before that the child is a copy of its parent.
    let machine = loop {
        assert!(bench.try_wait().expect("its end").is_none(), "it ended before it was killed");
        let runs = |child: &u32| {
            let words = fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
            words.split(|byte| *byte == 0).nth(1) == Some(b"run")
        };
        if let Some(child) = children(bench.id()).into_iter().find(runs) {
            break child;
        }
        thread::sleep(Duration::from_millis(5));
    };
    bench.kill().expect("it is killed");
    bench.wait().expect("it ends");
    let runs = || {
        let status = fs::read_to_string(format!("/proc/{machine}/status")).unwrap_or_default();
        status.lines().any(|line| line.starts_with("State:") && !line.contains('Z'))
    };
    let patience = (0..3000).find(|_| {
        thread::sleep(Duration::from_millis(10));
        !runs()
    });
    if patience.is_none() {
        let _ = Command::new("kill").args(["-KILL", &machine.to_string()]).status();
        panic!("the machine goes on");
    }
}

/// What is measured without a machine is interrupted too.
#[test]
fn an_interrupt_does_not_wait_for_the_yardstick() {
    if !kvm("an_interrupt_does_not_wait_for_the_yardstick") {
        return;
    }
    let folder = scratch();
    let mut words = small(folder.path());
    words.iter_mut().filter(|word| *word == "0.1").for_each(|word| "1000".clone_into(word));
    // In the order of this seed the yardstick comes first.
    words.extend(["--engines=threads", "--cache=none", "--depths=1", "--seed=2"].map(str::to_owned));
    let mut bench = bench(&words.iter().map(String::as_str).collect::<Vec<_>>())
        .stdout(Stdio::null())
        .spawn()
        .expect("skiff starts");
    let tasks = format!("/proc/{}/task", bench.id());
    let measures = || {
        let mut threads = fs::read_dir(&tasks).into_iter().flatten().flatten();
        threads.any(|thread| fs::read_to_string(thread.path().join("comm")).is_ok_and(|name| name.starts_with("yard")))
    };
    while !measures() {
        assert!(bench.try_wait().expect("its end").is_none(), "it ended before it measured");
        assert!(children(bench.id()).is_empty(), "the yardstick is first");
        thread::sleep(Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-INT", &bench.id().to_string()]).status().expect("kill").success());
    // Not after the thousand seconds that were asked for.
    let end = (0..12_000).find_map(|_| {
        thread::sleep(Duration::from_millis(10));
        bench.try_wait().expect("its end")
    });
    if end.is_none() {
        bench.kill().expect("it is killed");
    }
    assert_eq!(end.map(|status| status.code()), Some(Some(1)));
}

/// Runs `script` as root of a mount namespace of its own; nothing where that is not allowed.
fn apart(test: &str, script: &str) -> Option<Output> {
    let unshare = |script: &str| {
        Command::new("unshare").args(["--user", "--map-root-user", "--mount", "sh", "-c", script]).output()
    };
    if !unshare("mount -t tmpfs none /mnt").is_ok_and(|output| output.status.success()) {
        let _ = writeln!(std::io::stderr(), "SKIPPED bench::{test}: no mount namespace here");
        return None;
    }
    Some(unshare(script).expect("unshare"))
}

#[test]
fn a_full_disk_is_told_before_anything_runs() {
    let test = "a_full_disk_is_told_before_anything_runs";
    if !kvm(test) {
        return;
    }
    let skiff = assets::skiff();
    let script = format!(
        "mount -t tmpfs -o size=8M none /mnt && {} bench --dir /mnt --size 64M; code=$?; ls -A /mnt; df --output=used /mnt | tail -n1; exit $code",
        skiff.display()
    );
    let Some(output) = apart(test, &script) else { return };
    let (code, line) = outcome(&output);
    assert_eq!(code, Some(1), "{line}");
    assert_eq!(line, "skiff: --dir /mnt: a written file of 64M: no room; name a smaller --size or another folder\n");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "0", "nothing is left");
}

/// Not after the hours that a run may take.
#[test]
fn what_cannot_work_is_told_before_anything_runs() {
    if !kvm("what_cannot_work_is_told_before_anything_runs") {
        return;
    }
    let folder = scratch();
    let empty = folder.path().join("empty");
    fs::write(&empty, "").expect("an empty file");
    let empty = empty.to_str().expect("UTF-8");
    let table: &[(&[&str], &str)] = &[
        (&["--disk", "/nonexistent.img"], "skiff: --disk: disk image \"/nonexistent.img\" does not exist: "),
        (&["--disk", empty], "is empty: "),
        (&["--disk", "/dev/null"], "is a character device: "),
        (&["--size", "4M", "--json", "/nonexistent/a"], "skiff: --json /nonexistent/a: "),
        (&["--size", "4M", "--csv", "/dev"], "skiff: --csv /dev: "),
        (&["--size", "4M", "--html", "/nonexistent/a"], "skiff: --html /nonexistent/a: "),
        (&["--size", "4M", "--svg", empty], "skiff: --svg "),
    ];
    for (words, part) in table {
        let output = bench(words).current_dir(folder.path()).output().expect("skiff starts");
        let (code, line) = outcome(&output);
        assert_eq!((code, line.lines().count(), output.stdout.len()), (Some(1), 1, 0), "{words:?}: {line}");
        assert!(line.contains(part), "{words:?}: {line}");
    }
    assert_eq!(fs::read_dir(folder.path()).expect("the folder").count(), 1, "nothing is left");
}

#[test]
fn a_host_without_kvm() {
    let script = format!("mount --bind /dev/null /dev/kvm && exec {} bench --size 4M", assets::skiff().display());
    if !Path::new("/dev/kvm").exists() {
        let (code, line) = outcome(&bench(&["--size", "4M"]).output().expect("skiff starts"));
        assert_eq!((code, line.contains("/dev/kvm: no such device")), (Some(1), true), "{line}");
        return;
    }
    let Some(output) = apart("a_host_without_kvm", &script) else { return };
    let (code, line) = outcome(&output);
    assert_eq!(code, Some(1), "{line}");
    assert!(line.starts_with("skiff: /dev/kvm: ") && line.lines().count() == 1, "{line}");
}

#[test]
fn qemu_is_measured_with_the_same_guest() {
    let name = "qemu_is_measured_with_the_same_guest";
    if !kvm(name) {
        return;
    }
    if Command::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status().is_err() {
        let _ = writeln!(std::io::stderr(), "SKIPPED bench::{name}: qemu-system-x86_64 is not installed");
        return;
    }
    let folder = scratch();
    let words = "--vs qemu --engines io_uring,threads --cache none,directsync --depths 4 --queues 1,2 --rw randrw";
    let (report, text) = report(folder.path(), words);
    assert!(report["manifest"]["qemu"].as_str().is_some_and(|version| version.starts_with("QEMU emulator version")));
    for sample in samples(&report, "qemu") {
        assert!(sample["requests"].as_f64().is_some_and(|requests| requests > 0.0), "{sample}");
    }
    assert!(text.contains("/ qemu"), "{text}");
}

#[test]
fn qemu_that_is_not_installed() {
    if !kvm("qemu_that_is_not_installed") {
        return;
    }
    let output = bench(&["--vs", "qemu", "--size", "4M"]).env("PATH", "/nonexistent").output().expect("skiff starts");
    let (code, line) = outcome(&output);
    assert_eq!(code, Some(1), "{line}");
    assert!(line.starts_with("skiff: --vs qemu: there is no qemu-system-x86_64; install it"), "{line}");
}

/// A program of this name that does what `script` says, in a folder of its own that is first on PATH.
fn program(name: &str, script: &str) -> (TempDir, String) {
    let folder = scratch();
    let path = folder.path().join(name);
    fs::write(&path, format!("#!/bin/sh\n[ \"$1\" = --version ] && echo '{name} v0' && exit\n{script}\n"))
        .expect("a program");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("it may be run");
    // What another test starts just now has the file open for writing until it is another program.
    let version = || Command::new(&path).arg("--version").stdout(Stdio::null()).status();
    while version().is_err_and(|error| error.kind() == std::io::ErrorKind::ExecutableFileBusy) {
        thread::yield_now();
    }
    let others = std::env::var("PATH").unwrap_or_default();
    let search = format!("{}:{others}", folder.path().display());
    (folder, search)
}

/// Who cannot run the guest is an error if it was named, and else left out with its own words.
#[test]
fn a_monitor_that_does_not_run_the_guest() {
    if !kvm("a_monitor_that_does_not_run_the_guest") {
        return;
    }
    let script = "echo 'Error booting VM: it will not' >&2; exit 1";
    for name in ["cloud-hypervisor", "firecracker"] {
        let ((_program, search), folder) = (program(name, script), scratch());
        let words = format!("--dir {} --size 4M --runtime 0.5 --repeat 1 --depths 1", folder.path().display());
        let words = format!("{words} --engines io_uring --cache writeback --json {}/json", folder.path().display());
        let run = |vs: &str| {
            let words: Vec<&str> = words.split(' ').chain(["--vs", vs]).collect();
            bench(&words).env("PATH", &search).output().expect("skiff starts")
        };
        let (code, line) = outcome(&run(name));
        let why = "the guest does not run there: Error booting VM: it will not";
        let remedy = format!("mend that or leave {name} out");
        assert_eq!((code, line), (Some(1), format!("skiff: --vs {name}: {why}; {remedy}\n")));
        let output = run("all");
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(outcome(&output), (Some(0), String::new()), "{text}");
        assert!(text.contains(&format!("\n{name} is left out: {why}\n")), "{text}");
        let report: Value =
            serde_json::from_slice(&fs::read(folder.path().join("json")).expect("a report")).expect("JSON");
        let left_out = report["left_out"].as_array().expect("who is left out");
        assert!(left_out.contains(&Value::from(format!("{name} is left out: {why}"))), "{left_out:?}");
        assert!(report["cells"][0]["summary"]["host"].is_object(), "{report}");
    }
}

/// A program that says nothing is not waited for then, nor said to be at fault.
#[test]
fn an_interrupt_ends_a_trial() {
    if !kvm("an_interrupt_ends_a_trial") {
        return;
    }
    let ((_program, search), folder) = (program("firecracker", "exec sleep 1000"), scratch());
    let words = format!("--dir {} --size 4M --engines io_uring --cache writeback", folder.path().display());
    let words: Vec<&str> = words.split(' ').chain(["--vs", "firecracker"]).collect();
    let mut bench = bench(&words);
    bench.env("PATH", &search).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut bench = bench.spawn().expect("skiff starts");
    let is_tried = |child: u32| fs::read_to_string(format!("/proc/{child}/comm")).is_ok_and(|name| name == "sleep\n");
    while !children(bench.id()).into_iter().any(is_tried) {
        assert!(bench.try_wait().expect("its end").is_none(), "it ended before the trial");
        thread::sleep(Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-INT", &bench.id().to_string()]).status().expect("kill").success());
    let output = bench.wait_with_output().expect("it ends");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(outcome(&output), (Some(1), String::new()), "{text}");
    assert!(text.contains("INTERRUPTED") && !text.contains("left out: the guest"), "{text}");
}

/// Skiff in the place of the others, without an exit port: what is said to them and how they end.
#[test]
fn other_monitors_are_measured_with_the_same_guest() {
    if !kvm("other_monitors_are_measured_with_the_same_guest") {
        return;
    }
    let skiff = assets::skiff().display().to_string();
    let cloud_hypervisor = format!(
        r#"[ "$1" = --help ] && echo 'image_type=<raw>' && exit
        [ -t 0 ] || {{ echo 'no terminal' >&2; exit 1; }}
        case " $* " in *",image_type=raw,_disable_io_uring=on "*) aio=native;; *,image_type=raw\ *) aio=io_uring;; esac
        while [ $# -gt 0 ]; do case "$1" in
          --kernel) kernel=$2;; --cmdline) words=$2;; --disk) disk=${{2%%,*}};; --memory) memory=${{2#size=}};;
        esac; shift 2; done
        exec {skiff} run --kernel "$kernel" --cmdline "$words" --memory "$memory" --serial stdio \
          --disk "$disk,readonly=on,cache=none,aio=$aio""#
    );
    let firecracker = format!(
        r#"[ "$1 $2" = '--no-api --enable-pci' ] || exit 1
        field() {{ sed -E "s/.*\"$1\":\"?([^\",}}]*).*/\1/" "$file"; }}
        while [ $# -gt 1 ]; do [ "$1" = --config-file ] && file=$2; shift; done
        echo '2026-01-01T00:00:00.0 [anonymous-instance:main] Running Firecracker'
        exec {skiff} run --kernel "$(field kernel_image_path)" --cmdline "$(field boot_args)" \
          --memory "$(field mem_size_mib)M" --serial stdio --disk "path=$(field path_on_host),readonly=on,aio=io_uring""#
    );
    for (name, script, words, of_all) in [
        ("cloud-hypervisor", cloud_hypervisor, "--engines threads,native,io_uring --cache none", 2),
        ("firecracker", firecracker, "--engines io_uring --cache none,writeback", 1),
    ] {
        let ((_program, search), folder) = (program(name, &script), scratch());
        let json = folder.path().join("json").display().to_string();
        let place = format!("--dir {} --size 4M --runtime 0.3 --repeat 1 --depths 4", folder.path().display());
        let all: Vec<&str> = place.split(' ').chain(words.split(' ')).chain(["--vs", name, "--json", &json]).collect();
        let output = bench(&all).env("PATH", &search).output().expect("skiff starts");
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(outcome(&output), (Some(0), String::new()), "{text}");
        let report: Value = serde_json::from_slice(&fs::read(&json).expect("a report")).expect("JSON");
        let key = name.replace('-', "_");
        assert_eq!(report["manifest"][&key], format!("{name} v0"));
        let measured: Vec<_> = cells(&report).iter().filter_map(|cell| cell["rounds"][0].get(name)).collect();
        assert_eq!(measured.len(), of_all, "{text}");
        for sample in measured {
            let positive = |key: &str| sample[key].as_f64().is_some_and(|value| value > 0.0);
            assert!(["requests", "vcpu_us", "io_us", "kicks"].into_iter().all(positive), "{sample}");
        }
        assert!(text.contains(&format!("\n{name} is left out of 1 of ")), "{text}");
    }
}

/// Work that nobody else can do in the same way is no comparison.
#[test]
fn a_monitor_that_can_do_none_of_the_work() {
    if !kvm("a_monitor_that_can_do_none_of_the_work") {
        return;
    }
    let ((_program, search), folder) = (program("firecracker", "exit 1"), scratch());
    let words = format!("--dir {} --size 4M --cache none --vs firecracker", folder.path().display());
    let output = bench(&words.split(' ').collect::<Vec<_>>()).env("PATH", &search).output().expect("skiff starts");
    let expected = "skiff: --vs firecracker: it can do the work of no cell: it has no O_DIRECT; ask for other cells or leave \
                    firecracker out\n";
    assert_eq!(outcome(&output), (Some(1), expected.to_owned()));
}

/// QEMU's disk without indirect descriptors, as Firecracker's is: what the guest wrote it reads again.
#[test]
fn the_guest_does_without_indirect_descriptors() {
    let name = "the_guest_does_without_indirect_descriptors";
    if !kvm(name) {
        return;
    }
    let folder = scratch();
    let image = folder.path().join("image.img");
    fs::write(&image, vec![0; 4 << 20]).expect("the image");
    for (indirect, depth, code) in [("on", 200, 33), ("off", 85, 33), ("off", 86, 35)] {
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-M", "microvm,rtc=on,pcie=on,acpi=on", "-bios", "qboot.rom", "-accel", "kvm", "-m", "128"]);
        qemu.args([
            "-cpu",
            "host,-arch-capabilities",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ]);
        qemu.args(["-serial", "stdio", "-device", "isa-debug-exit,iobase=0x501,iosize=2", "-kernel", guest::PATH]);
        qemu.args([
            "-device",
            &format!("virtio-blk-pci,disable-legacy=on,drive=disk,queue-size=256,indirect_desc={indirect}"),
        ]);
        qemu.args(["-drive", &format!("if=none,id=disk,format=raw,file={}", image.display())]);
        let words = format!("bench rw=write depth={depth} count=1000 verify=on ecam=0xe0000000 bars=0xc0000000");
        let qemu = qemu.args(["-append", &words]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let Ok(mut qemu) = qemu else {
            let _ = writeln!(std::io::stderr(), "SKIPPED bench::{name}: qemu-system-x86_64 is not installed");
            return;
        };
        // Its serial port waits where its input is at an end.
        let _input = qemu.stdin.take();
        let output = qemu.wait_with_output().expect("it ends");
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(code), "{indirect}, {depth}: {text}");
        let counted = text.contains(r#""requests":1000,"writes":1000,"#);
        assert_eq!(counted, code == 33, "{text}");
        assert_eq!(text.contains("the queue has room for as many requests"), code == 35, "{text}");
    }
}
