//! QEMU and other monitors beside skiff, with the same guest.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use tests::assets;

use super::{bench, cells, children, kvm, outcome, report, samples, scratch};

#[test]
fn qemu_is_measured_with_the_same_guest() {
    if !kvm() {
        return;
    }
    if Command::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status().is_err() {
        skip::because("qemu-system-x86_64 is not installed");
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
    if !kvm() {
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
    if !kvm() {
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
    if !kvm() {
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
    if !kvm() {
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
    if !kvm() {
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
    if !kvm() {
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
            skip::because("qemu-system-x86_64 is not installed");
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
