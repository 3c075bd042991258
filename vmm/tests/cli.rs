//! The command line from outside: exit codes, one line for an error, outputs that other programs can read.

use std::path::Path;
use std::process::{Command, Output};

fn skiff(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_skiff")).args(args).output().unwrap()
}

fn stdout(args: &[&str]) -> String {
    let output = skiff(args);
    assert!(output.status.success(), "{args:?}: {output:?}");
    assert!(output.stderr.is_empty(), "{args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn usage_errors_are_one_line_and_exit_code_2() {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    let config = config.to_str().unwrap();
    for args in [
        &[][..],
        &["run"],
        &["run", "--kernl", "vmlinuz"],
        &["run", "--kernel", "vmlinuz", "--cpus", "0"],
        &["run", "--kernel", "vmlinuz", "--cpus", "many"],
        &["run", "--kernel", "vmlinuz", "--memory", "16M"],
        &["run", "--kernel", "vmlinuz", "--boot-protocol", "uefi"],
        &["run", "--kernel", "vmlinuz", "--disk", "path=a,\nb=c"],
        &["run", "--config", "/nonexistent.toml"],
        &["run", "--config", config],
        &["run", "--kernel", "vmlinuz", "--log-file", "/nonexistent/log"],
        &["doctor", "--yaml"],
        &["completions", "tcsh"],
    ] {
        let output = skiff(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(output.stdout.is_empty(), "{args:?}");
        let line = String::from_utf8(output.stderr).unwrap();
        assert!(line.starts_with("skiff: "), "{line}");
        assert_eq!(line.lines().count(), 1, "{line}");
    }
}

#[test]
fn an_argument_that_is_not_utf_8_is_named() {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::OsStr::from_bytes(b"vmlinuz-\xff");
    let output = Command::new(env!("CARGO_BIN_EXE_skiff")).args(["run", "--kernel"]).arg(path).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let line = "skiff: --kernel vmlinuz-\u{fffd}: not UTF-8; rename the file\n";
    assert_eq!(String::from_utf8(output.stderr).unwrap(), line);
}

#[test]
fn a_dry_run_prints_a_file_that_gives_the_same_machine() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vm.toml");
    let flags = ["run", "--dry-run", "--kernel", "vmlinuz", "--disk", "path=a,,b.img,readonly=on", "--debug-exit"];
    let first = stdout(&flags);
    std::fs::write(&file, &first).unwrap();
    assert_eq!(stdout(&["run", "--dry-run", "--config", file.to_str().unwrap()]), first);
    let here = std::env::current_dir().unwrap();
    let table: toml::Table = first.parse().unwrap();
    assert_eq!(table["disk"][0]["path"].as_str(), here.join("a,b.img").to_str());
    assert_eq!(table["debug-exit"].as_integer(), Some(0x501));
}

#[test]
fn the_sample_configurations_are_machines() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/configs");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        // Scenarios of skiff smoke are in a folder of their own.
        if path.is_file() {
            stdout(&["run", "--dry-run", "--config", path.to_str().unwrap()]);
            seen += 1;
        }
    }
    assert!(seen >= 2);
}

#[test]
fn the_report_of_the_doctor_is_json_and_its_verdict_the_exit_code() {
    let output = skiff(&["doctor", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["schema"], 1);
    assert_eq!(output.status.code(), Some(i32::from(report["verdict"] == "problem")));
    for check in report["checks"].as_array().unwrap() {
        assert!(["ok", "warning", "problem"].iter().any(|status| check["status"] == *status), "{check}");
        assert_eq!(check["status"] == "ok", check["remedy"].is_null(), "{check}");
        assert!(!check["message"].as_str().unwrap().contains('\n'), "{check}");
    }
    let text = String::from_utf8(skiff(&["doctor"]).stdout).unwrap();
    for check in report["checks"].as_array().unwrap() {
        assert!(text.contains(check["name"].as_str().unwrap()), "{text}");
    }
}

#[test]
fn help_shows_examples_and_every_exit_code() {
    let help = stdout(&["run", "--help"]);
    assert!(help.contains("skiff run --kernel vmlinuz --initrd initrd.img --disk path=root.img"));
    for code in ["0 ", "1 ", "2 ", "4 ", "6 ", "8 ", "10 ", "odd "] {
        assert!(help.lines().any(|line| line.starts_with(&format!("  {code}"))), "{code}");
    }
    assert!(stdout(&["--help"]).contains("skiff run --config vm.toml --memory 4G"));
    assert!(stdout(&["--version"]).starts_with("skiff "));
}

#[test]
fn manual_pages_are_written_into_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    stdout(&["man", "--dir", folder.path().to_str().unwrap()]);
    let page = std::fs::read_to_string(folder.path().join("skiff-run.1")).unwrap();
    assert!(page.contains(".SH EXIT CODES"));
    let output = skiff(&["man", "--dir", "/nonexistent"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        String::from_utf8(output.stderr).unwrap(),
        "skiff: --dir /nonexistent/skiff.1: No such file or directory (os error 2); name a folder that can be written\n"
    );
}

#[test]
fn messages_go_to_the_log_file() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let output = skiff(&["run", "--kernel", "/nonexistent/vmlinuz", "--log-file", log.to_str().unwrap(), "-vvv"]);
    assert_eq!(output.status.code(), Some(1));
    let line = String::from_utf8(output.stderr).unwrap();
    assert!(line.starts_with("skiff: ") && line.lines().count() == 1, "{line}");
    assert!(log.exists());
}

#[test]
fn the_program_is_one_static_file_at_random_addresses() {
    let output = Command::new("readelf").args(["-W", "-h", "-l", env!("CARGO_BIN_EXE_skiff")]).output();
    let output = output.expect("readelf of binutils, which linking needs");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("DYN (Position-Independent Executable file)"), "{text}");
    let remedy = "RUSTFLAGS in the environment replaces the flags of .cargo/config.toml: unset it";
    assert!(!text.contains("INTERP"), "{remedy}\n{text}");
}
