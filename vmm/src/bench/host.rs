//! The yardstick: the very same engine with the same work, driven as the worker of a disk drives it, but without a
//! machine around it. One thread a queue.

use std::os::fd::AsRawFd;
use std::path::Path;
use std::process;
use std::slice;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context, anyhow, bail};
use block::disk::Disk;
use block::engine::{Aio, Completion, Engine, Engines, Op, OpKind};
use guest::workload::{Workload, pattern};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::cell::Cell;
use super::machine::Machines;
use super::sample::{Counted, Handed, Histogram, Sample};
use super::usage::Usage;
use crate::config::MemoryConfig;
use crate::memory;

/// What the threads are called, so that their CPU time can be told from ours.
const NAME: &str = "yard";

/// Measures `cell`, whose engine is `aio`, on the image at `path`, timed and seeded as `machines` are.
///
/// # Errors
/// When the host refuses the image, the engine or a request. Or when it is to stop.
pub(super) fn run(cell: &Cell, aio: Aio, path: &Path, machines: &Machines<'_>) -> anyhow::Result<Sample> {
    let Machines { timing, seed, stop, .. } = machines;
    let readonly = !cell.work.rw.writes();
    let disk = Arc::new(Disk::open(path, readonly, cell.way.cache, "host")?);
    let mut drivers = (0..cell.work.queues)
        .map(|queue| Driver::new(cell, aio, &disk, seed.wrapping_add(queue.into()), queue))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let before = Usage::of(process::id())?;
    let begin = Instant::now() + timing.warm_up;
    let ended = thread::scope(|scope| {
        let threads: Vec<_> = drivers
            .iter_mut()
            .enumerate()
            .map(|(queue, driver)| {
                let thread = thread::Builder::new().name(format!("{NAME}-q{queue}"));
                thread.spawn_scoped(scope, move || driver.drive(begin, begin + timing.runtime, stop))
            })
            .collect::<Result<_, _>>()
            .context("no thread")?;
        join(threads)
    })?;
    // Engines and their threads are still there; the drivers said themselves what they used before they ended.
    let mut used = Usage::of(process::id())?.since(&before, is_io);
    let mut histogram = Histogram::default();
    for (driver, own) in drivers.iter().zip(&ended) {
        histogram.merge(&driver.histogram);
        used += own.since(&before, |name| name.starts_with(NAME) && !is_io(name));
    }
    let counted = Counted {
        block: cell.work.bs,
        started: drivers.iter().map(|driver| driver.started).sum(),
        seconds: timing.runtime.as_secs_f64(),
        histogram,
        unit: 1000.0,
        used: (None, used),
        kicks: None,
        interrupts: None,
        handed: Some(Handed {
            batches: drivers.iter().map(|driver| driver.batches).sum(),
            submissions: drivers.iter().map(|driver| driver.engine.submissions()).sum(),
        }),
    };
    Ok(counted.sample())
}

/// The threads of an engine, and those with which the kernel serves an io_uring.
fn is_io(name: &str) -> bool {
    name.starts_with(NAME) && name.ends_with("-io") || name.starts_with("iou-wrk")
}

fn join(threads: Vec<thread::ScopedJoinHandle<'_, anyhow::Result<Usage>>>) -> anyhow::Result<Vec<Usage>> {
    // A panic of the thread goes on here.
    let joined =
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
    joined.collect()
}

/// One queue.
struct Driver {
    work: Workload,
    engine: Box<dyn Engine>,
    epoll: Epoll,
    /// Buffers, one after the other.
    memory: Arc<GuestMemoryMmap>,
    block: u32,
    durable: bool,
    depth: u16,
    pushed: Vec<Instant>,
    in_flight: usize,
    started: u64,
    batches: u64,
    histogram: Histogram,
}

impl Driver {
    fn new(cell: &Cell, aio: Aio, disk: &Arc<Disk>, seed: u64, queue: u16) -> anyhow::Result<Self> {
        let (block, depth) = (cell.work.bs, cell.work.depth);
        let bytes = (u64::from(block) * u64::from(depth)).next_multiple_of(1 << 20);
        let all = 0..bytes;
        let memory = memory::map(&MemoryConfig { size: bytes, ..MemoryConfig::default() }, slice::from_ref(&all))?;
        for offset in (0..bytes).step_by(8) {
            memory.write_obj(pattern(0, offset), GuestAddress(offset)).expect("the buffers are in it");
        }
        let engines = Engines::only(aio).with_threads(cell.way.thread_pool_max);
        let (engine, _) = engines.start(disk, &format!("{NAME}-q{queue}-io"))?;
        let epoll = Epoll::new()?;
        let edge = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
        epoll.ctl(ControlOperation::Add, engine.completion_event().as_raw_fd(), edge)?;
        let work = Workload::new(cell.work.rw, block.into(), disk.size(), seed);
        Ok(Self {
            work: work.ok_or_else(|| anyhow!("the disk has no room for one block of {block} bytes"))?,
            engine,
            epoll,
            memory,
            block,
            durable: !cell.way.cache.has_write_cache(),
            depth,
            pushed: vec![Instant::now(); depth.into()],
            in_flight: 0,
            started: 0,
            batches: 0,
            histogram: Histogram::default(),
        })
    }

    /// Keeps the engine full until `end`, and counts from `begin` on. What this thread used is in what it returns. An error
    /// when `stop` becomes true.
    fn drive(&mut self, begin: Instant, end: Instant, stop: &AtomicBool) -> anyhow::Result<Usage> {
        let now = Instant::now();
        for tag in 0..self.depth {
            let op = self.new_op(tag);
            self.push(op, tag, now);
        }
        self.submit(0);
        let mut completions = Vec::with_capacity(self.depth.into());
        while self.in_flight > 0 {
            self.engine.reap(&mut completions);
            if completions.is_empty() {
                let _ = self.epoll.wait(-1, &mut [EpollEvent::default()]);
                continue;
            }
            if stop.load(Ordering::Relaxed) {
                bail!("interrupted");
            }
            let (now, before) = (Instant::now(), self.started);
            for Completion { tag, op, result } in completions.drain(..) {
                result.with_context(|| format!("a request at byte {}", op.offset))?;
                self.in_flight -= 1;
                if (begin..=end).contains(&now) {
                    self.histogram.record((now - self.pushed[usize::from(tag)]).as_nanos() as u64);
                }
                if now < end {
                    self.push(op, tag, now);
                }
            }
            self.submit(before);
        }
        Ok(Usage::of(process::id())?)
    }

    /// Hands over what was pushed since `before` had been.
    fn submit(&mut self, before: u64) {
        self.batches += u64::from(self.started > before);
        self.engine.submit();
    }

    fn new_op(&self, tag: u16) -> Op {
        let address = GuestAddress(u64::from(tag) * u64::from(self.block));
        let segments = vec![(address, self.block)];
        Op { kind: OpKind::Read, offset: 0, segments, ranges: Vec::new(), memory: self.memory.clone() }
    }

    fn push(&mut self, mut op: Op, tag: u16, now: Instant) {
        let operation = self.work.advance();
        op.kind = if operation.write { OpKind::Write { durable: self.durable } } else { OpKind::Read };
        op.offset = operation.offset;
        self.engine.push(op, tag);
        self.pushed[usize::from(tag)] = now;
        self.in_flight += 1;
        self.started += 1;
    }
}
