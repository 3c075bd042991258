//! The write cache of one disk as its driver sees it and switches it (virtio 1.2, 5.2.5 and 5.2.6.2). Workers ask for every
//! request; a vCPU thread switches.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use block::cache::CacheMode;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

/// Every write is stable when it completes.
const OFF: u8 = 0;
/// As `OFF` for writes from now on; what was written before is being made stable.
const CLOSING: u8 = 1;
/// A write may complete before it is stable; a flush makes it so.
const ON: u8 = 2;

/// Whether there is a write cache, and what it means for requests.
#[derive(Debug)]
pub(super) struct WriteCache {
    mode: CacheMode,
    state: AtomicU8,
    /// The driver may switch it.
    switchable: AtomicBool,
}

impl WriteCache {
    /// As the cache mode of the disk has it.
    pub(super) fn new(mode: CacheMode) -> Self {
        let state = AtomicU8::new(if mode.has_write_cache() { ON } else { OFF });
        Self { mode, state, switchable: AtomicBool::new(true) }
    }

    /// For a driver with these features, before a worker runs. One that cannot flush has no write cache; one that cannot
    /// switch it has that of the cache mode (5.2.5.2). Others may have switched it already.
    pub(super) fn begin(&self, features: u64) {
        let switchable = features & 1 << VIRTIO_BLK_F_CONFIG_WCE != 0;
        self.switchable.store(switchable, Ordering::SeqCst);
        if features & 1 << VIRTIO_BLK_F_FLUSH == 0 {
            self.set(false);
        } else if !switchable {
            self.set(self.mode.has_write_cache());
        }
    }

    /// Back to what the cache mode says, when no worker runs any more: they have flushed what they wrote.
    pub(super) fn end(&self) {
        self.set(self.mode.has_write_cache());
        self.switchable.store(true, Ordering::SeqCst);
    }

    fn set(&self, on: bool) {
        self.state.store(if on { ON } else { OFF }, Ordering::SeqCst);
    }

    /// What the field `writeback` of the configuration reads.
    pub(super) fn is_on(&self) -> bool {
        self.state.load(Ordering::SeqCst) == ON
    }

    /// Whether a write may only be answered when it is stable. To be asked before it is given to the engine, and again when
    /// it is about to be answered: what [`WriteCache::switch`] flushes was answered before it.
    pub(super) fn is_durable(&self) -> bool {
        self.mode != CacheMode::Unsafe && !self.is_on()
    }

    /// Whether a flush has something to do; else it is answered at once.
    pub(super) fn flushes(&self) -> bool {
        self.mode != CacheMode::Unsafe && self.state.load(Ordering::SeqCst) != OFF
    }

    /// Does what the driver wrote to `writeback`, if it may: on, from the next write on, or off. Then writes are answered
    /// when they are stable from now on, and when this returns those answered before are too: it blocks for as long as
    /// `flush`, of the disk, takes.
    ///
    /// # Errors
    /// What the host says to the flush. Then it is on, and the driver reads that it is.
    pub(super) fn switch(&self, on: bool, flush: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        if !self.switchable.load(Ordering::SeqCst) {
            return Ok(());
        }
        if on {
            self.set(true);
            return Ok(());
        }
        let was_on = self.state.swap(CLOSING, Ordering::SeqCst) != OFF;
        let flushed = if was_on && self.mode != CacheMode::Unsafe { flush() } else { Ok(()) };
        self.set(flushed.is_err());
        flushed
    }
}
