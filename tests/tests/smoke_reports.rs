//! What `skiff smoke` leaves behind: its files, its terminal, the examples for users and for CI servers. The machines are
//! the bare-metal guest, so that any KVM will do.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;
use tests::assets;

/// The exit code of isa-debug-exit, `(v << 1) | 1`, when the guest is content.
const PASSED: u8 = (guest::PASSED << 1) | 1;

/// A folder with the guest and three scenarios of it: one that passes, one that fails, one that hangs.
fn scenarios() -> Option<TempDir> {
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
        skip::because(format_args!("/dev/kvm: {error}"));
        return None;
    }
    let folder = TempDir::new().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name);
    fs::write(path("guest.elf"), guest::ELF).expect("the guest");
    fs::write(path("disk.img"), vec![0; 4 << 20]).expect("a disk");
    let scenario = |name: &str, cmdline: &str, steps: &str| {
        let machine = format!(
            "timeout = '60s'\n[machine]\nkernel = 'guest.elf'\ncmdline = '{cmdline}'\nmemory = '64M'\ndebug-exit = true\n\
             disk = [{{ path = 'disk.img' }}]\n{steps}"
        );
        fs::write(path(name), machine).expect("a scenario");
    };
    scenario("pass.toml", "test=pci", &format!("[[step]]\nwait = 'ok pci'\n[[step]]\nexit-code = {PASSED}\n"));
    scenario("fail.toml", "test=pci", "[[step]]\nwait = 'no <such> & text'\n");
    scenario("hang.toml", "bench rw=randread depth=1 count=1 pace=on", "[[step]]\nwait = 'never'\n");
    Some(folder)
}

fn smoke(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(assets::skiff());
    command.arg("smoke").args(args).current_dir(folder).stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What python3 prints for `program` with `input`; `None` if it lacks something.
fn python(program: &str, input: &str) -> Option<String> {
    let mut python = Command::new("python3");
    let mut python = python.args(["-c", program]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().ok()?;
    python.stdin.take()?.write_all(input.as_bytes()).ok()?;
    let output = python.wait_with_output().ok()?;
    output.status.success().then(|| text(&output.stdout))
}

#[test]
fn every_form_of_the_results_at_once() {
    let Some(folder) = scenarios() else { return };
    let forms = ["--junit", "r.xml", "--json", "r.json", "--html", "r.html", "--tap", "-"];
    let output = smoke(folder.path(), &[&["pass.toml", "fail.toml"][..], &forms].concat()).output().expect("skiff");
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{stdout}{stderr}");
    let lines: Vec<_> = stdout.lines().filter(|line| !line.starts_with(' ')).collect();
    assert_eq!(lines, ["TAP version 13", "1..2", "ok 1 - pass", "not ok 2 - fail"], "{stdout}");
    // For a person, who is elsewhere then.
    assert!(stderr.contains("step 1 of 1 (fail.toml:9): wait for \"no <such> & text\""), "{stderr}");
    assert!(stderr.contains("1 passed, 1 failed in "), "{stderr}");
    let json: Value =
        serde_json::from_str(&fs::read_to_string(folder.path().join("r.json")).expect("JSON")).expect("JSON");
    assert_eq!((&json["tests"][0]["verdict"], &json["tests"][1]["verdict"]), (&"passed".into(), &"failed".into()));
    assert!(json["tests"][1]["console"]["end"].as_str().is_some_and(|end| end.contains("ok pci")), "{json}");
    let html = fs::read_to_string(folder.path().join("r.html")).expect("HTML");
    assert!(html.contains("no &lt;such&gt; &amp; text") && html.contains("ok pci"), "{html}");
    let xml = fs::read_to_string(folder.path().join("r.xml")).expect("XML");
    let check = "import sys, xml.etree.ElementTree as t; r = t.fromstring(sys.stdin.read()); print(r.get('tests'), \
                 r.get('failures'), [c.get('name') for c in r.iter('testcase')])";
    match python(check, &xml) {
        Some(seen) => assert_eq!(seen, "2 1 ['pass', 'fail']\n"),
        None => skip::because("no python3 to read XML"),
    }
    assert_eq!(fs::read_dir(folder.path()).expect("the folder").count(), 8, "nothing else is left");
}

#[test]
fn results_are_written_after_ctrl_c_too() {
    let Some(folder) = scenarios() else { return };
    let files = ["--junit", "r.xml", "--json", "r.json", "--html", "r.html", "--tap", "r.tap"];
    let mut command = smoke(folder.path(), &[&["hang.toml", "-j", "1", "--repeat", "2"][..], &files].concat());
    let mut run = command.stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("skiff");
    let mut said = BufReader::new(run.stderr.take().expect("a pipe"));
    let mut line = String::new();
    while !line.contains("begins") {
        line.clear();
        assert!(said.read_line(&mut line).expect("a line") > 0, "it ended by itself");
    }
    let id = run.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().expect("kill").success());
    let mut rest = String::new();
    said.read_to_string(&mut rest).expect("what it says");
    let output = run.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(3), "{rest}");
    assert!(text(&output.stdout).trim_end().ends_with("; interrupted"), "{}", text(&output.stdout));
    for (file, mark) in [
        ("r.xml", "<property name=\"interrupted\" value=\"true\"/>"),
        ("r.json", "\"interrupted\": true"),
        ("r.html", "<strong>Interrupted"),
        ("r.tap", "Bail out!"),
    ] {
        let content = fs::read_to_string(folder.path().join(file)).expect("a file");
        assert!(content.contains(mark), "{file}: {content}");
    }
}

/// script(1) makes a pseudoterminal, of no size that anybody knows.
#[test]
fn a_terminal_shows_running_machines_in_place() {
    let Some(folder) = scenarios() else { return };
    for (colours, ok) in [("", "\x1b[32mok     \x1b[0m pass ("), ("1", "ok      pass (")] {
        let line = format!("'{}' smoke pass.toml fail.toml -j 1", assets::skiff().display());
        let mut script = Command::new("script");
        script.args(["--quiet", "--return", "--command", &line, "/dev/null"]).current_dir(folder.path());
        script.env("TERM", "vt100").env("NO_COLOR", colours).stdin(Stdio::null());
        let output = script.output().expect("script");
        let shown = text(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "{shown}");
        assert!(shown.contains(ok), "{shown:?}");
        assert!(shown.contains("of 2 done"), "{shown:?}");
        // Every row that was drawn was taken away again; what is left are lines that stay.
        assert!(shown.contains("A\r\x1b[J"), "{shown:?}");
        let (_, last) = shown.rsplit_once("\x1b[J").expect("cleared");
        assert!(!last.contains(" of 2 done") && last.contains("1 passed"), "{last:?}");
    }
}

/// The files that the scenarios under resources/configs/smoke name are the user's; here they are empty.
#[test]
fn the_examples_are_listed() {
    let folder = TempDir::new().expect("a temporary folder");
    for name in ["vmlinuz", "initrd.img", "root.img"] {
        fs::write(folder.path().join(name), "").expect("a file");
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(resources().join("configs/smoke")).expect("the examples") {
        let path = entry.expect("an example").path();
        let name = path.file_name().and_then(|name| name.to_str()).expect("UTF-8").to_owned();
        fs::copy(&path, folder.path().join(&name)).expect("a copy");
        files.push(name);
    }
    let names: Vec<&str> = files.iter().map(String::as_str).collect();
    for flag in ["--list", "--dry-run"] {
        let output = smoke(folder.path(), &[&names[..], &[flag]].concat()).output().expect("skiff");
        let listed = text(&output.stdout);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        for test in ["boot", "panic", "power-button", "disks [aio=threads, cache=none, cpus=1]"] {
            assert!(listed.lines().any(|line| line.starts_with(test)), "{test}: {listed}");
        }
    }
}

fn resources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the repository").join("resources")
}

/// The scripts of both examples, as a YAML parser that is not ours finds them, run where a CI server would run them; but for
/// the step that needs root, which is only read by the shell.
#[test]
fn what_ci_servers_are_told_works() {
    let scripts = "
import json, sys, yaml
name, text = sys.stdin.read().split('\\n', 1)
ci = yaml.safe_load(text)
if name == 'github-actions.yml':
    assert ci[True] == ['push', 'pull_request']    # YAML 1.1 takes 'on' for a truth
    steps = [step for job in ci['jobs'].values() for step in job['steps']]
    assert all(('run' in step) != ('uses' in step) for step in steps)
    assert [step['with']['path'].split() for step in steps if 'upload-artifact' in step.get('uses', '')] \\
        == [['smoke.html', 'smoke.xml']]
    print(json.dumps([step['run'] for step in steps if 'run' in step]))
else:
    assert ci['smoke']['artifacts']['reports']['junit'] == 'smoke.xml' and ci['smoke']['artifacts']['when'] == 'always'
    print(json.dumps(ci['smoke']['script']))";
    for name in ["github-actions.yml", "gitlab-ci.yml"] {
        let yaml = fs::read_to_string(resources().join("ci").join(name)).expect("an example");
        let Some(found) = python(scripts, &format!("{name}\n{yaml}")) else {
            let has_yaml = python("import yaml", "").is_some();
            assert!(!has_yaml, "{name}: not as expected");
            return skip::because("no yaml for python3 (python3-yaml)");
        };
        let found: Vec<String> = serde_json::from_str(&found).expect("a list");
        assert!(found.len() >= 2, "{name}: {found:?}");
        let Some(folder) = scenarios() else { return };
        fs::create_dir(folder.path().join("tools")).expect("a folder");
        std::os::unix::fs::symlink(assets::skiff(), folder.path().join("tools/skiff")).expect("a link");
        fs::create_dir(folder.path().join("scenarios")).expect("a folder");
        for file in ["pass.toml", "guest.elf", "disk.img"] {
            fs::rename(folder.path().join(file), folder.path().join("scenarios").join(file)).expect("a scenario");
        }
        for script in found {
            let flag = if script.contains("sudo") { "-n" } else { "-e" };
            let Output { status, stdout, stderr } =
                Command::new("bash").args([flag, "-c", &script]).current_dir(folder.path()).output().expect("bash");
            // A software KVM is a problem for stock kernels, and doctor says so; the guest here is none.
            let fine = status.success() || script.contains("doctor") && status.code() == Some(1);
            assert!(fine, "{script}: {}{}", text(&stdout), text(&stderr));
        }
        let xml = fs::read_to_string(folder.path().join("smoke.xml")).expect("JUnit");
        assert!(xml.contains("tests=\"1\" failures=\"0\" errors=\"0\""), "{xml}");
        assert!(folder.path().join("smoke.html").is_file());
    }
}

/// From two files to a scenario that is understood.
#[test]
fn a_first_scenario() {
    let folder = TempDir::new().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name);
    fs::write(path("guest.elf"), guest::ELF).expect("a kernel");
    fs::write(path("root.img"), vec![0; 1 << 20]).expect("a disk");
    let new = || smoke(folder.path(), &["new", "--kernel", "guest.elf", "--disk", "root.img"]).output().expect("skiff");
    let output = new();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(text(&output.stdout).ends_with("  skiff smoke smoke.toml\n"), "{}", text(&output.stdout));
    let listed = smoke(folder.path(), &["--list", "smoke.toml"]).output().expect("skiff");
    assert_eq!(text(&listed.stdout).lines().count(), 1, "{}{}", text(&listed.stdout), text(&listed.stderr));
    let again = new();
    assert_eq!(again.status.code(), Some(2));
    assert!(text(&again.stderr).contains("-o smoke.toml: there is such a file already"), "{}", text(&again.stderr));
}
