//! What moving frames costs a machine: CPU time of all its threads but the vCPUs', of vhost's for it in the kernel, and
//! KVM's counters.

use std::fs;
use std::path::Path;

use anyhow::Context;

/// Counters of a machine, or their difference, for each of something.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cost {
    /// Microseconds of CPU time outside of the vCPUs.
    pub(crate) cpu: f64,
    /// Exits of all vCPUs, of all kinds.
    pub(crate) exits: f64,
    /// Interrupts injected.
    pub(crate) interrupts: f64,
}

impl Cost {
    /// All so far of the machine that is process `pid`.
    pub(crate) fn of(pid: u32) -> anyhow::Result<Self> {
        let mut cpu = 0.0;
        for task in fs::read_dir(format!("/proc/{pid}/task")).context("the machine is gone")?.flatten() {
            let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            // skiff's name, and QEMU's with debug-threads=on.
            if !name.starts_with("vcpu") && !name.starts_with("CPU ") {
                cpu += run_time(&task.path());
            }
        }
        for process in fs::read_dir("/proc").context("/proc")?.flatten() {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            if name.trim_end() == format!("vhost-{pid}") {
                cpu += run_time(&process.path());
            }
        }
        Ok(Self { cpu, exits: counter(pid, "exits"), interrupts: counter(pid, "irq_injections") })
    }

    pub(crate) fn since(&self, before: &Self) -> Self {
        Self {
            cpu: self.cpu - before.cpu,
            exits: self.exits - before.exits,
            interrupts: self.interrupts - before.interrupts,
        }
    }

    pub(crate) fn per(&self, count: f64) -> Self {
        Self { cpu: self.cpu / count, exits: self.exits / count, interrupts: self.interrupts / count }
    }
}

/// Microseconds a task ran (Documentation/scheduler/sched-stats.rst, "/proc/<pid>/schedstat").
fn run_time(task: &Path) -> f64 {
    let text = fs::read_to_string(task.join("schedstat")).unwrap_or_default();
    text.split(' ').next().and_then(|number| number.parse::<f64>().ok()).unwrap_or(0.0) / 1000.0
}

/// A counter of the virtual machine of process `pid` (/sys/kernel/debug/kvm/PID-FD/NAME, the sum of all vCPUs); not a
/// number where debugfs is not readable.
fn counter(pid: u32, name: &str) -> f64 {
    let prefix = format!("{pid}-");
    let folders = fs::read_dir("/sys/kernel/debug/kvm").into_iter().flatten().flatten();
    let folder = folders
        .map(|entry| entry.path())
        .find(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(&prefix)));
    let text = folder.and_then(|folder| fs::read_to_string(folder.join(name)).ok());
    text.and_then(|text| text.trim().parse().ok()).unwrap_or(f64::NAN)
}
