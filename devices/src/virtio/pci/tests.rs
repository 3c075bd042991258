//! Drives the transport as a guest does: through configuration space and BAR accesses, by what the capabilities say.

use std::collections::BTreeMap;

use proptest::prelude::*;
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

#[test]
fn identity_is_modern() {
    let guest = Guest::new(true);
    assert_eq!(guest.config32(0x00), 0x1042_1af4);
    assert!(guest.config32(0x08) as u8 >= 1, "revision");
    assert!(guest.config32(0x2c) >> 16 >= 0x40, "subsystem");
    assert_eq!(guest.config32(0x3c) & 0xff00, 0, "no interrupt pin");
    assert_eq!(guest.config32(guest.msix_cap) >> 16, 3 - 1, "table size: two queues and the configuration");
    assert_eq!(guest.device.vectors(), 3);
    assert_eq!(guest.common::<2>(0x12), 2, "num_queues");
}

#[test]
fn a_device_without_configuration_shows_no_structure_for_it() {
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap());
    let doorbells: Arc<DoorbellTable> = Arc::default();
    let rng = Box::new(Rng::new().unwrap());
    let device = VirtioPci::new(rng, memory, GSI, Arc::new(MsiTable::default()), doorbells, true).unwrap();
    let byte = |offset: u8| {
        let mut byte = [0];
        device.config_read(offset.into(), &mut byte);
        byte[0]
    };
    let (mut at, mut types) = (byte(0x34), Vec::new());
    while at != 0 {
        if byte(at) == 0x09 {
            types.push(byte(at + 3));
        }
        at = byte(at + 1);
    }
    assert_eq!(types, [1, 2, 3, 5], "cfg_type of 4.1.4: no DEVICE_CFG");
}

#[test]
fn features_are_offered_in_words() {
    let guest = Guest::new(true);
    let words = [0, 1, 2, 4, u32::MAX].map(|select| {
        guest.set_common::<4>(0x00, u64::from(select));
        guest.common::<4>(0x04)
    });
    assert_eq!(words, [OFFERED | EVENT_IDX | INDIRECT_DESC, VERSION_1 >> 32, 0, 0, 0]);
}

#[test]
fn features_ok_needs_version_1_and_nothing_that_was_not_offered() {
    let guest = Guest::new(true);
    let before = ACKNOWLEDGE | DRIVER;
    for bad in [0, OFFERED, VERSION_1 | 0b10, VERSION_1 | 1 << 33, VERSION_1 | 1 << 40] {
        assert_eq!(guest.negotiate(bad), before, "{bad:#x}");
        assert_eq!(guest.set_status(before | FEATURES_OK | DRIVER_OK), before);
    }
    for good in [VERSION_1, VERSION_1 | 0b100, VERSION_1 | OFFERED | EVENT_IDX | INDIRECT_DESC] {
        assert_eq!(guest.negotiate(good), before | FEATURES_OK, "{good:#x}");
        guest.accept(0);
        guest.set_common::<4>(0x08, 1);
        assert_eq!(guest.common::<4>(0x0c), 1, "settled");
    }
    // A bit in the third word.
    guest.set_status(0);
    guest.set_status(before);
    guest.accept(VERSION_1);
    guest.set_common::<4>(0x08, 2);
    guest.set_common::<4>(0x0c, 1);
    assert_eq!(guest.set_status(before | FEATURES_OK), before);
    assert_eq!(guest.seen.lock().unwrap().activations, 0);
}

#[test]
fn status_bits_come_in_order_and_stay() {
    let guest = Guest::new(true);
    assert_eq!(guest.status(), 0);
    for jump in [DRIVER, FEATURES_OK, DRIVER_OK, DRIVER | DRIVER_OK, NEEDS_RESET, 0x30] {
        assert_eq!(guest.set_status(jump), 0, "{jump:#x}");
    }
    assert_eq!(guest.set_status(ACKNOWLEDGE), ACKNOWLEDGE);
    assert_eq!(guest.set_status(ACKNOWLEDGE | DRIVER_OK), ACKNOWLEDGE);
    assert_eq!(guest.set_status(DRIVER), ACKNOWLEDGE | DRIVER, "what is set stays set");
    assert_eq!(guest.set_status(ACKNOWLEDGE | DRIVER | DRIVER_OK), ACKNOWLEDGE | DRIVER);
    assert_eq!(guest.set_status(ACKNOWLEDGE | DRIVER | FAILED), ACKNOWLEDGE | DRIVER | FAILED);
    assert_eq!(guest.set_status(0), 0);
}

#[test]
fn queue_registers_answer_for_the_selected_queue() {
    let guest = Guest::new(true);
    guest.negotiate(VERSION_1);
    for (index, size) in [(0, 64), (1, 16)] {
        guest.set_common::<2>(0x16, index);
        assert_eq!(guest.common::<2>(0x18), size);
        assert_eq!(guest.common::<2>(0x1a), 0xffff);
        for bad in [0, 3, size * 2, 0xffff] {
            guest.set_common::<2>(0x18, bad);
            assert_eq!(guest.common::<2>(0x18), size, "{bad}");
        }
        guest.set_common::<2>(0x18, 8);
        assert_eq!(guest.common::<2>(0x18), 8);
    }
    for absent in [2, 0x8000, 0xffff] {
        guest.set_common::<2>(0x16, absent);
        let layout = QueueLayout { size: 8, desc: 0x1000, driver: 0x2000, device: 0x3000 };
        guest.set_up_queue(absent, layout, 0);
        for register in [0x18, 0x1c, 0x1e, 0x20, 0x28, 0x30] {
            assert_eq!(guest.common::<2>(register), 0, "queue {absent} register {register:#x}");
        }
        assert_eq!(guest.common::<2>(0x1a), 0xffff);
    }
}

#[test]
fn an_enabled_queue_is_frozen() {
    let guest = Guest::new(true);
    guest.negotiate(VERSION_1);
    guest.set_common::<2>(0x16, 1);
    guest.set_common::<8>(0x20, 0x1234_5678_9abc_def0);
    assert_eq!((guest.common::<4>(0x20), guest.common::<4>(0x24)), (0x9abc_def0, 0x1234_5678));
    guest.set_common::<2>(0x1c, 2);
    assert_eq!(guest.common::<2>(0x1c), 0, "only 1 enables");
    guest.set_common::<2>(0x1c, 1);
    guest.set_common::<2>(0x1c, 0);
    guest.set_common::<2>(0x18, 8);
    guest.set_common::<4>(0x20, 0);
    assert_eq!((guest.common::<2>(0x1c), guest.common::<2>(0x18)), (1, 16));
    assert_eq!(guest.common::<8>(0x20), 0x1234_5678_9abc_def0);
}

/// A queue that is enabled too late is never handed to the device, so it must not look enabled (virtio 1.2, 3.1.1).
#[test]
fn a_queue_cannot_be_set_up_after_driver_ok() {
    let guest = Guest::new(true);
    guest.start(VERSION_1);
    guest.set_up_queue(0, QueueLayout { size: 8, desc: 0x4000, driver: 0x5000, device: 0x6000 }, 1);
    assert_eq!([0x18, 0x1a, 0x1c, 0x20].map(|register| guest.common::<2>(register)), [64, 1, 0, 0]);
}

#[test]
fn vectors_that_do_not_exist_read_back_as_none() {
    let guest = Guest::new(true);
    guest.set_common::<2>(0x16, 1);
    for register in [0x10, 0x1a] {
        assert_eq!(guest.common::<2>(register), 0xffff);
        for (given, kept) in [(2, 2), (3, 0xffff), (0, 0), (0xfffe, 0xffff), (1, 1), (0xffff, 0xffff)] {
            guest.set_common::<2>(register, given);
            assert_eq!(guest.common::<2>(register), kept);
        }
    }
}

#[test]
fn odd_widths_touch_only_their_bytes() {
    let guest = Guest::new(true);
    guest.set_common::<4>(0x08, 0);
    guest.set_common::<4>(0x0c, 0x1122_3344);
    guest.set_common::<1>(0x0e, 0xaa);
    assert_eq!(guest.common::<4>(0x0c), 0x11aa_3344);
    // Eight bytes over four registers: msix_config, num_queues (read-only), status, generation, queue_select.
    guest.set_common::<8>(0x10, 0x0001_0001_ffff_0002);
    assert_eq!(guest.common::<2>(0x10), 2);
    assert_eq!(guest.common::<2>(0x12), 2);
    assert_eq!(guest.status(), ACKNOWLEDGE);
    assert_eq!(guest.common::<2>(0x16), 1);
    assert_eq!(guest.common::<8>(0x10), 0x0001_0001_0002_0002);
    assert_eq!(guest.common::<8>(0x38), 0, "queue_notify_data, queue_reset and past the end");
    assert_eq!(guest.common::<8>(0xff0), 0);
}

#[test]
fn a_request_travels_by_eventfds() {
    let guest = Guest::new(true);
    guest.msix_control(true, false);
    (0..3).for_each(|vector| guest.program_vector(vector, false));
    let features = VERSION_1 | EVENT_IDX | 1;
    let mut driver = guest.start(features);
    assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    let head = driver.add(&[writable(0x8000, 4)]);
    let address = guest.base() + guest.doorbell(1);
    guest.doorbells.attached.lock().unwrap()[&address].write(1).unwrap();
    assert!(guest.kicked());
    {
        let mut seen = guest.seen.lock().unwrap();
        let active = seen.active.as_mut().unwrap();
        assert_eq!((active.features, active.queues.len(), active.queues[0].index), (features, 1, 1));
        let mut chain = Chain::default();
        assert!(active.queues[0].queue.pop(&mut chain).unwrap());
        active.queues[0].queue.push(chain.head, 4);
        let _ = active.queues[0].queue.publish();
        active.interrupt.queue(1);
    }
    assert_eq!(guest.msi.raised(), raised(2));
    assert_eq!(driver.used(), Some((head, 4)));
    assert_eq!(guest.isr(), 0, "MSI-X is on");
    guest.interrupt().config();
    assert_eq!(guest.msi.raised(), raised(0));
    guest.interrupt().queue(7);
    assert_eq!(guest.msi.raised(), []);
}

#[test]
fn without_msix_the_isr_tells() {
    let guest = Guest::new(true);
    guest.start(VERSION_1);
    assert_eq!(guest.isr(), 0);
    guest.interrupt().queue(1);
    assert_eq!((guest.isr(), guest.isr()), (1, 0), "reading clears");
    guest.interrupt().config();
    guest.interrupt().queue(1);
    assert_eq!((guest.isr(), guest.isr()), (3, 0));
    assert_eq!(guest.msi.calls(), 0);
}

#[test]
fn a_change_of_the_configuration_changes_its_generation() {
    let guest = Guest::new(true);
    guest.start(VERSION_1);
    let device = guest.structures[&4];
    guest.bar_write(device + 1, &[7, 8]);
    assert_eq!(guest.bar_read::<8>(device), [0, 7, 8, 0, 0, 0, 0, 0]);
    let before = guest.common::<1>(0x15);
    assert_eq!(guest.common::<1>(0x15), before);
    guest.interrupt().config();
    assert_ne!(guest.common::<1>(0x15), before);
}

#[test]
fn an_interrupt_raised_while_masked_is_delivered_at_unmask() {
    let guest = Guest::new(true);
    guest.msix_control(true, true);
    guest.program_vector(2, false);
    guest.start(VERSION_1);
    guest.interrupt().queue(1);
    let pba = u64::from(guest.config32(guest.msix_cap + 8));
    assert_eq!(guest.bar_read::<8>(pba), [0b100, 0, 0, 0, 0, 0, 0, 0]);
    guest.msix_control(true, false);
    assert_eq!((guest.msi.raised(), guest.bar_read::<8>(pba)), (raised(2), [0; 8]));
    guest.program_vector(2, true);
    guest.interrupt().queue(1);
    assert_eq!((guest.msi.raised(), guest.bar_read::<1>(pba)), (vec![], [0b100]));
    guest.program_vector(2, false);
    assert_eq!(guest.msi.raised(), raised(2));
}

#[test]
fn a_reset_ends_everything_and_the_device_starts_again() {
    let guest = Guest::new(true);
    for life in 1..=3 {
        let features = if life % 2 == 0 { VERSION_1 | EVENT_IDX } else { VERSION_1 };
        guest.start(features);
        assert_eq!(guest.seen.lock().unwrap().activations, 2 * life - 1);
        assert_eq!(guest.seen.lock().unwrap().active.as_ref().unwrap().features, features);
        guest.interrupt().queue(1);
        guest.bar_write(guest.doorbell(1), &[1, 0]);
        assert_eq!(guest.set_status(0), 0);
        assert!(guest.seen.lock().unwrap().active.is_none());
        assert_eq!(guest.isr(), 0);
        assert_eq!(guest.common::<2>(0x10), 0xffff);
        guest.set_common::<2>(0x16, 1);
        let registers = [0x18, 0x1a, 0x1c, 0x20].map(|register| guest.common::<2>(register));
        assert_eq!(registers, [16, 0xffff, 0, 0]);
        guest.set_common::<4>(0x08, 1);
        assert_eq!(guest.common::<4>(0x0c), 0, "no features");
        guest.start(VERSION_1);
        assert!(!guest.kicked(), "the old notification is gone");
        guest.set_status(0);
    }
}

#[test]
fn a_notification_before_driver_ok_is_kept() {
    for ioeventfd in [true, false] {
        let guest = Guest::new(ioeventfd);
        guest.negotiate(VERSION_1);
        let driver = Driver::new(guest.memory.clone(), 0x1000, 16);
        guest.set_up_queue(1, driver.layout(), 2);
        guest.bar_write(guest.doorbell(1), &1_u16.to_le_bytes());
        guest.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        assert!(guest.kicked());
    }
}

#[test]
fn what_cannot_start_needs_a_reset_and_recovers() {
    let guest = Guest::new(true);
    let running = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
    guest.msix_control(true, false);
    guest.program_vector(0, false);
    // Rings outside memory.
    guest.negotiate(VERSION_1);
    guest.set_common::<2>(0x10, 0);
    guest.set_up_queue(0, QueueLayout { size: 8, desc: 1 << 40, driver: 2 << 40, device: 3 << 40 }, 1);
    assert_eq!(guest.set_status(running), running | NEEDS_RESET);
    assert_eq!(guest.msi.raised(), raised(0), "a configuration interrupt");
    assert!(guest.seen.lock().unwrap().active.is_none());
    // A device that cannot.
    guest.seen.lock().unwrap().refuse = true;
    guest.start(VERSION_1);
    assert_eq!((guest.status(), guest.msi.raised()), (running | NEEDS_RESET, raised(0)));
    assert_eq!(guest.set_status(running), running | NEEDS_RESET);
    // A driver that breaks a ring while it runs.
    guest.seen.lock().unwrap().refuse = false;
    guest.start(VERSION_1);
    assert_eq!((guest.status(), guest.msi.raised()), (running, vec![]));
    guest.interrupt().needs_reset();
    assert_eq!((guest.status(), guest.msi.raised()), (running | NEEDS_RESET, raised(0)));
    guest.start(VERSION_1);
    assert_eq!(guest.status(), running);
}

#[test]
fn the_configuration_window_reaches_the_structures() {
    let guest = Guest::new(true);
    let cap = guest.window_cap;
    let aim = |structure: u8, offset: u64, len: u32| {
        guest.config_write(cap + 4, &[0]);
        guest.config_write(cap + 8, &((guest.structures[&structure] + offset) as u32).to_le_bytes());
        guest.config_write(cap + 12, &len.to_le_bytes());
    };
    // As a firmware does, with memory decoding off.
    guest.config_write(0x04, &[0]);
    aim(1, 0x00, 4);
    guest.config_write(cap + 16, &1_u32.to_le_bytes());
    aim(1, 0x04, 4);
    assert_eq!(guest.config32(cap + 16), 1, "VERSION_1 in the second word");
    aim(1, 0x14, 1);
    guest.config_write(cap + 16, &[ACKNOWLEDGE, 0xff, 0xff, 0xff]);
    assert_eq!(guest.config32(cap + 16) as u8, ACKNOWLEDGE);
    aim(1, 0x12, 2);
    assert_eq!(guest.config32(cap + 16) as u16, 2);
    // The MSI-X table, which is behind the same lock as configuration space.
    guest.config_write(cap + 8, &(guest.table() as u32 + 8).to_le_bytes());
    guest.config_write(cap + 12, &[4]);
    guest.config_write(cap + 16, &0x4021_u32.to_le_bytes());
    assert_eq!(guest.config32(cap + 16), 0x4021);
    // What aims at nothing does nothing.
    let tries =
        [(0, 0x1_0000, 4), (0, 0xfffe, 4), (0, 0x14, 3), (0, 0x14, 0), (0, 0x14, 8), (1, 0x14, 1), (0, u32::MAX, 4)];
    for (bar, offset, len) in tries {
        guest.config_write(cap + 4, &[bar]);
        guest.config_write(cap + 8, &u32::to_le_bytes(offset));
        guest.config_write(cap + 12, &u32::to_le_bytes(len));
        guest.config_write(cap + 16, &[0x50; 4]);
        assert_eq!(guest.config32(cap + 16), 0x5050_5050, "what was written, not what is there");
    }
    guest.config_write(0x04, &[2]);
    assert_eq!(guest.status(), ACKNOWLEDGE);
}

#[test]
fn a_notification_through_the_configuration_window_arrives() {
    let guest = Guest::new(true);
    guest.start(VERSION_1);
    let doorbell = guest.doorbell(1);
    guest.config_write(guest.window_cap + 8, &(doorbell as u32).to_le_bytes());
    guest.config_write(guest.window_cap + 12, &2_u32.to_le_bytes());
    assert!(!guest.kicked());
    guest.config_write(guest.window_cap + 16, &[1, 0]);
    assert!(guest.kicked());
}

#[test]
fn doorbells_follow_the_bar() {
    let guest = Guest::new(true);
    let offsets = [guest.doorbell(0), guest.doorbell(1)];
    let attached = || guest.doorbells.attached.lock().unwrap().keys().copied().collect::<Vec<_>>();
    assert_eq!(attached(), offsets.map(|offset| guest.base() + offset));
    guest.config_write(0x04, &[0]);
    assert!(attached().is_empty());
    guest.config_write(0x10, &0xd000_0000_u32.to_le_bytes());
    assert!(attached().is_empty());
    guest.config_write(0x04, &[2]);
    assert_eq!(attached(), offsets.map(|offset| 0xd000_0000 + offset));
    // Moved while it is decoded, one half after the other.
    guest.config_write(0x14, &1_u32.to_le_bytes());
    guest.config_write(0x10, &[0; 4]);
    assert_eq!(attached(), offsets.map(|offset| 0x1_0000_0000 + offset));
    let calls = *guest.doorbells.calls.lock().unwrap();
    guest.config_write(0x04, &[6]);
    guest.config_write(0x3c, &[9]);
    assert_eq!(*guest.doorbells.calls.lock().unwrap(), calls, "nothing moved");
    guest.device.reset();
    assert!(attached().is_empty());
}

#[test]
fn doorbells_that_cannot_be_attached_exit() {
    let guest = Guest::new(true);
    *guest.doorbells.failing.lock().unwrap() = true;
    guest.config_write(0x10, &0xd000_0000_u32.to_le_bytes());
    assert!(guest.doorbells.attached.lock().unwrap().is_empty());
    guest.start(VERSION_1);
    guest.bar_write(guest.doorbell(1), &1_u32.to_le_bytes());
    assert!(guest.kicked());
    *guest.doorbells.failing.lock().unwrap() = false;
    guest.config_write(0x10, &0xd800_0000_u32.to_le_bytes());
    assert_eq!(guest.doorbells.attached.lock().unwrap().len(), 2);
}

#[test]
fn without_ioeventfd_doorbells_exit() {
    let guest = Guest::new(false);
    assert!(guest.doorbells.attached.lock().unwrap().is_empty());
    guest.start(VERSION_1);
    for data in [&[1][..], &[1, 0], &[1, 0, 0, 0], &[1, 0, 0, 0, 0, 0, 0, 0]] {
        guest.bar_write(guest.doorbell(1), data);
        assert!(guest.kicked(), "any width");
    }
    guest.bar_write(guest.doorbell(0), &[0, 0]);
    assert!(!guest.kicked(), "the other queue");
    // Past the last queue.
    guest.bar_write(guest.doorbell(1) + guest.multiplier, &[2, 0]);
}

#[test]
fn doorbells_take_no_lock() {
    let guest = Guest::new(false);
    guest.start(VERSION_1);
    let doorbell = guest.base() - WINDOW + guest.doorbell(1);
    let (_transport, _function) = (guest.device.transport(), guest.device.function());
    guest.window.write(doorbell, &[1, 0]);
    assert!(guest.kicked());
}

#[test]
fn a_reset_of_the_function_is_power_on() {
    let guest = Guest::new(true);
    let fresh: Vec<_> = (0..0x100).step_by(4).map(|register| guest.config32(register)).collect();
    guest.msix_control(true, false);
    guest.program_vector(2, false);
    guest.start(VERSION_1);
    guest.interrupt().queue(1);
    guest.interrupt().config();
    assert_eq!(guest.msi.raised(), raised(2));
    guest.device.reset();
    assert!(guest.seen.lock().unwrap().active.is_none());
    assert_eq!((guest.msi.attached(), guest.msi.raised()), (vec![], vec![]));
    let mut pending = [0; 8];
    let pba = u64::from(guest.config32(guest.msix_cap + 8));
    guest.device.bar_read(0, pba, &mut pending);
    assert_eq!(pending, [0; 8]);
    guest.device.reset();
    let after: Vec<_> = (0..0x100).step_by(4).map(|register| guest.config32(register)).collect();
    // But for the command register and the address, which firmware and the driver give it.
    let same = |at: usize| fresh[at] == after[at] || at == 1 || at == 4;
    assert!((0..fresh.len()).all(same), "{fresh:x?} {after:x?}");
    assert_eq!((after[1] & 0xffff, after[4]), (0, 4));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A hostile guest: any accesses to configuration space and BAR 0, biased to the registers that matter. It is
    /// survived, doorbells are where the BAR is, and a reset brings a device that works.
    #[test]
    fn noise_is_harmless(
        steps in prop::collection::vec(
            (0_u8..6, any::<u16>(), prop::collection::vec(any::<u8>(), 1..9), any::<bool>()),
            1..150,
        ),
    ) {
        let guest = Guest::new(true);
        for (kind, offset, mut data, write) in steps {
            let offset = match kind {
                0 => u64::from(offset) % 0x200,
                1 => u64::from(offset) % 0x48,
                2 => guest.structures[&1] + u64::from(offset) % 0x40,
                3 => guest.table() + u64::from(offset) % 0x40,
                4 => guest.structures[&2] + u64::from(offset) % 0x10,
                _ => u64::from(offset),
            };
            match (kind, write) {
                (0..2, true) => guest.config_write(offset, &data),
                (0..2, false) => guest.ecam.read(SLOT << 15 | offset, &mut data),
                _ if offset + data.len() as u64 > layout::SIZE => {}
                (_, true) => guest.device.bar_write(0, offset, &data),
                (_, false) => guest.device.bar_read(0, offset, &mut data),
            }
            let attached = guest.doorbells.attached.lock().unwrap();
            let base = guest.device.bars().base(0).map(|base| base + layout::NOTIFY);
            prop_assert_eq!(attached.keys().next().copied(), base);
        }
        guest.config_write(0x04, &[0]);
        guest.config_write(0x10, &0xc000_0000_u32.to_le_bytes());
        guest.config_write(0x14, &[0; 4]);
        guest.config_write(0x04, &[2]);
        guest.start(VERSION_1);
        prop_assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        guest.bar_write(guest.doorbell(1), &[1]);
        prop_assert!(guest.kicked());
    }
}
