//! For tests: hosts and kernels that are slow, short of room or out of order, and what the engines make of them.

use std::sync::Arc;
use std::thread;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::conformance::{self, Bed, COARSE, DIRECT, await_completions, memory, op};
use super::faulty::{Call, Fault as HostFault, Faulty as HostFaulty};
use super::merge::Merge;
use super::ring::RingEngine;
use super::scripted::{Fault, faulty, native, uring};
use super::threads::ThreadPool;
use super::{Aio, Engine, Op, OpKind};
use crate::disk::Disk;

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
