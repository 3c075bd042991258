#![expect(unsafe_code, reason = "the image takes raw memory, here our own")]
//! Transfers through memory of our own, in whole blocks: what O_DIRECT does not take as it is, and zeroes. Runs on the
//! threads of a pool.

use std::io::{self, ErrorKind};
use std::ops::Range;

use libc::iovec;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::transfer::{Image, in_batches, length};
use super::{Op, OpKind};
use crate::direct::{AlignedBuffer, Alignment};

/// Bytes of our own memory a thread uses at a time, a little less or more with the alignment.
const CHUNK: u64 = 256 << 10;

/// A read or a write. The caller keeps other writes away from blocks that are written in part.
pub(super) fn bounced(image: &dyn Image, op: &Op, bounce: &mut AlignedBuffer) -> io::Result<()> {
    let end = op.offset.checked_add(length(op)).ok_or_else(too_large)?;
    if let OpKind::Write { durable } = op.kind {
        let gather = |at: u64, bytes: &mut [u8]| gather(op, at - op.offset, bytes);
        return write_bounced(image, op.offset..end, durable, bounce, gather);
    }
    let Alignment { memory, block } = image.alignment();
    for window in windows(op.offset..end, block)? {
        let blocks = bounce.get(window.len, memory);
        read_blocks(image, blocks, window.start)?;
        scatter(op, window.begins() - op.offset, &blocks[window.inner])?;
    }
    Ok(())
}

/// Writes `bytes` of the image; `fill` is asked for them piece by piece, with the place of each. A block that is written
/// in part is read before: the caller keeps other writes away from it.
pub(super) fn write_bounced(
    image: &dyn Image,
    bytes: Range<u64>,
    durable: bool,
    bounce: &mut AlignedBuffer,
    mut fill: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<()> {
    let Alignment { memory, block } = image.alignment();
    for window in windows(bytes, block)? {
        let blocks = bounce.get(window.len, memory);
        let inner = window.inner.clone();
        let last = blocks.len() - block as usize;
        if inner.start > 0 {
            read_blocks(image, &mut blocks[..block as usize], window.start)?;
        }
        if inner.end < blocks.len() && (inner.start == 0 || last > 0) {
            read_blocks(image, &mut blocks[last..], window.start + last as u64)?;
        }
        fill(window.begins(), &mut blocks[inner])?;
        write_blocks(image, blocks, window.start, durable)?;
    }
    Ok(())
}

/// Whole blocks of the image, and the bytes of them that matter.
struct Window {
    start: u64,
    len: usize,
    inner: Range<usize>,
}

impl Window {
    /// Where in the image the bytes that matter begin.
    fn begins(&self) -> u64 {
        self.start + self.inner.start as u64
    }
}

/// The blocks of `block` bytes that hold `bytes`, about [`CHUNK`] at a time.
fn windows(bytes: Range<u64>, block: u64) -> io::Result<impl Iterator<Item = Window>> {
    let chunk = CHUNK.next_multiple_of(block);
    bytes.end.checked_next_multiple_of(block).ok_or_else(too_large)?;
    let mut at = bytes.start;
    Ok(std::iter::from_fn(move || {
        let start = at - at % block;
        let stop = bytes.end.min(start.saturating_add(chunk));
        let inner = (at - start) as usize..stop.checked_sub(start)? as usize;
        at = stop;
        let len = inner.end.next_multiple_of(block as usize);
        (!inner.is_empty()).then_some(Window { start, len, inner })
    }))
}

fn too_large() -> io::Error {
    io::Error::from_raw_os_error(libc::EFBIG)
}

/// Fills `blocks`, with zeroes past the end of the image.
fn read_blocks(image: &dyn Image, blocks: &mut [u8], offset: u64) -> io::Result<()> {
    let mut buffers = [iovec { iov_base: blocks.as_mut_ptr().cast(), iov_len: blocks.len() }];
    // SAFETY: they are our own, and borrowed until this returns.
    let read = |batch: &[iovec], offset| unsafe { image.read_at(batch, offset) };
    let done = in_batches(&mut buffers, offset, image.alignment().block, read)?;
    blocks[done as usize..].fill(0);
    Ok(())
}

fn write_blocks(image: &dyn Image, blocks: &mut [u8], offset: u64, durable: bool) -> io::Result<()> {
    let mut buffers = [iovec { iov_base: blocks.as_mut_ptr().cast(), iov_len: blocks.len() }];
    // SAFETY: as for reading.
    let write = |batch: &[iovec], offset| unsafe { image.write_at(batch, offset, durable) };
    let done = in_batches(&mut buffers, offset, image.alignment().block, write)?;
    if done == blocks.len() as u64 { Ok(()) } else { Err(ErrorKind::WriteZero.into()) }
}

/// Copies `bytes` to where they belong in guest memory: from byte `skip` of the op on.
pub(super) fn scatter(op: &Op, skip: u64, mut bytes: &[u8]) -> io::Result<()> {
    pieces(op, skip, bytes.len(), |memory, address, len| {
        let (now, later) = bytes.split_at(len);
        bytes = later;
        memory.write_slice(now, address)
    })
}

/// Copies from guest memory what belongs into `bytes`: from byte `skip` of the op on.
fn gather(op: &Op, skip: u64, bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    pieces(op, skip, bytes.len(), |memory, address, len| {
        let now = &mut bytes[done..done + len];
        done += len;
        memory.read_slice(now, address)
    })
}

/// Calls `copy` for each piece of guest memory that holds some of the `len` bytes from byte `skip` of the op on.
fn pieces(
    op: &Op,
    mut skip: u64,
    mut len: usize,
    mut copy: impl FnMut(&GuestMemoryMmap, GuestAddress, usize) -> vm_memory::GuestMemoryResult<()>,
) -> io::Result<()> {
    for &(address, segment) in &op.segments {
        let before = skip.min(segment.into());
        skip -= before;
        let count = len.min(segment as usize - before as usize);
        if count > 0 {
            copy(&op.memory, GuestAddress(address.0.wrapping_add(before)), count)
                .map_err(|_| io::Error::from_raw_os_error(libc::EFAULT))?;
            len -= count;
        }
    }
    Ok(())
}
