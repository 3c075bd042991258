//! `skiff doctor` on the host at hand: the same findings as text and as JSON, and an exit code that fits.

use std::process::{Command, Output};

use serde_json::Value;
use tests::assets;

fn doctor(words: &[&str]) -> Output {
    Command::new(assets::skiff()).arg("doctor").args(words).output().expect("skiff starts")
}

#[test]
fn every_line_has_a_status_and_what_is_wrong_a_remedy() {
    let output = doctor(&["--json"]);
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let checks = report["checks"].as_array().expect("checks");
    let mut worst = "ok";
    for check in checks {
        let status = check["status"].as_str().expect("a status");
        assert!(["ok", "warning", "problem"].contains(&status), "{check}");
        assert!(!check["message"].as_str().expect("a message").is_empty(), "{check}");
        assert_eq!(check["remedy"].is_string(), status != "ok", "a remedy where there is something to do: {check}");
        worst = match (worst, status) {
            ("problem", _) | (_, "problem") => "problem",
            ("warning", _) | (_, "warning") => "warning",
            _ => "ok",
        };
    }
    assert_eq!(report["verdict"], worst);
    assert_eq!(output.status.code(), Some(i32::from(worst == "problem")));
    let names: Vec<_> = checks.iter().filter_map(|check| check["name"].as_str()).collect();
    for subject in ["kvm-device", "io-uring", "linux-aio", "tun", "vhost-net", "passt", "memory-lock"] {
        assert!(names.contains(&subject), "{subject} is not in {names:?}");
    }
}

#[test]
fn text_says_what_json_says() {
    let report: Value = serde_json::from_slice(&doctor(&["--json"]).stdout).expect("JSON");
    let text = String::from_utf8(doctor(&[]).stdout).expect("UTF-8");
    let mut lines = text.lines().filter(|line| !line.starts_with(' '));
    for check in report["checks"].as_array().expect("checks") {
        let line = lines.next().expect("a line for each check");
        let mut words = line.split_whitespace();
        assert_eq!(words.next(), check["status"].as_str(), "{line}");
        assert_eq!(words.next(), check["name"].as_str(), "{line}");
    }
    assert_eq!(lines.next(), None);
}

/// The processor's flags are the independent witness: without VT-x or SVM, KVM can only be a software one.
#[test]
fn knows_a_software_kvm() {
    let report: Value = serde_json::from_slice(&doctor(&["--json"]).stdout).expect("JSON");
    let flags = std::fs::read_to_string("/proc/cpuinfo").expect("/proc/cpuinfo");
    let hardware = flags.split_whitespace().any(|word| word == "vmx" || word == "svm");
    match report["kvm"].as_str() {
        Some("hardware") => assert!(hardware, "{report}"),
        Some("software") => assert!(!hardware, "{report}"),
        _ => assert!(std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err(), "{report}"),
    }
}
