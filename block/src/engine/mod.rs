//! The contract every disk engine keeps. One worker thread owns an engine; only the completion eventfd is shared with
//! whatever does the transfers (a pool's threads, the kernel).

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryMmap};

/// What an [`Op`] asks of the image. Offsets and lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Image to guest memory (`preadv`). Bytes past the end of the image read as zero.
    Read,
    /// Guest memory to image (`pwritev`).
    Write,
    /// Everything completed before is on stable storage when this completes (`fdatasync`).
    Flush,
}

/// One transfer between the image and guest memory. It owns what it touches: the engine may use the memory until the
/// completion hands the `Op` back, whatever happens to the device in between.
#[derive(Debug)]
pub struct Op {
    /// What to do.
    pub kind: OpKind,
    /// Where in the image, in bytes.
    pub offset: u64,
    /// The guest memory, in order: address and length in bytes. Checked against `memory` by the engine before use.
    pub segments: Vec<(GuestAddress, u32)>,
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

/// Moves bytes between an image and guest memory. All engines complete the same way; nothing above asks which one it is.
///
/// Every pushed op completes exactly once. `EAGAIN` and a full ring park it in a FIFO and are never reported.
pub trait Engine: Send {
    /// Queues `op` without a system call. `tag` comes back with its completion; the caller keeps tags in flight unique.
    fn push(&mut self, op: Op, tag: u16);

    /// Hands what was pushed to the host, in as few system calls as possible.
    fn submit(&mut self) -> io::Result<()>;

    /// Appends what has completed to `completions`, without blocking.
    fn reap(&mut self, completions: &mut Vec<Completion>);

    /// Becomes readable when something completed; [`Engine::reap`] clears it.
    fn completion_fd(&self) -> BorrowedFd<'_>;

    /// Returns when nothing is in flight; appends the last completions. Called at reset, on the worker thread.
    fn drain(&mut self, completions: &mut Vec<Completion>);
}
