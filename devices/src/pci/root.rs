//! The root bus: 32 slots, the host bridge in slot 0, and the three ways a guest reaches them. Built once; afterwards
//! every vCPU thread looks up without a lock, and a function locks what it must.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;

use super::config::{BarWidth, Bars, Configuration, Identity};
use crate::bus::BusDevice;

/// Slots on the bus, without the host bridge's.
const SLOTS: usize = 31;
/// Functions a slot can have.
const FUNCTIONS: usize = 8;
/// The register that holds the header type, in its third byte, and the bit in it that says a slot has several functions.
const HEADER_TYPE: u16 = 0x0e;
const MULTI_FUNCTION: u8 = 1 << 7;

/// One PCI function. Called on vCPU threads, several at once.
pub trait PciDevice: Send + Sync {
    /// Reads configuration space. `offset` is below 4096, but the access may reach past it: there and where the
    /// function has no space, bytes are ones.
    fn config_read(&self, offset: u16, data: &mut [u8]);

    /// Writes configuration space. On return [`PciDevice::bars`] tells the new addresses.
    fn config_write(&self, offset: u16, data: &[u8]);

    /// Where its BARs are now.
    fn bars(&self) -> &Bars;

    /// Reads from a BAR; `offset..offset + data.len()` is inside it.
    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]);

    /// Writes to a BAR; `offset..offset + data.len()` is inside it.
    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]);
}

/// Why a set of functions makes no bus.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RootError {
    /// More functions than the bus has places.
    #[error("{0} PCI devices are more than a bus holds ({max}); use fewer disks", max = SLOTS * FUNCTIONS)]
    TooMany(usize),
    /// The windows hold fewer bytes than the BARs ask for.
    #[error("no room for BAR {bar} of a PCI device ({size:#x} bytes); use fewer devices")]
    NoRoom {
        /// Index of the BAR.
        bar: usize,
        /// Its size in bytes.
        size: u64,
    },
}

/// The functions on bus 0, by device and function number: what a configuration address says in 8 bits.
pub struct PciRoot {
    functions: Vec<Option<Arc<dyn PciDevice>>>,
}

impl PciRoot {
    /// A bus with `devices` behind the host bridge, which a guest finds in their order: one a slot while there are slots
    /// enough, else as functions of one slot.
    ///
    /// # Errors
    /// [`RootError::TooMany`].
    pub fn new(devices: Vec<Arc<dyn PciDevice>>) -> Result<Self, RootError> {
        let per_slot = devices.len().div_ceil(SLOTS).max(1);
        if per_slot > FUNCTIONS {
            return Err(RootError::TooMany(devices.len()));
        }
        let mut functions: Vec<Option<Arc<dyn PciDevice>>> = (0..(SLOTS + 1) * FUNCTIONS).map(|_| None).collect();
        functions[0] = Some(Arc::new(HostBridge::new()));
        for (at, device) in devices.into_iter().enumerate() {
            functions[(1 + at / per_slot) * FUNCTIONS + at % per_slot] = Some(device);
        }
        Ok(Self { functions })
    }

    /// Gives every BAR an address, as firmware does: naturally aligned, in `low` (below 4 GiB) while there is room,
    /// else in `high` if the BAR is 64 bits wide. Memory decoding is left off; drivers enable it.
    ///
    /// # Errors
    /// [`RootError::NoRoom`] if a BAR fits nowhere.
    pub fn assign_bars(&self, low: Range<u64>, high: Range<u64>) -> Result<(), RootError> {
        let devices = self.functions.iter().flatten();
        let mut bars: Vec<_> =
            devices.flat_map(|device| device.bars().iter().map(move |(index, spec)| (device, index, spec))).collect();
        // Those that must be low first, and the largest first: then alignment leaves hardly a gap.
        bars.sort_by_key(|(.., spec)| (spec.width == BarWidth::Bits64, std::cmp::Reverse(spec.size)));
        let (mut low, mut high) = (low, high);
        for (device, index, spec) in bars {
            let wide = spec.width == BarWidth::Bits64;
            let base = take(&mut low, spec.size)
                .or_else(|| if wide { take(&mut high, spec.size) } else { None })
                .ok_or(RootError::NoRoom { bar: index, size: spec.size })?;
            let register = 0x10 + 4 * index as u16;
            device.config_write(register, &(base as u32).to_le_bytes());
            if wide {
                device.config_write(register + 4, &((base >> 32) as u32).to_le_bytes());
            }
        }
        Ok(())
    }

    fn config_read(&self, address: FunctionAddress, offset: u16, data: &mut [u8]) {
        let Some(device) = self.function(address) else { return data.fill(0xff) };
        device.config_read(offset, data);
        if self.has_siblings(address) {
            let header_type = HEADER_TYPE.checked_sub(offset).and_then(|at| data.get_mut(usize::from(at)));
            if let Some(header_type) = header_type {
                *header_type |= MULTI_FUNCTION;
            }
        }
    }

    fn config_write(&self, address: FunctionAddress, offset: u16, data: &[u8]) {
        if let Some(device) = self.function(address) {
            device.config_write(offset, data);
        }
    }

    fn function(&self, address: FunctionAddress) -> Option<&dyn PciDevice> {
        let at = usize::from(address.slot) * FUNCTIONS + usize::from(address.function);
        (address.bus == 0).then(|| self.functions.get(at)?.as_deref()).flatten()
    }

    /// Whether this is function 0 of a slot that has more.
    fn has_siblings(&self, address: FunctionAddress) -> bool {
        address.function == 0 && self.function(FunctionAddress { function: 1, ..address }).is_some()
    }

    /// The function whose BAR decodes the access now, the BAR and the offset in it.
    fn decoding(&self, address: u64, len: usize) -> Option<(&dyn PciDevice, usize, u64)> {
        self.functions.iter().flatten().find_map(|device| {
            let (bar, offset) = device.bars().find(address, len)?;
            Some((device.as_ref(), bar, offset))
        })
    }
}

/// Cuts `size` bytes, aligned to `size`, from the start of `window`.
fn take(window: &mut Range<u64>, size: u64) -> Option<u64> {
    let base = window.start.checked_next_multiple_of(size)?;
    let end = base.checked_add(size).filter(|&end| end <= window.end)?;
    window.start = end;
    Some(base)
}

#[derive(Clone, Copy)]
struct FunctionAddress {
    bus: u8,
    slot: u8,
    function: u8,
}

/// Configuration mechanism #1 (PCI Local Bus 3.0, 3.2.2.3.2): the 8 ports from 0xCF8.
///
/// Only a dword access to the first port reaches the address register; narrower ones belong to other devices that a PC
/// has there (0xCF9) and that this machine has not.
pub struct ConfigPorts {
    root: Arc<PciRoot>,
    address: AtomicU32,
}

impl ConfigPorts {
    /// The ports of `root`.
    pub fn new(root: Arc<PciRoot>) -> Self {
        Self { root, address: AtomicU32::new(0) }
    }

    /// The function and register that an access to data port `port` (4 to 7) means; `None` while the enable bit is
    /// clear.
    fn target(&self, port: u64) -> Option<(FunctionAddress, u16)> {
        let address = self.address.load(Ordering::Acquire);
        let function = FunctionAddress {
            bus: (address >> 16) as u8,
            slot: (address >> 11) as u8 & 0x1f,
            function: (address >> 8) as u8 & 7,
        };
        (address & 1 << 31 != 0 && port >= 4).then_some((function, (address & 0xfc) as u16 | (port as u16 & 3)))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.address.load(Ordering::Acquire).to_le_bytes());
        } else if let Some((function, register)) = self.target(offset) {
            self.root.config_read(function, register, data);
        } else {
            data.fill(0xff);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Ok(address)) = (offset, <[u8; 4]>::try_from(data)) {
            // Bits 30 to 24 and 1 to 0 are reserved and read as zeroes.
            self.address.store(u32::from_le_bytes(address) & 0x80ff_fffc, Ordering::Release);
        } else if let Some((function, register)) = self.target(offset) {
            self.root.config_write(function, register, data);
        }
    }
}

/// The enhanced configuration access mechanism (PCI Express 3.0, 7.2.2): 4 KiB a function, 1 MiB a bus.
pub struct Ecam {
    root: Arc<PciRoot>,
}

impl Ecam {
    /// Bytes of the range, which holds bus 0 only.
    pub const SIZE: u64 = 1 << 20;

    /// The range of `root`.
    pub fn new(root: Arc<PciRoot>) -> Self {
        Self { root }
    }

    fn target(offset: u64) -> (FunctionAddress, u16) {
        let function = FunctionAddress {
            bus: (offset >> 20) as u8,
            slot: (offset >> 15) as u8 & 0x1f,
            function: (offset >> 12) as u8 & 7,
        };
        (function, offset as u16 & 0xfff)
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (function, register) = Self::target(offset);
        self.root.config_read(function, register, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (function, register) = Self::target(offset);
        self.root.config_write(function, register, data);
    }
}

/// A range of physical addresses that the host bridge forwards to the BARs behind it.
pub struct MemoryWindow {
    root: Arc<PciRoot>,
    base: u64,
}

impl MemoryWindow {
    /// The window that starts at guest physical address `base`.
    pub fn new(root: Arc<PciRoot>, base: u64) -> Self {
        Self { root, base }
    }
}

impl BusDevice for MemoryWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.root.decoding(self.base + offset, data.len()) {
            Some((device, bar, at)) => device.bar_read(bar, at, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((device, bar, at)) = self.root.decoding(self.base + offset, data.len()) {
            device.bar_write(bar, at, data);
        }
    }
}

/// The function every root bus has: no BARs, no capabilities. Its ID is the one QEMU gives a generic PCI Express host.
struct HostBridge {
    config: Mutex<Configuration>,
    bars: Bars,
}

impl HostBridge {
    fn new() -> Self {
        let config = Configuration::new(Identity {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: 0x06_00_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        Self { bars: config.bars(), config: Mutex::new(config) }
    }
}

impl PciDevice for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
    }

    fn bars(&self) -> &Bars {
        &self.bars
    }

    fn bar_read(&self, _bar: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _bar: usize, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LOW: Range<u64> = 0xc000_0000..0xe000_0000;
    const HIGH: Range<u64> = 0x40_0000_0000..0x48_0000_0000;

    /// A function with a 64-bit BAR 0 and a 32-bit BAR 2, which records what reaches them.
    struct Probe {
        config: Mutex<Configuration>,
        bars: Bars,
        writes: Mutex<Vec<(usize, u64, Vec<u8>)>>,
    }

    impl Probe {
        fn new(sizes: [u64; 2]) -> Arc<Self> {
            let identity =
                Identity { vendor: 1, device: 2, revision: 0, class: 0xff_0000, subsystem_vendor: 3, subsystem: 4 };
            let mut config = Configuration::new(identity);
            config.add_memory_bar(0, sizes[0], BarWidth::Bits64);
            config.add_memory_bar(2, sizes[1], BarWidth::Bits32);
            Arc::new(Self { bars: config.bars(), config: Mutex::new(config), writes: Mutex::default() })
        }

        fn seen(&self) -> Vec<(usize, u64, Vec<u8>)> {
            std::mem::take(&mut self.writes.lock().unwrap())
        }
    }

    impl PciDevice for Probe {
        fn config_read(&self, offset: u16, data: &mut [u8]) {
            self.config.lock().unwrap().read(offset, data);
        }
        fn config_write(&self, offset: u16, data: &[u8]) {
            let mut config = self.config.lock().unwrap();
            config.write(offset, data);
            self.bars.follow(&config);
        }
        fn bars(&self) -> &Bars {
            &self.bars
        }
        fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) {
            data.fill(0x10 * bar as u8 + offset as u8);
        }
        fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) {
            self.writes.lock().unwrap().push((bar, offset, data.to_vec()));
        }
    }

    fn root(devices: &[Arc<Probe>]) -> Arc<PciRoot> {
        let devices = devices.iter().map(|device| device.clone() as Arc<dyn PciDevice>).collect();
        Arc::new(PciRoot::new(devices).unwrap())
    }

    fn read32(device: &dyn BusDevice, offset: u64) -> u32 {
        let mut data = [0; 4];
        device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write32(device: &dyn BusDevice, offset: u64, value: u32) {
        device.write(offset, &value.to_le_bytes());
    }

    #[test]
    fn both_mechanisms_show_the_same_bus() {
        let root = root(&[Probe::new([0x1000, 0x1000])]);
        let (ports, ecam) = (ConfigPorts::new(root.clone()), Ecam::new(root));
        let ids: Vec<_> = (0..4).map(|slot| read32(&ecam, slot << 15)).collect();
        assert_eq!(ids, [0x0008_1b36, 0x0002_0001, u32::MAX, u32::MAX]);
        assert_eq!(read32(&ecam, 8) >> 8, 0x06_00_00, "the class of a host bridge");
        assert_eq!(read32(&ecam, 1 << 15 | 1 << 12), u32::MAX, "function 1");
        for slot in 0..32_u32 {
            for register in (0..0x100).step_by(4) {
                write32(&ports, 0, 1 << 31 | slot << 11 | register);
                let by_ecam = read32(&ecam, u64::from(slot << 15 | register));
                assert_eq!(read32(&ports, 4), by_ecam, "slot {slot} register {register:#x}");
            }
        }
        // Writes by one are seen by the other, and narrow ones touch only their bytes.
        write32(&ports, 0, 1 << 31 | 1 << 11 | 0x10);
        ports.write(6, &[0x34, 0x12]);
        assert_eq!(read32(&ecam, 1 << 15 | 0x10), 0x1234_0004);
        ecam.write(1 << 15 | 0x13, &[0xc0]);
        assert_eq!(read32(&ports, 4), 0xc034_0004);
        let mut byte = [0];
        ports.read(7, &mut byte);
        assert_eq!(byte, [0xc0]);
        let mut across = [0; 4];
        ecam.read((1 << 15 | 1 << 12) - 2, &mut across);
        assert_eq!(across, [0xff; 4], "not into the next function");
        // Another bus, another function.
        for address in [1 << 31 | 1 << 16, 1 << 31 | 1 << 11 | 1 << 8] {
            write32(&ports, 0, address);
            assert_eq!(read32(&ports, 4), u32::MAX);
            write32(&ports, 4, 0);
        }
        assert_eq!(read32(&ecam, 1 << 15 | 0x10), 0xc034_0004);
    }

    #[test]
    fn only_a_dword_reaches_the_address_register() {
        let ports = ConfigPorts::new(root(&[]));
        write32(&ports, 0, 0xffff_ffff);
        assert_eq!(read32(&ports, 0), 0x80ff_fffc, "reserved bits read as zero");
        write32(&ports, 0, 1 << 31);
        assert_eq!(read32(&ports, 4), 0x0008_1b36);
        for (offset, data) in [(0, &[0xff_u8; 1][..]), (0, &[0xff; 2]), (1, &[0x06]), (2, &[0xff; 2]), (1, &[0xff; 4])]
        {
            ports.write(offset, data);
            let mut back = vec![0; data.len()];
            ports.read(offset, &mut back);
            assert!(back.iter().all(|&byte| byte == 0xff), "nobody answers there");
        }
        assert_eq!(read32(&ports, 0), 1 << 31);
        write32(&ports, 0, 0);
        assert_eq!(read32(&ports, 4), u32::MAX, "disabled");
    }

    #[test]
    fn bars_are_assigned_in_the_windows_and_aligned() {
        let sizes = [[0x1000, 0x10_0000], [0x1000_0000, 0x1000], [0x1_0000, 0x20], [0x2000_0000, 0x1000]];
        let devices: Vec<_> = sizes.map(Probe::new).into();
        let root = root(&devices);
        root.assign_bars(LOW, HIGH).unwrap();
        let mut ranges = vec![];
        for device in &devices {
            let fresh = |index| device.config.lock().unwrap().decoded(index);
            assert_eq!((fresh(0), fresh(2)), (None, None), "decoding is off");
            device.config_write(4, &[2]);
            ranges.extend(device.bars.iter().map(|(index, spec)| (device.bars.base(index).unwrap(), spec.size)));
        }
        ranges.sort_unstable();
        for &(base, size) in &ranges {
            assert_eq!(base % size, 0);
            let inside = |window: &Range<u64>| window.start <= base && base + size <= window.end;
            assert!(inside(&LOW) || inside(&HIGH), "{base:#x}");
        }
        assert!(ranges.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{ranges:x?}");
    }

    #[test]
    fn a_bar_without_room_is_an_error() {
        let root = root(&[Probe::new([0x1000, 0x8000_0000])]);
        let error = root.assign_bars(LOW, HIGH).unwrap_err();
        assert_eq!(error, RootError::NoRoom { bar: 2, size: 0x8000_0000 });
    }

    #[test]
    fn accesses_follow_the_bars() {
        let (one, two) = (Probe::new([0x1_0000, 0x1000]), Probe::new([0x1_0000, 0x1000]));
        let root = root(&[one.clone(), two.clone()]);
        root.assign_bars(LOW, HIGH).unwrap();
        let window = MemoryWindow::new(root.clone(), LOW.start);
        let high = MemoryWindow::new(root, HIGH.start);
        assert_eq!(read32(&window, 0), u32::MAX, "nobody decodes yet");
        one.config_write(4, &[2]);
        two.config_write(4, &[2]);
        let base = two.bars.base(0).unwrap();
        window.write(base - LOW.start + 8, &[1, 2]);
        window.write(two.bars.base(2).unwrap() - LOW.start + 0xfff, &[3]);
        assert_eq!(two.seen(), [(0, 8, vec![1, 2]), (2, 0xfff, vec![3])]);
        assert_eq!(one.seen(), []);
        assert_eq!(read32(&window, two.bars.base(2).unwrap() - LOW.start + 4), 0x2424_2424);
        // The guest moves it above 4 GiB, with decoding on.
        two.config_write(0x10, &0_u32.to_le_bytes());
        two.config_write(0x14, &0x41_u32.to_le_bytes());
        assert_eq!(read32(&window, base - LOW.start), u32::MAX);
        high.write(0x1_0000_0000 + 0xffff, &[7]);
        assert_eq!(two.seen(), [(0, 0xffff, vec![7])]);
        assert_eq!(read32(&high, 0x1_0000_0000 + 0xfffe), u32::MAX, "across the end of the BAR");
        two.config_write(4, &[0]);
        high.write(0x1_0000_0000, &[7]);
        assert_eq!(two.seen(), []);
    }

    fn functions_found(root: &Arc<PciRoot>) -> Vec<(u64, u64)> {
        // As a driver scans: further functions only where function 0 says so (PCI Local Bus 3.0, 6.2.1).
        let ecam = Ecam::new(root.clone());
        let header = |slot: u64| read32(&ecam, slot << 15 | 0xc);
        let present = |slot: u64, function: u64| read32(&ecam, slot << 15 | function << 12) != u32::MAX;
        (1..32)
            .flat_map(|slot| (0..8).map(move |function| (slot, function)))
            .filter(|&(slot, function)| present(slot, function) && (function == 0 || header(slot) & 1 << 23 != 0))
            .collect()
    }

    #[test]
    fn a_scan_finds_as_many_devices_as_there_are() {
        let device = || Probe::new([0x1000, 0x1000]);
        for count in [0, 1, 31, 32, 63, 248] {
            let root = root(&(0..count).map(|_| device()).collect::<Vec<_>>());
            let found = functions_found(&root);
            assert_eq!(found.len(), count);
            assert!(found.is_sorted());
            assert_eq!(found.iter().any(|found| found.1 > 0), count > 31);
        }
        let devices = (0..249).map(|_| device() as Arc<dyn PciDevice>).collect();
        assert_eq!(PciRoot::new(devices).err(), Some(RootError::TooMany(249)));
    }

    #[test]
    fn a_byte_read_of_the_header_type_says_multi_function() {
        let root = root(&(0..32).map(|_| Probe::new([0x1000, 0x1000])).collect::<Vec<_>>());
        let ecam = Ecam::new(root);
        let mut byte = [0];
        ecam.read(1 << 15 | 0xe, &mut byte);
        assert_eq!(byte, [0x80]);
        ecam.read(1 << 15 | 1 << 12 | 0xe, &mut byte);
        assert_eq!(byte, [0]);
        ecam.read(1 << 15 | 0xf, &mut byte);
        assert_eq!(byte, [0]);
    }

    proptest! {
        /// Any access by any way is survived, and the two mechanisms agree afterwards.
        #[test]
        fn noise_is_harmless(
            steps in prop::collection::vec(
                (0_u8..3, any::<u32>(), prop::collection::vec(any::<u8>(), 1..9), any::<bool>()),
                1..60,
            ),
        ) {
            let root = root(&[Probe::new([0x1000, 0x1000])]);
            let (ports, ecam) = (ConfigPorts::new(root.clone()), Ecam::new(root.clone()));
            let window = MemoryWindow::new(root, LOW.start);
            for (kind, offset, mut data, write) in steps {
                let (device, size): (&dyn BusDevice, u64) = match kind {
                    0 => (&ports, 8),
                    1 => (&ecam, 0x1_0000),
                    _ => (&window, LOW.end - LOW.start),
                };
                let offset = u64::from(offset) % size;
                data.truncate((size - offset) as usize);
                if write { device.write(offset, &data) } else { device.read(offset, &mut data) }
            }
            for register in (0..0x100_u32).step_by(4) {
                write32(&ports, 0, 1 << 31 | 1 << 11 | register);
                prop_assert_eq!(read32(&ports, 4), read32(&ecam, u64::from(1 << 15 | register)));
            }
        }
    }
}
