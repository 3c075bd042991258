//! A queue at work: what its worker keeps of it besides the frames.

use std::{io, mem};

use vmm_sys_util::eventfd::EventFd;

use super::gate::Gate;
use super::statistics::Counts;
use super::wakeups::Wakeups;
use crate::virtio::device::{ActiveQueue, Interrupt};
use crate::virtio::queue::Virtqueue;

/// One queue; `frames` is what does its work.
pub(super) struct Side<T> {
    pub(super) index: u16,
    pub(super) frames: T,
    pub(super) gate: Gate,
    /// It wakes the worker, so it stays open as long.
    _kick: EventFd,
    /// The port took nothing when last asked.
    pub(super) blocked: bool,
    /// The driver is to be interrupted for what it can see already.
    pub(super) due: bool,
}

impl<T> Side<T> {
    pub(super) fn new(
        wakeups: &Wakeups,
        active: ActiveQueue,
        why: u64,
        gate: Gate,
        frames: impl FnOnce(Virtqueue) -> T,
    ) -> io::Result<Self> {
        let ActiveQueue { index, queue, kick } = active;
        wakeups.at_each_write(&kick, why)?;
        Ok(Self { index, frames: frames(queue), gate, _kick: kick, blocked: false, due: false })
    }

    /// Interrupts the driver for what it was shown since the last time, if it wants that.
    pub(super) fn interrupt(&mut self, interrupt: &dyn Interrupt, counts: &Counts) {
        if mem::take(&mut self.due) {
            interrupt.queue(self.index);
            counts.interrupted();
        }
    }
}
