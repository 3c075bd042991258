//! Whether the link of an interface is up. Shared by its workers, and the vCPU threads that read it.

use std::sync::atomic::{AtomicU64, Ordering};

/// Up unless a port is lost.
#[derive(Debug, Default)]
pub(super) struct Link {
    /// A bit a pair.
    lost: AtomicU64,
}

impl Link {
    pub(super) fn is_up(&self) -> bool {
        self.lost.load(Ordering::Acquire) == 0
    }

    /// The port of `pair` is lost, or not. Returns whether that changed the link.
    pub(super) fn set_lost(&self, pair: u16, lost: bool) -> bool {
        let bit = 1 << pair;
        let before =
            if lost { self.lost.fetch_or(bit, Ordering::AcqRel) } else { self.lost.fetch_and(!bit, Ordering::AcqRel) };
        let after = if lost { before | bit } else { before & !bit };
        (before == 0) != (after == 0)
    }

    /// Nobody looks at the ports any more.
    pub(super) fn reset(&self) {
        self.lost.store(0, Ordering::Release);
    }
}
