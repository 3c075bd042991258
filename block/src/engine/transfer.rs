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
        // SAFETY: the descriptor is open, the array has `count` elements, and the caller vouches for their targets.
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};

    use proptest::prelude::*;

    use crate::engine::conformance::{at, disk, memory, op};
    use crate::engine::faulty::{Call, Fault, Faulty};

    const WRITE: OpKind = OpKind::Write { durable: false };

    fn errno(result: io::Result<()>) -> Option<i32> {
        result.unwrap_err().raw_os_error()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn short_transfers_go_on(shorts in prop::collection::vec(1_usize..1500, 0..20), start in 0..3000_usize) {
            let (_dir, path, disk) = disk(16384);
            let content: Vec<u8> = (0..16384_usize).map(|n| (n % 253) as u8).collect();
            fs::write(&path, &content).unwrap();
            let faults: Vec<_> = shorts.iter().map(|&count| Fault::Short(count)).collect();
            let memory = memory(65536);
            let pieces = [(100, 700), (20_000, 3000), (9000, 1), (30_000, 2467)];
            let read = op(OpKind::Read, start as u64, &pieces, &memory);
            transfer(&*Faulty::new(disk.clone(), &faults), &read, &mut Vec::new()).unwrap();
            let mut seen = Vec::new();
            for (offset, len) in pieces {
                let mut piece = vec![0; len];
                memory.read_slice(&mut piece, GuestAddress(at(offset))).unwrap();
                seen.extend(piece);
            }
            prop_assert!(seen == content[start..start + 6168]);

            let write = op(WRITE, start as u64 + 7000, &pieces, &memory);
            transfer(&*Faulty::new(disk, &faults), &write, &mut Vec::new()).unwrap();
            let image = fs::read(&path).unwrap();
            prop_assert!(image[start + 7000..start + 13168] == content[start..start + 6168]);
            prop_assert!(image[..start + 7000] == content[..start + 7000]);
            prop_assert!(image[start + 13168..] == content[start + 13168..]);
        }
    }

    #[test]
    fn interrupted_calls_are_made_again() {
        let (_dir, path, disk) = disk(4096);
        let memory = memory(4096);
        memory.write_slice(&[9; 4096], GuestAddress(at(0))).unwrap();
        let eintr = Fault::Fail(libc::EINTR);
        let image = Faulty::new(disk, &[eintr, Fault::Short(100), eintr, eintr]);
        transfer(&*image, &op(WRITE, 0, &[(0, 4096)], &memory), &mut Vec::new()).unwrap();
        assert_eq!(fs::read(path).unwrap(), [9; 4096]);
        let write = |offset| Call::Write { offset, buffers: 1, durable: false };
        assert_eq!(image.calls(), [write(0), write(0), write(100), write(100), write(100)]);
    }

    #[test]
    fn errors_are_reported_even_after_a_part_was_done() {
        let (_dir, _path, disk) = disk(4096);
        let memory = memory(4096);
        for (kind, code) in [(WRITE, libc::ENOSPC), (OpKind::Read, libc::EIO)] {
            let image = Faulty::new(disk.clone(), &[Fault::Short(512), Fault::Fail(code)]);
            assert_eq!(errno(transfer(&*image, &op(kind, 0, &[(0, 4096)], &memory), &mut Vec::new())), Some(code));
        }
        let image = Faulty::new(disk, &[Fault::Fail(libc::EIO)]);
        assert_eq!(errno(transfer(&*image, &op(OpKind::Flush, 0, &[], &memory), &mut Vec::new())), Some(libc::EIO));
    }

    #[test]
    fn a_write_without_progress_is_an_error() {
        let (_dir, _path, disk) = disk(4096);
        let image = Faulty::new(disk, &[Fault::Short(512), Fault::Short(0)]);
        let write = op(WRITE, 0, &[(0, 4096)], &memory(4096));
        assert_eq!(transfer(&*image, &write, &mut Vec::new()).unwrap_err().kind(), ErrorKind::WriteZero);
        assert_eq!(image.calls().len(), 2);
    }

    #[test]
    fn an_image_that_shrank_reads_as_zero_past_its_end() {
        let (_dir, path, disk) = disk(8192);
        fs::write(&path, [3; 8192]).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(1000).unwrap();
        let memory = memory(65536);
        memory.write_slice(&vec![0xff; 65536], GuestAddress(at(0))).unwrap();
        transfer(&*disk, &op(OpKind::Read, 512, &[(10, 300), (1000, 7000)], &memory), &mut Vec::new()).unwrap();
        let mut seen = vec![0; 65536];
        memory.read_slice(&mut seen, GuestAddress(at(0))).unwrap();
        let mut expected = vec![0xff; 65536];
        expected[10..310].fill(3);
        expected[1000..1188].fill(3);
        expected[1188..8000].fill(0);
        assert!(seen == expected);
    }

    #[test]
    fn long_lists_take_several_calls_of_at_most_what_the_kernel_takes() {
        let (_dir, path, disk) = disk(3072 * 4);
        let memory = memory(3072 * 8);
        let mut pieces = Vec::new();
        for n in 0..3072 {
            memory.write_obj(n as u32, GuestAddress(at(n * 8))).unwrap();
            pieces.push((n * 8, 4));
        }
        let image = Faulty::new(disk, &[]);
        transfer(&*image, &op(OpKind::Write { durable: true }, 0, &pieces, &memory), &mut Vec::new()).unwrap();
        let written = fs::read(path).unwrap();
        assert!(written.chunks(4).enumerate().all(|(n, four)| four == (n as u32).to_le_bytes()));
        assert!(image.calls().iter().all(|call| matches!(call, Call::Write { buffers: ..=1024, durable: true, .. })));
    }
}
