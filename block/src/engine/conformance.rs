//! For tests: what every engine must do, checked against a model that is a vector of bytes.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use proptest::prelude::*;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::fallocate::{FallocateMode, fallocate};

use super::{Completion, Engine, Op, OpKind};
use crate::cache::CacheMode;
use crate::direct::Alignment;
use crate::disk::Disk;
use crate::overlay;

/// Ops of one batch work on stripes of their own, so that their order does not matter.
const STRIPES: usize = 8;
const STRIPE: usize = 8192;
/// Memory begins here, and is made of regions of odd size that touch each other.
const BASE: u64 = 0x1000;
const REGION: usize = 0x5000;
/// Long enough that only a lost completion takes longer.
const PATIENCE_MS: i32 = 60_000;

/// What an image is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// On a disk, every byte written before.
    Written,
    /// On a disk, one hole.
    Sparse,
    /// On a disk, with its blocks, none of them written.
    Preallocated,
    /// In memory, every byte written before.
    Tmpfs,
    /// A block device with sectors of this many bytes, every byte written before; see [`attach`].
    Loop(usize),
    /// In this folder, every byte written before.
    In(&'static Path),
}

/// The images of one test.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bed {
    pub(super) kind: Kind,
    pub(super) cache: CacheMode,
    /// The host demands this rather than what it does.
    pub(super) alignment: Option<Alignment>,
    /// The image stays as it is.
    pub(super) snapshot: bool,
    /// How many random cases to try.
    pub(super) cases: u32,
}

impl Default for Bed {
    fn default() -> Self {
        Self { kind: Kind::Written, cache: CacheMode::Writeback, alignment: None, snapshot: false, cases: 48 }
    }
}

/// An image past the page cache.
pub(super) const DIRECT: Bed =
    Bed { kind: Kind::Written, cache: CacheMode::None, alignment: None, snapshot: false, cases: 6 };

/// 4096-byte blocks, as of a disk with such sectors.
pub(super) const COARSE: Alignment = Alignment { memory: 512, block: 4096 };

/// What a byte of a written image is.
fn written(n: usize) -> u8 {
    (n % 241) as u8 + 7
}

impl Bed {
    /// An image of `size` bytes, opened, and its content.
    pub(super) fn disk(&self, size: usize) -> (TempDir, PathBuf, Arc<Disk>, Vec<u8>) {
        let dir = match self.kind {
            Kind::Tmpfs => TempDir::new_in("/dev/shm").unwrap(),
            Kind::In(folder) => TempDir::new_in(folder).unwrap(),
            // Where the build is; a temporary directory may be in memory.
            _ => TempDir::new_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap(),
        };
        let mut path = dir.path().join("disk.img");
        let file = File::options().write(true).create_new(true).open(&path).unwrap();
        let content = self.content(size);
        match self.kind {
            Kind::Written | Kind::Tmpfs | Kind::Loop(_) | Kind::In(_) => file.write_all_at(&content, 0).unwrap(),
            Kind::Sparse => file.set_len(size as u64).unwrap(),
            Kind::Preallocated => fallocate(&file, FallocateMode::ZeroRange, false, 0, size as u64).unwrap(),
        }
        if let Kind::Loop(sector) = self.kind {
            path = attach(&path, sector).expect("a loop device");
        }
        let disk = Disk::open(&path, self.snapshot, self.cache, "disk0").unwrap();
        if let Kind::Loop(_) = self.kind {
            // It stays until the disk is closed.
            assert!(Command::new("losetup").arg("-d").arg(&path).status().unwrap().success());
        }
        if let (Kind::Loop(sector), true) = (self.kind, self.cache.is_direct()) {
            assert_eq!(disk.alignment().block, sector as u64);
        }
        let disk = match self.alignment {
            Some(alignment) => disk.with_alignment(alignment),
            None => disk,
        };
        if !self.snapshot {
            return (dir, path, Arc::new(disk), content);
        }
        // As coarse as the image.
        let disk = overlay::over(disk, &path, dir.path()).unwrap();
        let disk = match self.alignment {
            Some(alignment) => disk.with_alignment(alignment),
            None => disk,
        };
        (dir, path, Arc::new(disk), content)
    }

    /// What an image of `size` bytes begins as.
    fn content(&self, size: usize) -> Vec<u8> {
        match self.kind {
            Kind::Written | Kind::Tmpfs | Kind::Loop(_) | Kind::In(_) => (0..size).map(written).collect(),
            Kind::Sparse | Kind::Preallocated => vec![0; size],
        }
    }

    /// What a disk of `size` bytes has now: the image at `path`. If that stays as it is, and so it must, what `engine` reads.
    fn seen(&self, engine: &mut dyn Engine, path: &Path, size: usize) -> Vec<u8> {
        let image = fs::read(path).unwrap();
        if !self.snapshot {
            return image;
        }
        assert!(image == self.content(size), "the image was written to");
        let memory = memory(size);
        engine.push(op(OpKind::Read, 0, &[(0, size)], &memory), 0);
        engine.submit();
        await_completions(engine, 1).remove(0).result.unwrap();
        let mut seen = vec![0; size];
        memory.read_slice(&mut seen, GuestAddress(BASE)).unwrap();
        seen
    }

    /// What is written or zeroed begins and ends at multiples of this.
    fn unit(&self) -> usize {
        if self.snapshot { 512 } else { 1 }
    }
}

/// A loop device over `image`, or what stands against it. The caller holds [`FORKING`](crate::lock::tests::FORKING).
pub(crate) fn attach(image: &Path, sector: usize) -> Result<PathBuf, String> {
    let mut losetup = Command::new("losetup");
    let output = losetup.args(["--find", "--show", "--sector-size", &sector.to_string()]).arg(image).output();
    let output = output.map_err(|error| error.to_string())?;
    let said = |text: Vec<u8>| String::from_utf8_lossy(&text).trim().to_owned();
    if output.status.success() { Ok(said(output.stdout).into()) } else { Err(said(output.stderr)) }
}

/// An image of `size` bytes, all zero, opened.
pub(super) fn disk(size: usize) -> (TempDir, PathBuf, Arc<Disk>) {
    let (dir, path, disk, _) = Bed { kind: Kind::Sparse, ..Bed::default() }.disk(size);
    (dir, path, disk)
}

/// `size` bytes of guest memory or a little more.
pub(crate) fn memory(size: usize) -> Arc<GuestMemoryMmap> {
    let regions: Vec<_> = (0..size.div_ceil(REGION)).map(|n| (GuestAddress(at(n * REGION)), REGION)).collect();
    Arc::new(GuestMemoryMmap::from_ranges(&regions).unwrap())
}

/// The guest address of a place in [`memory`].
pub(crate) fn at(offset: usize) -> u64 {
    BASE + offset as u64
}

/// An op on memory at `segments`, given as offsets and lengths.
pub(crate) fn op(kind: OpKind, offset: u64, segments: &[(usize, usize)], memory: &Arc<GuestMemoryMmap>) -> Op {
    let segments = segments.iter().map(|&(start, len)| (GuestAddress(at(start)), len as u32)).collect();
    Op { kind, offset, segments, ranges: Vec::new(), memory: memory.clone() }
}

/// Waits for `count` completions as a worker does: reaps until there is nothing, then sleeps until told.
pub(crate) fn await_completions(engine: &mut dyn Engine, count: usize) -> Vec<Completion> {
    let epoll = Epoll::new().unwrap();
    let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
    epoll.ctl(ControlOperation::Add, engine.completion_event().as_raw_fd(), event).unwrap();
    let mut completions = Vec::new();
    while completions.len() < count {
        let before = completions.len();
        engine.reap(&mut completions);
        if completions.len() == before {
            let mut events = [EpollEvent::default()];
            match epoll.wait(PATIENCE_MS, &mut events) {
                Ok(count) => assert_ne!(count, 0, "a completion was lost"),
                // io_uring does its work on the thread that submitted, and interrupts it for that.
                Err(error) => assert_eq!(error.kind(), ErrorKind::Interrupted),
            }
        }
    }
    assert_eq!(completions.len(), count);
    completions
}

/// One op on the stripe of its place in the batch.
#[derive(Clone, Debug)]
struct Step {
    kind: OpKind,
    /// It changes whole units of so many bytes.
    unit: usize,
    offset: usize,
    /// Gaps in memory and lengths.
    segments: Vec<(usize, usize)>,
}

fn step(unit: usize) -> impl Strategy<Value = Step> {
    let kind = prop_oneof![
        3 => Just(OpKind::Read),
        3 => any::<bool>().prop_map(|durable| OpKind::Write { durable }),
        1 => any::<bool>().prop_map(|durable| OpKind::Discard { durable }),
        2 => any::<[bool; 2]>().prop_map(|[unmap, durable]| OpKind::WriteZeroes { unmap, durable }),
    ];
    let segments = prop::collection::vec((0_usize..64, 0_usize..1500), 0..12);
    (kind, 0..STRIPE, segments).prop_map(move |(kind, offset, segments)| {
        let unit = if kind == OpKind::Read { 1 } else { unit };
        Step { kind, unit, offset: offset - offset % unit, segments }
    })
}

impl Step {
    /// Offset in the image, and the pieces of memory, cut to the stripe `n`. Reads of the last may leave the image.
    fn placed(&self, n: usize) -> (usize, Vec<(usize, usize)>) {
        let room = if self.kind == OpKind::Read && n == STRIPES - 1 { STRIPE } else { STRIPE - self.offset };
        let (mut memory, mut left, end) = (n * STRIPE, room, (n + 1) * STRIPE);
        let mut pieces = Vec::new();
        for &(gap, len) in &self.segments {
            memory = end.min(memory + gap);
            let len = len.min(left).min(end - memory);
            pieces.push((memory, len));
            (memory, left) = (memory + len, left - len);
        }
        // Part of a unit is left at the end.
        let mut cut = (room - left) % self.unit;
        for piece in pieces.iter_mut().rev() {
            let less = cut.min(piece.1);
            (piece.1, cut) = (piece.1 - less, cut - less);
        }
        (n * STRIPE + self.offset, pieces)
    }

    /// What is discarded or zeroed, of the image: it has the ranges that the pieces have in memory.
    fn ranges(&self, n: usize) -> Vec<Range<usize>> {
        let whole = |place: usize| place - place % self.unit;
        self.placed(n).1.into_iter().map(|(start, len)| whole(start)..whole(start + len)).collect()
    }

    /// The op.
    fn op(&self, n: usize, memory: &Arc<GuestMemoryMmap>) -> Op {
        let (offset, pieces) = self.placed(n);
        if matches!(self.kind, OpKind::Read | OpKind::Write { .. }) {
            return op(self.kind, offset as u64, &pieces, memory);
        }
        let ranges = self.ranges(n).into_iter().map(|range| range.start as u64..range.end as u64).collect();
        Op { ranges, ..op(self.kind, 0, &[], memory) }
    }

    fn apply(&self, n: usize, image: &mut [u8], memory: &mut [u8]) {
        if let OpKind::WriteZeroes { .. } = self.kind {
            self.ranges(n).into_iter().for_each(|range| image[range].fill(0));
        }
        let (mut offset, pieces) = self.placed(n);
        for (start, len) in pieces {
            for byte in &mut memory[start..start + len] {
                match self.kind {
                    OpKind::Read => *byte = image.get(offset).copied().unwrap_or(0),
                    OpKind::Write { .. } => image[offset] = *byte,
                    OpKind::Flush | OpKind::Discard { .. } | OpKind::WriteZeroes { .. } => {}
                }
                offset += 1;
            }
        }
    }

    /// What is discarded is as it was, or zero where the host gives blocks back.
    fn settle(&self, n: usize, image: &mut [u8], seen: &[u8]) {
        if let OpKind::Discard { .. } = self.kind {
            for at in self.ranges(n).into_iter().flatten() {
                image[at] = if seen[at] == 0 { 0 } else { image[at] };
            }
        }
    }
}

/// Random batches of scattered reads, writes, discarded and zeroed ranges leave image and memory as the model says.
pub(super) fn bytes(bed: &Bed, make: impl Fn(Arc<Disk>) -> Box<dyn Engine>) {
    let size = STRIPES * STRIPE;
    let batches = prop::collection::vec(prop::collection::vec(step(bed.unit()), 1..=STRIPES), 1..6);
    let config = ProptestConfig { cases: bed.cases, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(batches in batches)| {
        let (_dir, path, disk, mut model_image) = bed.disk(size);
        let memory = memory(size);
        let mut model_memory: Vec<u8> = (0..size).map(|n| (n % 251) as u8 + 1).collect();
        memory.write_slice(&model_memory, GuestAddress(BASE)).unwrap();
        let mut engine = make(disk);
        for batch in batches {
            for (n, step) in batch.iter().enumerate() {
                engine.push(step.op(n, &memory), n as u16);
                step.apply(n, &mut model_image, &mut model_memory);
            }
            engine.submit();
            for completion in await_completions(&mut *engine, batch.len()) {
                completion.result.unwrap();
            }
            let mut seen = vec![0; size];
            memory.read_slice(&mut seen, GuestAddress(BASE)).unwrap();
            prop_assert!(seen == model_memory, "memory differs");
            let seen = bed.seen(&mut *engine, &path, size);
            for (n, step) in batch.iter().enumerate() {
                step.settle(n, &mut model_image, &seen);
            }
            prop_assert!(seen == model_image, "image differs");
        }
    });
}

/// Of thousands in flight, each completes once, with its own op.
pub(super) fn exactly_once(bed: &Bed, make: impl Fn(Arc<Disk>) -> Box<dyn Engine>) {
    const COUNT: usize = 4096;
    let (_dir, path, disk, _) = bed.disk(512 * COUNT);
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
    let image = bed.seen(&mut *engine, &path, 512 * COUNT);
    assert!(image.chunks(512).enumerate().all(|(n, sector)| sector[..4] == (n as u32).to_le_bytes()));
    let mut rest = Vec::new();
    engine.drain(&mut rest);
    assert!(rest.is_empty());
}

/// A buffer outside guest memory fails its op and no other, and nothing is transferred for it.
pub(super) fn bad_buffers(bed: &Bed, make: impl Fn(Arc<Disk>) -> Box<dyn Engine>) {
    let (_dir, path, disk, content) = bed.disk(4096);
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
    let image = bed.seen(&mut *engine, &path, 4096);
    assert_eq!(image[..1024], content[..1024]);
    assert_eq!(image[1024..1536], [5; 512]);
}

/// `drain` and `abandon` return everything that was pushed, submitted or not, once, and the engine goes on working.
pub(super) fn drain(bed: &Bed, make: impl Fn(Arc<Disk>) -> Box<dyn Engine>) {
    let (_dir, _path, disk, _) = bed.disk(1 << 20);
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
        if round % 2 == 0 {
            engine.drain(&mut completions);
        } else {
            engine.abandon(&mut completions);
        }
        let mut tags: Vec<_> = completions.iter().map(|completion| completion.tag).collect();
        tags.sort_unstable();
        assert!(tags.into_iter().eq(0..100));
        for completion in &completions {
            match &completion.result {
                Err(error) if round % 2 == 1 => assert_eq!(error.raw_os_error(), Some(libc::ECANCELED)),
                result => assert!(result.is_ok(), "{result:?}"),
            }
        }
        assert_eq!(Arc::strong_count(&memory), 101, "an op is still somewhere");
        completions.clear();
        engine.reap(&mut completions);
        assert!(completions.is_empty());
    }
}

/// Writes and zeroes of the sectors of one block, all at once and through several queues, do not undo each other.
pub(super) fn neighbours(bed: &Bed, make: impl Fn(Arc<Disk>) -> Box<dyn Engine>) {
    const BLOCKS: usize = 16;
    let (_dir, path, disk, _) = bed.disk(BLOCKS * 4096);
    let memory = memory(BLOCKS * 4096);
    let mut engines = [make(disk.clone()), make(disk)];
    for round in 1..=6_usize {
        let mut expected = Vec::new();
        for block in 0..BLOCKS {
            // A block is written in one piece, or in eight.
            let pieces = if (block + round).is_multiple_of(3) { 1 } else { 8 };
            let len = 4096 / pieces;
            for piece in 0..pieces {
                let at_byte = block * 4096 + piece * len;
                let sector = vec![(round * 40 + block + piece) as u8; len];
                memory.write_slice(&sector, GuestAddress(at(at_byte))).unwrap();
                expected.extend(sector);
                let mut one = op(OpKind::Write { durable: false }, at_byte as u64, &[(at_byte, len)], &memory);
                if (block + round + piece).is_multiple_of(4) {
                    let range = at_byte as u64..(at_byte + len) as u64;
                    let kind = OpKind::WriteZeroes { unmap: round.is_multiple_of(2), durable: false };
                    one = Op { ranges: vec![range], ..op(kind, 0, &[], &memory) };
                    expected[at_byte..].fill(0);
                }
                engines[piece % 2].push(one, (block * 8 + piece) as u16);
            }
        }
        // Each on a thread of its own, as workers are: one may wait for what the other has done and not seen yet.
        std::thread::scope(|scope| {
            for engine in &mut engines {
                scope.spawn(|| {
                    let mut completions = Vec::new();
                    engine.drain(&mut completions);
                    assert!(completions.into_iter().all(|completion| completion.result.is_ok()));
                });
            }
        });
        let seen = bed.seen(&mut *engines[round % 2], &path, BLOCKS * 4096);
        assert!(seen == expected, "round {round}");
    }
}
