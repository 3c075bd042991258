//! What virtio-blk promises about power failures (virtio 1.2, 5.2.6.2): a write is stable when it is completed and the
//! disk had no write cache all the time, or when a flush that was sent after its completion is completed. Random requests
//! go through the device, merging and the engines' own code to an image with a volatile cache, whose power fails at a random
//! moment; what is left must be explained by the requests.

use std::collections::HashMap;
use std::fmt;

use block::direct::Alignment;
use block::engine::Engine;
use block::engine::merge::Merge;
use block::engine::volatile::{Lie, Volatile};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use super::workers::context;
use super::*;

// virtio 1.2, 5.2.6.
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// Few, so that requests meet.
const FEW: usize = 24;
const QUEUES: u64 = 2;
/// Requests of a whole history, at most.
const REQUESTS: u64 = 64;
/// Guest memory of one request's data.
const ROOM: u64 = 8 << 10;

#[derive(Clone, Debug)]
enum Step {
    Write(Transfer),
    Read(Transfer),
    /// Zeroes that may be unmapped, or may not.
    Zero(Transfer, bool),
    Discard(Transfer),
    Flush {
        queue: u64,
    },
    /// Switches the write cache.
    Cache(bool),
    /// Tells the device of what was made available since the last time.
    Notify,
    /// The same, and waits until so many requests are used, of any queue.
    Await(usize),
}

#[derive(Clone, Debug)]
struct Transfer {
    queue: u64,
    sector: usize,
    count: usize,
    /// It goes on where the one before ended, in the same queue, if there is room.
    follows: bool,
    /// Where its data begins, past an aligned address, and after how many bytes it goes on elsewhere.
    skew: u64,
    cut: u64,
}

fn history() -> impl Strategy<Value = (u64, Vec<Step>)> {
    let skew = prop_oneof![3 => Just(0), 1 => Just(512), 1 => 1..600_u64];
    let cut = prop_oneof![2 => Just(0), 1 => Just(512), 1 => 1..1300_u64];
    let transfer = (0..QUEUES, 0..FEW, 1..10_usize, any::<bool>(), skew, cut);
    let transfer = transfer.prop_map(|(queue, sector, count, follows, skew, cut)| {
        let count = count.min(FEW - sector);
        Transfer { queue, sector, count, follows, skew, cut }
    });
    let step = prop_oneof![
        6 => transfer.clone().prop_map(Step::Write),
        1 => transfer.clone().prop_map(Step::Read),
        1 => (transfer.clone(), any::<bool>()).prop_map(|(transfer, unmap)| Step::Zero(transfer, unmap)),
        1 => transfer.prop_map(Step::Discard),
        1 => any::<bool>().prop_map(Step::Cache),
        2 => (0..QUEUES).prop_map(|queue| Step::Flush { queue }),
        2 => Just(Step::Notify),
        3 => (1..6_usize).prop_map(Step::Await),
    ];
    (any::<u64>(), prop::collection::vec(step, 1..REQUESTS as usize))
}

/// One request, in the driver's time.
struct Request {
    kind: u32,
    sectors: std::ops::Range<usize>,
    data: Vec<Segment>,
    status: u64,
    submitted: u64,
    completed: Option<u64>,
}

impl Request {
    fn before(&self, other: &Self) -> bool {
        self.completed.is_some_and(|completed| completed < other.submitted)
    }

    /// Whether sector `sector` is another one afterwards, for certain.
    fn writes(&self, sector: usize) -> bool {
        [OUT, WRITE_ZEROES].contains(&self.kind) && self.sectors.contains(&sector)
    }
}

/// What write number `id` puts into a sector. No two writes, sectors or words of them are the same; 0 is what was there.
fn stamp(id: usize, sector: usize) -> Vec<u8> {
    let word = |n: u64| if id == 0 { 0 } else { (id as u64) << 32 | (sector as u64) << 16 | n };
    (0..64).flat_map(|n| word(n).to_le_bytes()).collect()
}

/// The driver, and what it knows.
struct History {
    guest: Guest,
    drivers: Vec<Driver>,
    kicks: Vec<EventFd>,
    /// Of each queue: its heads in flight, and their requests.
    heads: Vec<HashMap<u16, usize>>,
    /// By number. The first stands for what was there before: it is no request.
    requests: Vec<Request>,
    /// Where the last transfer ended: its queue, and the sector after it.
    last: (u64, usize),
    /// Since when the disk has a write cache or none, in order.
    cache: Vec<(u64, bool)>,
    now: u64,
}

impl History {
    fn new(cache: CacheMode, features: u64) -> Self {
        let modes = [CacheMode::Writeback, CacheMode::None, CacheMode::Unsafe];
        let has_cache = modes.contains(&cache) && features & 1 << VIRTIO_BLK_F_FLUSH != 0;
        let guest = Guest::new(features | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES);
        let ring = |queue| Driver::new(guest.memory.clone(), RINGS + queue * 0x4000, QUEUE_SIZE);
        let drivers = (0..QUEUES).map(ring).collect();
        let origin = Request { kind: OUT, sectors: 0..FEW, data: vec![], status: 0, submitted: 0, completed: Some(0) };
        Self {
            guest,
            drivers,
            kicks: (0..QUEUES).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect(),
            heads: vec![HashMap::new(); QUEUES as usize],
            requests: vec![origin],
            last: (0, 0),
            cache: vec![(0, has_cache)],
            now: 0,
        }
    }

    /// The queues of `blk` over `image`, each with an engine of its own.
    fn start(&self, blk: &Blk, engine: impl Fn() -> io::Result<Box<dyn Engine>>) -> Vec<Worker<()>> {
        let lines = Lines(vec![self.guest.line.clone(); QUEUES as usize]);
        let context = Context {
            interrupt: Arc::new(lines),
            ..context(&self.guest, blk.disk.clone(), blk.rules(self.guest.features))
        };
        let queues = self.drivers.iter().zip(&self.kicks).enumerate();
        let workers = queues.map(|(index, (driver, kick))| {
            let queue = Virtqueue::new(driver.layout(), self.guest.features, self.guest.memory.clone()).unwrap();
            let queue = ActiveQueue { index: index as u16, queue, kick: kick.try_clone().unwrap() };
            let worker = QueueWorker::new(context.clone(), queue, engine().unwrap()).unwrap();
            Worker::spawn("blk0", move |stop| worker.run(&stop)).unwrap()
        });
        workers.collect()
    }

    fn step(&mut self, blk: &Blk, image: &Volatile, step: &Step) -> Result<(), String> {
        match step {
            Step::Write(transfer) => self.transfer(OUT, transfer),
            Step::Read(transfer) => self.transfer(IN, transfer),
            Step::Zero(transfer, unmap) => self.change(WRITE_ZEROES, transfer, *unmap),
            Step::Discard(transfer) => self.change(DISCARD, transfer, false),
            Step::Cache(_) if self.guest.features & 1 << VIRTIO_BLK_F_CONFIG_WCE == 0 => {}
            Step::Cache(on) => {
                // While it is being switched, it may be on.
                self.now += 1;
                self.cache.push((self.now, true));
                blk.write_cache.switch(*on, || image.flush()).unwrap();
                self.now += 1;
                self.cache.push((self.now, *on));
            }
            // A driver that has not negotiated it must not.
            Step::Flush { .. } if self.guest.features & 1 << VIRTIO_BLK_F_FLUSH == 0 => {}
            Step::Flush { queue } => self.submit(FLUSH, *queue, 0..0, vec![]),
            Step::Notify => self.notify(),
            Step::Await(count) => self.wait_for(*count)?,
        }
        Ok(())
    }

    fn transfer(&mut self, kind: u32, transfer: &Transfer) {
        let Transfer { count, follows, skew, cut, .. } = *transfer;
        let goes_on = follows && self.last.1 + count <= FEW;
        let (queue, sector) = if goes_on { self.last } else { (transfer.queue, transfer.sector) };
        self.last = (queue, sector + count);
        let id = self.requests.len();
        let (start, len) = (DATA + id as u64 * ROOM, count as u64 * 512);
        let cut = cut.min(len);
        // Two pieces with a gap, so that they do not lie in one.
        let pieces = [(start + skew, cut), (start + skew + cut + 512, len - cut)];
        let segment = |(address, len): (u64, u64)| {
            if kind == OUT { readable(address, len as u32) } else { writable(address, len as u32) }
        };
        let data: Vec<_> = pieces.into_iter().filter(|piece| piece.1 > 0).map(segment).collect();
        let sectors = sector..sector + count;
        if kind == OUT {
            let content: Vec<u8> = sectors.clone().flat_map(|sector| stamp(id, sector)).collect();
            let mut rest = &content[..];
            for segment in &data {
                let (now, later) = rest.split_at(segment.len as usize);
                self.guest.fill(segment.address.0, now);
                rest = later;
            }
        }
        self.submit(kind, queue, sectors, data);
    }

    /// One range, as `struct virtio_blk_discard_write_zeroes` (5.2.6).
    fn change(&mut self, kind: u32, transfer: &Transfer, unmap: bool) {
        let Transfer { queue, sector, count, .. } = *transfer;
        let address = DATA + self.requests.len() as u64 * ROOM;
        self.guest.fill(address, &(sector as u64).to_le_bytes());
        self.guest.fill(address + 8, &(count as u32).to_le_bytes());
        self.guest.fill(address + 12, &u32::from(unmap).to_le_bytes());
        self.submit(kind, queue, sector..sector + count, vec![readable(address, 16)]);
    }

    fn submit(&mut self, kind: u32, queue: u64, sectors: std::ops::Range<usize>, data: Vec<Segment>) {
        let (header, status) = self.guest.header(kind, sectors.start as u64);
        let chain: Vec<_> = [header].into_iter().chain(data.iter().copied()).chain([status]).collect();
        let head = self.drivers[queue as usize].add(&chain);
        self.heads[queue as usize].insert(head, self.requests.len());
        self.now += 1;
        let (status, submitted) = (status.address.0, self.now);
        self.requests.push(Request { kind, sectors, data, status, submitted, completed: None });
    }

    fn notify(&self) {
        self.kicks.iter().for_each(|kick| kick.write(1).unwrap());
    }

    fn wait_for(&mut self, count: usize) -> Result<(), String> {
        self.notify();
        let mut seen = self.collect()?;
        while seen < count && self.heads.iter().any(|heads| !heads.is_empty()) {
            wait(&self.guest.line.queue);
            seen += self.collect()?;
        }
        Ok(())
    }

    /// Takes what is used; returns how many.
    fn collect(&mut self) -> Result<usize, String> {
        let mut count = 0;
        for queue in 0..self.drivers.len() {
            while let Some((head, _)) = self.drivers[queue].used() {
                let id = self.heads[queue].remove(&head).unwrap();
                count += 1;
                self.now += 1;
                self.requests[id].completed = Some(self.now);
                let request = &self.requests[id];
                assert_eq!(self.guest.bytes(request.status, 1), [OK], "request {id}");
                if request.kind == IN {
                    let read: Vec<u8> = request
                        .data
                        .iter()
                        .flat_map(|part| self.guest.bytes(part.address.0, part.len as usize))
                        .collect();
                    self.explain(&read, request.sectors.start, |write| write.before(request))?;
                }
            }
        }
        Ok(count)
    }

    /// Whether the power may fail without a loss of what this write wrote.
    fn stable(&self, write: &Request) -> bool {
        let Some(completed) = write.completed else { return false };
        let last_before = self.cache.iter().rposition(|(since, _)| *since < write.submitted).unwrap();
        let mut meanwhile = self.cache[last_before..].iter().take_while(|(since, _)| *since <= completed);
        let flushed = |flush: &Request| flush.kind == FLUSH && flush.completed.is_some() && write.before(flush);
        // Switching it off makes what was answered before stable.
        let switched = self.cache.iter().any(|(since, on)| !on && *since > completed + 1);
        meanwhile.all(|(_, on)| !on) || switched || self.requests.iter().any(flushed)
    }

    /// Every sector of `bytes`, from sector `start` on, is whole from one request, and not from one that a write which is
    /// `there` came after.
    fn explain(&self, bytes: &[u8], start: usize, there: impl Fn(&Request) -> bool) -> Result<(), String> {
        for (sector, bytes) in (start..).zip(bytes.chunks(512)) {
            let id = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize >> 32;
            let is_origin = |(number, request): &(usize, &Request)| {
                let zeroes = *number == 0 || [DISCARD, WRITE_ZEROES].contains(&request.kind);
                let right = if id == 0 { zeroes } else { *number == id && request.kind == OUT };
                right && request.sectors.contains(&sector) && bytes == stamp(id, sector)
            };
            let mut origins = self.requests.iter().enumerate().filter(is_origin).map(|(_, origin)| origin).peekable();
            if origins.peek().is_none() {
                return Err(format!("sector {sector}: never written: {bytes:x?}"));
            }
            let over = |origin: &Request| {
                let mut writes = self.requests[1..].iter().filter(|write| write.writes(sector) && there(write));
                writes.any(|write| origin.before(write))
            };
            if origins.all(over) {
                return Err(format!("sector {sector}: what is there, of request {id} (0: zeroes), was written over"));
            }
        }
        Ok(())
    }
}

impl fmt::Debug for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, Request { kind, sectors, submitted, completed, .. }) in self.requests.iter().enumerate() {
            writeln!(f, "{number}: {submitted}..{completed:?}: type {kind}, sectors {sectors:?}")?;
        }
        writeln!(f, "write cache: {:?}", self.cache)
    }
}

/// A disk, the driver's features, the engine, the host under it.
struct Case<'a> {
    image: &'a Image,
    cache: CacheMode,
    features: u64,
    ring: bool,
    block: u64,
    lie: Lie,
}

impl Case<'_> {
    fn try_out(&self, seed: u64, steps: &[Step]) -> Result<(), String> {
        let disk = self.image.open_as(false, None, self.cache, Aio::Threads);
        let direct = Alignment { memory: 512, block: self.block };
        let alignment = if self.cache.is_direct() { direct } else { Alignment::NONE };
        let image = Volatile::new(FEW, alignment, self.lie, seed);
        let mut history = History::new(self.cache, self.features);
        let engine = || if self.ring { image.ring() } else { image.pool() };
        // Neighbours go together in every second history.
        let merge = seed.is_multiple_of(2);
        let merging = |engine| if merge { Box::new(Merge::new(engine)) as Box<dyn Engine> } else { engine };
        let workers = history.start(&disk, || engine().map(merging));
        steps.iter().try_for_each(|step| history.step(&disk, &image, step))?;
        history.collect()?;
        let left = image.lose_power();
        workers.into_iter().for_each(Worker::stop);
        history.explain(&left, 0, |write| history.stable(write)).map_err(|lost| format!("{lost}\n{history:?}"))
    }

    /// Whether a few of the histories that are always the same show what `expected` says.
    fn breaks(&self) -> bool {
        let mut runner = TestRunner::deterministic();
        (0..400).any(|_| {
            let (seed, steps) = history().new_tree(&mut runner).unwrap().current();
            self.try_out(seed, &steps).is_err()
        })
    }
}

/// A driver that switches the write cache.
const SWITCHING: u64 = PLAIN | 1 << VIRTIO_BLK_F_CONFIG_WCE;

/// The cache modes, with drivers that flush, that cannot, and that switch the write cache.
const PROMISES: [(CacheMode, u64); 9] = [
    (CacheMode::Writeback, PLAIN),
    (CacheMode::None, PLAIN),
    (CacheMode::Writethrough, PLAIN),
    (CacheMode::Directsync, WITHOUT_FLUSH),
    (CacheMode::Writeback, WITHOUT_FLUSH),
    (CacheMode::None, WITHOUT_FLUSH),
    (CacheMode::Writeback, SWITCHING),
    (CacheMode::None, SWITCHING),
    (CacheMode::Writethrough, SWITCHING),
];

#[test]
fn what_was_promised_survives() {
    let image = image_on_disk();
    for (cache, features) in PROMISES {
        for (ring, block) in [(false, 512), (true, 512), (false, 4096), (true, 4096)] {
            if block == 4096 && !cache.is_direct() {
                continue;
            }
            let case = Case { image: &image, cache, features, ring, block, lie: Lie::None };
            let config = ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() };
            proptest!(config, |((seed, steps) in history())| {
                let result = case.try_out(seed, &steps);
                prop_assert!(result.is_ok(), "{cache:?}, features {features:x}, ring {ring}: {}", result.unwrap_err());
            });
        }
    }
}

/// The check can fail: it finds a disk that only pretends to flush, as `unsafe` does, and hosts that lie.
#[test]
fn what_is_not_kept_is_found() {
    let image = image_on_disk();
    for (cache, features, lie) in [
        (CacheMode::Unsafe, PLAIN, Lie::None),
        (CacheMode::Writeback, PLAIN, Lie::Flush),
        (CacheMode::Writethrough, WITHOUT_FLUSH, Lie::Durable),
        (CacheMode::None, WITHOUT_FLUSH, Lie::Durable),
        (CacheMode::None, SWITCHING, Lie::Durable),
    ] {
        for ring in [false, true] {
            let case = Case { image: &image, cache, features, ring, block: 512, lie };
            assert!(case.breaks(), "{cache:?} {lie:?}: nothing was lost");
        }
    }
}
