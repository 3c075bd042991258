//! The CPUs of a machine, and their clock, as a kernel sees them. Kernels, boot protocols and sizes of memory are scenarios: tests/scenarios.

use tests::Skiff;

/// The sockets, cores and threads that the guest sees, the way they are idle, and no complaint about them.
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
    let states = guest.ask("cat /sys/devices/system/cpu/cpu*/cpuidle/state1/desc");
    assert_eq!(states.lines().collect::<Vec<_>>(), vec!["ACPI HLT"; cpus as usize], "C1 of every CPU");
    let complaints = guest.run("dmesg | grep -iE 'topology|sibling|apic.*(mismatch|bug)|cpuidle.*fail|processor.*(invalid|duplicate)|\\[Firmware Bug\\]'");
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

/// Where the host's kernel keeps its time by the processor's time stamp counter, so does the guest's, which is told that
/// it need not watch it; and it finds those of its CPUs in step.
#[test]
fn the_counter_that_the_host_trusts() {
    const CLOCK: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    let host = std::fs::read_to_string(CLOCK).expect("the host's clock");
    if host.trim() != "tsc" {
        skip::because(format_args!("the host keeps its time by {}", host.trim()));
        return;
    }
    let mut guest = Skiff::linux().cpus(2).boot();
    assert_eq!(guest.ask(&format!("cat {CLOCK}")), "tsc");
    assert_eq!(guest.ask("grep -cw nonstop_tsc /proc/cpuinfo"), "2");
    let doubts = guest.run("dmesg | grep -iE 'tsc.*(unstable|warp|unsync)'");
    assert_eq!((doubts.text.as_str(), doubts.code), ("", 1));
    assert_eq!(guest.power_off().code, Some(0));
}
