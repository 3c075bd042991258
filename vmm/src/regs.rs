//! The registers of the first vCPU, from the boot crate's plain data into KVM's structures. Main thread.

use boot::{InitialState, Segment, Table};
use kvm_bindings::{Msrs, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::{Error, VcpuFd};

/// IA32_MTRR_DEF_TYPE: MTRRs on, and all memory write-back. Firmware's duty; without it Linux turns PAT off.
const MTRR_DEF_TYPE: kvm_msr_entry = kvm_msr_entry { index: 0x2ff, reserved: 0, data: 1 << 11 | 6 };

/// Makes `state` the state in which the vCPU executes its first instruction.
///
/// # Errors
/// If KVM refuses the registers.
pub(crate) fn set(vcpu: &VcpuFd, state: &InitialState) -> Result<(), Error> {
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs, sregs.ds, sregs.es) = (segment(&state.cs), segment(&state.ds), segment(&state.es));
    (sregs.fs, sregs.gs, sregs.ss) = (segment(&state.fs), segment(&state.gs), segment(&state.ss));
    (sregs.tr, sregs.ldt) = (segment(&state.tr), segment(&state.ldt));
    (sregs.gdt, sregs.idt) = (table(state.gdt), table(state.idt));
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (state.cr0, state.cr3, state.cr4, state.efer);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: state.rip,
        rsp: state.rsp,
        rsi: state.rsi,
        rbx: state.rbx,
        rflags: state.rflags,
        ..Default::default()
    })
}

/// Sets what every vCPU, not just the first, finds in its model-specific registers.
///
/// # Errors
/// If KVM refuses the call; an MSR that it does not know is left out with a log line, for the guest runs without.
pub(crate) fn set_msrs(vcpu: &VcpuFd) -> Result<(), Error> {
    let msrs = Msrs::from_entries(&[MTRR_DEF_TYPE]).expect("one entry is below every limit");
    if vcpu.set_msrs(&msrs)? != 1 {
        tracing::info!("this KVM has no IA32_MTRR_DEF_TYPE; the guest will see no MTRRs");
    }
    Ok(())
}

fn segment(segment: &Segment) -> kvm_segment {
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: segment.type_,
        present: segment.present.into(),
        dpl: segment.dpl,
        db: segment.db.into(),
        s: segment.s.into(),
        l: segment.l.into(),
        g: segment.g.into(),
        unusable: segment.unusable.into(),
        ..Default::default()
    }
}

fn table(table: Table) -> kvm_dtable {
    kvm_dtable { base: table.base, limit: table.limit, ..Default::default() }
}
