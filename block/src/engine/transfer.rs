#![expect(unsafe_code, reason = "preadv and pwritev take raw guest memory")]
//! One op, done with blocking system calls: whole, or an error. Runs on the threads of a pool.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

use libc::iovec;
use vm_memory::{GuestMemoryBackend, VolatileSlice};
use vmm_sys_util::fallocate::{FallocateMode, fallocate};

use super::bounce::{bounced, scatter};
use super::zeroes::{discard, write_zeroes};
use super::{Op, OpKind};
use crate::direct::{AlignedBuffer, Alignment};
use crate::disk::Disk;
use crate::ranges::{Claim, Ranges};
use crate::topology::{self, Topology};

/// The most buffers one system call takes (`IOV_MAX` of Linux, UIO_MAXIOV).
pub(super) const MAX_IOVECS: usize = 1024;

/// Milliseconds before each further attempt at what the host has no room for, a second in all. Then its EAGAIN is the result.
const PAUSES: [u64; 10] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512];

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

    /// As `fdatasync(2)`, and [`Image::flushed`].
    fn flush(&self) -> io::Result<()>;

    /// Makes `change`, and then `fdatasync(2)` for it: told of what becomes of that, whoever else is told of it too.
    fn durably(&self, change: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()>;

    /// What a flush comes to that was made by other means, with this `result`.
    fn flushed(&self, result: io::Result<()>) -> io::Result<()>;

    /// Whether the kernel may make durable writes by itself. Else they are for [`Image::write_at`].
    fn tells_apart(&self) -> bool;

    /// Makes `range` read as zero without transferring zeroes, as `fallocate(2)` with FALLOC_FL_ZERO_RANGE, or with
    /// FALLOC_FL_PUNCH_HOLE if `unmap`. Its ends are multiples of the topology's unit.
    fn zero(&self, range: &Range<u64>, unmap: bool) -> io::Result<()>;

    /// Gives the blocks of `range` back, as `fallocate(2)` with FALLOC_FL_PUNCH_HOLE, or BLKDISCARD of a block device.
    /// Its ends are multiples of the topology's unit.
    fn discard(&self, range: &Range<u64>) -> io::Result<()>;

    /// The host's blocks.
    fn topology(&self) -> Topology;

    /// What the two transfers demand.
    fn alignment(&self) -> Alignment;

    /// The writes to it that go on.
    fn ranges(&self) -> &Ranges;
}

impl Image for Disk {
    unsafe fn read_at(&self, buffers: &[iovec], offset: u64) -> io::Result<usize> {
        let (count, offset) = (to_count(buffers), to_off_t(offset)?);
        // SAFETY: the descriptor is open, the array has `count` elements, and the caller vouches for their targets.
        done(unsafe { libc::preadv(self.file().as_raw_fd(), buffers.as_ptr(), count, offset) })
    }

    unsafe fn write_at(&self, buffers: &[iovec], offset: u64, durable: bool) -> io::Result<usize> {
        let (count, offset) = (to_count(buffers), to_off_t(offset)?);
        let write = |file: &File, flags| {
            // SAFETY: as for reading.
            done(unsafe { libc::pwritev2(file.as_raw_fd(), buffers.as_ptr(), count, offset, flags) })
        };
        if durable { self.write_durably(|file| write(file, libc::RWF_DSYNC)) } else { write(self.file(), 0) }
    }

    fn flush(&self) -> io::Result<()> {
        Disk::flush(self)
    }

    fn durably(&self, change: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        self.change_durably(change)
    }

    fn flushed(&self, result: io::Result<()>) -> io::Result<()> {
        Disk::flushed(self, result)
    }

    fn tells_apart(&self) -> bool {
        Disk::tells_apart(self)
    }

    fn zero(&self, range: &Range<u64>, unmap: bool) -> io::Result<()> {
        let mode = if unmap { FallocateMode::PunchHole } else { FallocateMode::ZeroRange };
        Ok(fallocate(self.file(), mode, true, range.start, range.end - range.start)?)
    }

    fn discard(&self, range: &Range<u64>) -> io::Result<()> {
        if Disk::topology(self).device {
            return topology::discard_device(self.file(), range.start, range.end - range.start);
        }
        self.zero(range, true)
    }

    fn topology(&self) -> Topology {
        Disk::topology(self)
    }

    fn alignment(&self) -> Alignment {
        Disk::alignment(self)
    }

    fn ranges(&self) -> &Ranges {
        Disk::ranges(self)
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

/// Memory a thread uses for one op after the other.
#[derive(Default)]
pub(super) struct Scratch {
    buffers: Vec<iovec>,
    pub(super) bounce: AlignedBuffer,
}

/// Does the whole of `op`.
///
/// # Errors
/// `EFAULT` for a segment outside guest memory, `WriteZero` for a write that stops, and what the host says.
pub(super) fn transfer(image: &dyn Image, op: &Op, scratch: &mut Scratch) -> io::Result<()> {
    match op.kind {
        OpKind::Flush => retry(|| image.flush()),
        OpKind::Read | OpKind::Write { .. } => {
            resolve(op, &mut scratch.buffers)?;
            claimed(image, claim(op, image.alignment()), || copy(image, op, scratch))
        }
        OpKind::Discard { durable } => {
            let discard = |range| claimed(image, claim_range(range, image.alignment()), || discard(image, range));
            durably_if(image, durable, &mut || op.ranges.iter().try_for_each(discard))
        }
        OpKind::WriteZeroes { unmap, durable } => {
            let mut zero = |range| {
                let claim = claim_range(range, image.alignment());
                claimed(image, claim, || write_zeroes(image, range, unmap, &mut scratch.bounce))
            };
            durably_if(image, durable, &mut || op.ranges.iter().try_for_each(&mut zero))
        }
    }
}

fn durably_if(image: &dyn Image, durable: bool, change: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
    if durable { image.durably(change) } else { change() }
}

/// Does `work` under `claim`.
fn claimed(image: &dyn Image, claim: Option<Claim>, work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let Some(claim) = claim else { return work() };
    image.ranges().claim(&claim);
    let result = work();
    image.ranges().release(&claim);
    result
}

/// What a write must claim, if writes can disturb each other there: all blocks it touches.
pub(super) fn claim(op: &Op, alignment: Alignment) -> Option<Claim> {
    let is_write = matches!(op.kind, OpKind::Write { .. });
    if is_write { claim_range(&(op.offset..op.offset.saturating_add(length(op))), alignment) } else { None }
}

fn claim_range(bytes: &Range<u64>, alignment: Alignment) -> Option<Claim> {
    if !alignment.cuts_blocks() {
        return None;
    }
    let end = bytes.end.checked_next_multiple_of(alignment.block).unwrap_or(u64::MAX);
    let range = bytes.start - bytes.start % alignment.block..end;
    let exclusive = range != *bytes;
    Some(Claim { range, exclusive })
}

/// Moves the bytes of a read or a write, whose segments are in `scratch`.
fn copy(image: &dyn Image, op: &Op, scratch: &mut Scratch) -> io::Result<()> {
    if image.alignment().fits(&scratch.buffers, op.offset) {
        straight(image, op, &mut scratch.buffers)
    } else {
        bounced(image, op, &mut scratch.bounce)
    }
}

/// From or to guest memory itself.
fn straight(image: &dyn Image, op: &Op, buffers: &mut [iovec]) -> io::Result<()> {
    if let OpKind::Write { durable } = op.kind {
        // SAFETY: `resolve` checked the buffers against the mapping that `op.memory` keeps alive.
        let write = |batch: &[iovec], offset| unsafe { image.write_at(batch, offset, durable) };
        let done = in_batches(buffers, op.offset, image.alignment().block, write)?;
        return if done == length(op) { Ok(()) } else { Err(ErrorKind::WriteZero.into()) };
    }
    // SAFETY: as above.
    let read = |batch: &[iovec], offset| unsafe { image.read_at(batch, offset) };
    let done = in_batches(buffers, op.offset, image.alignment().block, read)?;
    zero_after(op, done)
}

/// Calls `call` until all of `buffers` is transferred or there is no progress; returns the number of bytes transferred.
/// Every call begins at a multiple of `block` bytes after the first: what a short transfer did of a block is done again.
pub(super) fn in_batches(
    buffers: &mut [iovec],
    offset: u64,
    block: u64,
    mut call: impl FnMut(&[iovec], u64) -> io::Result<usize>,
) -> io::Result<u64> {
    let mut rest = buffers;
    let (mut begun, mut done) = (0, 0);
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(MAX_IOVECS)];
        let count = persist(|| call(batch, offset.saturating_add(begun)))? as u64;
        // The second time it comes to the same place within a block, that is where the image ends.
        if count == 0 || begun + count == done {
            break;
        }
        done = done.max(begun + count);
        let next = done - done % block;
        rest = advance(rest, (next - begun) as usize);
        begun = next;
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

/// Bytes of the op.
pub(super) fn length(op: &Op) -> u64 {
    op.segments.iter().map(|&(_, len)| u64::from(len)).sum()
}

/// The image ended after `done` bytes of the op: the rest reads as zero.
fn zero_after(op: &Op, done: u64) -> io::Result<()> {
    const ZEROES: [u8; 4096] = [0; 4096];
    let (mut at, total) = (done, length(op));
    while at < total {
        let count = (total - at).min(ZEROES.len() as u64);
        scatter(op, at, &ZEROES[..count as usize])?;
        at += count;
    }
    Ok(())
}

/// Makes a call until it is not interrupted (EINTR).
pub(super) fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// As [`retry`], and again later while the host has no room for it (EAGAIN). Not for flushes: with theirs it may have told of
/// what it could not write, which it does once.
pub(super) fn persist<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    for pause in PAUSES {
        match retry(&mut call) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(Duration::from_millis(pause)),
            result => return result,
        }
    }
    retry(call)
}

/// Fills `buffers` with the op's segments as they are mapped here; none of them is empty.
pub(super) fn resolve(op: &Op, buffers: &mut Vec<iovec>) -> io::Result<()> {
    buffers.clear();
    let mut add = |slice: &VolatileSlice<'_>| {
        buffers.push(iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
    };
    for &(address, len) in &op.segments {
        // All in one region, and several times faster.
        if let (true, Ok(slice)) = (len > 0, op.memory.get_slice(address, len as usize)) {
            add(&slice);
            continue;
        }
        for slice in op.memory.get_slices(address, len as usize) {
            add(&slice.map_err(|_| io::Error::from_raw_os_error(libc::EFAULT))?);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use crate::engine::conformance::{Bed, at, disk, memory, op};
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
            transfer(&*Faulty::new(disk.clone(), &faults), &read, &mut Scratch::default()).unwrap();
            let mut seen = Vec::new();
            for (offset, len) in pieces {
                let mut piece = vec![0; len];
                memory.read_slice(&mut piece, GuestAddress(at(offset))).unwrap();
                seen.extend(piece);
            }
            prop_assert!(seen == content[start..start + 6168]);

            let write = op(WRITE, start as u64 + 7000, &pieces, &memory);
            transfer(&*Faulty::new(disk, &faults), &write, &mut Scratch::default()).unwrap();
            let image = fs::read(&path).unwrap();
            prop_assert!(image[start + 7000..start + 13168] == content[start..start + 6168]);
            prop_assert!(image[..start + 7000] == content[..start + 7000]);
            prop_assert!(image[start + 13168..] == content[start + 13168..]);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_is_not_aligned_bounces(
            shorts in prop::collection::vec(0_usize..3, 0..6), start in 0..10_000_usize,
            lens in [1..5000_usize, 1..9000, 1..400_000],
        ) {
            const SIZE: usize = 512 << 10;
            let bed = Bed { alignment: Some(Alignment { memory: 512, block: 4096 }), ..Bed::default() };
            let (_dir, path, disk, content) = bed.disk(SIZE);
            // Never twice at the same place within a block: there the image would end.
            let short = |(n, &blocks)| Fault::Short(blocks * 4096 + n + 1);
            let faults: Vec<_> = shorts.iter().enumerate().map(short).collect();
            let memory = memory(SIZE);
            let pieces = [(7, lens[0]), (10_003, lens[1]), (60_000, lens[2])];
            let total: usize = lens.iter().sum();
            // What stands in for the host refuses what is not aligned.
            let read = op(OpKind::Read, start as u64, &pieces, &memory);
            transfer(&*Faulty::new(disk.clone(), &faults), &read, &mut Scratch::default()).unwrap();
            let mut seen = Vec::new();
            for (offset, len) in pieces {
                let mut piece = vec![0; len];
                memory.read_slice(&mut piece, GuestAddress(at(offset))).unwrap();
                seen.extend(piece);
            }
            prop_assert!(seen == content[start..start + total]);

            let to = start + 4321;
            let write = op(WRITE, to as u64, &pieces, &memory);
            transfer(&*Faulty::new(disk, &faults), &write, &mut Scratch::default()).unwrap();
            let mut expected = content.clone();
            expected[to..to + total].copy_from_slice(&seen);
            prop_assert!(fs::read(&path).unwrap() == expected);
        }
    }

    #[test]
    fn interrupted_calls_are_made_again() {
        let (_dir, path, disk) = disk(4096);
        let memory = memory(4096);
        memory.write_slice(&[9; 4096], GuestAddress(at(0))).unwrap();
        let eintr = Fault::Fail(libc::EINTR);
        let image = Faulty::new(disk, &[eintr, Fault::Short(100), eintr, eintr]);
        transfer(&*image, &op(WRITE, 0, &[(0, 4096)], &memory), &mut Scratch::default()).unwrap();
        assert_eq!(fs::read(path).unwrap(), [9; 4096]);
        let write = |offset| Call::Write { offset, buffers: 1, durable: false };
        assert_eq!(image.calls(), [write(0), write(0), write(100), write(100), write(100)]);
    }

    /// EAGAIN is no result while there is hope; of a flush it is one, for nobody knows what it was about.
    #[test]
    fn what_the_host_has_no_room_for_is_done_later() {
        let (_dir, path, disk) = disk(8192);
        let memory = memory(4096);
        memory.write_slice(&[7; 4096], GuestAddress(at(0))).unwrap();
        let eagain = Fault::Fail(libc::EAGAIN);
        let image = Faulty::new(disk.clone(), &[eagain, Fault::Fail(libc::EINTR), eagain, Fault::Short(512), eagain]);
        transfer(&*image, &op(WRITE, 0, &[(0, 4096)], &memory), &mut Scratch::default()).unwrap();
        assert_eq!(fs::read(&path).unwrap()[..4096], [7; 4096]);
        assert_eq!(image.calls().len(), 6);

        let change = |kind| Op { ranges: vec![0..4096, 4096..8192], ..op(kind, 0, &[], &memory) };
        for kind in [OpKind::Discard { durable: false }, OpKind::WriteZeroes { unmap: true, durable: false }] {
            let image = Faulty::new(disk.clone(), &[eagain, eagain]);
            transfer(&*image, &change(kind), &mut Scratch::default()).unwrap();
            assert_eq!(image.calls().len(), 4, "{kind:?}");
        }
        assert_eq!(fs::read(path).unwrap(), [0; 8192]);

        let image = Faulty::new(disk.clone(), &[eagain; 11]);
        let read = op(OpKind::Read, 0, &[(0, 512)], &memory);
        assert_eq!(errno(transfer(&*image, &read, &mut Scratch::default())), Some(libc::EAGAIN), "in the end");
        let image = Faulty::new(disk, &[eagain]);
        let flush = op(OpKind::Flush, 0, &[], &memory);
        assert_eq!(errno(transfer(&*image, &flush, &mut Scratch::default())), Some(libc::EAGAIN));
        assert_eq!(image.calls(), [Call::Flush]);
    }

    #[test]
    fn errors_are_reported_even_after_a_part_was_done() {
        let (_dir, _path, disk) = disk(4096);
        let memory = memory(4096);
        for (kind, code) in [(WRITE, libc::ENOSPC), (OpKind::Read, libc::EIO)] {
            let image = Faulty::new(disk.clone(), &[Fault::Short(512), Fault::Fail(code)]);
            assert_eq!(
                errno(transfer(&*image, &op(kind, 0, &[(0, 4096)], &memory), &mut Scratch::default())),
                Some(code)
            );
        }
        let image = Faulty::new(disk, &[Fault::Fail(libc::EIO)]);
        assert_eq!(
            errno(transfer(&*image, &op(OpKind::Flush, 0, &[], &memory), &mut Scratch::default())),
            Some(libc::EIO)
        );
    }

    #[test]
    fn a_write_without_progress_is_an_error() {
        let (_dir, _path, disk) = disk(4096);
        let image = Faulty::new(disk, &[Fault::Short(512), Fault::Short(0)]);
        let write = op(WRITE, 0, &[(0, 4096)], &memory(4096));
        assert_eq!(transfer(&*image, &write, &mut Scratch::default()).unwrap_err().kind(), ErrorKind::WriteZero);
        assert_eq!(image.calls().len(), 2);
    }

    #[test]
    fn an_image_that_shrank_reads_as_zero_past_its_end() {
        let (_dir, path, disk) = disk(8192);
        fs::write(&path, [3; 8192]).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(1000).unwrap();
        let memory = memory(65536);
        memory.write_slice(&vec![0xff; 65536], GuestAddress(at(0))).unwrap();
        transfer(&*disk, &op(OpKind::Read, 512, &[(10, 300), (1000, 7000)], &memory), &mut Scratch::default()).unwrap();
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
        transfer(&*image, &op(OpKind::Write { durable: true }, 0, &pieces, &memory), &mut Scratch::default()).unwrap();
        let written = fs::read(path).unwrap();
        assert!(written.chunks(4).enumerate().all(|(n, four)| four == (n as u32).to_le_bytes()));
        assert!(image.calls().iter().all(|call| matches!(call, Call::Write { buffers: ..=1024, durable: true, .. })));
    }
}
