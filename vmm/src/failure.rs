//! What to tell the user when KVM cannot run a vCPU any further: which one, where, on which instruction, and whether
//! the reason is that this KVM is a software one. Runs on the vCPU's thread, after its last exit.
#![expect(unsafe_code, reason = "KVM's run area is a C union")]

use std::fmt::Write;

use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::doctor::{self, KvmKind, SOFTWARE_KVM};

/// The ways KVM gives up.
#[derive(Debug)]
pub(crate) enum Failure {
    /// KVM_EXIT_INTERNAL_ERROR; its details are in the run area.
    Internal,
    /// KVM_EXIT_FAIL_ENTRY: the processor refused the guest's state.
    Entry {
        /// The hardware's reason: a VM-instruction error or an SVM exit code.
        reason: u64,
        /// The host CPU it happened on.
        cpu: u32,
    },
    /// An exit that this machine does not cause.
    Exit(String),
    /// KVM_RUN itself failed.
    Run(kvm_ioctls::Error),
}

/// KVM_INTERNAL_ERROR_* of the KVM API (section 5, KVM_EXIT_INTERNAL_ERROR).
fn suberror_name(suberror: u32) -> &'static str {
    match suberror {
        1 => "an instruction it cannot emulate",
        2 => "simultaneous exceptions",
        3 => "an exception while delivering an event",
        4 => "an unexpected exit reason",
        _ => "an error it does not explain",
    }
}

/// One message, several lines at most, for a vCPU that cannot go on.
pub(crate) fn describe(fd: &mut VcpuFd, id: u32, memory: &GuestMemoryMmap, failure: &Failure) -> String {
    let mut text = format!("vCPU {id}: KVM stopped on ");
    let mut instruction = Vec::new();
    // Writing into a String cannot fail.
    let _ = match failure {
        Failure::Internal => {
            let run = fd.get_kvm_run();
            // SAFETY: for KVM_EXIT_INTERNAL_ERROR both members are valid views: plain integers, filled in or zero.
            let (internal, emulation) =
                unsafe { (run.__bindgen_anon_1.internal, run.__bindgen_anon_1.emulation_failure) };
            let with_bytes = internal.suberror == 1 && internal.ndata >= 3 && emulation.flags & 1 != 0;
            if with_bytes {
                // SAFETY: the flag says that KVM filled in the instruction bytes.
                let code = unsafe { emulation.__bindgen_anon_1.__bindgen_anon_1 };
                instruction = code.insn_bytes.iter().take(usize::from(code.insn_size)).copied().collect();
            }
            write!(
                text,
                "{} (KVM_EXIT_INTERNAL_ERROR, suberror {})",
                suberror_name(internal.suberror),
                internal.suberror
            )
        }
        Failure::Entry { reason, cpu } => {
            write!(
                text,
                "a guest state the processor refuses (KVM_EXIT_FAIL_ENTRY, reason {reason:#x}, host CPU {cpu})"
            )
        }
        Failure::Exit(exit) => write!(text, "an exit this machine does not know ({exit})"),
        Failure::Run(error) => write!(text, "KVM_RUN: {error}"),
    };
    match fd.get_regs() {
        Ok(regs) => {
            if instruction.is_empty() {
                instruction = code_at(fd, memory, regs.rip);
            }
            let bytes: Vec<_> = instruction.iter().map(|byte| format!("{byte:02x}")).collect();
            let bytes = if bytes.is_empty() { "not readable".into() } else { bytes.join(" ") };
            let _ = write!(text, " at RIP {:#x}, instruction bytes: {bytes}", regs.rip);
        }
        Err(error) => {
            let _ = write!(text, "; its registers cannot be read ({error})");
        }
    }
    if matches!(doctor::kvm_kind(), Ok(KvmKind::Software { .. })) {
        let _ = write!(text, "; {SOFTWARE_KVM}");
    }
    text
}

/// Up to 15 bytes of guest code at a linear address, across a page boundary if both pages are mapped.
fn code_at(fd: &VcpuFd, memory: &GuestMemoryMmap, rip: u64) -> Vec<u8> {
    let base = fd.get_sregs().map_or(0, |sregs| if sregs.efer & 0x400 == 0 { sregs.cs.base } else { 0 });
    let mut code = Vec::new();
    for at in 0..15 {
        let address = base.wrapping_add(rip).wrapping_add(at);
        let Ok(page) = fd.translate_gva(address) else { break };
        if page.valid == 0 {
            break;
        }
        let Ok(byte) = memory.read_obj::<u8>(GuestAddress(page.physical_address)) else { break };
        code.push(byte);
    }
    code
}
