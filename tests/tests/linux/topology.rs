//! The CPUs of a machine as a kernel sees them. Kernels, boot protocols and sizes of memory are scenarios: tests/scenarios.

use tests::Skiff;

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
