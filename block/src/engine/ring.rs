#![expect(unsafe_code, reason = "hands guest memory to the kernel")]
//! What the engines over a queue in the kernel have in common. The kernel gets the plain case, a transfer it can do as it
//! is; whatever needs more (buffers that O_DIRECT does not take, a part of a block, the rest of a short transfer, a durable
//! write through the page cache, discarding and zeroing, an operation the kernel lacks) is done whole by a few helper
//! threads, so that it never holds up the queue. Owned by the worker.

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use libc::iovec;
use vmm_sys_util::eventfd::EventFd;

use super::threads::ThreadPool;
use super::transfer::{Image, MAX_IOVECS, claim, length, resolve};
use super::{Completion, Engine, Op, OpKind};
use crate::ranges::Claim;

/// The most transfers of one queue in the kernel at a time; more wait in a FIFO.
pub(super) const DEPTH: usize = 256;

/// The most bytes one transfer of Linux has (MAX_RW_COUNT).
const MAX_BYTES: u64 = 0x7fff_f000;

/// So many ops are handed over as soon as they were pushed: the host begins with them while their owner goes on pushing.
const BATCH: usize = 16;

/// How long to wait for a kernel that has no memory for a single request.
const PAUSE: Duration = Duration::from_millis(1);

/// A queue in the kernel. Numbers below [`DEPTH`] tell the transfers in it apart.
pub(super) trait Ring: Send {
    /// Queues a read, a write or a flush without a system call. A flush has no buffers, the others at least one.
    ///
    /// # Safety
    /// `number` is not in use. The array and the memory it names stay until [`Ring::reap`] yields `number`.
    unsafe fn queue(&mut self, number: usize, kind: OpKind, offset: u64, buffers: &[iovec]);

    /// Hands over what is queued, in one system call if the kernel takes it all at once. Returns how many it made.
    fn enter(&mut self) -> u64;

    /// How many are queued and not handed over. After [`Ring::enter`]: the kernel had no room for them.
    fn queued(&self) -> usize;

    /// Whether [`Ring::reap`] would yield something, without a system call; `false` also where only the kernel knows.
    fn has_finished(&mut self) -> bool;

    /// Gives up what the kernel has and has not begun, as far as it lets us. [`Ring::reap`] yields it nonetheless.
    fn cancel(&mut self);

    /// Takes out what has completed: its number, and the bytes transferred or the negative errno. The event of the
    /// engine is written for each.
    fn reap(&mut self, finished: &mut Vec<(usize, i64)>);
}

/// An engine over a [`Ring`].
pub(super) struct RingEngine<R: Ring> {
    ring: R,
    image: Arc<dyn Image>,
    event: EventFd,
    helper: ThreadPool,
    /// Ops with the helper.
    helping: usize,
    /// Ops for which there was no slot yet.
    waiting: VecDeque<(Op, u16)>,
    /// Ops pushed since the last submission.
    pushed: usize,
    slots: Box<[Slot]>,
    free: Vec<usize>,
    finished: Vec<(usize, i64)>,
    submissions: u64,
    /// What must be done again is not: [`Engine::abandon`].
    abandoning: bool,
}

/// One transfer in the ring; its number is its index.
#[derive(Default)]
struct Slot {
    op: Option<(Op, u16)>,
    /// What the kernel reads while the op is in flight.
    buffers: Vec<iovec>,
    claim: Option<Claim>,
}

// SAFETY: the addresses in `buffers` are not tied to a thread, and `op` keeps their targets mapped.
unsafe impl Send for Slot {}

impl<R: Ring> RingEngine<R> {
    /// `event` is written by `ring`, for each completion. `name` is that of the helper threads.
    ///
    /// # Errors
    /// When the host gives no thread.
    pub(super) fn new(image: Arc<dyn Image>, ring: R, event: EventFd, name: &str) -> io::Result<Self> {
        Ok(Self {
            ring,
            helper: ThreadPool::helper(image.clone(), name, event.try_clone()?)?,
            image,
            event,
            helping: 0,
            waiting: VecDeque::with_capacity(DEPTH),
            pushed: 0,
            slots: (0..DEPTH).map(|_| Slot::default()).collect(),
            free: (0..DEPTH).rev().collect(),
            finished: Vec::with_capacity(DEPTH),
            submissions: 0,
            abandoning: false,
        })
    }

    /// Gives each waiting op a slot, as far as they go, or to the helper.
    fn start(&mut self) {
        while let Some(&number) = self.free.last() {
            let Some((op, tag)) = self.waiting.pop_front() else { return };
            let slot = &mut self.slots[number];
            if !slot.takes(&*self.image, &op) {
                self.help(op, tag);
                continue;
            }
            self.free.pop();
            // SAFETY: the number was free. `op` stays in the slot, and with it the memory, until the ring yields it; the
            // array is not touched while the slot is not free.
            unsafe { self.ring.queue(number, op.kind, op.offset, &slot.buffers) };
            slot.op = Some((op, tag));
        }
    }

    fn help(&mut self, op: Op, tag: u16) {
        self.helper.push(op, tag);
        self.helping += 1;
    }

    fn in_slots(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether all that is in the ring is still queued. More than that is, if the ring has something of its own to say.
    fn is_stuck(&self) -> bool {
        self.ring.queued() > 0 && self.ring.queued() >= self.in_slots()
    }

    /// Takes completions out of the ring; returns whether there were any.
    fn reap_ring(&mut self, completions: &mut Vec<Completion>) -> bool {
        let mut finished = mem::take(&mut self.finished);
        self.ring.reap(&mut finished);
        let any = !finished.is_empty();
        for (number, result) in finished.drain(..) {
            let slot = &mut self.slots[number];
            let (op, tag) = slot.op.take().expect("the kernel completes each transfer once");
            if let Some(claim) = slot.claim.take() {
                self.image.ranges().release(&claim);
            }
            self.free.push(number);
            match judge(&op, result) {
                Some(result) => {
                    let result = if op.kind == OpKind::Flush { self.image.flushed(result) } else { result };
                    completions.push(Completion { tag, op, result });
                }
                None if self.abandoning => completions.push(Completion::canceled(op, tag)),
                None => self.help(op, tag),
            }
        }
        self.finished = finished;
        any
    }

    /// Returns when nothing is in flight.
    fn finish(&mut self, completions: &mut Vec<Completion>) {
        loop {
            let before = completions.len();
            self.reap(completions);
            if self.waiting.is_empty() && self.in_slots() == 0 && self.helping == 0 {
                return;
            }
            if completions.len() == before {
                self.wait();
            }
        }
    }

    /// Waits until the event was written since the last wait.
    fn wait(&self) {
        let mut poll = libc::pollfd { fd: self.event.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: it is one structure of ours.
        unsafe { libc::poll(&raw mut poll, 1, -1) };
        // Its owner waits for edges, so the count is of no use to it.
        let _ = self.event.read();
    }
}

impl Slot {
    /// Prepares the slot for `op` if the kernel can do that as it is and now.
    fn takes(&mut self, image: &dyn Image, op: &Op) -> bool {
        self.buffers.clear();
        match op.kind {
            OpKind::Flush => return true,
            OpKind::Discard { .. } | OpKind::WriteZeroes { .. } => return false,
            OpKind::Write { durable: true } if !image.tells_apart() => return false,
            OpKind::Read | OpKind::Write { .. } => {}
        }
        let alignment = image.alignment();
        let plain = resolve(op, &mut self.buffers).is_ok()
            && (1..=MAX_IOVECS).contains(&self.buffers.len())
            && length(op) <= MAX_BYTES
            && alignment.fits(&self.buffers, op.offset);
        if !plain {
            return false;
        }
        self.claim = claim(op, alignment);
        let claimed = self.claim.as_ref().is_none_or(|claim| image.ranges().try_claim(claim));
        if !claimed {
            self.claim = None;
        }
        claimed
    }
}

/// The result of the op, or `None` if the helper is to do it again: it was short, or the kernel did not do it.
fn judge(op: &Op, result: i64) -> Option<io::Result<()>> {
    match u64::try_from(result) {
        Ok(count) if op.kind == OpKind::Flush || count == length(op) => Some(Ok(())),
        Ok(_) => None,
        Err(_) => match (-result) as i32 {
            // Of a flush this may tell of what could not be written, and the next flush would not.
            libc::EAGAIN if op.kind != OpKind::Flush => None,
            // ECANCELED: it was given up, which of a flush says nothing about what was written.
            libc::EINTR | libc::ECANCELED => None,
            libc::EINVAL | libc::EOPNOTSUPP if op.kind == OpKind::Flush => None,
            errno => Some(Err(io::Error::from_raw_os_error(errno))),
        },
    }
}

impl<R: Ring> Engine for RingEngine<R> {
    fn push(&mut self, op: Op, tag: u16) {
        self.waiting.push_back((op, tag));
        self.pushed += 1;
        if self.pushed == BATCH {
            self.submit();
        }
    }

    fn submit(&mut self) {
        self.pushed = 0;
        self.start();
        self.helper.submit();
        if self.ring.queued() == 0 {
            return;
        }
        self.submissions += self.ring.enter();
        if self.is_stuck() {
            // No completion will bring us back here, and there is nothing else to do.
            thread::sleep(PAUSE);
            let _ = self.event.write(1);
        }
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) {
        let any = self.reap_ring(completions);
        let parked = !self.waiting.is_empty() || self.ring.queued() > 0;
        if self.is_stuck() || any && parked {
            self.submit();
        } else if any {
            self.helper.submit();
        }
        // Last: the helper announces what completes after it was asked and had nothing.
        if self.helping > 0 {
            let before = completions.len();
            self.helper.reap(completions);
            self.helping -= completions.len() - before;
        }
    }

    fn has_completed(&mut self) -> bool {
        self.ring.has_finished() || self.helping > 0 && self.helper.has_completed()
    }

    fn completion_event(&self) -> &EventFd {
        &self.event
    }

    fn drain(&mut self, completions: &mut Vec<Completion>) {
        self.submit();
        self.finish(completions);
    }

    fn abandon(&mut self, completions: &mut Vec<Completion>) {
        completions.extend(self.waiting.drain(..).map(|(op, tag)| Completion::canceled(op, tag)));
        self.abandoning = true;
        self.ring.cancel();
        let before = completions.len();
        // Its threads may wait for blocks that a transfer of the ring has claimed, until that is reaped.
        self.helper.cancel(completions);
        self.helping -= completions.len() - before;
        self.finish(completions);
        self.abandoning = false;
    }

    fn submissions(&self) -> u64 {
        self.submissions
    }
}

impl<R: Ring> Drop for RingEngine<R> {
    fn drop(&mut self) {
        self.drain(&mut Vec::new());
    }
}
