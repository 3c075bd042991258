//! The rings of a queue that the kernel serves, for what it does not do: when an interface goes, vhost-net forgets the buffers
//! whose frames that did not take any more. They are used here, or their driver would wait for them for ever.

use std::sync::atomic::Ordering;

use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::virtio::area::Area;
use crate::virtio::queue::QueueLayout;

/// Both rings begin with flags and index, 16 bits each (virtio 1.2, 2.7.6 and 2.7.8).
const INDEX: usize = 2;
const ENTRIES: usize = 4;
/// Bytes of an entry: a head; a head and a length.
const AVAILABLE: usize = 2;
const USED: usize = 8;

/// The available and the used ring of one queue.
pub(super) struct Rings {
    size: u16,
    available: Area,
    used: Area,
    /// Forgotten chains that could not be found.
    unknown: u16,
}

impl Rings {
    /// `None` if they are not in guest memory.
    pub(super) fn new(memory: &GuestMemoryMmap, layout: &QueueLayout) -> Option<Self> {
        let entries = usize::from(layout.size);
        let available = Area::new(memory, GuestAddress(layout.driver), ENTRIES + AVAILABLE * entries)?;
        let used = Area::new(memory, GuestAddress(layout.device), ENTRIES + USED * entries)?;
        let rings = Self { size: layout.size, available, used, unknown: 0 };
        // No chain has this head, so what nobody used yet is not taken for something that was.
        (0..layout.size).for_each(|number| rings.used.store_long(rings.place(number, USED), u32::MAX));
        Some(rings)
    }

    /// Uses, with nothing in them, all chains that were taken and not used; the next to be taken is number `taken` of the available
    /// ring. Nobody else may be at work on the rings but the driver. Returns how many there were, and how many of them cannot be found
    /// any more; they are not looked for again.
    pub(super) fn use_forgotten(&mut self, taken: u16) -> (u16, u16) {
        let used = self.used.load(INDEX, Ordering::Acquire);
        let missing = taken.wrapping_sub(used).wrapping_sub(self.unknown);
        // More than there can be: the driver wrote to a ring that is not its own, and must see for itself.
        if missing > self.size {
            return (0, 0);
        }
        let found = self.find(taken, used, missing);
        for (number, head) in (0..missing).zip(found.iter().rev()) {
            let at = self.place(used.wrapping_add(number), USED);
            self.used.store_long(at, u32::from(*head));
            self.used.store_long(at + 4, 0);
        }
        let count = found.len() as u16;
        self.used.store(INDEX, used.wrapping_add(count), Ordering::Release);
        self.unknown = self.unknown.wrapping_add(missing - count);
        (count, missing - count)
    }

    /// The heads of `missing` chains that were taken before `taken` and not used before `used`, the last one first. Chains are used in
    /// the order in which they are taken, so what was used is what was taken with gaps, which are found from the end.
    fn find(&self, taken: u16, used: u16, missing: u16) -> Vec<u16> {
        // The driver writes over the oldest.
        let waiting = self.available.load(INDEX, Ordering::Acquire).wrapping_sub(taken);
        let (mut found, mut used) = (Vec::new(), used);
        for back in 1..=self.size.saturating_sub(waiting) {
            if found.len() == usize::from(missing) {
                break;
            }
            let head = self.available.load(self.place(taken.wrapping_sub(back), AVAILABLE), Ordering::Relaxed);
            let last = self.used.load(self.place(used.wrapping_sub(1), USED), Ordering::Relaxed);
            if head == last {
                used = used.wrapping_sub(1);
            } else {
                found.push(head);
            }
        }
        found
    }

    /// Where entry `number` of a ring of entries of `bytes` is.
    fn place(&self, number: u16, bytes: usize) -> usize {
        ENTRIES + bytes * usize::from(number % self.size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::Bytes;

    const LAYOUT: QueueLayout = QueueLayout { size: 8, desc: 0x1000, driver: 0x2000, device: 0x3000 };

    /// A queue as driver and kernel have it.
    struct Queue {
        memory: GuestMemoryMmap,
        rings: Rings,
        free: Vec<u16>,
        /// What is in the available ring and not taken yet, and what was taken and forgotten.
        waiting: Vec<u16>,
        forgotten: Vec<u16>,
        added: u16,
        taken: u16,
        used: u16,
        seen: u16,
    }

    impl Queue {
        /// With both indices at `start`, so that they wrap soon.
        fn new(start: u16) -> Self {
            let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
            let rings = Rings::new(&memory, &LAYOUT).unwrap();
            for ring in [LAYOUT.driver, LAYOUT.device] {
                memory.write_obj(start, GuestAddress(ring + 2)).unwrap();
            }
            let (added, taken, used, seen) = (start, start, start, start);
            let (free, waiting, forgotten) = ((0..8).collect(), Vec::new(), Vec::new());
            Self { memory, rings, free, waiting, forgotten, added, taken, used, seen }
        }

        fn add(&mut self, which: usize) {
            if self.free.is_empty() {
                return;
            }
            let head = self.free.remove(which % self.free.len());
            self.memory.write_obj(head, GuestAddress(LAYOUT.driver + 4 + 2 * u64::from(self.added % 8))).unwrap();
            self.added = self.added.wrapping_add(1);
            self.memory.write_obj(self.added, GuestAddress(LAYOUT.driver + 2)).unwrap();
            self.waiting.push(head);
        }

        /// The kernel takes the next one and uses it, or forgets it.
        fn take(&mut self, forgets: bool) {
            if self.waiting.is_empty() {
                return;
            }
            let head = self.waiting.remove(0);
            self.taken = self.taken.wrapping_add(1);
            if forgets {
                self.forgotten.push(head);
                return;
            }
            let at = GuestAddress(LAYOUT.device + 4 + 8 * u64::from(self.used % 8));
            self.memory.write_obj([u32::from(head), 60], at).unwrap();
            self.used = self.used.wrapping_add(1);
            self.memory.write_obj(self.used, GuestAddress(LAYOUT.device + 2)).unwrap();
        }

        /// What the driver finds used since it last looked.
        fn reap(&mut self) -> Vec<[u32; 2]> {
            self.used = self.memory.read_obj(GuestAddress(LAYOUT.device + 2)).unwrap();
            let mut reaped = Vec::new();
            while self.seen != self.used {
                let at = GuestAddress(LAYOUT.device + 4 + 8 * u64::from(self.seen % 8));
                reaped.push(self.memory.read_obj::<[u32; 2]>(at).unwrap());
                self.seen = self.seen.wrapping_add(1);
            }
            self.free.extend(reaped.iter().map(|[head, _]| *head as u16));
            reaped
        }
    }

    #[test]
    fn what_was_used_after_something_was_forgotten_is_not_used_again() {
        let mut queue = Queue::new(0xfffe);
        (0..5).for_each(|_| queue.add(0));
        for forgets in [false, true, true, false, true] {
            queue.take(forgets);
        }
        assert_eq!(queue.reap(), [[0, 60], [3, 60]]);
        assert_eq!(queue.rings.use_forgotten(queue.taken), (3, 0));
        assert_eq!(queue.reap(), [[1, 0], [2, 0], [4, 0]]);
        assert_eq!(queue.rings.use_forgotten(queue.taken), (0, 0));
    }

    #[test]
    fn an_index_that_the_kernel_never_wrote_changes_nothing() {
        let mut queue = Queue::new(0);
        (0..3).for_each(|_| queue.add(0));
        queue.take(true);
        queue.memory.write_obj(0x4000_u16, GuestAddress(LAYOUT.device + 2)).unwrap();
        assert_eq!(queue.rings.use_forgotten(queue.taken), (0, 0));
        // An available index that jumped leaves nothing to look at.
        queue.memory.write_obj([0, 0x4000_u16], GuestAddress(LAYOUT.driver)).unwrap();
        queue.memory.write_obj(0_u16, GuestAddress(LAYOUT.device + 2)).unwrap();
        assert_eq!(queue.rings.use_forgotten(queue.taken), (0, 1));
        assert_eq!(queue.rings.use_forgotten(queue.taken), (0, 0));
    }

    proptest! {
        /// Whatever is forgotten while the ring goes round comes back, each once, unless the driver wrote over it.
        #[test]
        fn every_chain_comes_back(steps in prop::collection::vec((0..3_u8, 0..8_usize, any::<bool>()), 1..60), start: u16) {
            let mut queue = Queue::new(start);
            for (step, which, forgets) in steps {
                match step {
                    0 => queue.add(which),
                    1 => queue.take(forgets),
                    _ => _ = queue.reap(),
                }
            }
            queue.reap();
            let (found, lost) = queue.rings.use_forgotten(queue.taken);
            prop_assert_eq!(usize::from(found + lost), queue.forgotten.len());
            // Only what the driver wrote over can make one unknown.
            prop_assert!(lost == 0 || queue.added.wrapping_sub(start) > LAYOUT.size);
            let mut back: Vec<_> = queue.reap().iter().map(|[head, _]| *head as u16).collect();
            prop_assert!(back.iter().all(|head| queue.forgotten.contains(head)), "{:?} of {:?}", back, queue.forgotten);
            back.sort_unstable();
            back.dedup();
            prop_assert_eq!(back.len(), usize::from(found));
        }
    }
}
