//! PCI configuration space by both of its ways in, and base address registers (PCI Local Bus 3.0, chapter 6).

use crate::Machine;
use crate::cpu::{Mmio, Width, port_in, port_out};
use crate::report::{Failure, Outcome};

const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;

pub(crate) const VENDOR: u16 = 0x00;
pub(crate) const DEVICE: u16 = 0x02;
pub(crate) const COMMAND: u16 = 0x04;
pub(crate) const STATUS: u16 = 0x06;
pub(crate) const HEADER_TYPE: u16 = 0x0e;
pub(crate) const BAR0: u16 = 0x10;
pub(crate) const CAPABILITIES: u16 = 0x34;
pub(crate) const INTERRUPT_LINE: u16 = 0x3c;

/// Command register: memory decoding and bus mastering.
pub(crate) const COMMAND_MEMORY: u16 = 1 << 1;
pub(crate) const COMMAND_MASTER: u16 = 1 << 2;

/// A way into configuration space.
#[derive(Clone, Copy)]
pub(crate) enum Space {
    /// Ports 0xcf8 and 0xcfc.
    Ports,
    /// Memory-mapped, from this address.
    Ecam(u64),
}

/// A function on bus 0.
#[derive(Clone, Copy)]
pub(crate) struct Function {
    pub(crate) space: Space,
    pub(crate) slot: u8,
    pub(crate) number: u8,
}

impl Function {
    /// Reads a register.
    pub(crate) fn read<T: Width>(self, register: u16) -> T {
        match self.space {
            Space::Ports => {
                port_out(CONFIG_ADDRESS, self.config_address(register));
                port_in(CONFIG_DATA + (register & 3))
            }
            Space::Ecam(base) => self.ecam(base).read(register.into()),
        }
    }

    /// Writes a register.
    pub(crate) fn write<T: Width>(self, register: u16, value: T) {
        match self.space {
            Space::Ports => {
                port_out(CONFIG_ADDRESS, self.config_address(register));
                port_out(CONFIG_DATA + (register & 3), value);
            }
            Space::Ecam(base) => self.ecam(base).write(register.into(), value),
        }
    }

    fn config_address(self, register: u16) -> u32 {
        1 << 31 | u32::from(self.slot) << 11 | u32::from(self.number) << 8 | u32::from(register & 0xfc)
    }

    fn ecam(self, base: u64) -> Mmio {
        Mmio(base + (u64::from(self.slot) << 15 | u64::from(self.number) << 12))
    }

    /// The same function through another way in.
    pub(crate) fn through(self, space: Space) -> Self {
        Self { space, ..self }
    }

    /// Whether something answers.
    pub(crate) fn exists(self) -> bool {
        self.read::<u16>(VENDOR) != 0xffff
    }

    /// Where its capabilities are: identifier and register. A list that does not end is cut off.
    pub(crate) fn capabilities(self) -> impl Iterator<Item = (u8, u16)> {
        let has_list = self.read::<u16>(STATUS) & 1 << 4 != 0;
        let mut next = if has_list { self.read::<u8>(CAPABILITIES) } else { 0 };
        let walk = core::iter::from_fn(move || {
            let register = u16::from(next & 0xfc);
            if register < 0x40 {
                return None;
            }
            next = self.read(register + 1);
            Some((self.read(register), register))
        });
        walk.take(48)
    }

    /// Sets or clears bits of the command register; returns what it was.
    pub(crate) fn command(self, set: u16, clear: u16) -> u16 {
        let command = self.read(COMMAND);
        self.write(COMMAND, command & !clear | set);
        command
    }

    /// Puts the BARs that no firmware has placed one behind the other from `start` on.
    pub(crate) fn place_bars(self, mut start: u64) {
        for bar in self.bars().filter(|bar| bar.address() == 0) {
            let size = bar.size();
            start = start.next_multiple_of(size);
            bar.set_address(start);
            start += size;
        }
    }

    /// Its memory BARs.
    pub(crate) fn bars(self) -> impl Iterator<Item = Bar> {
        let registers = match self.read::<u8>(HEADER_TYPE) & 0x7f {
            0 => 6,
            _ => 2,
        };
        let mut index = 0;
        core::iter::from_fn(move || {
            while index < registers {
                let bar = Bar { function: self, index };
                let low = self.read::<u32>(bar.register());
                index += 1 + u8::from(low & 7 == 4);
                if low & 1 == 0 && bar.size() != 0 {
                    return Some(bar);
                }
            }
            None
        })
    }
}

/// A memory base address register.
#[derive(Clone, Copy)]
pub(crate) struct Bar {
    pub(crate) function: Function,
    pub(crate) index: u8,
}

impl Bar {
    fn register(self) -> u16 {
        BAR0 + u16::from(self.index) * 4
    }

    /// Whether it takes two registers.
    pub(crate) fn is_64_bit(self) -> bool {
        self.function.read::<u32>(self.register()) & 6 == 4
    }

    fn raw(self) -> u64 {
        let low = u64::from(self.function.read::<u32>(self.register()));
        if low & 6 == 4 { low | u64::from(self.function.read::<u32>(self.register() + 4)) << 32 } else { low }
    }

    fn set_raw(self, value: u64) {
        self.function.write(self.register(), value as u32);
        if self.is_64_bit() {
            self.function.write(self.register() + 4, (value >> 32) as u32);
        }
    }

    /// Where it is.
    pub(crate) fn address(self) -> u64 {
        self.raw() & !0xf
    }

    /// Puts it elsewhere, with decoding off meanwhile.
    pub(crate) fn set_address(self, address: u64) {
        let command = self.function.command(0, COMMAND_MEMORY);
        self.set_raw(address);
        self.function.write(COMMAND, command);
    }

    /// What it reads after all ones were written: the size mask with the type bits. Put back afterwards.
    pub(crate) fn mask(self) -> u64 {
        let command = self.function.command(0, COMMAND_MEMORY);
        let before = self.raw();
        self.set_raw(u64::MAX);
        let mask = self.raw();
        self.set_raw(before);
        self.function.write(COMMAND, command);
        if self.is_64_bit() { mask } else { mask | 0xffff_ffff_0000_0000 }
    }

    /// Bytes; 0 if there is no such BAR.
    pub(crate) fn size(self) -> u64 {
        let mask = self.mask() & !0xf;
        if mask as u32 == 0 && !self.is_64_bit() { 0 } else { (!mask).wrapping_add(1) }
    }
}

impl Machine {
    /// The memory-mapped way into configuration space.
    pub(crate) fn ecam(&self) -> Space {
        Space::Ecam(self.acpi.ecam)
    }

    /// Every function of bus 0, as `space` shows it.
    pub(crate) fn functions(space: Space) -> impl Iterator<Item = Function> {
        (0..32).flat_map(move |slot| {
            let first = Function { space, slot, number: 0 };
            let several = first.exists() && first.read::<u8>(HEADER_TYPE) & 0x80 != 0;
            let count = if several { 8 } else { 1 };
            (0..count).map(move |number| Function { number, ..first }).filter(|function| function.exists())
        })
    }

    /// The virtio functions with this device type.
    pub(crate) fn virtio(&self, device_type: u16) -> impl Iterator<Item = Function> {
        Self::functions(self.ecam()).filter(move |function| {
            function.read::<u16>(VENDOR) == 0x1af4 && function.read::<u16>(DEVICE) == 0x1040 + device_type
        })
    }

    /// The disk that the command line names, the first by default.
    pub(crate) fn disk(&self) -> Outcome<Function> {
        let index = self.command_line.number("disk", 0) as usize;
        self.virtio(2).nth(index).ok_or(Failure::Skip("a virtio disk"))
    }
}
