//! `skiff disk` from outside: what a disk would run on and why, and what the host offers.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;
use tests::assets;

fn disk(words: &[&str]) -> Output {
    Command::new(assets::skiff()).arg("disk").args(words).output().expect("skiff starts")
}

fn json(words: &[&str]) -> Value {
    let output = disk(&[words, &["--json"]].concat());
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""), "{words:?}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// An image of a MiB of zeroes, all of them written, in memory if so wanted.
fn image(memory: bool) -> (TempDir, PathBuf) {
    let folder =
        if memory { tempfile::tempdir_in("/dev/shm") } else { tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")) };
    let folder = folder.expect("a scratch folder");
    let path = folder.path().join("root.img");
    std::fs::write(&path, vec![0; 1 << 20]).expect("a scratch file");
    (folder, path)
}

fn fact<'a>(explanation: &'a Value, name: &str) -> &'a str {
    let evidence = explanation["evidence"].as_array().expect("evidence");
    let entry = evidence.iter().find(|entry| entry["name"] == name).unwrap_or_else(|| panic!("{name}: {explanation}"));
    entry["fact"].as_str().expect("a text")
}

#[test]
fn explains_with_evidence_and_changes_nothing() {
    let (_folder, path) = image(true);
    let before = path.metadata().unwrap().modified().unwrap();
    let explanation = json(&["explain", path.to_str().unwrap()]);
    assert_eq!((explanation["schema"].as_u64(), explanation["cache"].as_str()), (Some(1), Some("writeback")));
    assert_eq!(explanation["probe"], Value::Null);
    assert_eq!(fact(&explanation, "image"), "a file of 1M on tmpfs");
    let text = String::from_utf8(disk(&["explain", path.to_str().unwrap()]).stdout).unwrap();
    let choice = format!("aio={}, cache=writeback", explanation["aio"].as_str().unwrap());
    assert_eq!(text.lines().next(), Some(format!("{}: {choice}", path.display()).as_str()));
    for part in [&explanation["aio_why"], &explanation["cache_why"]] {
        assert!(text.contains(part.as_str().unwrap()), "{text}");
    }
    // On an ordinary filesystem it would be another mode.
    let changes = explanation["changes"].as_array().unwrap();
    assert!(changes.iter().any(|change| change["cache"] == "none"), "{explanation}");
    assert_eq!(path.metadata().unwrap().modified().unwrap(), before);
    assert!(std::fs::read(&path).unwrap() == vec![0; 1 << 20]);
}

#[test]
fn what_is_asked_for_decides() {
    let (_folder, path) = image(false);
    let path = path.to_str().unwrap();
    for (words, aio, cache) in [
        (&["--aio", "threads"][..], "threads", ""),
        (&["--cache", "writethrough"], "", "writethrough"),
        (&["--aio", "threads", "--cache", "unsafe", "--readonly", "--queues", "4"], "threads", "unsafe"),
        (&["--snapshot"], "", "unsafe"),
        (&["--snapshot", "--cache", "writeback"], "", "writeback"),
    ] {
        let explanation = json(&[&["explain", path], words].concat());
        assert!(aio.is_empty() || explanation["aio"] == aio, "{words:?}: {explanation}");
        assert!(cache.is_empty() || explanation["cache"] == cache, "{words:?}: {explanation}");
    }
}

#[test]
fn measures_every_engine_that_works() {
    let (_folder, path) = image(false);
    let explanation = json(&["explain", path.to_str().unwrap(), "--cache", "writeback", "--measure"]);
    let probes = explanation["probe"].as_array().expect("a probe");
    let engines = json(&["engines"]);
    let works =
        |aio: &str| engines["engines"].as_array().unwrap().iter().any(|one| one["aio"] == aio && one["works"] == true);
    for (aio, expected) in [("threads", true), ("io_uring", works("io_uring")), ("native", false)] {
        let depths: Vec<_> =
            probes.iter().filter(|probe| probe["aio"] == aio).map(|probe| probe["depth"].as_u64()).collect();
        assert_eq!(depths, if expected { vec![Some(1), Some(32)] } else { vec![] }, "{explanation}");
    }
    assert!(probes.iter().all(|probe| probe["reads_per_second"].is_u64() && probe["microseconds"].is_f64()));
}

/// Another program has the lock that a machine takes.
#[test]
fn explains_an_image_in_use() {
    let (_folder, path) = image(false);
    let flock = r"import fcntl, struct, sys, time
file = open(sys.argv[1], 'r+b')
fcntl.fcntl(file, 37, struct.pack('hhqqi', fcntl.F_WRLCK, 0, 0, 0, 0))
print('locked', flush=True)
time.sleep(600)";
    let mut holder = Command::new("python3");
    holder.args(["-c", flock]).arg(&path).stdout(std::process::Stdio::piped());
    let Ok(mut holder) = holder.spawn() else {
        skip::because("python3 is not installed");
        return;
    };
    let mut line = [0; 7];
    std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut line).expect("it locks");
    let explanation = json(&["explain", path.to_str().unwrap(), "--measure"]);
    holder.kill().expect("it ends");
    holder.wait().expect("it ends");
    let user = fact(&explanation, "in use");
    assert!(user.starts_with(&format!("by process {} (python3", holder.id())), "{user}");
    assert!(!explanation["probe"].as_array().unwrap().is_empty());
}

/// As `skiff run` would say. A program that runs may not be written to, not even by root (open(2), ETXTBSY).
#[test]
fn an_image_that_may_not_be_written_is_for_a_read_only_disk() {
    let (folder, path) = image(false);
    let program = folder.path().join("sleep");
    std::fs::copy("/bin/sleep", &program).expect("a program of every Linux");
    // It still runs with some bytes behind it, and with an image's size.
    File::options().write(true).open(&program).unwrap().set_len(1 << 20).unwrap();
    // Not while a child of another test, between its fork and its exec, still has the file open for writing.
    let mut running = loop {
        match Command::new(&program).arg("600").spawn() {
            Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => std::thread::yield_now(),
            spawned => break spawned.expect("it starts"),
        }
    };
    let words = ["explain", program.to_str().unwrap()];
    let (refused, explained) = (disk(&words), disk(&[&words[..], &["--readonly"]].concat()));
    running.kill().expect("it ends");
    running.wait().expect("it ends");
    let line = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.status.code() == Some(1) && line.contains("Text file busy"), "{line}");
    assert_eq!(explained.status.code(), Some(0));
    assert_eq!(disk(&["explain", path.to_str().unwrap()]).status.code(), Some(0));
}

#[test]
fn lists_the_engines_of_this_host() {
    let engines = json(&["engines"]);
    let text = String::from_utf8(disk(&["engines"]).stdout).unwrap();
    let names: Vec<_> = engines["engines"].as_array().unwrap().iter().map(|one| one["aio"].as_str().unwrap()).collect();
    assert_eq!(names, ["threads", "native", "io_uring"]);
    for one in engines["engines"].as_array().unwrap() {
        assert_eq!(one["works"] == true, one["reason"].is_null() && one["remedy"].is_null(), "{one}");
        assert!(text.lines().any(|line| line.starts_with(&format!("aio={} ", one["aio"].as_str().unwrap()))), "{text}");
    }
    assert_eq!(engines["engines"][0]["works"], true);
}

#[test]
fn refuses_in_one_line() {
    let (folder, path) = image(false);
    let empty = folder.path().join("empty");
    File::create(&empty).unwrap();
    let [path, empty, folder] =
        [&path, &empty, &folder.path().to_owned()].map(|path| path.to_str().unwrap().to_owned());
    let table: &[(&[&str], i32, &str)] = &[
        (&["explain", "/nonexistent.img"], 1, "does not exist"),
        (&["explain", &folder], 1, "is a directory"),
        (&["explain", &empty], 1, "is empty"),
        (&["explain", "/dev/null"], 1, "is a character device"),
        (&["explain", "/proc/version", "--cache", "none"], 1, "O_DIRECT"),
        (&["explain", &path, "--aio", "native", "--cache", "writeback"], 2, "cache=none"),
        (&["explain", &path, "--aio", "fast"], 2, "fast"),
        (&["explain", &path, "--queues", "0"], 2, "--queues"),
        (&["explain"], 2, "<FILE>"),
        (&[], 2, "explain"),
    ];
    for (words, code, part) in table {
        let output = disk(words);
        let line = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), line.matches('\n').count()), (Some(*code), 1), "{words:?}: {line}");
        assert!(line.contains(part), "{words:?}: {line}");
        assert_eq!(output.stdout, b"", "{words:?}");
    }
}
