//! Whether the guest is told that its time stamp counters are invariant (one rate, never stopping). Linux keeps its time by
//! such counters and does not watch them twice a second. Main thread, but for the answer to a read, which is a vCPU's.
//!
//! Specification: AMD APM volume 3, leaf 8000_0007h; Linux, Documentation/virt/kvm/api.rst.

use std::fs;

use kvm_bindings::{CpuId, KVM_CLOCK_TSC_STABLE, kvm_clock_data, kvm_enable_cap};
use kvm_ioctls::{Cap, MsrExitReason, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};

use crate::cpuid;

/// AMD's hardware configuration register. That the counter runs at the rate of P-state 0 is its bit 24 (TscFreqSel, in the
/// processor programming references); a guest that finds an invariant counter without it takes that for a bug in the
/// firmware, and KVM before Linux 6.7 keeps it clear.
const HWCR: u32 = 0xc001_0015;
const HWCR_TSC_FREQ_SEL: u64 = 1 << 24;

/// Whether the counters of `vm`, all of whose vCPUs are there, are invariant and the guest may know: KVM reads its own clock from
/// them, and they are promised by the processor or the host's clock too. There is no migration that could end it.
pub(crate) fn is_invariant(vm: &VmFd, supported: &CpuId) -> bool {
    let invariant = keeps_time_by_tsc(vm) && (cpuid::has_invariant_tsc(supported) || is_hosts_clock());
    let known =
        |error: &_| tracing::info!("KVM does not filter HWCR ({error}); the guest will watch its time stamp counter");
    invariant && (!cpuid::is_amd(supported) || filter_hwcr(vm).inspect_err(known).is_ok())
}

/// KVM reads its clock from the counters only when the host's kernel keeps its time by the processor's, which it watches and may
/// have found wanting whatever CPUID says, and those of all vCPUs agree.
fn keeps_time_by_tsc(vm: &VmFd) -> bool {
    // Setting the clock makes KVM look at the counters now, and not when a vCPU first runs.
    let clock = vm.set_clock(&kvm_clock_data::default()).and_then(|()| vm.get_clock());
    clock.is_ok_and(|clock| clock.flags & KVM_CLOCK_TSC_STABLE != 0)
}

/// Whether the host's kernel keeps its time by the counter as it is, and not scaled by a hypervisor that may change the scale.
/// A processor that is itself emulated may run such a one without a word in CPUID.
fn is_hosts_clock() -> bool {
    let clock = fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    clock.is_ok_and(|name| name.trim() == "tsc")
}

/// Has the guest's reads of HWCR come to [`read_filtered`].
fn filter_hwcr(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    let mut exits = kvm_enable_cap { cap: Cap::X86UserSpaceMsr as u32, ..Default::default() };
    exits.args[0] = u64::from(MsrExitReason::Filter.bits());
    vm.enable_cap(&exits)?;
    let hwcr = MsrFilterRange { flags: MsrFilterRangeFlags::READ, base: HWCR, msr_count: 1, bitmap: &[0] };
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[hwcr])
}

/// What a read of `msr` that the filter kept from KVM gives; nothing if it is none of ours. KVM knows nothing else of HWCR but
/// a bit that lets a guest forge machine checks.
pub(crate) fn read_filtered(msr: u32) -> Option<u64> {
    (msr == HWCR).then_some(HWCR_TSC_FREQ_SEL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_but_hwcr_is_answered() {
        // The processor programming references' name and place: MSRC001_0015, bit 24.
        assert_eq!(read_filtered(0xc001_0015), Some(0x100_0000));
        assert_eq!(read_filtered(0xc001_0016), None);
    }
}
