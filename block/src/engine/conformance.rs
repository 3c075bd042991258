//! For tests: what every engine must do, checked against a model that is a vector of bytes.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;

use proptest::prelude::*;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{Completion, Engine, Op, OpKind};
use crate::disk::Disk;

/// Ops of one batch work on stripes of their own, so that their order does not matter.
const STRIPES: usize = 8;
const STRIPE: usize = 8192;
/// Memory begins here, and is made of regions of odd size that touch each other.
const BASE: u64 = 0x1000;
const REGION: usize = 0x5000;
/// Long enough that only a lost completion takes longer.
const PATIENCE_MS: i32 = 60_000;

/// An image of `size` bytes, opened.
pub(super) fn disk(size: u64) -> (TempDir, PathBuf, Arc<Disk>) {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("disk.img");
    File::create(&path).unwrap().set_len(size).unwrap();
    let disk = Arc::new(Disk::open(&path, false, "disk0").unwrap());
    (dir, path, disk)
}

/// `size` bytes of guest memory or a little more.
pub(super) fn memory(size: usize) -> Arc<GuestMemoryMmap> {
    let regions: Vec<_> = (0..size.div_ceil(REGION)).map(|n| (GuestAddress(at(n * REGION)), REGION)).collect();
    Arc::new(GuestMemoryMmap::from_ranges(&regions).unwrap())
}

/// The guest address of a place in [`memory`].
pub(super) fn at(offset: usize) -> u64 {
    BASE + offset as u64
}

/// An op on memory at `segments`, given as offsets and lengths.
pub(super) fn op(kind: OpKind, offset: u64, segments: &[(usize, usize)], memory: &Arc<GuestMemoryMmap>) -> Op {
    let segments = segments.iter().map(|&(start, len)| (GuestAddress(at(start)), len as u32)).collect();
    Op { kind, offset, segments, memory: memory.clone() }
}

/// Waits for `count` completions as a worker does: reaps until there is nothing, then sleeps until told.
pub(super) fn await_completions(engine: &mut dyn Engine, count: usize) -> Vec<Completion> {
    let epoll = Epoll::new().unwrap();
    let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
    epoll.ctl(ControlOperation::Add, engine.completion_event().as_raw_fd(), event).unwrap();
    let mut completions = Vec::new();
    while completions.len() < count {
        let before = completions.len();
        engine.reap(&mut completions);
        if completions.len() == before {
            let mut events = [EpollEvent::default()];
            assert_ne!(epoll.wait(PATIENCE_MS, &mut events).unwrap(), 0, "a completion was lost");
        }
    }
    assert_eq!(completions.len(), count);
    completions
}

/// One op on the stripe of its place in the batch.
#[derive(Clone, Debug)]
struct Step {
    write: Option<bool>,
    offset: usize,
    /// Gaps in memory and lengths.
    segments: Vec<(usize, usize)>,
}

fn step() -> impl Strategy<Value = Step> {
    let segments = prop::collection::vec((0_usize..64, 0_usize..1500), 0..12);
    (prop::option::of(any::<bool>()), 0..STRIPE, segments).prop_map(|(write, offset, segments)| Step {
        write,
        offset,
        segments,
    })
}

impl Step {
    /// Offset in the image, and the pieces of memory, cut to the stripe `n`. Reads of the last may leave the image.
    fn placed(&self, n: usize) -> (usize, Vec<(usize, usize)>) {
        let room = if self.write.is_none() && n == STRIPES - 1 { STRIPE } else { STRIPE - self.offset };
        let (mut memory, mut left, end) = (n * STRIPE, room, (n + 1) * STRIPE);
        let mut pieces = Vec::new();
        for &(gap, len) in &self.segments {
            memory = end.min(memory + gap);
            let len = len.min(left).min(end - memory);
            pieces.push((memory, len));
            (memory, left) = (memory + len, left - len);
        }
        (n * STRIPE + self.offset, pieces)
    }

    fn kind(&self) -> OpKind {
        self.write.map_or(OpKind::Read, |durable| OpKind::Write { durable })
    }

    fn apply(&self, n: usize, image: &mut [u8], memory: &mut [u8]) {
        let (mut offset, pieces) = self.placed(n);
        for (start, len) in pieces {
            for byte in &mut memory[start..start + len] {
                match self.write {
                    Some(_) => image[offset] = *byte,
                    None => *byte = image.get(offset).copied().unwrap_or(0),
                }
                offset += 1;
            }
        }
    }
}

/// Random batches of scattered reads and writes leave image and memory as the model says.
pub(super) fn bytes(make: impl Fn(Arc<Disk>) -> Box<dyn Engine>) {
    let size = STRIPES * STRIPE;
    let batches = prop::collection::vec(prop::collection::vec(step(), 1..=STRIPES), 1..6);
    let config = ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(batches in batches)| {
        let (_dir, path, disk) = disk(size as u64);
        let memory = memory(size);
        let mut model_memory: Vec<u8> = (0..size).map(|n| (n % 251) as u8 + 1).collect();
        let mut model_image: Vec<u8> = (0..size).map(|n| (n % 241) as u8 + 7).collect();
        fs::write(&path, &model_image).unwrap();
        memory.write_slice(&model_memory, GuestAddress(BASE)).unwrap();
        let mut engine = make(disk);
        for batch in batches {
            for (n, step) in batch.iter().enumerate() {
                let (offset, pieces) = step.placed(n);
                engine.push(op(step.kind(), offset as u64, &pieces, &memory), n as u16);
                step.apply(n, &mut model_image, &mut model_memory);
            }
            engine.submit();
            for completion in await_completions(&mut *engine, batch.len()) {
                completion.result.unwrap();
            }
            let mut seen = vec![0; size];
            memory.read_slice(&mut seen, GuestAddress(BASE)).unwrap();
            prop_assert!(seen == model_memory, "memory differs");
            prop_assert!(fs::read(&path).unwrap() == model_image, "image differs");
        }
    });
}

/// Of thousands in flight, each completes once, with its own op.
pub(super) fn exactly_once(make: impl Fn(Arc<Disk>) -> Box<dyn Engine>) {
    const COUNT: usize = 5000;
    let (_dir, path, disk) = disk(512 * COUNT as u64);
    let memory = memory(512 * COUNT);
    for n in 0..COUNT {
        memory.write_obj(n as u32, GuestAddress(at(n * 512))).unwrap();
    }
    let mut engine = make(disk);
    for n in 0..COUNT {
        engine.push(op(OpKind::Write { durable: false }, n as u64 * 512, &[(n * 512, 512)], &memory), n as u16);
        if n % 97 == 0 {
            engine.submit();
        }
    }
    engine.submit();
    let mut tags: Vec<u16> = await_completions(&mut *engine, COUNT)
        .into_iter()
        .map(|completion| {
            completion.result.unwrap();
            assert_eq!(completion.op.offset, u64::from(completion.tag) * 512);
            completion.tag
        })
        .collect();
    tags.sort_unstable();
    assert!(tags.iter().copied().eq(0..COUNT as u16));
    let image = fs::read(path).unwrap();
    assert!(image.chunks(512).enumerate().all(|(n, sector)| sector[..4] == (n as u32).to_le_bytes()));
    let mut rest = Vec::new();
    engine.drain(&mut rest);
    assert!(rest.is_empty());
}

/// A buffer outside guest memory fails its op and no other, and nothing is transferred for it.
pub(super) fn bad_buffers(make: impl Fn(Arc<Disk>) -> Box<dyn Engine>) {
    let (_dir, path, disk) = disk(4096);
    let memory = memory(REGION);
    memory.write_slice(&[5; 512], GuestAddress(at(0))).unwrap();
    let mut engine = make(disk);
    let write = OpKind::Write { durable: false };
    engine.push(op(write, 0, &[(0, 512), (REGION - 1, 512)], &memory), 0);
    engine.push(op(OpKind::Read, 0, &[(usize::MAX >> 1, 1)], &memory), 1);
    let mut wrapping = op(OpKind::Read, 0, &[], &memory);
    wrapping.segments.push((GuestAddress(u64::MAX - 5), 512));
    engine.push(wrapping, 2);
    engine.push(op(write, 1024, &[(0, 512)], &memory), 3);
    engine.submit();
    for completion in await_completions(&mut *engine, 4) {
        let errno = completion.result.err().and_then(|error| error.raw_os_error());
        assert_eq!(errno, (completion.tag != 3).then_some(libc::EFAULT), "op {}", completion.tag);
    }
    let image = fs::read(path).unwrap();
    assert_eq!(image[..1024], [0; 1024]);
    assert_eq!(image[1024..1536], [5; 512]);
}

/// `drain` returns everything that was pushed, submitted or not, and the engine goes on working.
pub(super) fn drain(make: impl Fn(Arc<Disk>) -> Box<dyn Engine>) {
    let (_dir, _path, disk) = disk(1 << 20);
    let memory = memory(1 << 20);
    let mut engine = make(disk);
    for round in 0..20 {
        for tag in 0..100 {
            engine.push(op(OpKind::Read, u64::from(tag) * 4096, &[(usize::from(tag) * 4096, 4096)], &memory), tag);
            if tag == round {
                engine.submit();
            }
        }
        let mut completions = Vec::new();
        engine.drain(&mut completions);
        assert_eq!(completions.len(), 100);
        assert_eq!(Arc::strong_count(&memory), 101, "an op is still somewhere");
        completions.clear();
        engine.reap(&mut completions);
        assert!(completions.is_empty());
    }
}
