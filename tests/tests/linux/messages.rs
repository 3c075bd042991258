//! The kernel's opinion of the machine: it says nothing worse about skiff than about QEMU, in the same run, on the same
//! KVM, with the same kernel and initrd.

use std::collections::BTreeSet;
use std::process::Command;

use tests::{Machine, Skiff, assets};

/// What the guests run: a warning of their own, and the log without the kernel's lines of levels 5 to 7 (syslog(3)).
/// Nobody judges those, and each byte on the console costs an exit, which is slow in the lab.
const LOG: &str = "skiff.run=\"echo '<4>skiff-guest: a warning' >/dev/kmsg; dmesg -r | grep -v '^<[567]>'\"";

/// Lines of the kernel's log at level warning or worse, without what differs from boot to boot: time, numbers, names of
/// CPUs. A line of `dmesg -r` is `<priority>[ time] text`; the level is the priority's low three bits (syslog(3)).
fn complaints(console: &str) -> BTreeSet<String> {
    let start = console.find("skiff-guest: run\n").expect("the guest ran its command");
    let mut found = BTreeSet::new();
    for line in console[start..].lines().filter_map(|line| line.strip_prefix('<')) {
        let Some((priority, text)) = line.split_once('>') else { continue };
        let Ok(priority) = priority.parse::<u8>() else { continue };
        if priority & 7 <= 4 {
            let text = text.split_once("] ").map_or(text, |(_time, text)| text);
            let hex = |c: char| c.is_ascii_hexdigit() || c == 'x';
            let words = text.split(' ').map(|word| {
                let bare = word.trim_matches(|c: char| !c.is_ascii_alphanumeric());
                let number = bare.starts_with(|c: char| c.is_ascii_digit()) && bare.chars().all(hex);
                if number { "N" } else { word }
            });
            found.insert(words.collect::<Vec<_>>().join(" "));
        }
    }
    assert!(found.remove("skiff-guest: a warning"), "the log was read: {console}");
    found
}

fn qemu(machine: &str) -> BTreeSet<String> {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-M", machine, "-accel", "kvm", "-cpu", "host", "-smp", "2", "-m", "512"]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"]);
    command.args(["-device", "virtio-rng-pci,disable-legacy=on"]);
    command.arg("-append").arg(format!("console=ttyS0 quiet panic=-1 {LOG}"));
    command.arg("-kernel").arg(assets::guest("vmlinuz")).arg("-initrd").arg(assets::guest("initrd.img"));
    let ended = Machine::start(command).wait();
    assert_eq!(ended.code, Some(0), "qemu -M {machine}: {}", ended.messages);
    complaints(&ended.console)
}

#[test]
fn the_kernel_complains_of_nothing_that_qemu_does_not_have() {
    let ended = Skiff::linux().cpus(2).cmdline(LOG).run();
    assert_eq!(ended.code, Some(0), "{}", ended.messages);
    let ours = complaints(&ended.console);
    let theirs: BTreeSet<_> = qemu("q35").union(&qemu("microvm,rtc=on,pcie=on,acpi=on")).cloned().collect();
    let more: Vec<_> = ours.difference(&theirs).collect();
    assert!(more.is_empty(), "only under skiff: {more:#?}\nunder QEMU too: {theirs:#?}");
    let acpi: Vec<_> = ended.console.lines().filter(|line| line.contains("ACPI Error")).collect();
    assert!(acpi.is_empty(), "{acpi:?}");
}

#[test]
fn reads_the_kernels_log() {
    let log = "before\nskiff-guest: run\n<6>[    0.0] info\n<4>[    0.1] APIC 12 at 0xfee00000: odd\n\
               <3>[ 1.0] bad\n<12>[ 2] init: said\n<12>[ 3.0] skiff-guest: a warning\n";
    let expected = ["APIC N at N odd", "bad", "init: said"].map(String::from);
    assert_eq!(complaints(log), BTreeSet::from(expected));
}
