//! What is measured: engines, queues, completions, images, and what is counted meanwhile.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use tests::assets;

use super::{bench, cells, children, kvm, outcome, report, samples, scratch, small};

#[test]
fn every_engine_is_measured_with_its_yardstick() {
    if !kvm() {
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
fn queues_and_doorbells() {
    if !kvm() {
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
    if !kvm() {
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
    if !kvm() {
        return;
    }
    if Command::new("strace").arg("-V").output().is_err() {
        skip::because("strace is not installed");
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
    if !kvm() {
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
    if !kvm() {
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

#[test]
fn pinned_vcpus_have_a_cpu_of_their_own() {
    if !kvm() {
        return;
    }
    let folder = scratch();
    let list = |path: &Path| {
        let status = fs::read_to_string(path.join("status")).ok()?;
        Some(status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?.trim().to_owned())
    };
    let ours = list(Path::new("/proc/self")).expect("a list of CPUs");
    if ours.parse::<u32>().is_ok() {
        skip::because("one CPU");
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
