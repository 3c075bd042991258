//! What KVM tells about a machine: its counters in debugfs.

use std::collections::BTreeMap;
use std::fs;

/// True where the processor has neither VT-x nor SVM, so that whatever /dev/kvm there is works without them.
pub(crate) fn is_software() -> bool {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    !flags.split_ascii_whitespace().any(|flag| matches!(flag, "vmx" | "svm"))
}

/// The counters of the virtual machine of process `pid` that are not zero (/sys/kernel/debug/kvm/PID-FD/*, the sums of
/// all vCPUs) and that count; none where debugfs is not readable or this KVM has none.
pub(crate) fn statistics(pid: u32) -> BTreeMap<String, u64> {
    let prefix = format!("{pid}-");
    let folders = fs::read_dir("/sys/kernel/debug/kvm").into_iter().flatten().flatten();
    let folder = folders
        .map(|entry| entry.path())
        .find(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(&prefix)));
    let files = folder.and_then(|folder| fs::read_dir(folder).ok()).into_iter().flatten().flatten();
    files
        .filter_map(|file| {
            let value = fs::read_to_string(file.path()).ok()?.trim().parse().ok()?;
            Some((file.file_name().into_string().ok()?, value))
        })
        .filter(|(name, value): &(String, u64)| *value > 0 && !name.ends_with("_ns"))
        .collect()
}
