//! Drives the transport as a guest does: through configuration space and BAR accesses, by what the capabilities say.

use std::collections::BTreeMap;

use vm_memory::GuestAddress;

use super::*;
use crate::bus::BusDevice;
use crate::pci::msix::MsiMessage;
use crate::pci::root::{Ecam, MemoryWindow, PciRoot};
use crate::pci::table::MsiTable;
use crate::virtio::device::{ActivateError, Activation, Interrupt};
use crate::virtio::driver::{Driver, writable};
use crate::virtio::queue::{Chain, QueueLayout};
use crate::virtio::rng::Rng;

mod doorbells;
mod hostile;
mod interrupts;
mod registers;
mod reset;

const WINDOW: u64 = 0xc000_0000;
const WINDOW_SIZE: u64 = 0x2000_0000;
const GSI: u32 = 30;
/// The first device behind the host bridge.
const SLOT: u64 = 1;
const VERSION_1: u64 = 1 << 32;
const EVENT_IDX: u64 = 1 << 29;
const INDIRECT_DESC: u64 = 1 << 28;
const OFFERED: u64 = 0b101;

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 64;
const FAILED: u8 = 128;

/// Ioeventfds as a table.
#[derive(Default)]
struct DoorbellTable {
    attached: Mutex<BTreeMap<u64, EventFd>>,
    failing: Mutex<bool>,
    calls: Mutex<usize>,
}

impl Doorbells for DoorbellTable {
    fn attach(&self, address: u64, event: &EventFd) -> io::Result<()> {
        *self.calls.lock().unwrap() += 1;
        if *self.failing.lock().unwrap() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let before = self.attached.lock().unwrap().insert(address, event.try_clone()?);
        assert!(before.is_none(), "{address:#x} is attached twice");
        Ok(())
    }

    fn detach(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        self.attached.lock().unwrap().remove(&address).expect("what is detached was attached");
        Ok(())
    }
}

/// What the device saw; the test plays its worker.
#[derive(Default)]
struct Seen {
    active: Option<Activation>,
    activations: usize,
    resets: usize,
    refuse: bool,
    config: [u8; 4],
}

struct Device(Arc<Mutex<Seen>>);

impl VirtioDevice for Device {
    fn device_type(&self) -> u32 {
        2
    }
    fn features(&self) -> u64 {
        OFFERED
    }
    fn queue_sizes(&self) -> &[u16] {
        &[64, 16]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let seen = self.0.lock().unwrap();
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = seen.config.get(at).copied().unwrap_or(0);
        }
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut seen = self.0.lock().unwrap();
        for (at, &byte) in (offset as usize..).zip(data) {
            seen.config.get_mut(at).into_iter().for_each(|place| *place = byte);
        }
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut seen = self.0.lock().unwrap();
        assert!(seen.active.is_none(), "activated twice without a reset");
        if seen.refuse {
            return Err(ActivateError { what: "test", source: io::Error::other("refused") });
        }
        seen.activations += 1;
        seen.active = Some(activation);
        Ok(())
    }
    fn reset(&mut self) {
        let mut seen = self.0.lock().unwrap();
        seen.active = None;
        seen.resets += 1;
    }
}

struct Guest {
    memory: Arc<GuestMemoryMmap>,
    msi: Arc<MsiTable>,
    doorbells: Arc<DoorbellTable>,
    seen: Arc<Mutex<Seen>>,
    device: Arc<VirtioPci>,
    ecam: Ecam,
    window: MemoryWindow,
    /// Offsets of the structures in BAR 0, by cfg_type.
    structures: BTreeMap<u8, u64>,
    multiplier: u64,
    window_cap: u64,
    msix_cap: u64,
}

impl Guest {
    fn new(ioeventfd: bool) -> Self {
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap());
        let (msi, doorbells, seen) = (Arc::new(MsiTable::default()), Arc::default(), Arc::default());
        let device = Box::new(Device(Arc::clone(&seen)));
        let doorbells: Arc<DoorbellTable> = doorbells;
        let device = VirtioPci::new(device, memory.clone(), GSI, msi.clone(), doorbells.clone(), ioeventfd).unwrap();
        let root = PciRoot::new(vec![device.clone()]).unwrap();
        root.assign_bars(WINDOW..WINDOW + WINDOW_SIZE, 0..0).unwrap();
        let root = Arc::new(root);
        let mut guest = Self {
            memory,
            msi,
            doorbells,
            seen,
            device,
            ecam: Ecam::new(root.clone()),
            window: MemoryWindow::new(root, WINDOW),
            structures: BTreeMap::new(),
            multiplier: 0,
            window_cap: 0,
            msix_cap: 0,
        };
        guest.find_capabilities();
        guest.config_write(0x04, &[6, 0]);
        guest
    }

    /// Walks the list as 4.1.4 tells a driver to.
    fn find_capabilities(&mut self) {
        let mut at = u64::from(self.config32(0x34)) & 0xff;
        while at != 0 {
            let head = self.config32(at);
            match (head as u8, (head >> 24) as u8) {
                (0x09, 5) => self.window_cap = at,
                (0x09, cfg_type) => {
                    assert_eq!(self.config32(at + 4) as u8, 0, "BAR");
                    self.structures.insert(cfg_type, u64::from(self.config32(at + 8)));
                    if cfg_type == 2 {
                        assert_eq!(head >> 16 & 0xff, 20, "cap_len with the multiplier");
                        self.multiplier = u64::from(self.config32(at + 16));
                    }
                }
                (0x11, _) => self.msix_cap = at,
                other => panic!("unknown capability {other:x?}"),
            }
            at = u64::from(head >> 8 & 0xff);
        }
        assert_eq!(self.structures.keys().copied().collect::<Vec<_>>(), [1, 2, 3, 4]);
    }

    fn config32(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.ecam.read(SLOT << 15 | offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn config_write(&self, offset: u64, data: &[u8]) {
        self.ecam.write(SLOT << 15 | offset, data);
    }

    fn base(&self) -> u64 {
        u64::from(self.config32(0x10) & !0xf) | u64::from(self.config32(0x14)) << 32
    }

    fn bar_read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.window.read(self.base() - WINDOW + offset, &mut data);
        data
    }

    fn bar_write(&self, offset: u64, data: &[u8]) {
        self.window.write(self.base() - WINDOW + offset, data);
    }

    fn common<const N: usize>(&self, offset: u64) -> u64 {
        let mut value = [0; 8];
        value[..N].copy_from_slice(&self.bar_read::<N>(self.structures[&1] + offset));
        u64::from_le_bytes(value)
    }

    fn set_common<const N: usize>(&self, offset: u64, value: u64) {
        self.bar_write(self.structures[&1] + offset, &value.to_le_bytes()[..N]);
    }

    fn status(&self) -> u8 {
        self.common::<1>(0x14) as u8
    }

    fn set_status(&self, status: u8) -> u8 {
        self.set_common::<1>(0x14, u64::from(status));
        self.status()
    }

    fn isr(&self) -> u8 {
        self.bar_read::<1>(self.structures[&3])[0]
    }

    fn accept(&self, features: u64) {
        for word in 0..2 {
            self.set_common::<4>(0x08, word);
            self.set_common::<4>(0x0c, features >> (32 * word) & 0xffff_ffff);
        }
    }

    fn negotiate(&self, features: u64) -> u8 {
        self.set_status(0);
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        self.accept(features);
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
    }

    fn set_up_queue(&self, index: u64, layout: QueueLayout, vector: u64) {
        self.set_common::<2>(0x16, index);
        self.set_common::<2>(0x18, u64::from(layout.size));
        self.set_common::<2>(0x1a, vector);
        for (register, address) in [(0x20, layout.desc), (0x28, layout.driver), (0x30, layout.device)] {
            self.set_common::<4>(register, address & 0xffff_ffff);
            self.set_common::<4>(register + 4, address >> 32);
        }
        self.set_common::<2>(0x1c, 1);
    }

    /// A driver's whole set-up with one queue, the second.
    fn start(&self, features: u64) -> Driver {
        assert_eq!(self.negotiate(features), ACKNOWLEDGE | DRIVER | FEATURES_OK);
        let driver = Driver::new(self.memory.clone(), 0x1000, 16);
        self.set_common::<2>(0x10, 0);
        self.set_up_queue(1, driver.layout(), 2);
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        driver
    }

    fn msix_control(&self, enabled: bool, masked: bool) {
        self.config_write(self.msix_cap + 3, &[u8::from(enabled) << 7 | u8::from(masked) << 6]);
    }

    fn table(&self) -> u64 {
        let table = self.config32(self.msix_cap + 4);
        assert_eq!(table & 7, 0, "BAR");
        u64::from(table)
    }

    fn program_vector(&self, vector: u64, masked: bool) {
        let at = self.table() + 16 * vector;
        self.bar_write(at, &0xfee0_0000_u64.to_le_bytes());
        self.bar_write(at + 8, &(0x4000 + vector as u32).to_le_bytes());
        self.bar_write(at + 12, &u32::from(masked).to_le_bytes());
    }

    fn doorbell(&self, queue: u64) -> u64 {
        self.set_common::<2>(0x16, queue);
        self.structures[&2] + self.common::<2>(0x1e) * self.multiplier
    }

    fn kicked(&self) -> bool {
        let seen = self.seen.lock().unwrap();
        seen.active.as_ref().unwrap().queues[0].kick.read().is_ok()
    }

    fn interrupt(&self) -> Arc<dyn Interrupt> {
        self.seen.lock().unwrap().active.as_ref().unwrap().interrupt.clone()
    }
}

fn raised(vector: u32) -> Vec<(u32, MsiMessage)> {
    vec![(GSI + vector, MsiMessage { address: 0xfee0_0000, data: 0x4000 + vector })]
}
