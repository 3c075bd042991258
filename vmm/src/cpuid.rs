//! What CPUID tells the guest: what KVM supports, with the topology of our machine (one socket, one core a vCPU, one
//! thread a core, APIC id = vCPU number) written into every leaf that speaks of it. Pure; used while the machine is built.
//!
//! Leaf numbers and fields: Intel SDM volume 2A (CPUID) and AMD APM volume 3, appendix E.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const LEAF_1_ECX_X2APIC: u32 = 1 << 21;
const LEAF_1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF_1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF_1_EDX_HTT: u32 = 1 << 28;
const AMD_ECX_CMP_LEGACY: u32 = 1 << 1;
const LEAF_8000_0007_EDX_INVARIANT_TSC: u32 = 1 << 8;
const KVM_FEATURES: u32 = 0x4000_0001;
const KVM_FEATURE_MSI_EXT_DEST_ID: u32 = 1 << 15;
/// Level types of leaves 0xb and 0x1f, in ECX[15:8].
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// What the leaves depend on besides the host.
#[derive(Clone, Copy, Debug)]
pub struct Topology {
    /// Number of vCPUs, at least 1.
    pub cpus: u32,
    /// KVM has the TSC deadline timer in its local APIC.
    pub tsc_deadline: bool,
    /// MSI destinations of more than 8 bits are folded into the message address.
    pub extended_destination: bool,
    /// The vCPUs' time stamp counters keep one rate and never stop, whatever the host's CPUID says.
    pub invariant_tsc: bool,
}

impl Topology {
    /// Bits of an APIC id that number the cores of the package.
    fn core_bits(self) -> u32 {
        self.cpus.next_power_of_two().trailing_zeros()
    }

    /// The leaves for the vCPU with APIC id `id`, from the ones KVM supports.
    ///
    /// # Panics
    /// Never: `supported` came from KVM, and at most a handful of entries are added to it.
    pub fn leaves(self, supported: &CpuId, id: u32) -> CpuId {
        let mut leaves = supported.as_slice().to_vec();
        let amd = is_amd(supported);
        self.extended_topology(&mut leaves, id);
        for leaf in &mut leaves {
            self.patch(leaf, id, amd);
        }
        CpuId::from_entries(&leaves).expect("KVM's own leaves and a few more fit the limit of 256 entries")
    }

    fn patch(self, leaf: &mut kvm_cpuid_entry2, id: u32, amd: bool) {
        let last_core = self.cpus - 1;
        let (ids, many) = (1 << self.core_bits(), self.cpus > 1);
        match leaf.function {
            0x1 => {
                // Initial APIC id, and how many ids the package can have.
                leaf.ebx = (leaf.ebx & 0xffff) | (id & 0xff) << 24 | ids.min(0xff) << 16;
                leaf.ecx |= LEAF_1_ECX_HYPERVISOR | LEAF_1_ECX_X2APIC;
                set(&mut leaf.ecx, LEAF_1_ECX_TSC_DEADLINE, self.tsc_deadline);
                set(&mut leaf.edx, LEAF_1_EDX_HTT, many);
            }
            // Intel: caches. EAX[4:0] is zero behind the last one. The third level is shared by the package.
            0x4 if leaf.eax & 0x1f != 0 => {
                let sharing = if leaf.eax >> 5 & 7 >= 3 { ids - 1 } else { 0 };
                leaf.eax = (leaf.eax & 0x3fff) | sharing.min(0xfff) << 14 | (ids - 1).min(0x3f) << 26;
            }
            0x8000_0001 if amd => set(&mut leaf.ecx, AMD_ECX_CMP_LEGACY, many),
            0x8000_0007 => set(&mut leaf.edx, LEAF_8000_0007_EDX_INVARIANT_TSC, self.invariant_tsc),
            // Threads in the package, and the bits of their numbers.
            0x8000_0008 if amd => {
                leaf.ecx = (leaf.ecx & !0xf0ff) | last_core.min(0xff) | self.core_bits() << 12;
            }
            // Caches, as leaf 4.
            0x8000_001d if amd && leaf.eax & 0x1f != 0 => {
                let sharing = if leaf.eax >> 5 & 7 >= 3 { ids - 1 } else { 0 };
                leaf.eax = (leaf.eax & 0x3fff) | sharing.min(0xfff) << 14;
            }
            // APIC id; core number and threads a core; node number and nodes a package.
            0x8000_001e if amd => (leaf.eax, leaf.ebx, leaf.ecx) = (id, id & 0xff, 0),
            KVM_FEATURES => set(&mut leaf.eax, KVM_FEATURE_MSI_EXT_DEST_ID, self.extended_destination),
            _ => {}
        }
    }

    /// Replaces the x2APIC topology leaves: a thread level of one, a core level of all.
    fn extended_topology(self, leaves: &mut Vec<kvm_cpuid_entry2>, id: u32) {
        let last_leaf = leaves.iter().find(|leaf| leaf.function == 0).map_or(0, |leaf| leaf.eax);
        let had: Vec<u32> = [0xb, 0x1f]
            .into_iter()
            .filter(|function| *function <= last_leaf && leaves.iter().any(|leaf| leaf.function == *function))
            .collect();
        leaves.retain(|leaf| !matches!(leaf.function, 0xb | 0x1f));
        for function in had {
            let level = |index, eax, ebx, kind: u32| kvm_cpuid_entry2 {
                function,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax,
                ebx,
                ecx: kind | index,
                edx: id,
                ..Default::default()
            };
            leaves.push(level(0, 0, 1, LEVEL_THREAD));
            leaves.push(level(1, self.core_bits(), self.cpus, LEVEL_CORE));
            leaves.push(level(2, 0, 0, 0));
        }
    }
}

/// The vendor string of leaf 0 starts with "Auth" (AMD) or "Hygo" (Hygon, the same leaves).
pub fn is_amd(supported: &CpuId) -> bool {
    let vendor = supported.as_slice().iter().find(|leaf| leaf.function == 0).map_or(0, |leaf| leaf.ebx);
    [*b"Auth", *b"Hygo"].contains(&vendor.to_le_bytes())
}

fn set(register: &mut u32, bits: u32, on: bool) {
    if on { *register |= bits } else { *register &= !bits }
}

/// Whether the host's processor promises a time stamp counter of one rate that never stops.
pub fn has_invariant_tsc(supported: &CpuId) -> bool {
    let leaf = supported.as_slice().iter().find(|leaf| leaf.function == 0x8000_0007);
    leaf.is_some_and(|leaf| leaf.edx & LEAF_8000_0007_EDX_INVARIANT_TSC != 0)
}

/// Width of guest physical addresses in bits (leaf 0x80000008); 36 where the CPU does not say.
pub fn address_bits(supported: &CpuId) -> u32 {
    let leaf = supported.as_slice().iter().find(|leaf| leaf.function == 0x8000_0008);
    leaf.map_or(36, |leaf| leaf.eax & 0xff)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn find(leaves: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let found = leaves.as_slice().iter().find(|leaf| leaf.function == function && leaf.index == index);
        *found.unwrap()
    }

    fn supported() -> CpuId {
        CpuId::from_entries(&[
            leaf(0, 0, [0x1f, u32::from_le_bytes(*b"Auth"), 0, 0]),
            leaf(1, 0, [0, 0x0700_0800, 1, 0x1780_0000]),
            leaf(4, 0, [0xffff_c121, 0, 0, 0]),
            leaf(4, 3, [0xffff_c163, 0, 0, 0]),
            leaf(4, 4, [0, 0, 0, 0]),
            leaf(0xb, 0, [1, 2, 0x100, 9]),
            leaf(0x1f, 0, [1, 2, 0x100, 9]),
            leaf(0x8000_0001, 0, [0, 0, 1 << 22, 0]),
            leaf(0x8000_0007, 0, [0; 4]),
            leaf(0x8000_0008, 0, [48, 0x1000, 0xf0ff, 0]),
            leaf(0x8000_001d, 3, [0x0fff_c163, 0, 0, 0]),
            leaf(0x8000_001e, 0, [7, 0x0107, 0x0303, 0]),
        ])
        .unwrap()
    }

    fn leaves(cpus: u32, id: u32) -> CpuId {
        Topology { cpus, tsc_deadline: true, extended_destination: false, invariant_tsc: false }
            .leaves(&supported(), id)
    }

    #[test]
    fn one_cpu_is_one_core() {
        let leaves = leaves(1, 0);
        let one = find(&leaves, 1, 0);
        assert_eq!(one.ebx, 0x0001_0800);
        assert_eq!(one.edx & LEAF_1_EDX_HTT, 0);
        assert_eq!(find(&leaves, 4, 3).eax, 0x163);
        assert_eq!(find(&leaves, 0xb, 1).eax, 0);
        assert_eq!(find(&leaves, 0xb, 1).ebx, 1);
    }

    #[test]
    fn the_apic_id_is_the_same_in_every_leaf() {
        let leaves = leaves(4, 3);
        assert_eq!(find(&leaves, 1, 0).ebx >> 24, 3);
        for (function, index) in [(0xb, 0), (0xb, 1), (0xb, 2), (0x1f, 0), (0x1f, 1)] {
            assert_eq!(find(&leaves, function, index).edx, 3);
        }
        assert_eq!(find(&leaves, 0x8000_001e, 0).eax, 3);
    }

    #[test]
    fn the_number_of_cores_is_the_same_in_every_leaf() {
        // Three cores take two bits of an APIC id, hence four ids (SDM 2A, leaf 1 EBX[23:16] and leaf 4 EAX[31:26]).
        let leaves = leaves(3, 2);
        assert_eq!(find(&leaves, 1, 0).ebx >> 16 & 0xff, 4);
        assert_ne!(find(&leaves, 1, 0).edx & LEAF_1_EDX_HTT, 0);
        assert_eq!(find(&leaves, 4, 0).eax, 3 << 26 | 0x121);
        assert_eq!(find(&leaves, 4, 3).eax, 3 << 26 | 3 << 14 | 0x163);
        assert_eq!(find(&leaves, 4, 4).eax, 0);
        assert_eq!(find(&leaves, 0xb, 1).eax, 2);
        assert_eq!(find(&leaves, 0xb, 1).ebx, 3);
        assert_eq!(find(&leaves, 0xb, 1).ecx, 0x201);
        assert_eq!(find(&leaves, 0x8000_0008, 0).ecx, 2 << 12 | 2);
        assert_eq!(find(&leaves, 0x8000_001d, 3).eax, 3 << 14 | 0x163);
        assert_eq!(find(&leaves, 0x8000_001e, 0).ebx, 2);
        assert_ne!(find(&leaves, 0x8000_0001, 0).ecx & AMD_ECX_CMP_LEGACY, 0);
    }

    #[test]
    fn timers_and_the_hypervisor_are_announced() {
        assert_eq!(find(&leaves(1, 0), 1, 0).ecx >> 21 & 0b100_0000_1001, 0b100_0000_1001);
        let without = Topology { cpus: 1, tsc_deadline: false, extended_destination: false, invariant_tsc: false }
            .leaves(&supported(), 0);
        assert_eq!(find(&without, 1, 0).ecx & LEAF_1_ECX_TSC_DEADLINE, 0);
    }

    #[test]
    fn an_invariant_counter_is_announced() {
        // SDM 2A: EDX bit 8 of leaf 80000007H.
        assert_eq!(find(&leaves(1, 0), 0x8000_0007, 0).edx, 0);
        assert!(!has_invariant_tsc(&supported()));
        let steady = Topology { cpus: 1, tsc_deadline: true, extended_destination: false, invariant_tsc: true };
        assert_eq!(find(&steady.leaves(&supported(), 0), 0x8000_0007, 0).edx, 0x100);
        let promised = CpuId::from_entries(&[leaf(0x8000_0007, 0, [0, 0, 0, 0x100])]).unwrap();
        assert!(has_invariant_tsc(&promised));
        let plain = Topology { invariant_tsc: false, ..steady };
        assert_eq!(find(&plain.leaves(&promised, 0), 0x8000_0007, 0).edx, 0);
    }

    #[test]
    fn leaves_that_the_host_lacks_are_not_made_up() {
        let old = CpuId::from_entries(&[leaf(0, 0, [0xa, 0, 0, 0]), leaf(1, 0, [0; 4])]).unwrap();
        let leaves =
            Topology { cpus: 2, tsc_deadline: true, extended_destination: false, invariant_tsc: false }.leaves(&old, 0);
        assert_eq!(leaves.as_slice().len(), 2);
        assert_eq!(address_bits(&leaves), 36);
        assert_eq!(address_bits(&supported()), 48);
    }
}
