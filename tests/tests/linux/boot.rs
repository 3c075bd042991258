//! Every way into the kernel, every shape of machine.

use tests::{Machine, Skiff};

/// The guest's view of its memory in MiB, as the kernel counts it: without what it reserved for itself.
fn memory_mib(guest: &mut Machine) -> u64 {
    let line = guest.ask("grep MemTotal /proc/meminfo");
    let kib: u64 = line.split_whitespace().nth(1).expect("MemTotal: N kB").parse().expect("a number");
    kib / 1024
}

/// Boots, asks for the name of the kernel's release and the command line, powers off.
fn boots(kernel: &str, protocol: &str) {
    let mut guest = Skiff::kernel(kernel).option("--boot-protocol", protocol).cmdline("skiff.word=here").boot();
    assert!(guest.ask("cat /proc/cmdline").contains("skiff.word=here"));
    assert_eq!(guest.ask("cat /proc/version").split(' ').next(), Some("Linux"));
    assert_eq!(guest.power_off().code, Some(0));
}

#[test]
fn bzimage_by_the_linux_protocol() {
    boots("vmlinuz", "linux");
}

#[test]
fn elf_by_the_linux_protocol() {
    boots("vmlinux", "linux");
}

#[test]
fn elf_by_pvh() {
    let mut guest = Skiff::kernel("vmlinux").option("--boot-protocol", "pvh").boot();
    // The kernel says so itself: the PVH entry sets this type of loader (arch/x86/platform/pvh/enlighten.c).
    assert_eq!(guest.ask("cat /proc/sys/kernel/bootloader_type"), "176");
    assert_eq!(guest.power_off().code, Some(0));
}

/// The sockets, cores and threads that the guest sees, and no complaint about them.
fn topology(cpus: u32) {
    let mut guest = Skiff::linux().cpus(cpus).boot();
    assert_eq!(guest.ask("nproc"), cpus.to_string());
    assert_eq!(guest.ask("cat /sys/devices/system/cpu/online"), ["", "0", "0-1", "0-2", "0-3"][cpus as usize]);
    let siblings = guest.ask("cat /sys/devices/system/cpu/cpu0/topology/core_siblings_list");
    assert_eq!(siblings, guest.ask("cat /sys/devices/system/cpu/online"), "one socket");
    let ids = guest.ask("cat /sys/devices/system/cpu/cpu*/topology/core_id");
    let threads = guest.ask("cat /sys/devices/system/cpu/cpu*/topology/thread_siblings_list");
    let pairs: std::collections::BTreeSet<_> = ids.lines().zip(threads.lines()).collect();
    assert_eq!(pairs.len(), cpus as usize, "every CPU is a core of its own: {ids} {threads}");
    let complaints = guest.run("dmesg | grep -iE 'topology|sibling|apic.*(mismatch|bug)|\\[Firmware Bug\\]'");
    assert_eq!((complaints.text.as_str(), complaints.code), ("", 1), "the kernel does not like the topology");
    assert_eq!(guest.power_off().code, Some(0));
}

#[test]
fn one_cpu() {
    topology(1);
}

#[test]
fn two_cpus() {
    topology(2);
}

#[test]
fn four_cpus() {
    topology(4);
}

/// A stock kernel takes 45 MiB for itself. What remains of 64 is too little for the files of its tracing, which nobody
/// looks at here; without them it boots.
#[test]
fn memory_of_64_mib() {
    let mut guest = Skiff::kernel("vmlinux").memory("64M").cmdline("initcall_blacklist=tracer_init_tracefs").boot();
    let seen = memory_mib(&mut guest);
    assert!((16..64).contains(&seen), "{seen} MiB");
    assert_eq!(guest.power_off().code, Some(0));
}

#[test]
fn memory_of_1_gib() {
    let mut guest = Skiff::linux().memory("1G").boot();
    let seen = memory_mib(&mut guest);
    assert!((920..1024).contains(&seen), "{seen} MiB");
    assert_eq!(guest.power_off().code, Some(0));
}

#[test]
fn memory_past_the_hole() {
    let mut guest = Skiff::linux().memory("4608M").boot();
    let seen = memory_mib(&mut guest);
    assert!((4300..4608).contains(&seen), "{seen} MiB");
    let above = guest.ask("dmesg | grep 'BIOS-e820' | grep 'mem 0x0000000100000000-.*usable'");
    assert_eq!(above.lines().count(), 1, "RAM begins again at 4 GiB");
    assert_eq!(guest.power_off().code, Some(0));
}
