//! Discarding and zeroing ranges of an image, by the host's means where it has them. The caller keeps other writes away
//! from blocks that are touched in part. Runs on the threads of a pool.

use std::io;
use std::ops::Range;

use super::bounce::write_bounced;
use super::transfer::{Image, persist};
use crate::direct::AlignedBuffer;

/// Gives back what of `range` can be given back. It is a hint: what the host cannot do is not done.
///
/// # Errors
/// When the host can, and fails.
pub(super) fn discard(image: &dyn Image, range: &Range<u64>) -> io::Result<()> {
    let topology = image.topology();
    // Of a file, a part of a block would be zeroed and nothing given back. A device sorts this out itself.
    let unit = if topology.device { topology.unit } else { topology.discard };
    let Some(whole) = inside(range, unit) else { return Ok(()) };
    match persist(|| image.discard(&whole)) {
        Err(error) if is_lacking(&error) => Ok(()),
        result => result,
    }
}

/// Makes `range` read as zero: by the host's means, else by writing zeroes. Unless `unmap`, the blocks stay allocated.
///
/// # Errors
/// What the host says.
pub(super) fn write_zeroes(
    image: &dyn Image,
    range: &Range<u64>,
    unmap: bool,
    bounce: &mut AlignedBuffer,
) -> io::Result<()> {
    let mut by_hand = |bytes| {
        let zero = |_, piece: &mut [u8]| {
            piece.fill(0);
            Ok(())
        };
        write_bounced(image, bytes, false, bounce, zero)
    };
    let Some(whole) = inside(range, image.topology().unit) else { return by_hand(range.clone()) };
    // A device that cannot unmap may still zero.
    let ways: &[bool] = if unmap { &[true, false] } else { &[false] };
    for &unmap in ways {
        match persist(|| image.zero(&whole, unmap)) {
            Ok(()) => {
                by_hand(range.start..whole.start)?;
                return by_hand(whole.end..range.end);
            }
            Err(error) if is_lacking(&error) => {}
            Err(error) => return Err(error),
        }
    }
    by_hand(range.clone())
}

/// The largest range within `range` whose ends are multiples of `unit`; `None` if it is empty.
fn inside(range: &Range<u64>, unit: u64) -> Option<Range<u64>> {
    let inside = range.start.checked_next_multiple_of(unit)?..range.end - range.end % unit;
    (!inside.is_empty()).then_some(inside)
}

/// Whether the host says that it cannot do this at all: filesystems and devices have several words for it.
fn is_lacking(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::single_range_in_vec_init, reason = "a list of one range is meant")]

    use super::*;
    use std::fs;
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;
    use std::sync::Arc;

    use crate::cache::CacheMode;
    use crate::direct::Alignment;
    use crate::engine::conformance::{Bed, Kind, memory, op};
    use crate::engine::faulty::{Call, Fault, Faulty};
    use crate::engine::transfer::{Scratch, transfer};
    use crate::engine::{Op, OpKind};

    const SIZE: usize = 1 << 20;
    const DISCARD: OpKind = OpKind::Discard { durable: false };
    const UNMAP: OpKind = OpKind::WriteZeroes { unmap: true, durable: false };
    const KEEP: OpKind = OpKind::WriteZeroes { unmap: false, durable: false };

    fn change(kind: OpKind, ranges: &[Range<u64>]) -> Op {
        Op { ranges: ranges.to_vec(), ..op(kind, 0, &[], &memory(4096)) }
    }

    fn run(image: &Arc<Faulty>, kind: OpKind, ranges: &[Range<u64>]) -> io::Result<()> {
        transfer(&**image, &change(kind, ranges), &mut Scratch::default())
    }

    /// Bytes of the host's disk or memory that a file uses.
    fn used(path: &Path) -> u64 {
        fs::metadata(path).unwrap().blocks() * 512
    }

    fn zeroed(content: &[u8], ranges: &[Range<u64>]) -> Vec<u8> {
        let mut content = content.to_vec();
        for range in ranges {
            content[range.start as usize..range.end as usize].fill(0);
        }
        content
    }

    #[test]
    fn blocks_are_given_back_or_kept() {
        for kind in [Kind::Written, Kind::Preallocated, Kind::Tmpfs] {
            for (what, ranges, freed) in [
                (DISCARD, vec![8192..SIZE as u64 / 2, 786_432..SIZE as u64], 778_240),
                (UNMAP, vec![8192..SIZE as u64 / 2, 786_432..SIZE as u64], 778_240),
                (KEEP, vec![0..SIZE as u64], 0),
            ] {
                let (_dir, path, disk, content) = Bed { kind, ..Bed::default() }.disk(SIZE);
                disk.flush().unwrap();
                let before = used(&path);
                run(&Faulty::new(disk, &[]), what, &ranges).unwrap();
                assert_eq!(before - used(&path), freed, "{kind:?} {what:?}");
                assert!(fs::read(&path).unwrap() == zeroed(&content, &ranges), "{kind:?} {what:?}");
            }
        }
    }

    /// The parts of a block at both ends of a discarded range stay as they are.
    #[test]
    fn a_discard_keeps_to_whole_blocks() {
        let (_dir, path, disk, content) = Bed::default().disk(SIZE);
        let block = disk.topology().discard;
        let image = Faulty::new(disk, &[]);
        run(&image, DISCARD, &[512..4 * block - 512, 5 * block + 512..6 * block, 7 * block - 512..7 * block + 512])
            .unwrap();
        assert_eq!(image.calls(), [Call::Discard { range: block..3 * block }]);
        assert!(fs::read(&path).unwrap() == zeroed(&content, &[block..3 * block]));
    }

    /// The kernel zeroes parts of blocks in the page cache (fallocate(2): "partial filesystem blocks are zeroed") and writes
    /// them later: past it nobody would be told if it could not.
    #[test]
    fn past_the_page_cache_parts_of_blocks_are_written() {
        for cache in [CacheMode::None, CacheMode::Writeback] {
            for kind in [UNMAP, KEEP, OpKind::WriteZeroes { unmap: false, durable: true }] {
                let (_dir, path, disk, content) = Bed { cache, ..Bed::default() }.disk(SIZE);
                let block = disk.topology().discard;
                let ranges = [512..4 * block - 512, 5 * block + 512..5 * block + 1024];
                let image = Faulty::new(disk, &[]);
                run(&image, kind, &ranges).unwrap();
                let asked = |call| if let Call::Zero { range, .. } = call { Some(range) } else { None };
                let asked: Vec<_> = image.calls().into_iter().filter_map(asked).collect();
                let expected = if cache.is_direct() { vec![block..3 * block] } else { ranges.to_vec() };
                assert_eq!(asked, expected, "{cache:?} {kind:?}");
                assert!(fs::read(&path).unwrap() == zeroed(&content, &ranges), "{cache:?} {kind:?}");
            }
        }
    }

    #[test]
    fn a_host_that_cannot_discard_does_nothing() {
        for errno in [libc::EOPNOTSUPP, libc::ENOSYS, libc::EINVAL] {
            let (_dir, path, disk, content) = Bed::default().disk(SIZE);
            let image = Faulty::new(disk, &[Fault::Fail(libc::EINTR), Fault::Fail(errno)]);
            run(&image, DISCARD, &[0..65536]).unwrap();
            assert_eq!(image.calls(), vec![Call::Discard { range: 0..65536 }; 2]);
            assert!(fs::read(&path).unwrap() == content);
        }
    }

    #[test]
    fn a_host_that_cannot_zero_is_given_zeroes() {
        const COARSE: Alignment = Alignment { memory: 512, block: 4096 };
        for alignment in [None, Some(COARSE)] {
            for (what, attempts) in [(UNMAP, vec![true, false]), (KEEP, vec![false])] {
                let (_dir, path, disk, content) = Bed { alignment, ..Bed::default() }.disk(SIZE);
                let faults = vec![Fault::Fail(libc::EOPNOTSUPP); attempts.len()];
                let image = Faulty::new(disk, &faults);
                // Longer than one piece of our own memory, and through the middle of blocks.
                let range = 1000..700_001;
                run(&image, what, std::slice::from_ref(&range)).unwrap();
                let calls = image.calls();
                let attempted = attempts.iter().map(|&unmap| Call::Zero { range: range.clone(), unmap });
                assert!(calls.iter().take(attempts.len()).cloned().eq(attempted), "{calls:?}");
                assert!(calls.iter().any(|call| matches!(call, Call::Write { .. })));
                assert!(fs::read(&path).unwrap() == zeroed(&content, &[range]), "{what:?}");
            }
        }
    }

    #[test]
    fn several_ranges_are_made_stable_at_once() {
        let (_dir, _path, disk, _) = Bed::default().disk(SIZE);
        let block = disk.topology().discard;
        let ranges = [0..block, 2 * block..4 * block];
        for (kind, expected) in [
            (OpKind::Discard { durable: true }, ranges.clone().map(|range| Call::Discard { range })),
            (
                OpKind::WriteZeroes { unmap: true, durable: true },
                ranges.clone().map(|range| Call::Zero { range, unmap: true }),
            ),
        ] {
            let image = Faulty::new(disk.clone(), &[]);
            run(&image, kind, &ranges).unwrap();
            assert_eq!(image.calls(), [&expected[..], &[Call::Flush]].concat());
        }
    }

    #[test]
    fn errors_are_reported() {
        let (_dir, _path, disk, _) = Bed::default().disk(SIZE);
        for kind in [DISCARD, UNMAP, KEEP] {
            for errno in [libc::EIO, libc::ENOSPC] {
                let image = Faulty::new(disk.clone(), &[Fault::Fail(errno)]);
                let ranges = [0..4096, 8192..12288];
                assert_eq!(run(&image, kind, &ranges).unwrap_err().raw_os_error(), Some(errno));
                assert_eq!(image.calls().len(), 1, "what comes after the failure is left");
            }
        }
        // Neither the way around nor the flush may fail unseen.
        let (lacks, full, broken) = (libc::EOPNOTSUPP, libc::ENOSPC, libc::EIO);
        let image = Faulty::new(disk.clone(), &[Fault::Fail(lacks), Fault::Short(512), Fault::Fail(full)]);
        assert_eq!(run(&image, KEEP, &[0..4096]).unwrap_err().raw_os_error(), Some(full));
        let image = Faulty::new(disk, &[Fault::Short(0), Fault::Fail(broken)]);
        let durable = OpKind::Discard { durable: true };
        assert_eq!(run(&image, durable, &[0..4096]).unwrap_err().raw_os_error(), Some(broken));
    }
}
