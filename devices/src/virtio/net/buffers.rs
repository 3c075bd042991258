#![expect(unsafe_code, reason = "readv and writev take raw guest memory")]
//! Guest memory as a list of buffers, for system calls that fill or send them without a copy. Owned by a queue's worker.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use libc::{c_int, iovec};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

/// The most buffers one system call takes (`IOV_MAX` of Linux, UIO_MAXIOV).
pub(super) const MAX_IOVECS: usize = 1024;

/// The buffers of a frame, or room for one; lent for as long as the memory is there. Buffers follow each other as one piece
/// of bytes. None is empty; there are at most 1024.
#[derive(Clone, Copy, Debug)]
pub struct Buffers<'a> {
    iovecs: &'a [iovec],
    len: usize,
    memory: PhantomData<&'a GuestMemoryMmap>,
}

impl Buffers<'_> {
    /// Bytes of all buffers.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// As the kernel takes them. They are mapped and writable as long as this exists; the guest can read and write them, so no
    /// reference to their bytes may be made.
    pub fn iovecs(&self) -> &[iovec] {
        self.iovecs
    }

    /// How many there are, as the system calls want it.
    fn count(&self) -> c_int {
        c_int::try_from(self.iovecs.len()).expect("there are at most 1024")
    }

    /// Fills them from `file`, as readv(2): the bytes that came.
    pub fn read_from(&self, file: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: the buffers are mapped and writable as long as `self`, and only the guest sees them as memory.
        let read = unsafe { libc::readv(file.as_raw_fd(), self.iovecs.as_ptr(), self.count()) };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }

    /// Writes them to `file`, as writev(2): the bytes that went.
    pub fn write_to(&self, file: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: the buffers are mapped as long as `self`.
        let written = unsafe { libc::writev(file.as_raw_fd(), self.iovecs.as_ptr(), self.count()) };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }

    /// Copies `bytes` to where they are `offset` bytes behind the start; what is past the end is left out.
    pub fn put(&self, offset: usize, bytes: &[u8]) {
        self.each(offset, bytes.len(), |done, slice| slice.copy_from(&bytes[done..]));
    }

    /// Copies what is `offset` bytes behind the start to `bytes`. Returns how many there were.
    pub fn get(&self, offset: usize, bytes: &mut [u8]) -> usize {
        self.each(offset, bytes.len(), |done, slice| {
            slice.copy_to(&mut bytes[done..]);
        })
    }

    /// Visits the `len` bytes from `offset` on, as far as they exist: how many came before, and the next piece.
    fn each(&self, mut offset: usize, len: usize, mut visit: impl FnMut(usize, VolatileSlice<'_>)) -> usize {
        let mut done = 0;
        for buffer in self.iovecs {
            if offset >= buffer.iov_len {
                offset -= buffer.iov_len;
                continue;
            }
            let count = (buffer.iov_len - offset).min(len - done);
            // SAFETY: these bytes are inside one buffer, which is mapped as long as `self`.
            let slice = unsafe { VolatileSlice::new(buffer.iov_base.cast::<u8>().wrapping_add(offset), count) };
            visit(done, slice);
            (done, offset) = (done + count, 0);
            if done == len {
                break;
            }
        }
        done
    }
}

/// Buffers that come at one end and go at the other, kept so that a system call can take them as they are.
pub(super) struct BufferList {
    memory: Arc<GuestMemoryMmap>,
    iovecs: Vec<iovec>,
    /// Those before it are gone.
    start: usize,
    /// Our own memory, for what the guest's does not hold.
    spill: Box<[u8]>,
}

// SAFETY: the pointers are to guest memory, which any thread may access and which `memory` keeps mapped, and to `spill`, which
// moves along.
unsafe impl Send for BufferList {}

impl BufferList {
    /// None yet, and `spill` bytes for what they will not hold.
    pub(super) fn new(memory: Arc<GuestMemoryMmap>, spill: usize) -> Self {
        Self { memory, iovecs: Vec::new(), start: 0, spill: vec![0; spill].into() }
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.iovecs.len() - self.start
    }

    /// Appends `len` bytes at `address`: one buffer, or several where memory is not in one piece, or none of 0 bytes.
    /// `false` if they are not all guest memory; some of them may have been appended then.
    #[must_use = "a guest can name what is not memory"]
    pub(super) fn push(&mut self, address: GuestAddress, len: usize) -> bool {
        for slice in self.memory.get_slices(address, len) {
            let Ok(slice) = slice else { return false };
            if !slice.is_empty() {
                self.iovecs.push(iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
            }
        }
        true
    }

    /// Forgets the first `count`.
    pub(super) fn pop_front(&mut self, count: usize) {
        self.start += count;
        debug_assert!(self.start <= self.iovecs.len(), "what was not there cannot go");
        if self.start >= self.iovecs.len() {
            self.iovecs.clear();
            self.start = 0;
        } else if self.start >= MAX_IOVECS {
            self.iovecs.drain(..self.start);
            self.start = 0;
        }
    }

    /// The first `count`.
    pub(super) fn first(&self, count: usize) -> Buffers<'_> {
        lend(&self.iovecs[self.start..self.start + count])
    }

    /// Calls `fill` with the first `count`, or as many as a system call takes beside the spill, and behind them the spill.
    /// Also returns the bytes of guest memory in it.
    pub(super) fn fill<T>(&mut self, count: usize, fill: impl FnOnce(&Buffers<'_>) -> T) -> (T, usize) {
        let end = self.start + count.min(MAX_IOVECS - 1);
        let spill = iovec { iov_base: self.spill.as_mut_ptr().cast(), iov_len: self.spill.len() };
        self.iovecs.insert(end, spill);
        let room = lend(&self.iovecs[self.start..=end]);
        let held = room.len - spill.iov_len;
        let result = fill(&room);
        self.iovecs.remove(end);
        (result, held)
    }

    /// Moves what [`BufferList::fill`] put into the first `count` bytes of the spill to the buffers, from `offset` on.
    pub(super) fn unspill(&self, offset: usize, count: usize) {
        self.first(self.count()).put(offset, &self.spill[..count]);
    }
}

fn lend(iovecs: &[iovec]) -> Buffers<'_> {
    Buffers { iovecs, len: iovecs.iter().map(|buffer| buffer.iov_len).sum(), memory: PhantomData }
}
