#![expect(unsafe_code, reason = "preadv and pwritev take raw guest memory")]
//! One op, done with blocking system calls: whole, or an error. Runs on the threads of a pool.

use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;

use libc::iovec;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::{Op, OpKind};
use crate::disk::Disk;

/// The most buffers one system call takes (`IOV_MAX` of Linux, UIO_MAXIOV).
const MAX_IOVECS: usize = 1024;

/// What the kernel does for an image. The transfers may be short; `Ok(0)` means no progress.
pub(super) trait Image: Send + Sync {
    /// As `preadv(2)`.
    ///
    /// # Safety
    /// The buffers are mapped and writable until it returns.
    unsafe fn read_at(&self, buffers: &[iovec], offset: u64) -> io::Result<usize>;

    /// As `pwritev2(2)`, with RWF_DSYNC if `durable`.
    ///
    /// # Safety
    /// The buffers are mapped until it returns.
    unsafe fn write_at(&self, buffers: &[iovec], offset: u64, durable: bool) -> io::Result<usize>;

    /// As `fdatasync(2)`.
    fn flush(&self) -> io::Result<()>;
}

impl Image for Disk {
    unsafe fn read_at(&self, buffers: &[iovec], offset: u64) -> io::Result<usize> {
        let (count, offset) = (to_count(buffers), to_off_t(offset)?);
        // SAFETY: the descriptor is open, the array has `count` elements, and the caller vouches for what they point to.
        done(unsafe { libc::preadv(self.file().as_raw_fd(), buffers.as_ptr(), count, offset) })
    }

    unsafe fn write_at(&self, buffers: &[iovec], offset: u64, durable: bool) -> io::Result<usize> {
        let (count, offset) = (to_count(buffers), to_off_t(offset)?);
        let flags = if durable { libc::RWF_DSYNC } else { 0 };
        // SAFETY: as for reading.
        done(unsafe { libc::pwritev2(self.file().as_raw_fd(), buffers.as_ptr(), count, offset, flags) })
    }

    fn flush(&self) -> io::Result<()> {
        Disk::flush(self)
    }
}

/// The kernel refuses more than [`MAX_IOVECS`], so also what would not fit.
fn to_count(buffers: &[iovec]) -> libc::c_int {
    buffers.len().try_into().unwrap_or(libc::c_int::MAX)
}

fn to_off_t(offset: u64) -> io::Result<libc::off_t> {
    offset.try_into().map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

fn done(count: isize) -> io::Result<usize> {
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Does the whole of `op`. `buffers` is scratch space, for its allocation to be used again.
///
/// # Errors
/// `EFAULT` for a segment outside guest memory, `WriteZero` for a write that stops, and what the host says.
pub(super) fn transfer(image: &dyn Image, op: &Op, buffers: &mut Vec<iovec>) -> io::Result<()> {
    match op.kind {
        OpKind::Flush => retry(|| image.flush()),
        OpKind::Read => {
            resolve(op, buffers)?;
            // SAFETY: `resolve` checked the buffers against the mapping that `op.memory` keeps alive.
            let done = in_batches(buffers, op.offset, |batch, offset| unsafe { image.read_at(batch, offset) })?;
            zero_after(op, done)
        }
        OpKind::Write { durable } => {
            resolve(op, buffers)?;
            // SAFETY: as above.
            let write = |batch: &[iovec], offset| unsafe { image.write_at(batch, offset, durable) };
            let done = in_batches(buffers, op.offset, write)?;
            if done == length(op) { Ok(()) } else { Err(ErrorKind::WriteZero.into()) }
        }
    }
}

/// Calls `call` until all of `buffers` is transferred or there is no progress; returns the number of bytes transferred.
fn in_batches(
    buffers: &mut [iovec],
    offset: u64,
    mut call: impl FnMut(&[iovec], u64) -> io::Result<usize>,
) -> io::Result<u64> {
    let mut rest = buffers;
    let mut done = 0;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(MAX_IOVECS)];
        let count = retry(|| call(batch, offset.saturating_add(done)))?;
        if count == 0 {
            break;
        }
        done += count as u64;
        rest = advance(rest, count);
    }
    Ok(done)
}

/// What is left of `buffers` after their first `count` bytes.
fn advance(buffers: &mut [iovec], mut count: usize) -> &mut [iovec] {
    let mut whole = 0;
    for buffer in buffers.iter_mut() {
        if count < buffer.iov_len {
            buffer.iov_base = buffer.iov_base.wrapping_byte_add(count);
            buffer.iov_len -= count;
            break;
        }
        count -= buffer.iov_len;
        whole += 1;
    }
    &mut buffers[whole..]
}

fn length(op: &Op) -> u64 {
    op.segments.iter().map(|&(_, len)| u64::from(len)).sum()
}

/// The image ended after `done` bytes of the op: the rest reads as zero.
fn zero_after(op: &Op, mut done: u64) -> io::Result<()> {
    const ZEROES: [u8; 4096] = [0; 4096];
    for &(address, len) in &op.segments {
        let len = u64::from(len);
        let mut at = done.min(len);
        done -= at;
        while at < len {
            let count = (len - at).min(ZEROES.len() as u64);
            let zeroes = &ZEROES[..count as usize];
            op.memory
                .write_slice(zeroes, GuestAddress(address.0.wrapping_add(at)))
                .map_err(|_| io::Error::from_raw_os_error(libc::EFAULT))?;
            at += count;
        }
    }
    Ok(())
}

fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Fills `buffers` with the op's segments as they are mapped here; none of them is empty.
fn resolve(op: &Op, buffers: &mut Vec<iovec>) -> io::Result<()> {
    buffers.clear();
    for &(address, len) in &op.segments {
        for slice in op.memory.get_slices(address, len as usize) {
            let slice = slice.map_err(|_| io::Error::from_raw_os_error(libc::EFAULT))?;
            buffers.push(iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
        }
    }
    Ok(())
}
