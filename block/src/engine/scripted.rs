//! For tests: a ring in the kernel that misbehaves as kernels do, by a script.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use libc::iovec;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::native::Native;
use super::ring::{Ring, RingEngine};
use super::uring::Uring;
use super::{Engine, OpKind};
use crate::disk::Disk;

/// What becomes of a completion, or of an attempt to hand transfers over.
#[derive(Clone, Copy)]
pub(super) enum Fault {
    /// The kernel has no room.
    Full,
    /// The transfer reports this.
    Report(i64),
    /// The completion comes when no other does any more, and after those that were held back later.
    Late,
    /// None.
    Pass,
}

/// A ring whose behaviour follows a script, over and over.
struct Faulty<R> {
    ring: R,
    script: VecDeque<Fault>,
    /// Behind what is held: to cancel.
    cancel: bool,
    /// Queued, and not yet in `ring`: whose memory the engine keeps until it is reaped.
    held: VecDeque<(usize, OpKind, u64, *const iovec, usize)>,
    /// Completed, and not yet said.
    late: Vec<(usize, i64)>,
    /// That of the engine.
    event: EventFd,
}

// SAFETY: the pointers are those the engine gave, to memory that it keeps.
#[expect(unsafe_code, reason = "it holds what it was given for the kernel")]
unsafe impl<R: Ring> Send for Faulty<R> {}

impl<R: Ring> Faulty<R> {
    fn next(&mut self) -> Fault {
        self.script.rotate_left(1);
        *self.script.back().unwrap()
    }
}

impl<R: Ring> Ring for Faulty<R> {
    #[expect(unsafe_code, reason = "the same promise as that of the ring inside")]
    unsafe fn queue(&mut self, number: usize, kind: OpKind, offset: u64, buffers: &[iovec]) {
        self.held.push_back((number, kind, offset, buffers.as_ptr(), buffers.len()));
    }

    fn enter(&mut self) -> u64 {
        let mut calls = 0;
        while let Some(&(number, kind, offset, array, count)) = self.held.front() {
            if matches!(self.next(), Fault::Full) {
                break;
            }
            self.held.pop_front();
            #[expect(unsafe_code, reason = "passes on what it was given")]
            // SAFETY: the engine keeps the array and its targets until the number is reaped.
            unsafe {
                self.ring.queue(number, kind, offset, std::slice::from_raw_parts(array, count));
            }
            calls += self.ring.enter();
            assert_eq!(self.ring.queued(), 0);
        }
        if self.cancel && self.held.is_empty() {
            self.ring.cancel();
            self.cancel = false;
        }
        calls
    }

    fn queued(&self) -> usize {
        self.held.len() + usize::from(self.cancel)
    }

    fn has_finished(&mut self) -> bool {
        self.ring.has_finished()
    }

    fn cancel(&mut self) {
        self.cancel = true;
        self.enter();
    }

    fn reap(&mut self, finished: &mut Vec<(usize, i64)>) {
        let mut reaped = Vec::new();
        self.ring.reap(&mut reaped);
        if reaped.is_empty() {
            return finished.extend(self.late.drain(..).rev());
        }
        for (number, result) in reaped {
            match self.next() {
                Fault::Report(instead) if instead < 0 => finished.push((number, instead)),
                Fault::Report(most) => finished.push((number, result.min(most))),
                Fault::Late => self.late.push((number, result)),
                Fault::Full | Fault::Pass => finished.push((number, result)),
            }
        }
        if !self.late.is_empty() {
            self.event.write(1).unwrap();
        }
    }
}

pub(super) fn faulty<R: Ring + 'static>(
    open: impl Fn(&Disk, &EventFd) -> R,
    script: &[Fault],
) -> impl Fn(Arc<Disk>) -> Box<dyn Engine> {
    move |disk| {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let ring = Faulty {
            ring: open(&disk, &event),
            script: script.iter().copied().collect(),
            cancel: false,
            held: VecDeque::new(),
            late: Vec::new(),
            event: event.try_clone().unwrap(),
        };
        Box::new(RingEngine::new(disk, ring, event, "test-io").unwrap())
    }
}

pub(super) fn native(disk: &Disk, event: &EventFd) -> Native {
    Native::new(disk.file().as_raw_fd(), event.as_raw_fd()).unwrap()
}

pub(super) fn uring(disk: &Disk, event: &EventFd) -> Uring {
    Uring::new(disk.file().as_raw_fd(), event.as_raw_fd()).unwrap()
}
