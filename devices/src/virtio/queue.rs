//! The device's side of a split virtqueue (virtio 1.2, 2.7). `virtio-queue` says whether a layout is valid; the rings are
//! read and written here, for a look-up in guest memory at each access would cost more than all the rest. Owned by one
//! thread at a time: the transport while it is being set up, then the worker.

use std::mem;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_ALIGN_SIZE,
    VRING_USED_F_NO_NOTIFY,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileMemory, VolatileSlice};

use super::area::Area;

/// How the driver broke a queue. The device then needs a reset (virtio 1.2, 2.1.2).
#[derive(Debug, Error, PartialEq, Eq)]
pub enum QueueError {
    /// Size, alignment or address of the rings.
    #[error(
        "the rings are not valid: size {size}, descriptors {desc:#x}, driver area {driver:#x}, device area {device:#x}"
    )]
    Layout {
        /// Entries.
        size: u16,
        /// Guest address of the descriptor table.
        desc: u64,
        /// Guest address of the available ring.
        driver: u64,
        /// Guest address of the used ring.
        device: u64,
    },
    /// The available index moved further than the queue is long, or an entry names no descriptor.
    #[error("the available ring is broken")]
    AvailRing,
    /// A chain that leaves the table, is longer than the queue, or nests indirect tables.
    #[error("the descriptor chain at head {0} is broken")]
    Chain(u16),
}

/// Where the driver put one queue, frozen at activation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueLayout {
    /// Entries: a power of two up to 32768.
    pub size: u16,
    /// Guest address of the descriptor table, 16-byte aligned.
    pub desc: u64,
    /// Guest address of the available ring (driver area), 2-byte aligned.
    pub driver: u64,
    /// Guest address of the used ring (device area), 4-byte aligned.
    pub device: u64,
}

/// One buffer of a chain. Not checked against guest memory: the device does that where it uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest address.
    pub address: GuestAddress,
    /// Length in bytes; a driver may say zero.
    pub len: u32,
    /// Device-writable, else device-readable.
    pub writable: bool,
}

/// A descriptor chain, flattened. Reused from request to request so that the hot path does not allocate.
#[derive(Debug, Default)]
pub struct Chain {
    /// The descriptor head: what [`Virtqueue::push`] takes back.
    pub head: u16,
    /// Its buffers in order.
    pub segments: Vec<Segment>,
}

/// A running split virtqueue.
#[derive(Debug)]
pub struct Virtqueue {
    memory: Arc<GuestMemoryMmap>,
    layout: QueueLayout,
    desc: Area,
    driver: Area,
    device: Area,
    event_idx: bool,
    indirect: bool,
    /// How many chains were taken and how many the driver offered when last asked; both modulo 2^16.
    taken: u16,
    offered: u16,
    /// How many chains are in the used ring and how many the driver knows of; both modulo 2^16.
    used: u16,
    published: u16,
}

/// Offset of `flags` in the driver and the device area (2.7.6, 2.7.8).
const FLAGS: usize = 0;
/// Offset of `idx`, after `flags`.
const IDX: usize = 2;
/// Offset of `ring`, after `idx`.
const RING: usize = 4;
/// Bytes of a descriptor.
const DESCRIPTOR: usize = VRING_DESC_ALIGN_SIZE as usize;

/// The longest chain through an indirect table, if the queue is not longer. The specification says the queue size, but
/// Linux halves a queue that it cannot allocate and keeps its segment limit, so a short queue may see longer chains.
const INDIRECT_CHAIN: usize = 1024;

impl Virtqueue {
    /// Freezes a queue that the driver laid out.
    ///
    /// # Errors
    /// [`QueueError::Layout`] if the size is no power of two, a ring is misaligned, not in one piece of memory, or over
    /// another, or the driver area is at address 0: it was not set.
    pub fn new(layout: QueueLayout, features: u64, memory: Arc<GuestMemoryMmap>) -> Result<Self, QueueError> {
        debug_assert!(features & (1 << VIRTIO_F_VERSION_1) != 0, "the transport negotiates VERSION_1");
        let QueueLayout { size, desc, driver, device } = layout;
        let bad = QueueError::Layout { size, desc, driver, device };
        if !layout.is_valid(&memory) {
            return Err(bad);
        }
        let [desc, driver, device] = layout.areas().map(|(start, len)| Area::new(&memory, GuestAddress(start), len));
        let (Some(desc), Some(driver), Some(device)) = (desc, driver, device) else { return Err(bad) };
        let event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let indirect = features & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0;
        let (taken, offered, used, published) = (0, 0, 0, 0);
        Ok(Self { memory, layout, desc, driver, device, event_idx, indirect, taken, offered, used, published })
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.layout.size
    }

    /// Where the driver put it, for whoever serves it in our place.
    pub(super) fn layout(&self) -> QueueLayout {
        self.layout
    }

    /// Takes the next available chain into `chain`; `false` when there is none. Heads are below [`Virtqueue::size`];
    /// whether one is in flight already is for the device to know.
    ///
    /// # Errors
    /// When the driver broke the ring or the chain; nothing more can be trusted then.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        chain.segments.clear();
        if self.taken == self.offered {
            self.offered = self.driver.load(IDX, Ordering::Acquire);
            if self.offered.wrapping_sub(self.taken) > self.layout.size {
                return Err(QueueError::AvailRing);
            }
            if self.taken == self.offered {
                return Ok(false);
            }
        }
        chain.head = self.driver.load(RING + 2 * self.entry(self.taken), Ordering::Relaxed);
        if chain.head >= self.layout.size {
            return Err(QueueError::AvailRing);
        }
        self.taken = self.taken.wrapping_add(1);
        self.walk(chain).ok_or(QueueError::Chain(chain.head))?;
        Ok(true)
    }

    /// Whether there is a chain to be taken. Cheap: the look of someone who polls.
    pub fn is_available(&self) -> bool {
        self.driver.load(IDX, Ordering::Acquire) != self.taken
    }

    /// Flattens the chain at `chain.head`; `None` where it breaks 2.7.5. An indirect table must be in one piece of memory.
    fn walk(&self, chain: &mut Chain) -> Option<()> {
        let longest = usize::from(self.layout.size);
        let table = match walk_table(&self.desc.slice(), chain.head, longest, &mut chain.segments)? {
            End::Last => return Some(()),
            End::Table(table) => table,
        };
        if !self.indirect || table.has_next() || !table.len().is_multiple_of(VRING_DESC_ALIGN_SIZE) {
            return None;
        }
        let entries = self.memory.get_slice(table.addr(), table.len() as usize).ok()?;
        // A table inside a table is refused.
        let end = walk_table(&entries, 0, longest.max(INDIRECT_CHAIN), &mut chain.segments)?;
        matches!(end, End::Last).then_some(())
    }

    /// Puts the chain `head` into the used ring, `len` bytes of it written. The driver sees it after
    /// [`Virtqueue::publish`].
    pub fn push(&mut self, head: u16, len: u32) {
        debug_assert!(head < self.layout.size, "only what was popped is pushed");
        let at = RING + 8 * self.entry(self.used);
        self.device.store_long(at, head.into());
        self.device.store_long(at + 4, len);
        self.used = self.used.wrapping_add(1);
    }

    /// Shows the driver what was pushed, and what the device wrote into those buffers. Returns whether it wants an
    /// interrupt for them (virtio 1.2, 2.7.7 and 2.7.10).
    #[must_use = "a driver that waits for an interrupt must get it"]
    pub fn publish(&mut self) -> bool {
        let before = mem::replace(&mut self.published, self.used);
        let count = self.used.wrapping_sub(before);
        if count == 0 {
            return false;
        }
        self.device.store(IDX, self.used, Ordering::Release);
        // What was pushed is visible before the look at what the driver wants.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.driver.load(RING + 2 * usize::from(self.layout.size), Ordering::Relaxed);
            return self.used.wrapping_sub(event).wrapping_sub(1) < count;
        }
        self.driver.load(FLAGS, Ordering::Relaxed) & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0
    }

    /// Asks the driver for notifications; `true` when chains became available meanwhile, and the caller must look
    /// again.
    pub fn enable_notification(&mut self) -> bool {
        if self.event_idx {
            self.device.store(RING + 8 * usize::from(self.layout.size), self.taken, Ordering::Relaxed);
        } else {
            self.device.store(FLAGS, 0, Ordering::Relaxed);
        }
        // What was asked for is visible before the look at what came in the meantime.
        fence(Ordering::SeqCst);
        self.is_available()
    }

    /// Tells the driver that it need not notify: the worker is awake. With EVENT_IDX it need not be told: past the entry
    /// it was asked to notify of, it does not.
    pub fn disable_notification(&mut self) {
        if !self.event_idx {
            self.device.store(FLAGS, VRING_USED_F_NO_NOTIFY as u16, Ordering::Relaxed);
        }
    }

    /// The entry of a ring that the chain with this number has.
    fn entry(&self, number: u16) -> usize {
        usize::from(number & (self.layout.size - 1))
    }
}

/// How a walk through a table ended.
enum End {
    /// At the end of the chain.
    Last,
    /// At this descriptor, which refers to an indirect table.
    Table(Descriptor),
}

/// Appends the buffers of a chain from entry `next` of `table` on to `segments`. `None` where it leaves `table`, or if there
/// would be more than `longest` segments, so it ends. Every descriptor is read once.
fn walk_table(table: &VolatileSlice<'_>, mut next: u16, longest: usize, segments: &mut Vec<Segment>) -> Option<End> {
    loop {
        let descriptor = table.get_ref::<Descriptor>(DESCRIPTOR * usize::from(next)).ok()?.load();
        if descriptor.refers_to_indirect_table() {
            return Some(End::Table(descriptor));
        }
        if segments.len() == longest {
            return None;
        }
        let (address, len, writable) = (descriptor.addr(), descriptor.len(), descriptor.is_write_only());
        segments.push(Segment { address, len, writable });
        if !descriptor.has_next() {
            return Some(End::Last);
        }
        next = descriptor.next();
    }
}

impl QueueLayout {
    /// Start and length in bytes of the descriptor table, the driver and the device area (2.7, table of sizes; with the
    /// event indices after the rings).
    fn areas(&self) -> [(u64, usize); 3] {
        let size = usize::from(self.size);
        [(self.desc, 16 * size), (self.driver, 6 + 2 * size), (self.device, 6 + 8 * size)]
    }

    fn is_valid(&self, memory: &GuestMemoryMmap) -> bool {
        let Ok(mut queue) = Queue::new(self.size) else { return false };
        let laid_out = queue.try_set_desc_table_address(GuestAddress(self.desc)).is_ok()
            && queue.try_set_avail_ring_address(GuestAddress(self.driver)).is_ok()
            && queue.try_set_used_ring_address(GuestAddress(self.device)).is_ok();
        queue.set_ready(true);
        laid_out && self.driver != 0 && queue.is_valid(memory) && !self.overlaps()
    }

    /// Whether two of the three areas share a byte. All end inside the address space.
    fn overlaps(&self) -> bool {
        let mut areas = self.areas();
        areas.sort_unstable();
        areas.windows(2).any(|pair| pair[1].0 - pair[0].0 < pair[0].1 as u64)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;
    use crate::virtio::driver::{self, Descriptor as RawDescriptor, Driver, readable, writable};

    const BASE: u64 = 0x1000;
    const TABLES: u64 = 0x1_0000;
    const PLAIN: u64 = 1 << VIRTIO_F_VERSION_1;
    const INDIRECT: u64 = PLAIN | 1 << VIRTIO_RING_F_INDIRECT_DESC;
    const EVENT_IDX: u64 = INDIRECT | 1 << VIRTIO_RING_F_EVENT_IDX;

    fn memory() -> Arc<GuestMemoryMmap> {
        Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap())
    }

    fn pair(size: u16, features: u64) -> (Driver, Virtqueue) {
        let memory = memory();
        let driver = Driver::new(memory.clone(), BASE, size);
        let queue = Virtqueue::new(driver.layout(), features, memory).unwrap();
        (driver, queue)
    }

    /// Offers head 0 after writing `descriptors` into the table from entry 0 up, and pops.
    fn pop_raw(features: u64, descriptors: &[RawDescriptor]) -> Result<Chain, QueueError> {
        let (mut driver, mut queue) = pair(4, features);
        for (entry, &descriptor) in (0..).zip(descriptors) {
            driver.write_descriptor(driver.layout().desc, entry, descriptor);
        }
        driver.publish(0);
        let mut chain = Chain::default();
        queue.pop(&mut chain).map(|found| {
            assert!(found);
            chain
        })
    }

    fn raw(flags: u16, next: u16) -> RawDescriptor {
        RawDescriptor { address: 0x8000, len: 16, flags, next }
    }

    #[test]
    fn chains_come_and_go() {
        let (mut driver, mut queue) = pair(8, INDIRECT);
        let mut chain = Chain::default();
        assert_eq!(queue.pop(&mut chain), Ok(false));
        let direct = [readable(0x8000, 16), writable(0x9000, 0), writable(0xa000, 1)];
        let head = driver.add(&direct);
        assert_eq!(queue.pop(&mut chain), Ok(true));
        assert_eq!((chain.head, chain.segments.as_slice()), (head, direct.as_slice()));
        let other = driver.add_indirect(TABLES, &direct);
        assert_eq!(queue.pop(&mut chain), Ok(true));
        assert_eq!((chain.head, chain.segments.as_slice()), (other, direct.as_slice()));
        assert_eq!(queue.pop(&mut chain), Ok(false));
        // Out of order, as a device may.
        queue.push(other, 7);
        queue.push(head, 1);
        assert_eq!(driver.used(), None, "not published");
        assert!(queue.publish());
        assert_eq!([driver.used(), driver.used(), driver.used()], [Some((other, 7)), Some((head, 1)), None]);
        assert_eq!(driver.free(), 8);
    }

    #[test]
    fn direct_descriptors_may_end_in_an_indirect_one() {
        let (mut driver, mut queue) = pair(4, INDIRECT);
        let desc = driver.layout().desc;
        driver.write_descriptor(desc, 0, raw(driver::NEXT, 1));
        // 2.7.5.3.2: the device ignores WRITE on a descriptor that refers to a table.
        let flags = driver::INDIRECT | driver::WRITE;
        driver.write_descriptor(desc, 1, RawDescriptor { address: TABLES, len: 16, flags, next: 0 });
        driver.write_descriptor(TABLES, 0, RawDescriptor { address: 0x9000, len: 5, flags: driver::WRITE, next: 9 });
        driver.publish(0);
        let mut chain = Chain::default();
        assert_eq!(queue.pop(&mut chain), Ok(true));
        assert_eq!(chain.segments, [readable(0x8000, 16), writable(0x9000, 5)]);
    }

    #[test]
    fn broken_chains_are_refused() {
        let table = |len| RawDescriptor { address: TABLES, len, flags: driver::INDIRECT, next: 0 };
        let cases: [(&str, u64, Vec<RawDescriptor>); 7] = [
            ("leaves the table", PLAIN, vec![raw(driver::NEXT, 4)]),
            ("a loop, longer than the queue", PLAIN, vec![raw(driver::NEXT, 1), raw(driver::NEXT, 0)]),
            ("indirect not negotiated", PLAIN, vec![table(16)]),
            ("a table of odd length", INDIRECT, vec![table(24)]),
            ("an empty table", INDIRECT, vec![table(0)]),
            ("a table outside memory", INDIRECT, vec![RawDescriptor { address: u64::MAX - 7, ..table(16) }]),
            (
                "indirect and next",
                INDIRECT,
                vec![RawDescriptor { flags: driver::INDIRECT | driver::NEXT, next: 1, ..table(16) }, raw(0, 0)],
            ),
        ];
        for (what, features, descriptors) in cases {
            let result = pop_raw(features, &descriptors);
            assert_eq!(result.map(|chain| chain.segments), Err(QueueError::Chain(0)), "{what}");
        }
        // What is wrong in none of them is accepted.
        assert!(pop_raw(INDIRECT, &[table(16)]).is_ok());
    }

    #[test]
    fn nested_and_endless_tables_are_refused() {
        for inner in
            [RawDescriptor { address: TABLES, len: 16, flags: driver::INDIRECT, next: 0 }, raw(driver::NEXT, 0)]
        {
            let (mut driver, mut queue) = pair(4, INDIRECT);
            driver.write_descriptor(TABLES, 0, inner);
            let outer = RawDescriptor { address: TABLES, len: 16, flags: driver::INDIRECT, next: 0 };
            driver.write_descriptor(driver.layout().desc, 0, outer);
            driver.publish(0);
            let mut chain = Chain::default();
            assert_eq!(queue.pop(&mut chain), Err(QueueError::Chain(0)));
            assert!(chain.segments.len() <= INDIRECT_CHAIN);
        }
    }

    #[test]
    fn a_full_queue_in_one_chain_is_the_longest() {
        let (mut driver, mut queue) = pair(4, PLAIN);
        driver.add(&[readable(0x8000, 1); 4]);
        let mut chain = Chain::default();
        assert_eq!(queue.pop(&mut chain), Ok(true));
        assert_eq!(chain.segments.len(), 4);
    }

    #[test]
    fn a_broken_available_ring_is_refused() {
        let (mut driver, mut queue) = pair(4, PLAIN);
        let mut chain = Chain::default();
        driver.set_avail_idx(5);
        assert_eq!(queue.pop(&mut chain), Err(QueueError::AvailRing));
        let (mut driver, mut queue) = pair(4, PLAIN);
        driver.publish(4);
        assert_eq!(queue.pop(&mut chain), Err(QueueError::AvailRing));
        let (mut driver, mut queue) = pair(4, PLAIN);
        driver.set_avail_idx(0xffff);
        assert_eq!(queue.pop(&mut chain), Err(QueueError::AvailRing), "an index that goes back");
    }

    #[test]
    fn bad_layouts_are_refused() {
        let good = Driver::new(memory(), BASE, 8).layout();
        let bad = [
            QueueLayout { size: 0, ..good },
            QueueLayout { size: 6, ..good },
            QueueLayout { desc: good.desc + 8, ..good },
            QueueLayout { driver: good.driver + 1, ..good },
            QueueLayout { device: good.device + 2, ..good },
            QueueLayout { driver: 0, ..good },
            // 16 * 8 bytes of descriptors, 22 of available ring and 70 of used ring; memory ends at 0x10_0000.
            QueueLayout { desc: 0xf_ff90, ..good },
            QueueLayout { device: 0xf_fffc, ..good },
            QueueLayout { desc: !0xf, ..good },
            QueueLayout { device: 1 << 40, ..good },
            QueueLayout { driver: good.desc + 126, ..good },
            QueueLayout { device: good.driver + 20, ..good },
            QueueLayout { device: good.desc, ..good },
        ];
        for layout in bad {
            assert!(Virtqueue::new(layout, PLAIN, memory()).is_err(), "{layout:x?}");
        }
        for layout in [good, QueueLayout { desc: 0xf_ff80, ..good }, QueueLayout { driver: good.desc + 128, ..good }] {
            assert!(Virtqueue::new(layout, PLAIN, memory()).is_ok(), "{layout:x?}");
        }
    }

    #[test]
    fn the_driver_suppresses_interrupts_by_its_flag() {
        let (mut driver, mut queue) = pair(4, PLAIN);
        let mut chain = Chain::default();
        assert!(!queue.publish(), "nothing was pushed");
        for wanted in [true, false, true] {
            driver.want_interrupts(wanted);
            let head = driver.add(&[readable(0x8000, 1)]);
            queue.pop(&mut chain).unwrap();
            queue.push(head, 0);
            assert_eq!(queue.publish(), wanted);
            assert!(!queue.publish(), "already told");
            driver.used().unwrap();
        }
    }

    #[test]
    fn notifications_are_suppressed_and_never_lost() {
        for features in [PLAIN, EVENT_IDX] {
            let event_idx = features == EVENT_IDX;
            let (mut driver, mut queue) = pair(4, features);
            let mut chain = Chain::default();
            assert!(!queue.enable_notification());
            driver.add(&[readable(0x8000, 1)]);
            assert!(driver.must_notify(event_idx, 1));
            queue.disable_notification();
            assert!(queue.pop(&mut chain).unwrap());
            driver.add(&[readable(0x8000, 1)]);
            assert!(!driver.must_notify(event_idx, 1), "the device is awake");
            assert!(queue.enable_notification(), "it came while nobody notified");
            assert!(queue.pop(&mut chain).unwrap());
            assert!(!queue.enable_notification());
        }
    }

    proptest! {
        /// Whatever a driver offers arrives as it was offered, whatever is returned is seen, over many turns of the
        /// rings; and interrupts follow the formula of 2.7.7.2 over the indices the driver sees.
        #[test]
        fn agrees_with_the_driver(
            event_idx: bool,
            rounds in prop::collection::vec(
                (prop::collection::vec((1_usize..5, any::<bool>(), any::<u32>()), 0..4), any::<u16>(), any::<u64>()),
                1..200,
            ),
        ) {
            let (mut driver, mut queue) = pair(16, if event_idx { EVENT_IDX } else { INDIRECT });
            let mut chain = Chain::default();
            let (mut offered, mut held) = (HashMap::new(), Vec::new());
            let mut used_idx = 0_u16;
            for (adds, event, order) in rounds {
                for (count, indirect, len) in adds {
                    if driver.free() < count {
                        continue;
                    }
                    let segments: Vec<_> = (0..count as u64)
                        .map(|at| if at % 2 == 0 { readable(at << 40, len) } else { writable(at, len) })
                        .collect();
                    let table = TABLES + 16 * 4 * (offered.len() + held.len()) as u64;
                    let head = if indirect { driver.add_indirect(table, &segments) } else { driver.add(&segments) };
                    prop_assert!(queue.pop(&mut chain).unwrap());
                    prop_assert_eq!(chain.head, head);
                    prop_assert_eq!(&chain.segments, &segments);
                    offered.insert(head, len);
                    held.push(head);
                }
                driver.set_used_event(event);
                let old_idx = used_idx;
                for _ in 0..(order as usize % 4).min(held.len()) {
                    let head = held.swap_remove(order as usize % held.len());
                    queue.push(head, offered[&head]);
                    used_idx = used_idx.wrapping_add(1);
                }
                let wanted = if event_idx {
                    used_idx.wrapping_sub(event).wrapping_sub(1) < used_idx.wrapping_sub(old_idx)
                } else {
                    used_idx != old_idx
                };
                prop_assert_eq!(queue.publish(), wanted);
                while let Some((head, len)) = driver.used() {
                    prop_assert_eq!(offered.remove(&head), Some(len));
                }
                prop_assert_eq!(offered.len(), held.len());
            }
        }

        /// Rings full of noise: an error or a chain within bounds, and the end after at most a queue of them.
        #[test]
        fn noise_is_harmless(noise in prop::collection::vec(any::<u8>(), 0x200), event_idx: bool) {
            let features = if event_idx { EVENT_IDX } else { PLAIN };
            let memory = memory();
            let layout = Driver::new(memory.clone(), BASE, 16).layout();
            memory.write_slice(&noise, GuestAddress(BASE)).unwrap();
            let mut queue = Virtqueue::new(layout, features, memory).unwrap();
            let mut chain = Chain::default();
            let mut popped = 0;
            while let Ok(true) = queue.pop(&mut chain) {
                popped += 1;
                prop_assert!(!chain.segments.is_empty() && chain.segments.len() <= INDIRECT_CHAIN);
                prop_assert!(popped <= 16);
            }
        }
    }
}
