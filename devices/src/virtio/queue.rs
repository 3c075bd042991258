//! The device's side of a split virtqueue (virtio 1.2, 2.7) over `virtio-queue`. Owned by one thread at a time: the
//! transport while it is being set up, then the worker.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use thiserror::Error;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_ALIGN_SIZE,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

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
    /// The rings are no longer in guest memory.
    #[error("the rings cannot be accessed")]
    Access,
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
pub struct Virtqueue {
    queue: Queue,
    memory: Arc<GuestMemoryMmap>,
    layout: QueueLayout,
    event_idx: bool,
    indirect: bool,
    pushed: bool,
}

/// The longest chain through an indirect table, if the queue is not longer. The specification says the queue size, but
/// Linux halves a queue that it cannot allocate and keeps its segment limit, so a short queue may see longer chains.
const INDIRECT_CHAIN: usize = 1024;

impl Virtqueue {
    /// Freezes a queue that the driver laid out.
    ///
    /// # Errors
    /// [`QueueError::Layout`] if the size is no power of two, a ring is misaligned, not in memory, or over another, or
    /// the driver area is at address 0: it was not set.
    pub fn new(layout: QueueLayout, features: u64, memory: Arc<GuestMemoryMmap>) -> Result<Self, QueueError> {
        debug_assert!(features & (1 << VIRTIO_F_VERSION_1) != 0, "the transport negotiates VERSION_1");
        let QueueLayout { size, desc, driver, device } = layout;
        let bad = QueueError::Layout { size, desc, driver, device };
        let event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let indirect = features & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0;
        let Ok(mut queue) = Queue::new(size) else { return Err(bad) };
        let laid_out = queue.try_set_desc_table_address(GuestAddress(desc)).is_ok()
            && queue.try_set_avail_ring_address(GuestAddress(driver)).is_ok()
            && queue.try_set_used_ring_address(GuestAddress(device)).is_ok();
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        if !laid_out || driver == 0 || !queue.is_valid(&*memory) || layout.overlaps() {
            return Err(bad);
        }
        Ok(Self { queue, memory, layout, event_idx, indirect, pushed: false })
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.layout.size
    }

    /// Takes the next available chain into `chain`; `false` when there is none. Heads are below [`Virtqueue::size`];
    /// whether one is in flight already is for the device to know.
    ///
    /// # Errors
    /// When the driver broke the ring or the chain; nothing more can be trusted then.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        chain.segments.clear();
        let Some(next) = self.queue.iter(&*self.memory).map_err(|_| QueueError::AvailRing)?.next() else {
            return Ok(false);
        };
        chain.head = next.head_index();
        if chain.head >= self.layout.size {
            return Err(QueueError::AvailRing);
        }
        self.walk(chain).ok_or(QueueError::Chain(chain.head))?;
        Ok(true)
    }

    /// Flattens the chain at `chain.head`; `None` where it breaks 2.7.5. Ends because every step adds a segment, but
    /// for the one into an indirect table. virtio-queue's own iterator accepts what we refuse, and ends silently at the
    /// rest.
    fn walk(&self, chain: &mut Chain) -> Option<()> {
        let mut table = GuestAddress(self.layout.desc);
        let mut entries = u32::from(self.layout.size);
        let mut longest = usize::from(self.layout.size);
        let mut inside_indirect = false;
        let mut next = chain.head;
        loop {
            if u32::from(next) >= entries {
                return None;
            }
            let at = table.checked_add(u64::from(next) * u64::from(VRING_DESC_ALIGN_SIZE))?;
            let descriptor: Descriptor = self.memory.read_obj(at).ok()?;
            if descriptor.refers_to_indirect_table() {
                let whole = descriptor.len().is_multiple_of(VRING_DESC_ALIGN_SIZE);
                if inside_indirect || !self.indirect || descriptor.has_next() || !whole {
                    return None;
                }
                inside_indirect = true;
                table = descriptor.addr();
                entries = descriptor.len() / VRING_DESC_ALIGN_SIZE;
                longest = longest.max(INDIRECT_CHAIN);
                next = 0;
                continue;
            }
            if chain.segments.len() == longest {
                return None;
            }
            chain.segments.push(Segment {
                address: descriptor.addr(),
                len: descriptor.len(),
                writable: descriptor.is_write_only(),
            });
            if !descriptor.has_next() {
                return Some(());
            }
            next = descriptor.next();
        }
    }

    /// Publishes the chain `head` as used, `len` bytes of it written. What the device wrote into its buffers before is
    /// visible to a driver that sees it used.
    ///
    /// # Errors
    /// When the used ring cannot be written or `head` is out of range.
    pub fn push(&mut self, head: u16, len: u32) -> Result<(), QueueError> {
        self.pushed = true;
        self.queue.add_used(&*self.memory, head, len).map_err(|_| QueueError::Access)
    }

    /// Whether the driver wants an interrupt for what was pushed since the last call (virtio 1.2, 2.7.7 and 2.7.10).
    ///
    /// # Errors
    /// When the driver area cannot be read.
    pub fn needs_interrupt(&mut self) -> Result<bool, QueueError> {
        if !std::mem::take(&mut self.pushed) {
            return Ok(false);
        }
        // Orders what was pushed before the look at what the driver wants, with EVENT_IDX or without.
        let wanted = self.queue.needs_notification(&*self.memory).map_err(|_| QueueError::Access)?;
        if self.event_idx {
            return Ok(wanted);
        }
        let flags = GuestAddress(self.layout.driver);
        let flags: u16 = self.memory.load(flags, Ordering::Relaxed).map_err(|_| QueueError::Access)?;
        Ok(u16::from_le(flags) & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0)
    }

    /// Asks the driver for notifications; `true` when chains became available meanwhile, and the caller must look
    /// again.
    ///
    /// # Errors
    /// When the rings cannot be accessed.
    pub fn enable_notification(&mut self) -> Result<bool, QueueError> {
        self.queue.enable_notification(&*self.memory).map_err(|_| QueueError::Access)
    }

    /// Tells the driver that it need not notify: the worker is awake.
    ///
    /// # Errors
    /// When the device area cannot be written.
    pub fn disable_notification(&mut self) -> Result<(), QueueError> {
        self.queue.disable_notification(&*self.memory).map_err(|_| QueueError::Access)
    }
}

impl QueueLayout {
    /// Whether two of the three areas (2.7, table of sizes) share a byte. All end inside the address space.
    fn overlaps(&self) -> bool {
        let size = u64::from(self.size);
        let mut areas = [(self.desc, 16 * size), (self.driver, 6 + 2 * size), (self.device, 6 + 8 * size)];
        areas.sort_unstable();
        areas.windows(2).any(|pair| pair[1].0 - pair[0].0 < pair[0].1)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

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
        queue.push(other, 7).unwrap();
        queue.push(head, 1).unwrap();
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
    fn a_head_out_of_range_is_not_pushed() {
        let (mut driver, mut queue) = pair(4, PLAIN);
        assert_eq!(queue.push(4, 0), Err(QueueError::Access));
        assert_eq!(driver.used(), None);
    }

    #[test]
    fn the_driver_suppresses_interrupts_by_its_flag() {
        let (mut driver, mut queue) = pair(4, PLAIN);
        let mut chain = Chain::default();
        assert_eq!(queue.needs_interrupt(), Ok(false), "nothing was pushed");
        for wanted in [true, false, true] {
            driver.want_interrupts(wanted);
            let head = driver.add(&[readable(0x8000, 1)]);
            queue.pop(&mut chain).unwrap();
            queue.push(head, 0).unwrap();
            assert_eq!(queue.needs_interrupt(), Ok(wanted));
            assert_eq!(queue.needs_interrupt(), Ok(false), "already told");
            driver.used().unwrap();
        }
    }

    #[test]
    fn notifications_are_suppressed_and_never_lost() {
        for features in [PLAIN, EVENT_IDX] {
            let event_idx = features == EVENT_IDX;
            let (mut driver, mut queue) = pair(4, features);
            let mut chain = Chain::default();
            assert_eq!(queue.enable_notification(), Ok(false));
            driver.add(&[readable(0x8000, 1)]);
            assert!(driver.must_notify(event_idx, 1));
            queue.disable_notification().unwrap();
            assert!(queue.pop(&mut chain).unwrap());
            driver.add(&[readable(0x8000, 1)]);
            assert!(!driver.must_notify(event_idx, 1), "the device is awake");
            assert_eq!(queue.enable_notification(), Ok(true), "it came while nobody notified");
            assert!(queue.pop(&mut chain).unwrap());
            assert_eq!(queue.enable_notification(), Ok(false));
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
                    queue.push(head, offered[&head]).unwrap();
                    used_idx = used_idx.wrapping_add(1);
                }
                let wanted = if event_idx {
                    used_idx.wrapping_sub(event).wrapping_sub(1) < used_idx.wrapping_sub(old_idx)
                } else {
                    used_idx != old_idx
                };
                prop_assert_eq!(queue.needs_interrupt().unwrap(), wanted);
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
