//! The root bus: 32 slots of one function each, the host bridge in slot 0, and the three ways a guest reaches them.
//! Built once; afterwards every vCPU thread looks up without a lock, and a function locks what it must.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;

use super::config::{BarWidth, Bars, Configuration, Identity};
use crate::bus::BusDevice;

/// Slots on the bus.
pub const SLOTS: u8 = 32;

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

/// The windows hold fewer bytes than the BARs ask for.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("no room for BAR {bar} of PCI slot {slot} ({size:#x} bytes); use fewer devices")]
pub struct NoRoom {
    /// Slot of the function.
    pub slot: u8,
    /// Index of the BAR.
    pub bar: usize,
    /// Its size in bytes.
    pub size: u64,
}

/// The functions on bus 0.
pub struct PciRoot {
    slots: [Option<Arc<dyn PciDevice>>; SLOTS as usize],
}

impl Default for PciRoot {
    fn default() -> Self {
        let mut root = Self { slots: Default::default() };
        root.slots[0] = Some(Arc::new(HostBridge::new()));
        root
    }
}

impl PciRoot {
    /// Puts `device` into `slot` as function 0. Slot 0 has the host bridge.
    ///
    /// # Panics
    /// If the slot is taken or does not exist: the layout of the machine is ours.
    pub fn add(&mut self, slot: u8, device: Arc<dyn PciDevice>) {
        let place = &mut self.slots[usize::from(slot)];
        assert!(place.is_none(), "PCI slot {slot} is taken");
        *place = Some(device);
    }

    /// Gives every BAR an address, as firmware does: naturally aligned, in `low` (below 4 GiB) while there is room,
    /// else in `high` if the BAR is 64 bits wide. Memory decoding is left off; drivers enable it.
    ///
    /// # Errors
    /// [`NoRoom`] if a BAR fits nowhere.
    pub fn assign_bars(&self, low: Range<u64>, high: Range<u64>) -> Result<(), NoRoom> {
        let mut bars: Vec<_> = (0..SLOTS)
            .filter_map(|slot| Some((slot, self.function(slot)?)))
            .flat_map(|(slot, device)| device.bars().iter().map(move |(index, spec)| (slot, device, index, spec)))
            .collect();
        // Those that must be low first, and the largest first: then alignment leaves hardly a gap.
        bars.sort_by_key(|(.., spec)| (spec.width == BarWidth::Bits64, std::cmp::Reverse(spec.size)));
        let (mut low, mut high) = (low, high);
        for (slot, device, index, spec) in bars {
            let wide = spec.width == BarWidth::Bits64;
            let base = take(&mut low, spec.size)
                .or_else(|| if wide { take(&mut high, spec.size) } else { None })
                .ok_or(NoRoom { slot, bar: index, size: spec.size })?;
            let register = 0x10 + 4 * index as u16;
            device.config_write(register, &(base as u32).to_le_bytes());
            if wide {
                device.config_write(register + 4, &((base >> 32) as u32).to_le_bytes());
            }
        }
        Ok(())
    }

    fn function(&self, slot: u8) -> Option<&dyn PciDevice> {
        self.slots.get(usize::from(slot))?.as_deref()
    }

    fn config_read(&self, address: FunctionAddress, offset: u16, data: &mut [u8]) {
        match self.addressed(address) {
            Some(device) => device.config_read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn config_write(&self, address: FunctionAddress, offset: u16, data: &[u8]) {
        if let Some(device) = self.addressed(address) {
            device.config_write(offset, data);
        }
    }

    fn addressed(&self, address: FunctionAddress) -> Option<&dyn PciDevice> {
        (address.bus == 0 && address.function == 0).then(|| self.function(address.slot)).flatten()
    }

    /// The function whose BAR decodes the access now, the BAR and the offset in it.
    fn decoding(&self, address: u64, len: usize) -> Option<(&dyn PciDevice, usize, u64)> {
        self.slots.iter().flatten().find_map(|device| {
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

    fn root(devices: &[(u8, Arc<Probe>)]) -> Arc<PciRoot> {
        let mut root = PciRoot::default();
        for (slot, device) in devices {
            root.add(*slot, device.clone());
        }
        Arc::new(root)
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
        let root = root(&[(3, Probe::new([0x1000, 0x1000]))]);
        let (ports, ecam) = (ConfigPorts::new(root.clone()), Ecam::new(root));
        let ids: Vec<_> = (0..4).map(|slot| read32(&ecam, slot << 15)).collect();
        assert_eq!(ids, [0x0008_1b36, u32::MAX, u32::MAX, 0x0002_0001]);
        assert_eq!(read32(&ecam, 8) >> 8, 0x06_00_00, "the class of a host bridge");
        assert_eq!(read32(&ecam, 3 << 15 | 1 << 12), u32::MAX, "function 1");
        for slot in 0..32_u32 {
            for register in (0..0x100).step_by(4) {
                write32(&ports, 0, 1 << 31 | slot << 11 | register);
                let by_ecam = read32(&ecam, u64::from(slot << 15 | register));
                assert_eq!(read32(&ports, 4), by_ecam, "slot {slot} register {register:#x}");
            }
        }
        // Writes by one are seen by the other, and narrow ones touch only their bytes.
        write32(&ports, 0, 1 << 31 | 3 << 11 | 0x10);
        ports.write(6, &[0x34, 0x12]);
        assert_eq!(read32(&ecam, 3 << 15 | 0x10), 0x1234_0004);
        ecam.write(3 << 15 | 0x13, &[0xc0]);
        assert_eq!(read32(&ports, 4), 0xc034_0004);
        let mut byte = [0];
        ports.read(7, &mut byte);
        assert_eq!(byte, [0xc0]);
        let mut across = [0; 4];
        ecam.read((4 << 15) - 2, &mut across);
        assert_eq!(across, [0xff; 4], "not into the next function");
        // Another bus, another function.
        for address in [1 << 31 | 1 << 16, 1 << 31 | 3 << 11 | 1 << 8] {
            write32(&ports, 0, address);
            assert_eq!(read32(&ports, 4), u32::MAX);
            write32(&ports, 4, 0);
        }
        assert_eq!(read32(&ecam, 3 << 15 | 0x10), 0xc034_0004);
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
        let devices: Vec<_> = (1..).zip(sizes).map(|(slot, sizes)| (slot, Probe::new(sizes))).collect();
        let root = root(&devices);
        root.assign_bars(LOW, HIGH).unwrap();
        let mut ranges = vec![];
        for (_, device) in &devices {
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
        let root = root(&[(5, Probe::new([0x1000, 0x8000_0000]))]);
        let error = root.assign_bars(LOW, HIGH).unwrap_err();
        assert_eq!(error, NoRoom { slot: 5, bar: 2, size: 0x8000_0000 });
    }

    #[test]
    fn accesses_follow_the_bars() {
        let (one, two) = (Probe::new([0x1_0000, 0x1000]), Probe::new([0x1_0000, 0x1000]));
        let root = root(&[(1, one.clone()), (2, two.clone())]);
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

    #[test]
    #[should_panic(expected = "slot 0 is taken")]
    fn slot_0_has_the_host_bridge() {
        root(&[(0, Probe::new([0x1000, 0x1000]))]);
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
            let root = root(&[(1, Probe::new([0x1000, 0x1000]))]);
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
