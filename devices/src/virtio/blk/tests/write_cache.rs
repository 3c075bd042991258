//! The write cache, and a driver that switches it (virtio 1.2, 5.2.5 and 5.2.6.2).

use block::engine::{Completion, Engine, Op, OpKind};

use super::super::request::{Action, Request, Status};
use super::workers::worker_with;
use super::*;

const CONFIG_WCE: u64 = 1 << 11;

/// What a request of this type becomes.
fn action(blk: &Blk, kind: u32, features: u64) -> Action {
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096)]).unwrap());
    memory.write_obj(kind, GuestAddress(0)).unwrap();
    let segments = vec![readable(0, 16), readable(512, 512), writable(2048, 1)];
    let chain = crate::virtio::queue::Chain { head: 0, segments };
    let mut op =
        Op { kind: OpKind::Flush, offset: 0, segments: Vec::new(), ranges: Vec::new(), memory: memory.clone() };
    Request::parse(&chain, &memory, &blk.rules(features), &mut op).unwrap().1
}

fn write(durable: bool) -> Action {
    Action::Transfer(OpKind::Write { durable }, 0)
}

const FLUSHES: Action = Action::Transfer(OpKind::Flush, 0);
const NOTHING: Action = Action::Answer(Status::Ok);

fn writeback(blk: &Blk) -> u8 {
    let mut byte = [0xff];
    blk.read_config(32, &mut byte);
    byte[0]
}

/// The table of cache modes: what is told, what a write and a flush become, and what a write of a driver that cannot flush.
#[test]
fn cache_modes_decide_what_is_told_and_what_is_stable() {
    for (cache, told, durable, flush, durable_without) in [
        (CacheMode::Writeback, 1, false, FLUSHES, true),
        (CacheMode::None, 1, false, FLUSHES, true),
        (CacheMode::Writethrough, 0, true, NOTHING, true),
        (CacheMode::Directsync, 0, true, NOTHING, true),
        (CacheMode::Unsafe, 1, false, NOTHING, false),
    ] {
        for with_switch in [0, CONFIG_WCE] {
            let mut blk = image_on_disk().open_as(false, None, cache, Aio::Threads);
            // 5.2.5.2: it must offer the flush if it offers the switch.
            assert_eq!(blk.features() & (1 << VIRTIO_BLK_F_FLUSH | CONFIG_WCE), 1 << VIRTIO_BLK_F_FLUSH | CONFIG_WCE);
            assert_eq!(writeback(&blk), told, "{cache:?}");
            let guest = Guest::new(PLAIN | with_switch);
            guest.activate(&mut blk);
            assert_eq!(writeback(&blk), told, "{cache:?}");
            assert_eq!(action(&blk, OUT, PLAIN), write(durable), "{cache:?}");
            assert_eq!(action(&blk, FLUSH, PLAIN), flush, "{cache:?}");
            blk.reset();
            // 5.2.5.2: with the switch and without the flush it must begin with 0.
            Guest::new(WITHOUT_FLUSH | with_switch).activate(&mut blk);
            assert_eq!(writeback(&blk), 0, "{cache:?}");
            assert_eq!(action(&blk, OUT, WITHOUT_FLUSH), write(durable_without), "{cache:?}");
            blk.reset();
            assert_eq!(writeback(&blk), told, "{cache:?}");
        }
    }
}

#[test]
fn the_driver_switches_it_until_the_reset() {
    let features = PLAIN | CONFIG_WCE;
    for (cache, told) in [(CacheMode::Writeback, 1), (CacheMode::Writethrough, 0), (CacheMode::Unsafe, 1)] {
        let is_unsafe = cache == CacheMode::Unsafe;
        let mut blk = Image::new().open_as(false, None, cache, Aio::Threads);
        let guest = Guest::new(features);
        guest.activate(&mut blk);
        for on in [0, 0, 1, 1, 0] {
            blk.write_config(32, &[on]);
            assert_eq!(writeback(&blk), on);
            assert_eq!(action(&blk, OUT, features), write(on == 0 && !is_unsafe), "{cache:?} {on}");
            let flush = if on == 1 && !is_unsafe { FLUSHES } else { NOTHING };
            assert_eq!(action(&blk, FLUSH, features), flush, "{cache:?} {on}");
        }
        blk.write_config(32, &[1 - told]);
        blk.reset();
        assert_eq!(writeback(&blk), told, "{cache:?}");
        // A driver may write the configuration before DRIVER_OK (3.1.1, step 7).
        blk.write_config(32, &[1 - told]);
        guest.activate(&mut blk);
        assert_eq!(writeback(&blk), 1 - told);
        blk.reset();
    }
}

#[test]
fn only_the_byte_itself_switches_and_only_when_that_was_negotiated() {
    let mut blk = Image::new().open(false, None);
    let guest = Guest::new(PLAIN | CONFIG_WCE);
    guest.activate(&mut blk);
    for (offset, len) in [(0, 32), (31, 1), (33, 4), (u64::MAX, 1), (u64::MAX - 40, 60)] {
        blk.write_config(offset, &vec![0; len]);
        assert_eq!(writeback(&blk), 1, "{offset} {len}");
    }
    blk.write_config(30, &[0xff, 0xff, 0, 0xff]);
    assert_eq!(writeback(&blk), 0);
    blk.write_config(0, &[0xff; 60]);
    assert_eq!(writeback(&blk), 1, "any other number is as good as 1");
    let mut capacity = [0; 8];
    blk.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), SECTORS);
    blk.reset();
    guest_without_switch(&mut blk);
}

fn guest_without_switch(blk: &mut Blk) {
    blk.write_config(32, &[0]);
    Guest::new(PLAIN).activate(blk);
    assert_eq!(writeback(blk), 1, "as the cache mode has it");
    blk.write_config(32, &[0]);
    assert_eq!(writeback(blk), 1);
}

/// A driver that reads the field back, as Linux does, goes on to flush what may not be stable.
#[test]
fn a_cache_that_cannot_be_emptied_stays() {
    let cache = WriteCache::new(CacheMode::Writeback);
    let error = cache.switch(false, || Err(io::Error::from_raw_os_error(5))).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(5));
    assert!(cache.is_on() && !cache.is_durable() && cache.flushes());
    cache.switch(false, || Ok(())).unwrap();
    assert!(!cache.is_on() && cache.is_durable() && !cache.flushes());
}

/// An engine that completes what it was given when it is told to, and shows what that was.
struct Stepped {
    ops: Vec<(Op, u16)>,
    seen: Arc<Mutex<Vec<OpKind>>>,
    go: EventFd,
}

impl Engine for Stepped {
    fn push(&mut self, op: Op, tag: u16) {
        self.seen.lock().unwrap().push(op.kind);
        self.ops.push((op, tag));
    }
    fn submit(&mut self) {}
    fn reap(&mut self, completions: &mut Vec<Completion>) {
        if !self.ops.is_empty() && self.go.read().is_ok() {
            completions.extend(self.ops.drain(..).map(|(op, tag)| Completion { tag, op, result: Ok(()) }));
        }
    }
    fn has_completed(&mut self) -> bool {
        false
    }
    fn completion_event(&self) -> &EventFd {
        &self.go
    }
    fn drain(&mut self, completions: &mut Vec<Completion>) {
        completions.extend(self.ops.drain(..).map(|(op, tag)| Completion { tag, op, result: Ok(()) }));
    }
}

/// A write that was given to the host before the write cache was switched off is flushed before it is answered.
#[test]
fn what_is_in_flight_when_it_is_switched_off_becomes_stable() {
    let (image, mut guest) = (Image::new(), Guest::new(PLAIN));
    let (seen, go) = (Arc::<Mutex<Vec<OpKind>>>::default(), EventFd::new(EFD_NONBLOCK).unwrap());
    let engine = Stepped { ops: Vec::new(), seen: seen.clone(), go: go.try_clone().unwrap() };
    let cache = Arc::new(WriteCache::new(CacheMode::Writeback));
    let worker = worker_with(&guest, &image, Box::new(engine), cache.clone());
    let worker = Worker::spawn("blk0-q0", move |stop| worker.run(&stop)).unwrap();
    let (head, status) = guest.offer(OUT, 0, &[readable(DATA, 512)]);
    guest.kick.write(1).unwrap();
    while seen.lock().unwrap().is_empty() {
        std::thread::yield_now();
    }
    cache.switch(false, || Ok(())).unwrap();
    go.write(1).unwrap();
    while seen.lock().unwrap().len() < 2 {
        std::thread::yield_now();
    }
    assert_eq!(guest.bytes(status, 1), [UNTOUCHED]);
    go.write(1).unwrap();
    wait(&guest.line.queue);
    assert_eq!(guest.driver.used(), Some((head, 1)));
    assert_eq!(guest.bytes(status, 1), [OK]);
    assert_eq!(*seen.lock().unwrap(), [OpKind::Write { durable: false }, OpKind::Flush]);
    worker.stop();
}
