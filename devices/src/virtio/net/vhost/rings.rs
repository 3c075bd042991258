//! The rings of a queue that the kernel serves, for what it does not do: when an interface goes, vhost-net forgets the buffers
//! of frames that it had copied and could not hand over. They are used here, or their driver would wait for them for ever.
//! Owned by the worker of the pair.

use std::mem;
use std::sync::atomic::{Ordering, fence};

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
    /// Both indices when frames began to pass: all that was taken before is used, or given up.
    start: Indices,
    /// More than a ring was used since.
    is_far: bool,
}

/// How many chains were taken from the available ring and how many put into the used one, modulo 2^16.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Indices {
    taken: u16,
    used: u16,
}

/// What was done about chains that were taken and not used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Forgotten {
    /// They are used now, with nothing in them.
    pub(super) used: u16,
    /// Which ones they are, the rings do not say: their driver has lost them.
    pub(super) unknown: u16,
}

impl Rings {
    /// Of a queue whose driver begins at the start of its rings. `None` if they are not in guest memory.
    pub(super) fn new(memory: &GuestMemoryMmap, layout: &QueueLayout) -> Option<Self> {
        let entries = usize::from(layout.size);
        let available = Area::new(memory, GuestAddress(layout.driver), ENTRIES + AVAILABLE * entries)?;
        let used = Area::new(memory, GuestAddress(layout.device), ENTRIES + USED * entries)?;
        Some(Self { size: layout.size, available, used, start: Indices::default(), is_far: false })
    }

    /// To be called now and then while frames pass: an index alone does not tell how often it went round.
    pub(super) fn watch(&mut self) {
        self.is_far |= self.used.load(INDEX, Ordering::Acquire).wrapping_sub(self.start.used) > self.size;
    }

    /// Uses, with nothing in them, all chains that were taken and not used; the next to be taken is number `taken` of the available
    /// ring. Nobody may be at work on the rings but the driver. What cannot be found is not looked for again.
    pub(super) fn use_forgotten(&mut self, taken: u16) -> Forgotten {
        let now = Indices { taken, used: self.used.load(INDEX, Ordering::Acquire) };
        let since =
            Indices { taken: taken.wrapping_sub(self.start.taken), used: now.used.wrapping_sub(self.start.used) };
        let missing = since.taken.wrapping_sub(since.used);
        let found = self.find(now, since.taken, missing).unwrap_or_default();
        for (number, head) in (0..missing).zip(&found) {
            let at = self.place(now.used.wrapping_add(number), USED);
            self.used.store_long(at, u32::from(*head));
            self.used.store_long(at + 4, 0);
        }
        let used = found.len() as u16;
        self.start = Indices { taken, used: now.used.wrapping_add(used) };
        self.is_far = false;
        self.used.store(INDEX, self.start.used, Ordering::Release);
        // With more than there can be the driver wrote to a ring that is not its own.
        Forgotten { used, unknown: (missing - used).min(self.size) }
    }

    /// The heads of the `missing` chains: of the last chains taken, those that are not among the last ones used. The order does not
    /// matter, for a head comes again only after it was used. `None` if the rings do not tell.
    ///
    /// Looked at is all that was taken `since` the start, or as much as the driver has not written over. The latter tells only if
    /// nothing was forgotten earlier, which [`is_all`] makes sure of.
    fn find(&self, now: Indices, since: u16, missing: u16) -> Option<Vec<u16>> {
        let load = |number| self.available.load(self.place(number, AVAILABLE), Ordering::Relaxed);
        let available: Vec<_> = (0..self.size).map(load).collect();
        // What the driver writes over meanwhile its index tells afterwards, but for the entry that it may be writing.
        fence(Ordering::Acquire);
        let waiting = self.available.load(INDEX, Ordering::Acquire).wrapping_sub(now.taken);
        let left = self.size.checked_sub(waiting)?;
        let waiting: Vec<_> = (0..waiting).map(|number| load(now.taken.wrapping_add(number))).collect();
        if missing == left {
            // The driver has none itself.
            return difference(&(0..self.size).collect::<Vec<_>>(), &waiting, self.size);
        }
        let left = left.checked_sub(1)?;
        let is_cut = self.is_far || since > left;
        let last = if is_cut { left } else { since };

        let place = |back| usize::from(now.taken.wrapping_sub(back) % self.size);
        let taken: Vec<_> = (1..=last).rev().map(|back| available[place(back)]).collect();
        let used = |back| self.used.load(self.place(now.used.wrapping_sub(back), USED), Ordering::Relaxed);
        let used: Vec<_> = (1..=last.checked_sub(missing)?).rev().map(used).collect();
        let found = difference(&taken, &used, self.size)?;
        // Nobody has a chain that waits to be taken.
        let is_possible = found.iter().all(|head| !waiting.contains(head));
        (is_possible && (!is_cut || is_all(&found, &taken, &used, self.size))).then_some(found)
    }

    /// Where entry `number` of a ring of entries of `bytes` is.
    fn place(&self, number: u16, bytes: usize) -> usize {
        ENTRIES + bytes * usize::from(number % self.size)
    }
}

/// The heads, all below `size`, that are once more in `taken` than in `used`; `None` if the others are not equally often in both.
fn difference(taken: &[u16], used: &[u16], size: u16) -> Option<Vec<u16>> {
    let mut balance = vec![0; usize::from(size)];
    for head in taken {
        *balance.get_mut(usize::from(*head))? += 1;
    }
    for head in used {
        *balance.get_mut(usize::from(*head))? -= 1;
    }
    let agree = balance.iter().all(|more| matches!(more, 0 | 1));
    agree.then(|| (0..size).filter(|head| balance[usize::from(*head)] == 1).collect())
}

/// Whether nothing was forgotten before `taken` begins, if the kernel uses chains in the order in which it takes them, which it does
/// with those that it copies (drivers/vhost/net.c): without what was `found`, which is not taken again, that is what was `used`.
/// Had something been forgotten earlier, all would be shifted, and the first one found. (Only of one chain that was taken again
/// and again, with no other between, that is not known: then it is the last time that counts.) All are below `size`.
fn is_all(found: &[u16], taken: &[u16], used: &[u16], size: u16) -> bool {
    let mut is_found = vec![false; usize::from(size)];
    for head in found {
        is_found[usize::from(*head)] = true;
    }
    let mut others: Vec<_> =
        taken.iter().rev().filter(|head| !mem::take(&mut is_found[usize::from(**head)])).copied().collect();
    others.reverse();
    others == used && taken.first() == used.first()
}

#[cfg(test)]
mod tests;
