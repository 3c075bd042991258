//! MSI-X as a driver uses it (PCI Local Bus 3.0, section 6.8.2).

use crate::cpu::{self, Mmio};
use crate::memory;
use crate::pci::{Bar, Function};
use crate::report::{Failure, Outcome};

const CAPABILITY: u8 = 0x11;
const CONTROL: u16 = 2;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK: u16 = 1 << 14;

/// The MSI-X structures of a function.
#[derive(Clone, Copy)]
pub(crate) struct Msix {
    function: Function,
    capability: u16,
    /// Number of table entries.
    pub(crate) size: u16,
    /// BAR and offset of the table, and of the pending bits.
    pub(crate) places: [(u8, u64); 2],
    table: Mmio,
    pending: Mmio,
}

impl Msix {
    /// Finds them.
    pub(crate) fn find(function: Function) -> Outcome<Self> {
        let Some((_, capability)) = function.capabilities().find(|(id, _)| *id == CAPABILITY) else {
            return Err(Failure::Skip("an MSI-X capability"));
        };
        let places = [4, 8].map(|register| {
            let value = function.read::<u32>(capability + register);
            ((value & 7) as u8, u64::from(value & !7))
        });
        let [table, pending] = places.map(|(index, offset)| {
            let address = Bar { function, index }.address() + offset;
            memory::map(address, 4096);
            Mmio(address)
        });
        let size = (function.read::<u16>(capability + CONTROL) & 0x7ff) + 1;
        Ok(Self { function, capability, size, places, table, pending })
    }

    /// Switches it on or off, with or without the mask of the whole function.
    pub(crate) fn control(&self, enable: bool, mask: bool) {
        let bits = if enable { CONTROL_ENABLE } else { 0 } | if mask { CONTROL_MASK } else { 0 };
        let control = self.function.read::<u16>(self.capability + CONTROL);
        self.function.write(self.capability + CONTROL, control & !(CONTROL_ENABLE | CONTROL_MASK) | bits);
    }

    /// The control register's enable and mask bits.
    pub(crate) fn state(&self) -> (bool, bool) {
        let control = self.function.read::<u16>(self.capability + CONTROL);
        (control & CONTROL_ENABLE != 0, control & CONTROL_MASK != 0)
    }

    /// The table entry `index` as memory.
    pub(crate) fn entry(&self, index: u16) -> Mmio {
        Mmio(self.table.0 + u64::from(index) * 16)
    }

    /// Directs the entry to `vector` on this processor. Its mask stays as it is.
    pub(crate) fn direct(&self, index: u16, vector: u8) {
        let entry = self.entry(index);
        // Fixed delivery, edge, physical destination (Intel SDM volume 3, 11.11).
        entry.write::<u32>(0, 0xfee0_0000 | u32::from(cpu::apic_id()) << 12);
        entry.write::<u32>(4, 0);
        entry.write::<u32>(8, vector.into());
    }

    /// Masks or unmasks the entry.
    pub(crate) fn mask(&self, index: u16, masked: bool) {
        self.entry(index).write::<u32>(12, masked.into());
    }

    /// Whether the entry's interrupt is pending.
    pub(crate) fn pending(&self, index: u16) -> bool {
        self.pending.read::<u32>(u64::from(index / 32) * 4) & 1 << (index % 32) != 0
    }

    /// Masks every entry and switches MSI-X off.
    pub(crate) fn quiesce(&self) {
        for index in 0..self.size {
            self.mask(index, true);
        }
        self.control(false, false);
    }
}
