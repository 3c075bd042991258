//! The driver's side of a split virtqueue (virtio 1.2, 2.7).

use core::sync::atomic::{Ordering, fence};

use crate::cpu::Mmio;
use crate::memory;

/// Features of the rings (6): chains in tables of their own, and interrupts and doorbells by index.
pub(crate) const F_INDIRECT_DESC: u64 = 1 << 28;
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// The longest chain: an indirect table has room for as many.
pub(crate) const MAX_BUFFERS: usize = 32;
const DESCRIPTOR: u64 = 16;
const END: u16 = u16::MAX;

/// One buffer of a chain.
#[derive(Clone, Copy)]
pub(crate) struct Buffer {
    pub(crate) address: u64,
    pub(crate) bytes: u32,
    /// The device writes it.
    pub(crate) writable: bool,
}

/// A queue in the guest's memory.
pub(crate) struct Virtqueue {
    pub(crate) index: u16,
    pub(crate) size: u16,
    pub(crate) descriptors: Mmio,
    pub(crate) available: Mmio,
    pub(crate) used: Mmio,
    /// Where to notify; follows the BAR.
    pub(crate) doorbell: Mmio,
    /// How often the doorbell was rung.
    pub(crate) kicks: u64,
    event_idx: bool,
    interrupts: bool,
    /// One table of `MAX_BUFFERS` for each head.
    indirect: Option<Mmio>,
    free: u16,
    available_index: u16,
    notified_index: u16,
    used_index: u16,
}

impl Virtqueue {
    /// An empty queue. With `interrupts` the device is asked for one only where [`Self::arm`] says so; without, never.
    pub(crate) fn new(index: u16, size: u16, features: u64, interrupts: bool, doorbell: Mmio) -> Self {
        let entries = u64::from(size);
        let mut queue = Self {
            index,
            size,
            descriptors: memory::allocate(entries * DESCRIPTOR),
            available: memory::allocate(6 + 2 * entries),
            used: memory::allocate(6 + 8 * entries),
            doorbell,
            kicks: 0,
            event_idx: features & F_EVENT_IDX != 0,
            interrupts,
            indirect: (features & F_INDIRECT_DESC != 0)
                .then(|| memory::allocate(entries * DESCRIPTOR * MAX_BUFFERS as u64)),
            free: 0,
            available_index: 0,
            notified_index: 0,
            used_index: 0,
        };
        queue.clear();
        queue
    }

    /// Makes it empty again, as after a reset of the device.
    pub(crate) fn clear(&mut self) {
        for head in 0..self.size {
            let next = if head + 1 < self.size { head + 1 } else { END };
            write_descriptor(self.descriptors, head, &Buffer { address: 0, bytes: 0, writable: false }, 0, next);
        }
        (self.free, self.available_index, self.notified_index, self.used_index) = (0, 0, 0, 0);
        for offset in 0..3 {
            self.available.write::<u16>(2 * offset, 0);
            self.used.write::<u16>(2 * offset, 0);
        }
        self.disarm();
    }

    fn next_free(&self, index: u16) -> u16 {
        self.descriptors.read(u64::from(index) * DESCRIPTOR + 14)
    }

    /// The head that the next chain will have.
    pub(crate) fn next_head(&self) -> Option<u16> {
        (self.free != END).then_some(self.free)
    }

    /// Makes a chain available; its head, or nothing if too few descriptors are free. The device may see it at once.
    pub(crate) fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        let head = self.free;
        if head == END {
            return None;
        }
        if let Some(tables) = self.indirect {
            self.free = self.next_free(head);
            self.write_table(tables, head, buffers);
        } else {
            let next = |index: &u16| (*index != END).then(|| self.next_free(*index));
            let free = core::iter::successors(Some(head), next);
            if free.take(buffers.len()).any(|index| index == END) {
                return None;
            }
            let mut index = head;
            for (position, buffer) in buffers.iter().enumerate() {
                let next = self.next_free(index);
                let more = position + 1 < buffers.len();
                self.free = next;
                write_descriptor(self.descriptors, index, buffer, if more { NEXT } else { 0 }, next);
                index = next;
            }
        }
        self.publish(head);
        Some(head)
    }

    /// Descriptors of the queue itself that a chain of so many `buffers` takes.
    pub(crate) fn taken_by(&self, buffers: u16) -> u16 {
        if self.indirect.is_some() { 1 } else { buffers }
    }

    /// Makes a chain with this head available: for a driver that keeps track of heads itself, and takes completions with
    /// [`Self::take`]. The descriptors behind the head are taken too, as [`Self::taken_by`] says.
    pub(crate) fn add_at(&mut self, head: u16, buffers: &[Buffer]) {
        if let Some(tables) = self.indirect {
            self.write_table(tables, head, buffers);
        } else {
            for (index, buffer) in (head..).zip(buffers) {
                let more = usize::from(index - head) + 1 < buffers.len();
                write_descriptor(self.descriptors, index, buffer, if more { NEXT } else { 0 }, index + 1);
            }
        }
        self.publish(head);
    }

    fn write_table(&self, tables: Mmio, head: u16, buffers: &[Buffer]) {
        let table = Mmio(tables.0 + u64::from(head) * DESCRIPTOR * MAX_BUFFERS as u64);
        for (index, buffer) in buffers.iter().enumerate() {
            let more = index + 1 < buffers.len();
            write_descriptor(table, index as u16, buffer, if more { NEXT } else { 0 }, index as u16 + 1);
        }
        let whole = Buffer { address: table.0, bytes: buffers.len() as u32 * DESCRIPTOR as u32, writable: false };
        write_descriptor(self.descriptors, head, &whole, INDIRECT, END);
    }

    /// Puts any head into the available ring, a wrong one too.
    pub(crate) fn publish(&mut self, head: u16) {
        self.available.write(4 + 2 * u64::from(self.available_index % self.size), head);
        self.set_available_index(self.available_index.wrapping_add(1));
    }

    /// Moves the available index, to a wrong place too.
    pub(crate) fn set_available_index(&mut self, index: u16) {
        self.available_index = index;
        fence(Ordering::Release);
        self.available.write(2, index);
    }

    /// Notifies the device if it asked for that since the last call.
    pub(crate) fn kick(&mut self) {
        fence(Ordering::SeqCst);
        let (new, old) = (self.available_index, self.notified_index);
        let wanted = if self.event_idx {
            let event = self.used.read::<u16>(4 + 8 * u64::from(self.size));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.used.read::<u16>(0) & USED_NO_NOTIFY == 0
        };
        self.notified_index = new;
        if wanted {
            self.ring();
        }
    }

    /// Notifies the device.
    pub(crate) fn ring(&mut self) {
        self.kicks += 1;
        self.doorbell.write(0, self.index);
    }

    /// The device's used index.
    pub(crate) fn used_index(&self) -> u16 {
        self.used.read(2)
    }

    /// Takes a used chain, and its descriptors are free again: its head and the bytes written.
    pub(crate) fn pop(&mut self) -> Option<(u16, u32)> {
        let used = self.take()?;
        self.release(used.0);
        Some(used)
    }

    /// Takes a used chain: its head and the bytes written.
    pub(crate) fn take(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.used_index {
            return None;
        }
        fence(Ordering::Acquire);
        let element = 4 + 8 * u64::from(self.used_index % self.size);
        let (head, bytes) = (self.used.read::<u32>(element), self.used.read::<u32>(element + 4));
        assert!(head < u32::from(self.size), "the used ring names descriptor {head}");
        self.used_index = self.used_index.wrapping_add(1);
        Some((head as u16, bytes))
    }

    fn release(&mut self, head: u16) {
        let mut last = head;
        while self.descriptors.read::<u16>(u64::from(last) * DESCRIPTOR + 12) & NEXT != 0 {
            last = self.next_free(last);
        }
        self.descriptors.write(u64::from(last) * DESCRIPTOR + 14, self.free);
        self.free = head;
    }

    /// Asks for an interrupt at the next used chain; `false` if there is one already, for which none may come.
    pub(crate) fn arm(&mut self) -> bool {
        if self.event_idx {
            self.available.write(4 + 2 * u64::from(self.size), self.used_index);
        } else {
            self.available.write(0, 0_u16);
        }
        fence(Ordering::SeqCst);
        self.used_index() == self.used_index
    }

    fn disarm(&mut self) {
        if self.interrupts {
            self.arm();
            return;
        }
        // An index that the device has just left behind.
        self.available.write(4 + 2 * u64::from(self.size), self.used_index.wrapping_sub(1));
        self.available.write(0, AVAIL_NO_INTERRUPT);
    }
}

fn write_descriptor(table: Mmio, index: u16, buffer: &Buffer, flags: u16, next: u16) {
    let descriptor = Mmio(table.0 + u64::from(index) * DESCRIPTOR);
    descriptor.write(0, buffer.address);
    descriptor.write(8, buffer.bytes);
    descriptor.write(12, flags | if buffer.writable { WRITE } else { 0 });
    descriptor.write(14, next);
}
