#![expect(unsafe_code, reason = "an allocator that counts")]
//! A worker and its engine allocate nothing for a request. Each thread counts for itself, whatever other tests do meanwhile;
//! that the threads that help an engine allocate nothing is tested with the engines.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::num::NonZeroUsize;
use std::sync::atomic::{self, AtomicU64, Ordering};

use block::engine::{Completion, Engine, Op};

use super::workers::context;
use super::*;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: the system's allocator does it all. Counting neither allocates nor needs anything that a thread takes apart.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the promise of the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the promise of the caller.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// An engine that tells what its thread has allocated, whenever that asks it for completions.
struct Watched {
    engine: Box<dyn Engine>,
    allocations: Arc<AtomicU64>,
}

impl Engine for Watched {
    fn push(&mut self, op: Op, tag: u16) {
        self.engine.push(op, tag);
    }
    fn submit(&mut self) {
        self.engine.submit();
    }
    fn reap(&mut self, completions: &mut Vec<Completion>) {
        self.engine.reap(completions);
        self.allocations.store(ALLOCATIONS.get(), Ordering::SeqCst);
    }
    fn has_completed(&mut self) -> bool {
        self.engine.has_completed()
    }
    fn completion_event(&self) -> &EventFd {
        self.engine.completion_event()
    }
    fn drain(&mut self, completions: &mut Vec<Completion>) {
        self.engine.drain(completions);
    }
    fn abandon(&mut self, completions: &mut Vec<Completion>) {
        self.engine.abandon(completions);
    }
    fn merged(&self) -> u64 {
        self.engine.merged()
    }
    fn submissions(&self) -> u64 {
        self.engine.submissions()
    }
}

const TOGETHER: u16 = 32;
/// Of the queue: no more than these requests need, so that each head soon was used for everything.
const SIZE: u16 = 128;
const ROUNDS: u16 = 200;

/// Requests of all sorts at once, some of them neighbours; waits for all. `used` is how many were answered so far.
fn round(guest: &mut Guest, used: &mut u16) {
    guest.requests = 0;
    for n in 0..u64::from(TOGETHER) {
        let at = DATA + n * 8192;
        match n % 8 {
            0 => guest.offer(OUT, n * 16, &[readable(at, 4096), readable(at + 4096, 4096)]),
            6 => guest.offer(FLUSH, 0, &[]),
            7 => guest.offer(GET_ID, 0, &[writable(at, 20)]),
            _ => guest.offer(IN, n * 16, &[writable(at, 512), writable(at + 512, 7680)]),
        };
    }
    guest.kick.write(1).unwrap();
    let all = *used + TOGETHER;
    while *used < all {
        guest.driver.set_used_event(*used);
        atomic::fence(Ordering::SeqCst);
        match guest.driver.used() {
            Some(_) => *used += 1,
            None => wait(&guest.line.queue),
        }
    }
}

#[test]
fn no_request_allocates() {
    let image = image_on_disk();
    for (aio, cache) in [
        (Aio::Threads, CacheMode::Writeback),
        (Aio::Native, CacheMode::None),
        (Aio::IoUring, CacheMode::Writeback),
        (Aio::IoUring, CacheMode::None),
    ] {
        for (features, latencies) in [(PLAIN, true), (EVENT_IDX, false)] {
            let (disk, mut guest) = (image.disk_as(false, cache), Guest::many(features, 1, SIZE).remove(0));
            // Of so few threads all are there soon. More would come whenever the host takes its time.
            let engines = Engines::only(aio).with_threads(NonZeroUsize::new(4).unwrap());
            let engine = Box::new(Merge::new(engines.start(&disk, "test-io").unwrap().0));
            let allocations = Arc::new(AtomicU64::new(0));
            let engine = Box::new(Watched { engine, allocations: allocations.clone() });
            let cache = Arc::new(WriteCache::new(cache));
            let rules = Rules { size: disk.size(), readonly: false, cache, features, may_unmap: true };
            let context = Context { statistics: Arc::new(Statistics::new(latencies)), ..context(&guest, disk, rules) };
            let worker = QueueWorker::new(context, guest.queue(), engine).unwrap();
            let worker = Worker::spawn("blk0-q0", move |stop| worker.run(&stop)).unwrap();
            let mut used = 0;
            (0..ROUNDS).for_each(|_| round(&mut guest, &mut used));
            let before = allocations.load(Ordering::SeqCst);
            assert_ne!(before, 0, "nobody counts");
            (0..ROUNDS).for_each(|_| round(&mut guest, &mut used));
            let during = allocations.load(Ordering::SeqCst) - before;
            worker.stop();
            // What is used again, as the parts of each head, grows when it meets the longest for the first time, in an order that
            // depends on the host; and to start a thread of a pool allocates. All of it is less than once a round.
            let allowed = u64::from(SIZE);
            assert!(during <= allowed, "{aio:?}: {during} allocations in {ROUNDS} rounds of {TOGETHER} requests");
        }
    }
}
