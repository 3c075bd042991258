//! The configuration space of one function with a type 0 header (PCI Local Bus 3.0, chapter 6). Plain data: the
//! function that owns it locks it; only [`Bars`] is shared with the dispatch of memory accesses.

use std::array;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of configuration space of a conventional function. Past them every byte reads as ones.
pub const CONFIG_SIZE: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CLASS: usize = 0x09;
const CACHE_LINE_SIZE: usize = 0x0c;
const BAR0: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_MEMORY: u16 = 1 << 1;
/// Memory space, bus master, parity error response, SERR# and interrupt disable. There is no I/O space to enable.
const COMMAND_WRITABLE: u16 = COMMAND_MEMORY | 1 << 2 | 1 << 6 | 1 << 8 | 1 << 10;
const STATUS_CAPABILITY_LIST: u8 = 1 << 4;
const BAR_MEMORY_64: u8 = 0b100;
/// The bits of a memory BAR that say its kind (6.2.5.1).
const BAR_KIND: u64 = 0xf;

/// Who a function says it is (6.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, sub-class and programming interface: 24 bits.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// How wide the address of a memory BAR is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarWidth {
    /// One register, below 4 GiB.
    Bits32,
    /// Two registers, anywhere.
    Bits64,
}

/// What the function declared about one BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarSpec {
    /// Bytes, a power of two.
    pub size: u64,
    /// Address width.
    pub width: BarWidth,
}

/// Registers, which of their bits the guest may write, and the BARs among them.
#[derive(Debug)]
pub struct Configuration {
    registers: [u8; CONFIG_SIZE],
    writable: [u8; CONFIG_SIZE],
    bars: [Option<BarSpec>; 6],
    /// The pointer to set when a capability is added, and the offset it will get.
    last_pointer: usize,
    next_free: usize,
}

impl Configuration {
    /// A function without BARs and capabilities, and without an interrupt pin: interrupts are message-signalled only.
    pub fn new(identity: Identity) -> Self {
        let mut config = Self {
            registers: [0; CONFIG_SIZE],
            writable: [0; CONFIG_SIZE],
            bars: [None; 6],
            last_pointer: CAPABILITIES,
            next_free: FIRST_CAPABILITY,
        };
        config.registers[0..2].copy_from_slice(&identity.vendor.to_le_bytes());
        config.registers[2..4].copy_from_slice(&identity.device.to_le_bytes());
        config.registers[8] = identity.revision;
        config.registers[CLASS..CLASS + 3].copy_from_slice(&identity.class.to_le_bytes()[..3]);
        config.registers[SUBSYSTEM..SUBSYSTEM + 2].copy_from_slice(&identity.subsystem_vendor.to_le_bytes());
        config.registers[SUBSYSTEM + 2..SUBSYSTEM + 4].copy_from_slice(&identity.subsystem.to_le_bytes());
        config.writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_WRITABLE.to_le_bytes());
        config.writable[CACHE_LINE_SIZE] = 0xff;
        config.writable[INTERRUPT_LINE] = 0xff;
        config
    }

    /// Declares the memory BAR `index` of `size` bytes, not prefetchable.
    ///
    /// # Panics
    /// If the size is no power of two of at least 16, or the registers are taken: the function is ours.
    pub fn add_memory_bar(&mut self, index: usize, size: u64, width: BarWidth) {
        assert!(size.is_power_of_two() && size > BAR_KIND, "BAR {index} has a bad size {size:#x}");
        let registers = if width == BarWidth::Bits64 { 2 } else { 1 };
        let at = BAR0 + 4 * index;
        let taken = &self.writable[at..at + 4 * registers];
        assert!(index + registers <= 6 && taken.iter().all(|&mask| mask == 0), "BAR {index} is taken");
        let mask = (!(size - 1)).to_le_bytes();
        self.writable[at..at + 4 * registers].copy_from_slice(&mask[..4 * registers]);
        if width == BarWidth::Bits64 {
            self.registers[at] = BAR_MEMORY_64;
        }
        self.bars[index] = Some(BarSpec { size, width });
    }

    /// Appends a capability (6.7): `body` is what follows its ID and pointer, `writable` the bits of it that the guest
    /// may write, shorter if the rest is read-only. Returns its offset.
    ///
    /// # Panics
    /// If it does not fit: the function is ours.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.next_free;
        let end = at + 2 + body.len();
        assert!(end <= CONFIG_SIZE && writable.len() <= body.len(), "the capability {id:#x} does not fit");
        self.registers[STATUS] |= STATUS_CAPABILITY_LIST;
        self.registers[self.last_pointer] = at as u8;
        self.registers[at] = id;
        self.registers[at + 2..end].copy_from_slice(body);
        self.writable[at + 2..at + 2 + writable.len()].copy_from_slice(writable);
        self.last_pointer = at + 1;
        self.next_free = end.next_multiple_of(4);
        at
    }

    /// Reads any bytes; those past the space are ones.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.registers.get(at).copied().unwrap_or(0xff);
        }
    }

    /// Writes any bytes, as far as they are writable.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (at, &byte) in (usize::from(offset)..).zip(data).take_while(|&(at, _)| at < CONFIG_SIZE) {
            let mask = self.writable[at];
            self.registers[at] = self.registers[at] & !mask | byte & mask;
        }
    }

    /// Back to the state after power-on: no address, no decoding.
    pub fn reset(&mut self) {
        for (register, mask) in self.registers.iter_mut().zip(self.writable) {
            *register &= !mask;
        }
    }

    /// Sets one byte as the function itself does, whatever is writable.
    ///
    /// # Panics
    /// If `offset` is past the space.
    pub fn set(&mut self, offset: usize, byte: u8) {
        self.registers[offset] = byte;
    }

    /// One little-endian dword, for the function itself.
    ///
    /// # Panics
    /// If it reaches past the space.
    pub fn dword(&self, offset: usize) -> u32 {
        u32::from_le_bytes(array::from_fn(|byte| self.registers[offset + byte]))
    }

    /// Where the BAR `index` is now: `None` while memory decoding is off, or if the guest gave it no address.
    pub fn decoded(&self, index: usize) -> Option<u64> {
        let spec = (*self.bars.get(index)?)?;
        let at = BAR0 + 4 * index;
        let low = u64::from(self.dword(at)) & !BAR_KIND;
        let high = if spec.width == BarWidth::Bits64 { u64::from(self.dword(at + 4)) << 32 } else { 0 };
        let enabled = self.registers[COMMAND] & COMMAND_MEMORY as u8 != 0;
        (enabled && high | low != 0).then_some(high | low)
    }

    /// The dispatch view of the declared BARs.
    pub fn bars(&self) -> Bars {
        let bars = Bars { specs: self.bars, current: array::from_fn(|_| AtomicU64::new(0)) };
        bars.follow(self);
        bars
    }
}

/// Where the BARs of a function are now. Read without a lock by every memory access, written by the owner of the
/// [`Configuration`] after each write to it.
#[derive(Debug)]
pub struct Bars {
    specs: [Option<BarSpec>; 6],
    /// The base, or 0 while the BAR is not decoded.
    current: [AtomicU64; 6],
}

impl Bars {
    /// Takes over the addresses and the decode enable of `config`.
    pub fn follow(&self, config: &Configuration) {
        for (index, current) in self.current.iter().enumerate() {
            current.store(config.decoded(index).unwrap_or(0), Ordering::Release);
        }
    }

    /// The BAR that decodes all of `address..address + len`, and the offset in it.
    pub fn find(&self, address: u64, len: usize) -> Option<(usize, u64)> {
        self.iter().find_map(|(index, spec)| {
            let base = self.base(index)?;
            let offset = address.checked_sub(base)?;
            (offset < spec.size && len as u64 <= spec.size - offset).then_some((index, offset))
        })
    }

    /// Where the BAR `index` is now; `None` while it is not decoded.
    pub fn base(&self, index: usize) -> Option<u64> {
        match self.current.get(index)?.load(Ordering::Acquire) {
            0 => None,
            base => Some(base),
        }
    }

    /// The declared BARs with their index.
    pub fn iter(&self) -> impl Iterator<Item = (usize, BarSpec)> + '_ {
        self.specs.iter().enumerate().filter_map(|(index, spec)| Some((index, (*spec)?)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const IDENTITY: Identity = Identity {
        vendor: 0x1af4,
        device: 0x1042,
        revision: 1,
        class: 0x01_80_02,
        subsystem_vendor: 0x1234,
        subsystem: 0x5678,
    };

    fn read(config: &Configuration, offset: u16) -> u32 {
        let mut data = [0; 4];
        config.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// A 64-bit BAR of 64 KiB in registers 0 and 1, a 32-bit one of 4 KiB in register 2, two capabilities.
    fn function() -> Configuration {
        let mut config = Configuration::new(IDENTITY);
        config.add_memory_bar(0, 0x1_0000, BarWidth::Bits64);
        config.add_memory_bar(2, 0x1000, BarWidth::Bits32);
        assert_eq!(config.add_capability(0x11, &[1; 10], &[0, 0xc0]), 0x40);
        assert_eq!(config.add_capability(0x09, &[2; 15], &[]), 0x4c);
        config
    }

    #[test]
    fn the_header_is_where_the_specification_has_it() {
        let config = function();
        assert_eq!(read(&config, 0x00), 0x1042_1af4);
        assert_eq!(read(&config, 0x04), 0x0010_0000, "only the capability list bit");
        assert_eq!(read(&config, 0x08), 0x0180_0201);
        assert_eq!(read(&config, 0x0c), 0, "type 0, one function");
        assert_eq!(read(&config, 0x2c), 0x5678_1234);
        assert_eq!(read(&config, 0x34), 0x40);
        assert_eq!(read(&config, 0x3c), 0, "no interrupt pin");
        assert_eq!(read(&config, 0x40), 0x0101_4c11);
        assert_eq!(read(&config, 0x4c), 0x0202_0009, "the last of the list");
    }

    #[test]
    fn sizing_shows_the_size_and_the_kind() {
        let mut config = function();
        for register in [0x10, 0x14, 0x18, 0x1c, 0x20, 0x24, 0x30] {
            config.write(register, &[0xff; 4]);
        }
        let answers: Vec<_> = [0x10, 0x14, 0x18, 0x1c, 0x20, 0x24, 0x30].map(|at| read(&config, at)).into();
        assert_eq!(answers, [0xffff_0004, 0xffff_ffff, 0xffff_f000, 0, 0, 0, 0]);
    }

    #[test]
    fn a_bar_decodes_while_it_is_enabled_and_has_an_address() {
        let mut config = function();
        let bars = config.bars();
        let at = |config: &Configuration, index| {
            bars.follow(config);
            bars.base(index)
        };
        config.write(0x04, &[2]);
        assert_eq!((at(&config, 0), config.decoded(0)), (None, None), "no address");
        config.write(0x10, &0xc012_ffff_u32.to_le_bytes());
        assert_eq!(at(&config, 0), Some(0xc012_0000));
        config.write(0x14, &[0x34, 0x12]);
        assert_eq!(at(&config, 0), Some(0x1234_c012_0000));
        config.write(0x18, &0xd000_1000_u32.to_le_bytes());
        assert_eq!([at(&config, 1), at(&config, 2), at(&config, 9)], [None, Some(0xd000_1000), None]);
        assert_eq!(bars.find(0xd000_1ffc, 4), Some((2, 0xffc)));
        assert_eq!(bars.find(0xd000_1ffd, 4), None, "across the end");
        assert_eq!(bars.find(0xd000_0fff, 1), None);
        config.write(0x04, &[0]);
        assert_eq!([at(&config, 0), at(&config, 2)], [None, None]);
        assert_eq!(bars.find(0xd000_1ffc, 4), None);
        config.write(0x04, &[2]);
        config.reset();
        assert_eq!([at(&config, 0), at(&config, 2)], [None, None]);
        assert_eq!([read(&config, 0x04), read(&config, 0x10)], [0x0010_0000, 4]);
    }

    #[test]
    fn past_the_space_are_ones() {
        let mut config = function();
        config.write(0xfe, &[0; 8]);
        let mut data = [0; 8];
        config.read(0xfc, &mut data);
        assert_eq!(data, [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        config.read(u16::MAX, &mut data);
        assert_eq!(data, [0xff; 8]);
    }

    #[test]
    #[should_panic(expected = "BAR 1 is taken")]
    fn a_bar_takes_both_registers() {
        function().add_memory_bar(1, 0x1000, BarWidth::Bits32);
    }

    proptest! {
        /// Whatever is written, only these bits change (PCI Local Bus 3.0, figure 6-1 and 6.2; MSI-X control 6.8.2.3).
        #[test]
        fn only_writable_bits_change(
            writes in prop::collection::vec((0_u16..0x110, prop::collection::vec(any::<u8>(), 1..9)), 1..50),
        ) {
            let fresh = function();
            let mut config = function();
            for (offset, data) in writes {
                config.write(offset, &data);
            }
            for register in (0..0x100).step_by(4) {
                let writable = match register {
                    0x04 => 0x0000_0546,
                    0x0c | 0x3c => 0x0000_00ff,
                    0x10 => 0xffff_0000,
                    0x14 => 0xffff_ffff,
                    0x18 => 0xffff_f000,
                    0x40 => 0xc000_0000,
                    _ => 0,
                };
                let changed = read(&config, register) ^ read(&fresh, register);
                prop_assert_eq!(changed & !writable, 0, "register {:#x}", register);
            }
        }
    }
}
