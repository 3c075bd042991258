//! Hardware or software KVM: told by running a few instructions in a tiny guest. Runs on the calling thread.
//!
//! Every KVM runs guest code at some privilege by itself, but a KVM without VT-x or SVM interprets what a kernel does, and
//! its interpreter knows only part of the instruction set. So the guest executes, in 64-bit mode at privilege level 0,
//! one instruction that any processor with VT-x or SVM runs natively, then writes to a port. On hardware the write
//! arrives; an interpreter that does not know the instruction gives KVM_EXIT_INTERNAL_ERROR instead.
#![expect(unsafe_code, reason = "KVM is given the memory of the tiny guest")]

use anyhow::{Context, bail, ensure};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use serde::{Serialize, Serializer};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// How this host's KVM runs the code of a guest kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvmKind {
    /// On the processor, by VT-x or SVM.
    Hardware,
    /// In an interpreter.
    Software {
        /// The instructions that it refused.
        refused: Vec<&'static str>,
    },
}

impl Serialize for KvmKind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(match self {
            Self::Hardware => "hardware",
            Self::Software { .. } => "software",
        })
    }
}

/// What a software KVM means for its user, and what to do; a sentence without a full stop.
pub const SOFTWARE_KVM: &str = "this KVM interprets kernel code and cannot run stock kernels; run them on a machine with \
                                VT-x or SVM, or nested under QEMU";

/// Finds out how this host's KVM runs guest kernels, by running a few instructions. Takes some milliseconds.
///
/// # Errors
/// When there is no usable KVM, or it does not run even the simplest guest.
pub fn kvm_kind() -> anyhow::Result<KvmKind> {
    kind_of(&crate::kvm::open()?)
}

/// Like [`kvm_kind`], with an open KVM.
pub(super) fn kind_of(kvm: &Kvm) -> anyhow::Result<KvmKind> {
    let plain = run(kvm, &[0x90]).context("a guest of one instruction")?;
    ensure!(plain == Outcome::Ran, "KVM does not run even a guest of one instruction");
    let mut refused = Vec::new();
    for instruction in INSTRUCTIONS.iter().filter(|instruction| (instruction.present)()) {
        if run(kvm, instruction.code).with_context(|| format!("a guest with {}", instruction.name))? == Outcome::Refused
        {
            refused.push(instruction.name);
        }
    }
    Ok(if refused.is_empty() { KvmKind::Hardware } else { KvmKind::Software { refused } })
}

/// An instruction that stock kernels use and interpreters tend to lack.
struct Instruction {
    name: &'static str,
    /// RBX points to 16 aligned bytes.
    code: &'static [u8],
    /// Whether the processor has it, so that its absence is not taken for an interpreter's.
    present: fn() -> bool,
}

const INSTRUCTIONS: [Instruction; 5] = [
    Instruction {
        name: "popcnt",
        code: &[0xf3, 0x48, 0x0f, 0xb8, 0xc0], // popcnt rax, rax
        present: || is_x86_feature_detected!("popcnt"),
    },
    Instruction {
        name: "crc32",
        code: &[0xf2, 0x48, 0x0f, 0x38, 0xf1, 0xc0], // crc32 rax, rax
        present: || is_x86_feature_detected!("sse4.2"),
    },
    Instruction {
        name: "cmpxchg16b",
        code: &[0x48, 0x0f, 0xc7, 0x0b], // cmpxchg16b [rbx]
        present: || is_x86_feature_detected!("cmpxchg16b"),
    },
    Instruction {
        name: "addps",
        code: &[0x0f, 0x58, 0xc0], // addps xmm0, xmm0
        present: || true,
    },
    Instruction { name: "fwait", code: &[0x9b], present: || true },
];

#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// The guest went past the instruction.
    Ran,
    /// KVM gave up on it.
    Refused,
}

/// The guest's memory: page tables, code and data in the first 64 KiB.
const MEMORY_SIZE: usize = 0x1_0000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const CODE: u64 = 0x4000;
const DATA: u64 = 0x5000;

/// Any port that KVM does not serve itself.
const PORT: u8 = 0xf4;

/// Runs `instruction` in a guest of its own.
fn run(kvm: &Kvm, instruction: &[u8]) -> anyhow::Result<Outcome> {
    let memory = memory(instruction)?;
    let vm = crate::kvm::create_vm(kvm).context("KVM_CREATE_VM")?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY_SIZE as u64,
        userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
    };
    // SAFETY: the region is the whole mapping of `memory`, which is dropped after the VM and its vCPU: they are declared
    // later.
    unsafe { vm.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")?;
    let mut vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?).context("KVM_SET_CPUID2")?;
    enter_64_bit_mode(&vcpu)?;
    match vcpu.run().context("KVM_RUN")? {
        VcpuExit::IoOut(port, _) if port == u16::from(PORT) => Ok(Outcome::Ran),
        VcpuExit::InternalError => Ok(Outcome::Refused),
        other => bail!("the guest ended with {other:?}"),
    }
}

/// Identity page tables for 2 MiB (Intel SDM volume 3, 4.5) and the code: the instruction, an OUT and a HLT.
fn memory(instruction: &[u8]) -> anyhow::Result<GuestMemoryMmap> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_SIZE)])?;
    memory.write_obj(PDPT | PRESENT_WRITABLE, GuestAddress(PML4))?;
    memory.write_obj(PD | PRESENT_WRITABLE, GuestAddress(PDPT))?;
    memory.write_obj(PRESENT_WRITABLE | LARGE, GuestAddress(PD))?;
    let code = [instruction, &[0xe6, PORT, 0xf4]].concat();
    memory.write_slice(&code, GuestAddress(CODE))?;
    Ok(memory)
}

fn enter_64_bit_mode(vcpu: &VcpuFd) -> anyhow::Result<()> {
    // Intel SDM volume 3: 2.5 for CR0 and CR4, 2.2.1 for EFER, 3.4.5 for the segments.
    const CR0_PE_MP_ET_NE_WP_PG: u64 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
    const CR4_PAE_OSFXSR_OSXMMEXCPT: u64 = 1 << 5 | 1 << 9 | 1 << 10;
    const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
    let data =
        kvm_segment { limit: u32::MAX, selector: 0x10, type_: 3, present: 1, db: 1, s: 1, g: 1, ..Default::default() };
    let code = kvm_segment { selector: 0x08, type_: 11, db: 0, l: 1, ..data };
    let mut special = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    (special.cs, special.ds, special.es, special.ss) = (code, data, data, data);
    special.cr0 = CR0_PE_MP_ET_NE_WP_PG;
    special.cr3 = PML4;
    special.cr4 = CR4_PAE_OSFXSR_OSXMMEXCPT;
    special.efer = EFER_LME_LMA;
    vcpu.set_sregs(&special).context("KVM_SET_SREGS")?;
    let mut general = vcpu.get_regs().context("KVM_GET_REGS")?;
    general.rip = CODE;
    general.rbx = DATA;
    general.rflags = 2;
    vcpu.set_regs(&general).context("KVM_SET_REGS")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_and_the_probe_agree() {
        let Ok(kvm) = crate::kvm::open() else {
            skip::because("no KVM on this host");
            return;
        };
        // Modules named so exist only where the processor virtualises; a software KVM has neither.
        let hardware =
            ["kvm_intel", "kvm_amd"].iter().any(|name| std::path::Path::new("/sys/module").join(name).exists());
        match kind_of(&kvm).unwrap() {
            KvmKind::Hardware => assert!(hardware),
            KvmKind::Software { refused } => assert!(!hardware && !refused.is_empty()),
        }
    }

    #[test]
    fn an_instruction_that_does_not_exist_is_not_taken_for_run() {
        let Ok(kvm) = crate::kvm::open() else {
            skip::because("no KVM on this host");
            return;
        };
        // UD2, without an interrupt table to handle the fault: a triple fault, or an interpreter that gives up.
        assert!(!matches!(run(&kvm, &[0x0f, 0x0b]), Ok(Outcome::Ran)));
    }
}
