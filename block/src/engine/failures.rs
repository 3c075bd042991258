//! For tests: what fails, and that who asked for it is told.

use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::conformance::{Bed, DIRECT, await_completions, memory, op};
use super::faulty::{Fault as HostFault, Faulty as HostFaulty};
use super::scripted::{Fault, faulty, native, uring};
use super::threads::ThreadPool;
use super::{Aio, Engine, OpKind};
use crate::cache::CacheMode;
use crate::disk::Disk;

/// One that was given up says nothing about what was written: the next is believed.
#[test]
fn a_flush_that_was_cancelled_has_not_failed() {
    let script = [Fault::Pass, Fault::Report((-libc::ECANCELED).into()), Fault::Pass, Fault::Pass];
    let (_dir, _path, disk, _) = Bed { cache: CacheMode::Writeback, ..DIRECT }.disk(4096);
    let memory = memory(4096);
    let mut engine = faulty(uring, &script)(disk);
    let mut completions = Vec::new();
    engine.push(op(OpKind::Flush, 0, &[], &memory), 0);
    engine.submit();
    engine.abandon(&mut completions);
    assert_eq!(completions.remove(0).result.unwrap_err().raw_os_error(), Some(libc::ECANCELED));
    engine.push(op(OpKind::Flush, 0, &[], &memory), 1);
    engine.drain(&mut completions);
    completions.remove(0).result.unwrap();
}

fn reports_errors(make: impl Fn(Arc<Disk>) -> Box<dyn Engine>, kind: OpKind, errno: i32) {
    let (_dir, _path, disk, _) = DIRECT.disk(1 << 20);
    let memory = memory(1 << 16);
    let mut engine = make(disk);
    for tag in 0..100 {
        let segments: &[_] = if kind == OpKind::Flush { &[] } else { &[(4096, 4096)] };
        engine.push(op(kind, u64::from(tag) * 4096, segments, &memory), tag);
    }
    engine.submit();
    for completion in await_completions(&mut *engine, 100) {
        assert_eq!(completion.result.unwrap_err().raw_os_error(), Some(errno), "{kind:?}");
    }
}

#[test]
fn errors_are_reported_as_they_are() {
    let write = OpKind::Write { durable: false };
    for (kind, errno) in [
        (OpKind::Read, libc::EIO),
        (write, libc::ENOSPC),
        (OpKind::Flush, libc::EIO),
        (OpKind::Flush, libc::EAGAIN),
        (OpKind::Read, libc::EINVAL),
    ] {
        let script = [Fault::Report((-errno).into())];
        reports_errors(faulty(native, &script), kind, errno);
        reports_errors(faulty(uring, &script), kind, errno);
    }
}

/// Old kernels refuse it, and the helper does it: a flush of a file fails no more than `fdatasync` does.
#[test]
fn a_flush_the_kernel_lacks_is_done_all_the_same() {
    let script = [Fault::Report((-libc::EINVAL).into())];
    let (_dir, _path, disk, _) = DIRECT.disk(4096);
    let mut engine = faulty(native, &script)(disk);
    engine.push(op(OpKind::Flush, 0, &[], &memory(4096)), 0);
    engine.submit();
    await_completions(&mut *engine, 1).remove(0).result.unwrap();
}

/// After a flush that failed the page cache takes for written what it could not write, and the next `fdatasync` succeeds
/// (fsync(2), Linux): for whoever asks again that must not count. Past the page cache nothing is forgotten.
#[test]
fn a_flush_that_failed_does_not_succeed_later() {
    // A turn for handing each over, and one for its completion.
    let script = [&[Fault::Pass, Fault::Report((-libc::EIO).into())], &[Fault::Pass; 4][..]].concat();
    for bed in [DIRECT, Bed { cache: CacheMode::Writeback, ..DIRECT }] {
        let disk = || bed.disk(1 << 20);
        let (over_threads, over_uring) = (disk(), disk());
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let image = HostFaulty::new(over_threads.2, &[HostFault::Fail(libc::EINTR), HostFault::Fail(libc::EIO)]);
        let pool = Box::new(ThreadPool::helper(image, "test-io", event).unwrap());
        let ring = faulty(uring, &script)(over_uring.2.clone());
        for mut engine in [pool, ring] {
            let results = [(); 3].map(|()| {
                engine.push(op(OpKind::Flush, 0, &[], &memory(4096)), 0);
                engine.submit();
                await_completions(&mut *engine, 1).remove(0).result
            });
            assert_eq!(results[0].as_ref().unwrap_err().raw_os_error(), Some(libc::EIO));
            for later in &results[1..] {
                let said = later.as_ref().err().map(ToString::to_string).unwrap_or_default();
                assert_eq!(said.contains("an earlier flush failed"), !bed.cache.is_direct(), "{bed:?} {said}");
            }
        }
        assert_eq!(over_uring.2.flush().is_ok(), bed.cache.is_direct(), "whoever flushes it");
    }
}

/// What the kernel does not even begin is completed, and announced, all the same.
#[test]
fn what_is_refused_at_once_completes() {
    for aio in [Aio::Native, Aio::IoUring] {
        let (_dir, path, disk, _) = DIRECT.disk(1 << 20);
        drop(disk);
        let disk = Arc::new(Disk::open(&path, true, CacheMode::None, "disk0").unwrap());
        let memory = memory(1 << 16);
        let mut engine = aio.start(disk, "test-io").unwrap();
        for tag in 0..10 {
            // It is not open for writing.
            let kind = if tag % 2 == 0 { OpKind::Write { durable: false } } else { OpKind::Read };
            engine.push(op(kind, 0, &[(4096, 4096)], &memory), tag);
        }
        engine.submit();
        for completion in await_completions(&mut *engine, 10) {
            let errno = completion.result.err().and_then(|error| error.raw_os_error());
            assert_eq!(errno, (completion.tag % 2 == 0).then_some(libc::EBADF));
        }
    }
}
