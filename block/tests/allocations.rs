#![expect(unsafe_code, reason = "an allocator that counts")]
//! An engine at work allocates nothing: neither for a request of its own nor on the threads that help it. The only test
//! in its process, because it counts what every thread does.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cmp::Reverse;
use std::num::NonZeroUsize;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::cache::CacheMode;
use block::disk::Disk;
use block::engine::merge::Merge;
use block::engine::{Aio, Engine, Engines, Op, OpKind};
use block::overlay;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: the system's allocator does it all.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
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

const OPS: u16 = 64;

/// Waits until `event` was written since the last wait.
fn wait(event: &EventFd) {
    let mut poll = libc::pollfd { fd: event.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one structure of ours.
    unsafe { libc::poll(&raw mut poll, 1, -1) };
    let _ = event.read();
}

/// Every op once through the engine; they come back in `spare`.
fn round(engine: &mut dyn Engine, spare: &mut Vec<Op>, completions: &mut Vec<block::engine::Completion>) {
    // Neighbours come one after the other.
    spare.sort_unstable_by_key(|op| Reverse(op.offset));
    for tag in 0..OPS {
        engine.push(spare.pop().unwrap(), tag);
    }
    engine.submit();
    while spare.len() < usize::from(OPS) {
        engine.reap(completions);
        if completions.is_empty() {
            wait(engine.completion_event());
        }
        for completion in completions.drain(..) {
            completion.result.unwrap();
            spare.push(completion.op);
        }
    }
}

#[test]
fn no_request_allocates() {
    let dir = tempfile::TempDir::new_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
    let path = dir.path().join("disk.img");
    std::fs::write(&path, vec![1; 1 << 20]).unwrap();
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
    let choices = [
        (Aio::Threads, CacheMode::Writeback),
        (Aio::Threads, CacheMode::None),
        (Aio::Native, CacheMode::None),
        (Aio::IoUring, CacheMode::Writeback),
        (Aio::IoUring, CacheMode::None),
    ];
    let layers = [(false, false), (true, false), (false, true), (true, true)];
    for ((aio, cache), (merge, snapshot)) in choices.into_iter().flat_map(|it| layers.map(|layer| (it, layer))) {
        let mut disk = Disk::open(&path, snapshot, cache, "disk0").unwrap();
        if snapshot {
            disk = overlay::over(disk, &path, dir.path()).unwrap();
        }
        // Of so few threads all are there soon. More would come whenever the host takes its time.
        let engines = Engines::only(aio).with_threads(NonZeroUsize::new(4).unwrap());
        let (mut engine, _) = engines.start(&Arc::new(disk), "test-io").unwrap();
        if merge {
            engine = Box::new(Merge::new(engine));
        }
        let mut completions = Vec::with_capacity(OPS.into());
        let mut spare: Vec<Op> = (0..u64::from(OPS))
            .map(|n| Op {
                kind: if n % 4 == 0 { OpKind::Write { durable: false } } else { OpKind::Read },
                // What follows a write reads half of it: of a snapshot, half from the overlay.
                offset: if n % 4 == 0 { n * 8192 } else { n * 8192 - 4096 },
                segments: vec![(GuestAddress(n * 8192), 4096), (GuestAddress(n * 8192 + 4096), 4096)],
                ranges: Vec::new(),
                memory: memory.clone(),
            })
            .collect();
        for _ in 0..50 {
            round(&mut *engine, &mut spare, &mut completions);
        }
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        for _ in 0..50 {
            round(&mut *engine, &mut spare, &mut completions);
        }
        let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
        // A pool starts a thread whenever all are busy, and that allocates; a request does not.
        let pools = if aio == Aio::Threads { 1 + u64::from(snapshot) } else { 0 };
        assert_eq!(engine.merged() > 0, merge);
        // Requests differ in length there, and what is used again (a slot's buffers, an op at rest) grows when it meets the
        // longest for the first time: each once, in an order that depends on the host.
        let grown = if merge || snapshot { OPS.into() } else { 0 };
        let what = format!("{aio:?} {cache:?}, merge {merge}, snapshot {snapshot}");
        assert!(allocations <= 50 * pools + grown, "{what}: {allocations} allocations in 3200 requests");
    }
}
