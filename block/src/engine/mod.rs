//! The contract every disk engine keeps. One worker thread owns an engine; only the completion eventfd is shared with
//! whatever does the transfers (a pool's threads, the kernel).

use std::io;
use std::ops::Range;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

mod aio;
mod bounce;
pub mod merge;
pub mod native;
mod ring;
mod snapshot;
pub mod threads;
mod transfer;
pub mod uring;
#[cfg(any(test, feature = "test-utils"))]
pub mod volatile;
mod zeroes;

pub use aio::{Aio, Engines, Unusable};

/// What an [`Op`] asks of the image. Offsets and lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Image to guest memory (`preadv`). Bytes past the end of the image read as zero.
    Read,
    /// Guest memory to image (`pwritev`).
    Write {
        /// Complete only when the bytes are on stable storage (RWF_DSYNC).
        durable: bool,
    },
    /// Writes that completed before this was pushed are on stable storage when it completes (`fdatasync`).
    Flush,
    /// What is at [`Op::ranges`] is no longer needed: what they read as afterwards is not said, and the host may use their
    /// blocks for something else. Where it cannot, nothing happens.
    Discard {
        /// As for `Write`.
        durable: bool,
    },
    /// [`Op::ranges`] read as zero from the completion on.
    WriteZeroes {
        /// The host may use their blocks for something else; otherwise they stay allocated.
        unmap: bool,
        /// As for `Write`.
        durable: bool,
    },
}

/// One transfer between the image and guest memory, or one change of the image alone. It owns what it touches: the engine
/// may use the memory until the completion hands the `Op` back, whatever happens to the device in between.
#[derive(Debug)]
pub struct Op {
    /// What to do.
    pub kind: OpKind,
    /// Where in the image, in bytes. Of reads and writes.
    pub offset: u64,
    /// The guest memory, in order: address and length in bytes. Checked against `memory` by the engine before use; one
    /// outside of it fails the op with `EFAULT`.
    pub segments: Vec<(GuestAddress, u32)>,
    /// What is discarded or zeroed: bytes of the image. Empty for other kinds.
    pub ranges: Vec<Range<u64>>,
    /// Keeps the mapping alive.
    pub memory: Arc<GuestMemoryMmap>,
}

/// The end of one [`Op`].
#[derive(Debug)]
pub struct Completion {
    /// As given to [`Engine::push`].
    pub tag: u16,
    /// The op, for its buffers to be used again.
    pub op: Op,
    /// `Ok` only if the whole op was done; short transfers are continued inside the engine.
    pub result: io::Result<()>,
}

impl Completion {
    /// Of an op that was not done, because nobody waits for it any more.
    fn canceled(op: Op, tag: u16) -> Self {
        Self { tag, op, result: Err(io::Error::from_raw_os_error(libc::ECANCELED)) }
    }
}

/// Moves bytes between an image and guest memory. All engines complete the same way; nothing above asks which
/// one it is.
///
/// Every pushed op completes exactly once, in any order. A full ring parks it in a FIFO and is never reported. A transfer that
/// was interrupted (`EINTR`), or for which the host has no room (`EAGAIN`), is made again, the latter for about a second;
/// whatever else goes wrong is the result of the op. Dropping an engine waits for what is in flight.
pub trait Engine: Send {
    /// Queues `op`; may hand over what was pushed so far, so that the host begins while the owner goes on pushing. `tag` comes
    /// back with its completion; the caller keeps tags in flight unique.
    fn push(&mut self, op: Op, tag: u16);

    /// Hands what was pushed to the host, in as few system calls as possible.
    fn submit(&mut self);

    /// Appends what has completed to `completions`, without blocking.
    fn reap(&mut self, completions: &mut Vec<Completion>);

    /// Whether [`Engine::reap`] would yield something, for an owner who looks again and again: no system call and no lock.
    /// May miss what only the host knows of; that is announced as always.
    fn has_completed(&mut self) -> bool;

    /// Written when something completes after a [`Engine::reap`] that found nothing; an owner who still reaps need not
    /// be told. Nobody reads it, so wait for it edge-triggered, and only after such a `reap`.
    fn completion_event(&self) -> &EventFd;

    /// Submits what was pushed and returns when nothing is in flight; appends the last completions. Called at reset, on
    /// the worker thread.
    fn drain(&mut self, completions: &mut Vec<Completion>);

    /// As [`Engine::drain`], for an owner who needs no answers any more: what the host has not begun is not done, and completes
    /// with `ECANCELED`. What it has begun is waited for, for most of it cannot be taken back.
    fn abandon(&mut self, completions: &mut Vec<Completion>) {
        self.drain(completions);
    }

    /// How many ops so far went together with one before them, instead of each on its own.
    fn merged(&self) -> u64 {
        0
    }

    /// How many system calls so far gave ops to the kernel, some or many at once: io_submit, io_uring_enter. None of a pool,
    /// whose threads make one for each op.
    fn submissions(&self) -> u64 {
        0
    }
}

#[cfg(test)]
pub(crate) mod conformance;
#[cfg(test)]
mod failures;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod faulty;
#[cfg(test)]
mod matrix;
#[cfg(test)]
mod scripted;
