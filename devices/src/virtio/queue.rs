//! The device's side of a split virtqueue (virtio 1.2, 2.7) over `virtio-queue`. Owned by one thread at a time: the
//! transport while it is being set up, then the worker.

use std::sync::Arc;

use thiserror::Error;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_AVAIL_F_NO_INTERRUPT};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

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
}

impl Virtqueue {
    /// Freezes a queue that the driver laid out.
    ///
    /// # Errors
    /// [`QueueError::Layout`] if the size is no power of two, or a ring is misaligned or not in memory.
    pub fn new(layout: QueueLayout, features: u64, memory: Arc<GuestMemoryMmap>) -> Result<Self, QueueError> {
        debug_assert!(features & (1 << VIRTIO_F_VERSION_1) != 0, "the transport negotiates VERSION_1");
        let bad =
            QueueError::Layout { size: layout.size, desc: layout.desc, driver: layout.driver, device: layout.device };
        let event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let Ok(mut queue) = Queue::new(layout.size) else { return Err(bad) };
        let laid_out = queue.try_set_size(layout.size).is_ok()
            && queue.try_set_desc_table_address(GuestAddress(layout.desc)).is_ok()
            && queue.try_set_avail_ring_address(GuestAddress(layout.driver)).is_ok()
            && queue.try_set_used_ring_address(GuestAddress(layout.device)).is_ok();
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        if !laid_out || !queue.is_valid(&*memory) {
            return Err(bad);
        }
        Ok(Self { queue, memory, layout, event_idx })
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.layout.size
    }

    /// Takes the next available chain into `chain`; `false` when there is none.
    ///
    /// # Errors
    /// When the driver broke the ring or the chain; nothing more can be trusted then.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        chain.segments.clear();
        let Some(descriptors) = self.queue.iter(&*self.memory).map_err(|_| QueueError::AvailRing)?.next() else {
            return Ok(false);
        };
        chain.head = descriptors.head_index();
        let mut complete = false;
        for descriptor in descriptors {
            complete = !descriptor.has_next();
            chain.segments.push(Segment {
                address: descriptor.addr(),
                len: descriptor.len(),
                writable: descriptor.is_write_only(),
            });
        }
        // The iterator of virtio-queue just ends at a bad link, and then the last descriptor it gave says NEXT.
        if complete { Ok(true) } else { Err(QueueError::Chain(chain.head)) }
    }

    /// Publishes the chain `head` as used, `len` bytes of it written.
    ///
    /// # Errors
    /// When the used ring cannot be written or `head` is out of range.
    pub fn push(&mut self, head: u16, len: u32) -> Result<(), QueueError> {
        self.queue.add_used(&*self.memory, head, len).map_err(|_| QueueError::Access)
    }

    /// Whether the driver wants an interrupt for what was pushed since the last call (virtio 1.2, 2.7.7 and 2.7.10).
    ///
    /// # Errors
    /// When the driver area cannot be read.
    pub fn needs_interrupt(&mut self) -> Result<bool, QueueError> {
        let wanted = self.queue.needs_notification(&*self.memory).map_err(|_| QueueError::Access)?;
        if self.event_idx {
            return Ok(wanted);
        }
        let flags: u16 = self.memory.read_obj(GuestAddress(self.layout.driver)).map_err(|_| QueueError::Access)?;
        Ok(u16::from_le(flags) & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0)
    }

    /// Asks the driver for notifications; `true` when chains became available meanwhile, and the caller must look again.
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
