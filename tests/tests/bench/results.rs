//! The forms of the results, and two of them compared.

use std::fs;

use super::{bench, kvm, outcome, report, scratch};

#[test]
fn every_form_of_the_results_is_written() {
    if !kvm() {
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
