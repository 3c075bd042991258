//! The guest's side of a split virtqueue (virtio 1.2, 2.7), for tests: it lays the rings out, makes buffers available
//! and collects used ones. Written from the specification and independent of `virtio-queue`, so that the two check each
//! other. It does what it is told, wrong things too.

#![expect(clippy::missing_panics_doc, reason = "all of it panics where guest memory is too small: the test chose it")]

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::queue::{QueueLayout, Segment};

/// Descriptor flag: the chain goes on at `next`.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes this buffer.
pub const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// One entry of a descriptor table (2.7.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest address of the buffer.
    pub address: u64,
    /// Its length in bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// The entry after it, if [`NEXT`].
    pub next: u16,
}

/// A buffer the device reads.
pub fn readable(address: u64, len: u32) -> Segment {
    Segment { address: GuestAddress(address), len, writable: false }
}

/// A buffer the device writes.
pub fn writable(address: u64, len: u32) -> Segment {
    Segment { address: GuestAddress(address), len, writable: true }
}

/// A driver of one queue.
#[derive(Debug)]
pub struct Driver {
    memory: Arc<GuestMemoryMmap>,
    layout: QueueLayout,
    /// Entries of the descriptor table that belong to the driver.
    free: Vec<u16>,
    /// For each head in flight, the entries it holds.
    held: Vec<Vec<u16>>,
    avail_idx: u16,
    used_idx: u16,
}

impl Driver {
    /// Lays a queue of `size` entries out from guest address `base` (16-byte aligned) up, and clears its rings.
    pub fn new(memory: Arc<GuestMemoryMmap>, base: u64, size: u16) -> Self {
        let driver = base + 16 * u64::from(size);
        let device = (driver + 6 + 2 * u64::from(size)).next_multiple_of(4);
        let layout = QueueLayout { size, desc: base, driver, device };
        let end = device + 6 + 8 * u64::from(size);
        memory.write_slice(&vec![0; (end - base) as usize], GuestAddress(base)).unwrap();
        Self {
            memory,
            layout,
            free: (0..size).rev().collect(),
            held: vec![Vec::new(); usize::from(size)],
            avail_idx: 0,
            used_idx: 0,
        }
    }

    /// Where the rings are, for the registers of a transport or for `Virtqueue::new`.
    pub fn layout(&self) -> QueueLayout {
        self.layout
    }

    /// Entries of the descriptor table that are free.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Makes `segments` available as one chain of direct descriptors. Returns its head.
    pub fn add(&mut self, segments: &[Segment]) -> u16 {
        let entries: Vec<_> = segments.iter().map(|_| self.free.pop().expect("enough descriptors")).collect();
        for (at, (&entry, descriptor)) in entries.iter().zip(describe(segments)).enumerate() {
            let next = entries.get(at + 1).copied().unwrap_or(0);
            self.write_descriptor(self.layout.desc, entry, Descriptor { next, ..descriptor });
        }
        self.offer(entries)
    }

    /// Makes `segments` available through an indirect table that it writes at `table`. Returns the head.
    pub fn add_indirect(&mut self, table: u64, segments: &[Segment]) -> u16 {
        for (entry, descriptor) in (0..).zip(describe(segments)) {
            self.write_descriptor(table, entry, Descriptor { next: entry + 1, ..descriptor });
        }
        let entry = self.free.pop().expect("a descriptor");
        let len = 16 * segments.len() as u32;
        self.write_descriptor(self.layout.desc, entry, Descriptor { address: table, len, flags: INDIRECT, next: 0 });
        self.offer(vec![entry])
    }

    /// Writes entry `entry` of the descriptor table at `table`, whatever it says.
    pub fn write_descriptor(&self, table: u64, entry: u16, descriptor: Descriptor) {
        let at = table + 16 * u64::from(entry);
        self.memory.write_obj(descriptor.address.to_le(), GuestAddress(at)).unwrap();
        self.memory.write_obj(descriptor.len.to_le(), GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(descriptor.flags.to_le(), GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(descriptor.next.to_le(), GuestAddress(at + 14)).unwrap();
    }

    /// Puts `head` into the available ring, whatever it is, and moves the index.
    pub fn publish(&mut self, head: u16) {
        let slot = u64::from(self.avail_idx % self.layout.size);
        self.memory.write_obj(head.to_le(), GuestAddress(self.layout.driver + 4 + 2 * slot)).unwrap();
        self.set_avail_idx(self.avail_idx.wrapping_add(1));
    }

    /// Sets the index of the available ring, whatever it is.
    pub fn set_avail_idx(&mut self, idx: u16) {
        self.avail_idx = idx;
        self.memory.store(idx.to_le(), GuestAddress(self.layout.driver + 2), Ordering::Release).unwrap();
    }

    /// Takes the next used buffer: its head and the bytes the device says it wrote. The descriptors are free again.
    ///
    /// # Panics
    /// If the device returns what it does not have.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        let device = self.layout.device;
        let idx = u16::from_le(self.memory.load(GuestAddress(device + 2), Ordering::Acquire).unwrap());
        if idx == self.used_idx {
            return None;
        }
        let at = device + 4 + 8 * u64::from(self.used_idx % self.layout.size);
        let id = u32::from_le(self.memory.read_obj(GuestAddress(at)).unwrap());
        let len = u32::from_le(self.memory.read_obj(GuestAddress(at + 4)).unwrap());
        let head = u16::try_from(id).unwrap();
        let mut entries = std::mem::take(&mut self.held[usize::from(head)]);
        assert!(!entries.is_empty(), "head {head} was not in flight");
        self.free.append(&mut entries);
        self.used_idx = self.used_idx.wrapping_add(1);
        Some((head, len))
    }

    /// Without VIRTIO_RING_F_EVENT_IDX: whether the driver wants interrupts (2.7.7).
    pub fn want_interrupts(&self, wanted: bool) {
        let flags = u16::from(!wanted);
        self.memory.store(flags.to_le(), GuestAddress(self.layout.driver), Ordering::Release).unwrap();
    }

    /// With VIRTIO_RING_F_EVENT_IDX: sets `used_event`, the index whose use raises an interrupt (2.7.7).
    pub fn set_used_event(&self, event: u16) {
        let at = self.layout.driver + 4 + 2 * u64::from(self.layout.size);
        self.memory.store(event.to_le(), GuestAddress(at), Ordering::Release).unwrap();
    }

    /// Whether the device asked to be notified of the last `added` chains (2.7.10).
    pub fn must_notify(&self, event_idx: bool, added: u16) -> bool {
        fence(Ordering::SeqCst);
        let device = self.layout.device;
        if event_idx {
            let at = device + 4 + 8 * u64::from(self.layout.size);
            let event = u16::from_le(self.memory.load(GuestAddress(at), Ordering::Acquire).unwrap());
            self.avail_idx.wrapping_sub(event).wrapping_sub(1) < added
        } else {
            u16::from_le(self.memory.load(GuestAddress(device), Ordering::Acquire).unwrap()) & 1 == 0
        }
    }

    fn offer(&mut self, entries: Vec<u16>) -> u16 {
        let head = entries[0];
        self.held[usize::from(head)] = entries;
        self.publish(head);
        head
    }
}

/// `segments` as descriptors in a chain; the caller links them.
fn describe(segments: &[Segment]) -> impl Iterator<Item = Descriptor> + '_ {
    segments.iter().enumerate().map(|(at, segment)| Descriptor {
        address: segment.address.0,
        len: segment.len,
        flags: if segment.writable { WRITE } else { 0 } | if at + 1 < segments.len() { NEXT } else { 0 },
        next: 0,
    })
}
