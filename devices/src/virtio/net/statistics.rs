//! What is counted of a network interface. Each pair's worker counts, any thread reads.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::statistics::Counter;

/// Why a frame was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropReason {
    /// Longer or shorter than a frame can be, or in more pieces than the host takes.
    Length,
    /// Longer than the buffers that the driver gives.
    NoBuffer,
    /// It needs what the driver did not agree to do.
    Offload,
    /// The driver filters it out.
    Filtered,
    /// The host refused it, as it does for a header that contradicts the frame.
    Host,
    /// The link was down.
    Link,
}

impl DropReason {
    /// All of them, in the order of a snapshot's array.
    pub const ALL: [Self; DROPS] =
        [Self::Length, Self::NoBuffer, Self::Offload, Self::Filtered, Self::Host, Self::Link];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Length => "length",
            Self::NoBuffer => "no-buffer",
            Self::Offload => "offload",
            Self::Filtered => "filtered",
            Self::Host => "host",
            Self::Link => "link-down",
        }
    }
}

/// How many reasons there are.
pub const DROPS: usize = 6;

/// One queue's numbers.
#[derive(Debug, Default)]
pub(super) struct Counts {
    frames: Counter,
    bytes: Counter,
    drops: [Counter; DROPS],
    kicks: Counter,
    interrupts: Counter,
}

impl Counts {
    /// A frame of `bytes` without its header passed.
    pub(super) fn passed(&self, bytes: usize) {
        self.frames.add(1);
        self.bytes.add(bytes as u64);
    }

    /// A frame did not.
    pub(super) fn dropped(&self, reason: DropReason) {
        self.drops[reason as usize].add(1);
    }

    /// A notification of the driver woke the worker.
    pub(super) fn kicked(&self) {
        self.kicks.add(1);
    }

    /// An interrupt was raised for used buffers.
    pub(super) fn interrupted(&self) {
        self.interrupts.add(1);
    }

    fn snapshot(&self) -> Snapshot {
        Snapshot {
            frames: self.frames.get(),
            bytes: self.bytes.get(),
            drops: std::array::from_fn(|reason| self.drops[reason].get()),
            kicks: self.kicks.get(),
            interrupts: self.interrupts.get(),
        }
    }
}

/// The numbers of one queue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Frames that passed.
    pub frames: u64,
    /// Their bytes, without the headers of virtio.
    pub bytes: u64,
    /// Frames that were dropped, in the order of [`DropReason::ALL`].
    pub drops: [u64; DROPS],
    /// Notifications by the driver that woke the worker; what arrives while it is awake wakes nobody.
    pub kicks: u64,
    /// Interrupts raised for used buffers.
    pub interrupts: u64,
}

/// The numbers of the two queues of a pair.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PairSnapshot {
    /// Received by the guest.
    pub rx: Snapshot,
    /// Sent by the guest.
    pub tx: Snapshot,
}

/// Where the worker of a pair counts.
#[derive(Debug, Default)]
pub(super) struct PairCounts {
    pub(super) rx: Counts,
    pub(super) tx: Counts,
}

/// The statistics of one interface, over all activations of its device and all machines that have it.
#[derive(Debug, Default)]
pub struct Statistics {
    pairs: Mutex<Vec<Arc<PairCounts>>>,
}

impl Statistics {
    /// What was counted until now, for each pair that ever ran. From any thread.
    pub fn snapshot(&self) -> Vec<PairSnapshot> {
        let both = |pair: &Arc<PairCounts>| PairSnapshot { rx: pair.rx.snapshot(), tx: pair.tx.snapshot() };
        self.pairs().iter().map(both).collect()
    }

    /// Where the worker of the pair `index` counts. There is at most one at a time.
    pub(super) fn pair(&self, index: usize) -> Arc<PairCounts> {
        let mut pairs = self.pairs();
        while pairs.len() <= index {
            pairs.push(Arc::default());
        }
        pairs[index].clone()
    }

    fn pairs(&self) -> MutexGuard<'_, Vec<Arc<PairCounts>>> {
        self.pairs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
