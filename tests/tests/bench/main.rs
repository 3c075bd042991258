//! `skiff bench` as a user meets it: small runs on scratch files. No figure is judged.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;
use tests::assets;

mod ends;
mod others;
mod refusals;
mod results;
mod runs;

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
fn kvm() -> bool {
    let opened = fs::File::options().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &opened {
        skip::because(format_args!("/dev/kvm: {error}"));
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

/// The children of a process.
fn children(process: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{process}/task/{process}/children")).unwrap_or_default();
    text.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect()
}
