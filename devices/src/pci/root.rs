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
    /// Reads configuration space. `offset` is below 4096; any offset and length may come from a guest.
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

    /// Gives every BAR an address, as firmware does: naturally aligned, in `low` (below 4 GiB) while there is room, else in
    /// `high` if the BAR is 64 bits wide. Memory decoding is left off; drivers enable it.
    ///
    /// # Errors
    /// [`RootError::NoRoom`] if a BAR fits nowhere.
    pub fn assign_bars(&self, low: Range<u64>, high: Range<u64>) -> Result<(), RootError> {
        let devices = self.functions.iter().flatten();
        let mut bars: Vec<_> =
            devices.flat_map(|device| device.bars().iter().map(move |(index, spec)| (device, index, spec))).collect();
        // Largest first: then no alignment leaves a gap.
        bars.sort_by_key(|(.., spec)| std::cmp::Reverse(spec.size));
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
/// Only a dword access to the first port reaches the address register; narrower ones belong to other devices that a PC has
/// there (0xCF9) and that this machine has not.
pub struct ConfigPorts {
    root: Arc<PciRoot>,
    address: AtomicU32,
}

impl ConfigPorts {
    /// The ports of `root`.
    pub fn new(root: Arc<PciRoot>) -> Self {
        Self { root, address: AtomicU32::new(0) }
    }

    /// The function and register that an access to data port `port` (4 to 7) means; `None` while the enable bit is clear.
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

    /// `None` if the access would cross into the next function.
    fn target(offset: u64, len: usize) -> Option<(FunctionAddress, u16)> {
        let function = FunctionAddress {
            bus: (offset >> 20) as u8,
            slot: (offset >> 15) as u8 & 0x1f,
            function: (offset >> 12) as u8 & 7,
        };
        let register = offset & 0xfff;
        (register + len as u64 <= 0x1000).then_some((function, register as u16))
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match Self::target(offset, data.len()) {
            Some((function, register)) => self.root.config_read(function, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((function, register)) = Self::target(offset, data.len()) {
            self.root.config_write(function, register, data);
        }
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
