//! The doorbells of a virtio PCI function as ioeventfds (virtio 1.2, 4.1.4.4). Changed on vCPU threads under the lock
//! of the function's configuration space.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::layout::NOTIFY_MULTIPLIER;

/// Connects guest physical addresses to eventfds. Implemented over KVM's ioeventfds, and over a table in tests.
///
/// A guest can move a BAR over its RAM or another doorbell: then `attach` may fail or the address is never seen, and
/// neither harms anybody but that guest.
pub trait Doorbells: Send + Sync {
    /// From now on a guest's write of any width to `address` writes `event` instead of leaving the guest.
    fn attach(&self, address: u64, event: &EventFd) -> io::Result<()>;

    /// Undoes [`Doorbells::attach`] of the same pair.
    fn detach(&self, address: u64, event: &EventFd) -> io::Result<()>;
}

/// The doorbells of all queues, which move with the notification structure.
pub(super) struct DoorbellSet {
    doorbells: Arc<dyn Doorbells>,
    kicks: Arc<[EventFd]>,
    wanted: bool,
    base: Option<u64>,
    attached: Vec<bool>,
    warned: bool,
}

impl DoorbellSet {
    pub(super) fn new(doorbells: Arc<dyn Doorbells>, kicks: Arc<[EventFd]>, wanted: bool) -> Self {
        Self { doorbells, attached: vec![false; kicks.len()], kicks, wanted, base: None, warned: false }
    }

    /// Puts the doorbell of queue 0 at `base` and the others after it; `None` while BAR 0 is not decoded.
    pub(super) fn place(&mut self, base: Option<u64>) {
        if base == self.base || !self.wanted {
            return;
        }
        let address = |base: u64, queue: usize| base + queue as u64 * NOTIFY_MULTIPLIER;
        let mut failure = None;
        for (queue, kick) in self.kicks.iter().enumerate() {
            if let Some(old) = self.base.filter(|_| self.attached[queue]) {
                failure = self.doorbells.detach(address(old, queue), kick).err().or(failure);
                self.attached[queue] = false;
            }
        }
        for (queue, kick) in self.kicks.iter().enumerate() {
            if let Some(new) = base {
                let result = self.doorbells.attach(address(new, queue), kick);
                self.attached[queue] = result.is_ok();
                failure = result.err().or(failure);
            }
        }
        self.base = base;
        if let Some(error) = failure.filter(|_| !std::mem::replace(&mut self.warned, true)) {
            tracing::warn!(%error, "a virtio doorbell could not be moved; its notifications go the slow way");
        }
    }
}
