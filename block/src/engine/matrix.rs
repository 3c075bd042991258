//! For tests: every engine, on every kind of image, in every cache mode it goes with; and engines over rings that
//! misbehave.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;

use libc::iovec;
use tempfile::TempDir;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::conformance::{self, Bed, Kind, attach, await_completions, memory, op};
use super::faulty::{Call, Fault as HostFault, Faulty as HostFaulty};
use super::merge::Merge;
use super::native::Native;
use super::ring::{Ring, RingEngine};
use super::threads::ThreadPool;
use super::uring::Uring;
use super::{Aio, Engine, Op, OpKind};
use crate::cache::CacheMode;
use crate::direct::Alignment;
use crate::disk::Disk;
use crate::lock::tests::FORKING;

/// An engine with an image and a cache mode each.
fn combinations() -> impl Iterator<Item = (Aio, Bed)> {
    let kinds = [Kind::Written, Kind::Sparse, Kind::Preallocated, Kind::Tmpfs];
    Aio::ALL.into_iter().flat_map(move |aio| {
        CacheMode::ALL.into_iter().filter(move |&cache| aio.goes_with(cache)).flat_map(move |cache| {
            // Before Linux 6.6 nothing in memory can be opened with O_DIRECT.
            let kinds = kinds.into_iter().filter(move |&kind| kind != Kind::Tmpfs || !cache.is_direct());
            kinds.map(move |kind| (aio, Bed { kind, cache, cases: 4, ..Bed::default() }))
        })
    })
}

fn start(aio: Aio) -> impl Fn(Arc<Disk>) -> Box<dyn Engine> {
    move |disk| aio.start(disk, "test-io").unwrap()
}

/// 4096-byte blocks, as of a disk with such sectors.
const COARSE: Alignment = Alignment { memory: 512, block: 4096 };

#[test]
fn all_move_the_right_bytes() {
    for (aio, bed) in combinations() {
        eprintln!("{aio:?} {bed:?}");
        conformance::bytes(&bed, start(aio));
    }
}

#[test]
fn all_complete_exactly_once() {
    for (aio, bed) in combinations().filter(|(_, bed)| bed.kind == Kind::Written) {
        eprintln!("{aio:?} {bed:?}");
        conformance::exactly_once(&bed, start(aio));
    }
}

#[test]
fn all_refuse_bad_buffers_and_drain() {
    for (aio, bed) in combinations().filter(|(_, bed)| bed.kind != Kind::Tmpfs) {
        eprintln!("{aio:?} {bed:?}");
        conformance::bad_buffers(&bed, start(aio));
        conformance::drain(&bed, start(aio));
    }
}

#[test]
fn all_work_on_block_devices() {
    let _alone = FORKING.lock();
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    match attach(image.path(), 512) {
        Ok(device) => assert!(Command::new("losetup").arg("-d").arg(device).status().unwrap().success()),
        Err(why) => {
            skip::because(why);
            return;
        }
    }
    for sector in [512, 4096] {
        for (aio, bed) in combinations().filter(|(_, bed)| bed.kind == Kind::Written && bed.cache != CacheMode::Unsafe)
        {
            let bed = Bed { kind: Kind::Loop(sector), cases: 2, ..bed };
            eprintln!("{aio:?} {bed:?}");
            conformance::bytes(&bed, start(aio));
            conformance::neighbours(&bed, start(aio));
            conformance::drain(&bed, start(aio));
        }
    }
}

/// An overlay mounted over two empty folders, as containers have one; unmounted when dropped.
struct Overlay(TempDir);

impl Overlay {
    fn new() -> Result<Self, String> {
        // The upper folder must be on a filesystem that keeps extended attributes, and not on an overlay itself.
        let dir = TempDir::new_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        let [lower, upper, work, merged] = ["lower", "upper", "work", "merged"].map(|name| dir.path().join(name));
        for folder in [&lower, &upper, &work, &merged] {
            std::fs::create_dir(folder).unwrap();
        }
        let [lower, upper, work] = [lower, upper, work].map(|path| path.display().to_string());
        let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
        let output = Command::new("mount").args(["-t", "overlay", "overlay", "-o", &options]).arg(merged).output();
        let output = output.map_err(|error| error.to_string())?;
        if output.status.success() { Ok(Self(dir)) } else { Err(String::from_utf8_lossy(&output.stderr).trim().into()) }
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path().join("merged")).status();
    }
}

#[test]
fn all_work_on_overlayfs() {
    let _alone = FORKING.lock();
    let overlay = match Overlay::new() {
        Ok(overlay) => overlay,
        Err(why) => {
            skip::because(why);
            return;
        }
    };
    let folder: &'static Path = Box::leak(overlay.0.path().join("merged").into_boxed_path());
    for (aio, bed) in combinations().filter(|(_, bed)| bed.kind == Kind::Written) {
        let bed = Bed { kind: Kind::In(folder), cases: 3, ..bed };
        eprintln!("{aio:?} {bed:?}");
        conformance::bytes(&bed, start(aio));
        conformance::drain(&bed, start(aio));
    }
}

/// Every engine over a host that fails as `script` says.
fn over_faults(disk: &Arc<Disk>, script: &[HostFault]) -> Vec<Box<dyn Engine>> {
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let image = || HostFaulty::new(disk.clone(), script);
    let (of_native, of_uring) = (event(), event());
    let rings = (native(disk, &of_native), uring(disk, &of_uring));
    vec![
        Box::new(ThreadPool::helper(image(), "test-io", event()).unwrap()),
        Box::new(RingEngine::new(image(), rings.0, of_native, "test-io").unwrap()),
        Box::new(RingEngine::new(image(), rings.1, of_uring, "test-io").unwrap()),
    ]
}

#[test]
fn a_host_that_cannot_or_fails_to_discard_and_to_zero() {
    let (_dir, path, disk, content) = DIRECT.disk(1 << 20);
    let memory = memory(4096);
    let discard = OpKind::Discard { durable: false };
    let zeroes = OpKind::WriteZeroes { unmap: true, durable: true };
    for errno in [libc::EIO, libc::ENOSPC, libc::EOPNOTSUPP] {
        for (kind, start) in [(discard, 0), (zeroes, 65536)] {
            for mut engine in over_faults(&disk, &[HostFault::Fail(errno), HostFault::Fail(errno)]) {
                let range = start..start + 8192;
                engine.push(Op { ranges: vec![range], ..op(kind, 0, &[], &memory) }, 5);
                engine.submit();
                let done = await_completions(&mut *engine, 1).remove(0);
                let failed = done.result.err().and_then(|error| error.raw_os_error());
                assert_eq!(failed, (errno != libc::EOPNOTSUPP).then_some(errno), "{kind:?}");
                assert_eq!(done.tag, 5);
            }
        }
    }
    let mut expected = content;
    expected[65536..65536 + 8192].fill(0);
    assert!(std::fs::read(&path).unwrap() == expected, "only what could not be zeroed otherwise was written");
}

#[test]
fn all_write_sectors_of_larger_blocks() {
    for aio in Aio::ALL {
        for cache in [CacheMode::None, CacheMode::Directsync] {
            let bed = Bed { cache, alignment: Some(COARSE), cases: 4, ..Bed::default() };
            conformance::bytes(&bed, start(aio));
            conformance::neighbours(&bed, start(aio));
        }
    }
}

/// What becomes of a completion, or of an attempt to hand transfers over.
#[derive(Clone, Copy)]
enum Fault {
    /// The kernel has no room.
    Full,
    /// The transfer reports this.
    Report(i64),
    /// The completion comes when no other does any more, and after those that were held back later.
    Late,
    /// None.
    Pass,
}

const DIRECT: Bed = Bed { kind: Kind::Written, cache: CacheMode::None, alignment: None, snapshot: false, cases: 6 };

/// Linux from 3.17 on has the ring that is read without a system call; should it ever be another, the call remains.
#[test]
fn linux_aio_works_with_and_without_its_mapped_ring() {
    for mapped in [true, false] {
        let open = |disk: &Disk, event: &EventFd| {
            let mut ring = native(disk, event);
            assert!(ring.mapped, "this host's ring is not known");
            ring.mapped = mapped;
            ring
        };
        conformance::bytes(&DIRECT, faulty(open, &[Fault::Pass]));
        conformance::exactly_once(&DIRECT, faulty(open, &[Fault::Pass]));
    }
}

#[test]
fn short_transfers_and_interruptions_are_made_good() {
    let script = [
        Fault::Report(0),
        Fault::Pass,
        Fault::Report(512),
        Fault::Report((-libc::EAGAIN).into()),
        Fault::Report(1),
        Fault::Report((-libc::EINTR).into()),
    ];
    for bed in [DIRECT, Bed { alignment: Some(COARSE), ..DIRECT }] {
        conformance::bytes(&bed, faulty(native, &script));
        conformance::bytes(&bed, faulty(uring, &script));
        conformance::neighbours(&bed, faulty(native, &script));
        conformance::neighbours(&bed, faulty(uring, &script));
    }
}

#[test]
fn completions_may_be_late_and_in_any_order() {
    // Some of them short as well: the rest is done by others than the ring.
    let script = [Fault::Late, Fault::Late, Fault::Pass, Fault::Late, Fault::Report(512), Fault::Late, Fault::Pass];
    for bed in [DIRECT, Bed { alignment: Some(COARSE), ..DIRECT }] {
        for merge in [false, true] {
            let (native, uring) = (faulty(native, &script), faulty(uring, &script));
            for make in [&native as &dyn Fn(Arc<Disk>) -> Box<dyn Engine>, &uring] {
                let make = |disk| -> Box<dyn Engine> {
                    let engine = make(disk);
                    if merge { Box::new(Merge::new(engine)) } else { engine }
                };
                conformance::bytes(&bed, make);
                conformance::exactly_once(&bed, make);
                conformance::neighbours(&bed, make);
                conformance::drain(&bed, make);
            }
        }
    }
}

/// An engine whose helper works on `image`, and its ring on `disk` below.
fn over(image: Arc<HostFaulty>, disk: &Disk, aio: Aio) -> Box<dyn Engine> {
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    match aio {
        Aio::Native => Box::new(RingEngine::new(image, native(disk, &event), event, "test-io").unwrap()),
        _ => Box::new(RingEngine::new(image, uring(disk, &event), event, "test-io").unwrap()),
    }
}

/// What the kernel's queue cannot do holds up neither that queue nor its owner.
#[test]
fn a_slow_discard_is_not_waited_for() {
    const READS: u16 = 600;
    let (_dir, _path, disk, _) = DIRECT.disk(1 << 20);
    let memory = memory(1 << 20);
    let range = 0..8192;
    let discard = || Op { ranges: vec![range.clone()], ..op(OpKind::Discard { durable: false }, 0, &[], &memory) };
    let zeroes = || Op { kind: OpKind::WriteZeroes { unmap: true, durable: true }, ..discard() };
    for aio in [Aio::Native, Aio::IoUring] {
        let image = HostFaulty::new(disk.clone(), &[]);
        let mut engine = over(image.clone(), &disk, aio);
        image.hold(true);
        engine.push(discard(), READS);
        engine.push(zeroes(), READS + 1);
        for tag in 0..READS {
            let place = usize::from(tag % 128) * 4096;
            engine.push(op(OpKind::Read, 65536 + place as u64, &[(place, 4096)], &memory), tag);
        }
        engine.submit();
        let reads = await_completions(&mut *engine, READS.into());
        assert!(reads.iter().all(|read| read.result.is_ok() && read.tag < READS), "{aio:?}");
        image.hold(false);
        let mut tags: Vec<_> = await_completions(&mut *engine, 2).into_iter().map(|done| done.tag).collect();
        tags.sort_unstable();
        assert_eq!(tags, [READS, READS + 1]);
    }
}

/// A thread of the helper waits for a block that a transfer of the ring has: it can be abandoned, for that is reaped meanwhile.
#[test]
fn who_waits_for_a_block_can_be_abandoned() {
    let (write, elsewhere) = (OpKind::Write { durable: false }, 65536..131_072);
    for aio in [Aio::Native, Aio::IoUring] {
        let (_dir, _path, disk, _) = Bed { alignment: Some(COARSE), ..DIRECT }.disk(1 << 20);
        let memory = memory(1 << 20);
        let image = HostFaulty::new(disk.clone(), &[]);
        let mut engine = over(image.clone(), &disk, aio);
        engine.push(op(write, 0, &[(0, 4096)], &memory), 0);
        engine.push(op(write, 512, &[(4096, 512)], &memory), 1);
        let discard = op(OpKind::Discard { durable: false }, 0, &[], &memory);
        engine.push(Op { ranges: vec![elsewhere.clone()], ..discard }, 2);
        engine.submit();
        // Threads take their work in order: when this one is begun the one before is.
        while !image.calls().iter().any(|call| matches!(call, Call::Discard { .. })) {
            thread::yield_now();
        }
        let mut completions = Vec::new();
        engine.abandon(&mut completions);
        let mut tags: Vec<_> = completions.iter().map(|completion| completion.tag).collect();
        tags.sort_unstable();
        assert_eq!(tags, [0, 1, 2], "{aio:?}");
    }
}

#[test]
fn a_full_kernel_is_waited_for() {
    let script = [Fault::Full, Fault::Full, Fault::Pass, Fault::Full, Fault::Full, Fault::Full, Fault::Pass];
    conformance::bytes(&DIRECT, faulty(native, &script));
    conformance::bytes(&DIRECT, faulty(uring, &script));
    conformance::exactly_once(&DIRECT, faulty(native, &script[2..]));
    conformance::exactly_once(&DIRECT, faulty(uring, &script[2..]));
    conformance::drain(&DIRECT, faulty(native, &script));
    conformance::drain(&DIRECT, faulty(uring, &script));
}

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

/// An engine leaves nothing behind that holds the image, and with it its lock: not even for a moment.
#[test]
fn an_image_is_free_when_its_engine_is_gone() {
    let _alone = FORKING.lock();
    for aio in Aio::ALL {
        let (_dir, path, disk, _) = DIRECT.disk(1 << 20);
        drop(disk);
        for round in 0..50 {
            let disk = Disk::open(&path, false, CacheMode::None, "disk0");
            let disk = disk.unwrap_or_else(|error| panic!("{aio:?}, round {round}: {error}"));
            let mut engine = aio.start(Arc::new(disk), "test-io").unwrap();
            engine.push(op(OpKind::Read, 0, &[(4096, 4096)], &memory(1 << 16)), 0);
            engine.submit();
        }
    }
}

/// The host begins while the owner goes on pushing; neighbours, of which there may be more, are not parted for that.
#[test]
fn many_are_handed_over_before_the_last_is_pushed() {
    for aio in [Aio::Native, Aio::IoUring] {
        let (_dir, _path, disk, _) = DIRECT.disk(1 << 20);
        let memory = memory(1 << 20);
        for (stride, calls) in [(8192, [2, 3]), (4096, [0, 1])] {
            let mut engine = Merge::new(aio.start(disk.clone(), "test-io").unwrap());
            for tag in 0..40 {
                let place = usize::from(tag) * 4096;
                engine.push(op(OpKind::Read, u64::from(tag) * stride, &[(place, 4096)], &memory), tag);
            }
            let before = engine.submissions();
            engine.submit();
            assert_eq!([before, engine.submissions()], calls, "{aio:?}, {stride} bytes apart");
            assert_eq!(engine.merged(), if stride == 4096 { 39 } else { 0 });
            for completion in await_completions(&mut engine, 40) {
                completion.result.unwrap();
            }
        }
    }
}

fn snapshots() -> impl Iterator<Item = (Aio, Bed)> {
    combinations().map(|(aio, bed)| (aio, Bed { snapshot: true, ..bed }))
}

/// Every engine, twice, as one: over an image that nothing is written to.
#[test]
fn all_leave_the_image_of_a_snapshot_alone() {
    for (aio, bed) in snapshots() {
        eprintln!("{aio:?} {bed:?}");
        conformance::bytes(&bed, start(aio));
        conformance::bad_buffers(&bed, start(aio));
        conformance::drain(&bed, start(aio));
    }
    for (aio, bed) in snapshots().filter(|(_, bed)| bed.kind == Kind::Written) {
        conformance::exactly_once(&bed, start(aio));
        // Through two queues: one map, and under O_DIRECT blocks of which each writes a part.
        conformance::neighbours(&bed, start(aio));
        conformance::bytes(&bed, |disk| Box::new(Merge::new(start(aio)(disk))));
        if bed.cache.is_direct() {
            let bed = Bed { alignment: Some(COARSE), ..bed };
            conformance::bytes(&bed, start(aio));
            conformance::neighbours(&bed, start(aio));
        }
    }
}

/// A ring whose behaviour follows a script, over and over.
struct Faulty<R> {
    ring: R,
    script: VecDeque<Fault>,
    /// Behind what is held: to cancel.
    cancel: bool,
    /// Queued, and not yet in `ring`: whose memory the engine keeps until it is reaped.
    held: VecDeque<(usize, OpKind, u64, *const iovec, usize)>,
    /// Completed, and not yet said.
    late: Vec<(usize, i64)>,
    /// That of the engine.
    event: EventFd,
}

// SAFETY: the pointers are those the engine gave, to memory that it keeps.
#[expect(unsafe_code, reason = "it holds what it was given for the kernel")]
unsafe impl<R: Ring> Send for Faulty<R> {}

impl<R: Ring> Faulty<R> {
    fn next(&mut self) -> Fault {
        self.script.rotate_left(1);
        *self.script.back().unwrap()
    }
}

impl<R: Ring> Ring for Faulty<R> {
    #[expect(unsafe_code, reason = "the same promise as that of the ring inside")]
    unsafe fn queue(&mut self, number: usize, kind: OpKind, offset: u64, buffers: &[iovec]) {
        self.held.push_back((number, kind, offset, buffers.as_ptr(), buffers.len()));
    }

    fn enter(&mut self) -> u64 {
        let mut calls = 0;
        while let Some(&(number, kind, offset, array, count)) = self.held.front() {
            if matches!(self.next(), Fault::Full) {
                break;
            }
            self.held.pop_front();
            #[expect(unsafe_code, reason = "passes on what it was given")]
            // SAFETY: the engine keeps the array and its targets until the number is reaped.
            unsafe {
                self.ring.queue(number, kind, offset, std::slice::from_raw_parts(array, count));
            }
            calls += self.ring.enter();
            assert_eq!(self.ring.queued(), 0);
        }
        if self.cancel && self.held.is_empty() {
            self.ring.cancel();
            self.cancel = false;
        }
        calls
    }

    fn queued(&self) -> usize {
        self.held.len() + usize::from(self.cancel)
    }

    fn has_finished(&mut self) -> bool {
        self.ring.has_finished()
    }

    fn cancel(&mut self) {
        self.cancel = true;
        self.enter();
    }

    fn reap(&mut self, finished: &mut Vec<(usize, i64)>) {
        let mut reaped = Vec::new();
        self.ring.reap(&mut reaped);
        if reaped.is_empty() {
            return finished.extend(self.late.drain(..).rev());
        }
        for (number, result) in reaped {
            match self.next() {
                Fault::Report(instead) if instead < 0 => finished.push((number, instead)),
                Fault::Report(most) => finished.push((number, result.min(most))),
                Fault::Late => self.late.push((number, result)),
                Fault::Full | Fault::Pass => finished.push((number, result)),
            }
        }
        if !self.late.is_empty() {
            self.event.write(1).unwrap();
        }
    }
}

fn faulty<R: Ring + 'static>(
    open: impl Fn(&Disk, &EventFd) -> R,
    script: &[Fault],
) -> impl Fn(Arc<Disk>) -> Box<dyn Engine> {
    move |disk| {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let ring = Faulty {
            ring: open(&disk, &event),
            script: script.iter().copied().collect(),
            cancel: false,
            held: VecDeque::new(),
            late: Vec::new(),
            event: event.try_clone().unwrap(),
        };
        Box::new(RingEngine::new(disk, ring, event, "test-io").unwrap())
    }
}

fn native(disk: &Disk, event: &EventFd) -> Native {
    Native::new(disk.file().as_raw_fd(), event.as_raw_fd()).unwrap()
}

fn uring(disk: &Disk, event: &EventFd) -> Uring {
    Uring::new(disk.file().as_raw_fd(), event.as_raw_fd()).unwrap()
}
