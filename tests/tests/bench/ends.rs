//! Runs that are interrupted or killed.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use super::{bench, children, kvm, outcome, scratch, small};

#[test]
fn an_interrupt_ends_it_with_what_there_is() {
    if !kvm() {
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
    if !kvm() {
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
    if !kvm() {
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
