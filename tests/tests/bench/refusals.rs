//! What is told before anything runs.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use tests::assets;

use super::{bench, kvm, outcome, scratch};

/// Runs `script` as root of a mount namespace of its own; nothing where that is not allowed.
fn apart(script: &str) -> Option<Output> {
    let unshare = |script: &str| {
        Command::new("unshare").args(["--user", "--map-root-user", "--mount", "sh", "-c", script]).output()
    };
    if !unshare("mount -t tmpfs none /mnt").is_ok_and(|output| output.status.success()) {
        skip::because("no mount namespace here");
        return None;
    }
    Some(unshare(script).expect("unshare"))
}

#[test]
fn a_full_disk_is_told_before_anything_runs() {
    if !kvm() {
        return;
    }
    let skiff = assets::skiff();
    let script = format!(
        "mount -t tmpfs -o size=8M none /mnt && {} bench --dir /mnt --size 64M; code=$?; ls -A /mnt; df --output=used /mnt | tail -n1; exit $code",
        skiff.display()
    );
    let Some(output) = apart(&script) else { return };
    let (code, line) = outcome(&output);
    assert_eq!(code, Some(1), "{line}");
    assert_eq!(line, "skiff: --dir /mnt: a written file of 64M: no room; name a smaller --size or another folder\n");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "0", "nothing is left");
}

/// Not after the hours that a run may take.
#[test]
fn what_cannot_work_is_told_before_anything_runs() {
    if !kvm() {
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
    let Some(output) = apart(&script) else { return };
    let (code, line) = outcome(&output);
    assert_eq!(code, Some(1), "{line}");
    assert!(line.starts_with("skiff: /dev/kvm: ") && line.lines().count() == 1, "{line}");
}
