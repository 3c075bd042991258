//! Where things are in the guest's physical address space and port space. The only file that names an address of the
//! machine: ACPI tables, devices and boot code are all told from here.

use std::ops::Range;

/// First byte of the 32-bit hole: RAM that would reach into it goes above 4 GiB instead.
const HOLE_START: u64 = 0xC000_0000;
const HOLE_END: u64 = 1 << 32;

/// 32-bit window of the PCI host bridge, where BARs are assigned before boot.
pub const PCI_WINDOW_32: Range<u64> = HOLE_START..0xE000_0000;

/// Memory-mapped configuration space of bus 0 (ECAM): 256 functions of 4 KiB.
pub const PCI_ECAM: Range<u64> = 0xE000_0000..0xE010_0000;

/// The in-kernel I/O APIC.
pub const IOAPIC: u32 = 0xFEC0_0000;

/// The local APICs.
pub const LAPIC: u32 = 0xFEE0_0000;

/// One page for an identity map and three for a TSS, which KVM on old Intel hosts needs outside guest memory.
pub const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;
/// See [`KVM_IDENTITY_MAP`].
pub const KVM_TSS: u64 = 0xFFFB_D000;

/// The classic BIOS area holds the RSDP at its start, the other ACPI tables behind it, and the reset vector at its end.
pub const ACPI_TABLES: Range<u64> = 0xE_0000..boot::reset_vector::ADDRESS;

/// What the memory map reserves below 1 MiB: the EBDA, the VGA hole and the BIOS area.
pub const LOW_RESERVED: Range<u64> = 0x9_FC00..0x10_0000;

/// I/O ports.
pub mod port {
    /// 16550, eight registers.
    pub const COM1: u16 = 0x3F8;
    /// i8042 data port; the command port is 4 above.
    pub const I8042: u16 = 0x60;
    /// MC146818 index port; the data port is 1 above.
    pub const RTC: u16 = 0x70;
    /// PCI CONFIG_ADDRESS; CONFIG_DATA is 4 above.
    pub const PCI_CONFIG: u16 = 0xCF8;
    /// pvpanic, one byte.
    pub const PVPANIC: u16 = 0x505;
    /// ACPI sleep control register; the sleep status register is 1 above.
    pub const ACPI_SLEEP: u16 = 0x600;
    /// Ports of isa-debug-exit, whose first one the user names.
    pub const DEBUG_EXIT_WIDTH: u16 = devices::debug_exit::PORTS as u16;

    /// First and last port of all that the machine always has, KVM's own devices included, and whose they are.
    pub const OCCUPIED: [(u16, u16, &str); 10] = [
        (0x20, 0x21, "the interrupt controller"),
        (0x40, 0x43, "the timer"),
        (I8042, I8042 + 4, "the keyboard controller"),
        (RTC, RTC + 1, "the clock"),
        (0xa0, 0xa1, "the interrupt controller"),
        (COM1, COM1 + 7, "COM1"),
        (0x4d0, 0x4d1, "the interrupt controller"),
        (PVPANIC, PVPANIC, "pvpanic"),
        (ACPI_SLEEP, ACPI_SLEEP + 1, "ACPI sleep"),
        (PCI_CONFIG, PCI_CONFIG + 7, "PCI"),
    ];
}

/// Global system interrupts.
pub mod gsi {
    /// COM1.
    pub const COM1: u32 = 4;
    /// The ACPI generic event device: the power button.
    pub const POWER_BUTTON: u32 = 5;
    /// Pins of the I/O APIC; message-signalled interrupts take the numbers from here on.
    pub const IOAPIC_PINS: u32 = 24;
}

/// The part of the layout that depends on how much memory the guest has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Guest RAM: one range, or two around the 32-bit hole. Ascending.
    pub ram: Vec<Range<u64>>,
    /// 64-bit window of the PCI host bridge, above all RAM; none where the CPU's physical addresses end too early.
    pub pci_window_64: Option<Range<u64>>,
}

impl Layout {
    /// Places `memory` bytes of RAM (a multiple of 4 KiB) in an address space of `address_bits` bits.
    ///
    /// Returns `None` if the RAM does not fit.
    pub fn new(memory: u64, address_bits: u32) -> Option<Self> {
        let limit = 1u64 << address_bits.min(52);
        let below = 0..memory.min(HOLE_START);
        let ram: Vec<_> = match memory.checked_sub(HOLE_START) {
            None | Some(0) => vec![below],
            Some(rest) => vec![below, HOLE_END..HOLE_END.checked_add(rest)?],
        };
        let end_of_ram = ram.last()?.end;
        if end_of_ram > limit {
            return None;
        }
        let window = end_of_ram.max(HOLE_END).next_multiple_of(64 << 30);
        let pci_window_64 = window.checked_add(64 << 30).filter(|end| *end <= limit).map(|end| window..end);
        Some(Self { ram, pci_window_64 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn small_memory_is_one_range() {
        let layout = Layout::new(GIB, 40).unwrap();
        assert_eq!(layout.ram, vec![0..GIB]);
        assert_eq!(layout.pci_window_64, Some(64 * GIB..128 * GIB));
    }

    #[test]
    fn memory_up_to_the_hole_stays_below_it() {
        assert_eq!(Layout::new(3 * GIB, 40).unwrap().ram, vec![0..3 * GIB]);
    }

    #[test]
    fn memory_past_the_hole_continues_at_4_gib() {
        let layout = Layout::new(5 * GIB, 40).unwrap();
        assert_eq!(layout.ram, vec![0..3 * GIB, 4 * GIB..6 * GIB]);
        assert!(layout.pci_window_64.unwrap().start >= 6 * GIB);
    }

    #[test]
    fn a_short_address_space_has_no_64_bit_window() {
        assert_eq!(Layout::new(GIB, 36).unwrap().pci_window_64, None);
        assert_eq!(Layout::new(64 * GIB, 36), None);
        assert_eq!(Layout::new(!0xfff, 52), None);
    }
}
