//! Rate limits at the device. No test measures a time: rates are so low that what must wait waits longer than any test, or
//! so high that it matters only in which order things happen.

use std::num::NonZeroU64;

use block::engine::{Completion, Engine, Op};
use block::throttle::{Direction, Limits, Rates, Throttle};

use super::workers::context;
use super::*;

fn rate(rate: u64) -> Option<NonZeroU64> {
    NonZeroU64::new(rate)
}

/// As many answers as `heads`, and for these.
fn assert_answered(guest: &mut Guest, heads: &[u16]) {
    let (mut answered, mut heads): (Vec<_>, _) = (heads.iter().map(|_| guest.turn().0).collect(), heads.to_vec());
    answered.sort_unstable();
    heads.sort_unstable();
    assert_eq!(answered, heads);
}

#[test]
fn what_is_over_the_limit_waits_and_a_reset_does_not_wait_for_it() {
    // A byte a second, and the bytes of an hour saved up.
    let bytes = Rates { write: rate(1), ..Rates::default() };
    let limits = Some(Limits { requests: Rates::default(), bytes, burst: Duration::from_secs(3600) });
    let (image, mut guest) = (Image::new(), Guest::new(PLAIN));
    let mut blk = image.open_for(&BlkOptions { limits, ..BlkOptions::default() });
    guest.activate(&mut blk);
    let content = pattern(5632, 7);
    guest.fill(DATA, &content);
    // More than is saved up, but it finds a full bucket. 2032 bytes remain to be paid for.
    assert_eq!(guest.request(OUT, 0, &[readable(DATA, 5632)]), (OK, 1));
    // So this one waits; reads and flushes pass it.
    let (_, status) = guest.offer(OUT, 100, &[readable(DATA, 512)]);
    for _ in 0..3 {
        assert_eq!(guest.request(IN, 0, &[writable(DATA + 0x4000, 512)]), (OK, 513));
        assert_eq!(guest.request(FLUSH, 0, &[]), (OK, 1));
    }
    let file = fs::read(&image.path).unwrap();
    assert!(file[..5632] == content && file[5632..].iter().all(|byte| *byte == 0));
    blk.reset();
    assert_eq!(guest.driver.used(), None);
    assert_eq!(guest.bytes(status, 1), [UNTOUCHED]);
    assert_eq!(Arc::strong_count(&guest.memory), 2, "nothing holds the memory");
    // What was done is paid for, whoever comes next; what was not done is not.
    let now = Instant::now();
    let due = blk.limited.as_ref().unwrap().lock().unwrap().reserve(Direction::Write, 512, now) - now;
    assert!((Duration::from_secs(2032)..=Duration::from_secs(2544)).contains(&due), "{due:?}");
}

/// The host may have to write zeroes that the driver does not send, and must not for free. A discard writes nothing.
#[test]
fn zeroes_are_bytes_too() {
    const FEATURES: u64 = PLAIN | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
    let bytes = Rates { write: rate(1), ..Rates::default() };
    let limits = Some(Limits { requests: Rates::default(), bytes, burst: Duration::from_secs(3600) });
    let (image, mut guest) = (Image::new(), Guest::new(FEATURES));
    let mut blk = image.open_for(&BlkOptions { limits, ..BlkOptions::default() });
    guest.activate(&mut blk);
    // 16 sectors from sector 8 on; virtio 1.2, 5.2.6: 11 is a discard, 13 write zeroes.
    guest.fill(DATA, &[&8_u64.to_le_bytes()[..], &16_u32.to_le_bytes(), &[0; 4]].concat());
    for kind in [11, 11, 13] {
        assert_eq!(guest.request(kind, 0, &[readable(DATA, 16)]), (OK, 1), "type {kind}");
    }
    blk.reset();
    let now = Instant::now();
    let due = blk.limited.as_ref().unwrap().lock().unwrap().reserve(Direction::Write, 512, now) - now;
    // 8192 bytes out of 3600, and 512 more.
    assert!((Duration::from_secs(4600)..=Duration::from_secs(5104)).contains(&due), "{due:?}");
}

#[test]
fn what_is_saved_up_does_not_wait() {
    let requests = Rates { total: rate(1), ..Rates::default() };
    let limits = Some(Limits { requests, bytes: Rates::default(), burst: Duration::from_secs(2000) });
    let (image, mut guest) = (Image::new(), Guest::new(PLAIN));
    let mut blk = image.open_for(&BlkOptions { limits, ..BlkOptions::default() });
    guest.activate(&mut blk);
    for _ in 0..40 {
        guest.requests = 0;
        let heads: Vec<_> = (0..50).map(|n| guest.offer(IN, n, &[writable(DATA, 512)]).0).collect();
        assert_answered(&mut guest, &heads);
    }
}

/// Completes everything at once, and notes what in which order.
struct Noting {
    offsets: Arc<Mutex<Vec<u64>>>,
    done: Vec<Completion>,
    completed: EventFd,
}

impl Engine for Noting {
    fn push(&mut self, op: Op, tag: u16) {
        self.offsets.lock().unwrap().push(op.offset);
        self.done.push(Completion { tag, op, result: Ok(()) });
    }
    fn submit(&mut self) {}
    fn reap(&mut self, completions: &mut Vec<Completion>) {
        completions.append(&mut self.done);
    }
    fn has_completed(&mut self) -> bool {
        !self.done.is_empty()
    }
    fn completion_event(&self) -> &EventFd {
        &self.completed
    }
    fn drain(&mut self, completions: &mut Vec<Completion>) {
        self.reap(completions);
    }
}

/// The worker has nothing in flight while it waits, so only the limit can wake it.
#[test]
fn what_waits_goes_in_order_when_its_time_comes() {
    let (image, mut guest) = (Image::new(), Guest::new(PLAIN));
    let offsets: Arc<Mutex<Vec<u64>>> = Arc::default();
    let completed = EventFd::new(EFD_NONBLOCK).unwrap();
    let engine = Noting { offsets: offsets.clone(), done: Vec::new(), completed };
    let disk = image.disk();
    let cache = Arc::new(WriteCache::new(CacheMode::Writeback));
    let rules = Rules { size: disk.size(), readonly: false, cache, features: guest.features, may_unmap: true };
    let mut context = context(&guest, disk, rules);
    let requests = Rates { total: rate(2000), ..Rates::default() };
    let limits = Limits { requests, bytes: Rates::default(), burst: Duration::ZERO };
    context.limited = Some(Arc::new(Mutex::new(Throttle::new(&limits, Instant::now()))));
    let worker = QueueWorker::new(context, guest.queue(), Box::new(engine)).unwrap();
    let worker = Worker::spawn("blk0-q0", move |stop| worker.run(&stop)).unwrap();
    let heads: Vec<_> = (0..60).map(|n| guest.offer(OUT, 60 - n, &[readable(DATA, 512)]).0).collect();
    assert_answered(&mut guest, &heads);
    let expected: Vec<u64> = (1..=60).rev().map(|sector| sector * 512).collect();
    assert_eq!(*offsets.lock().unwrap(), expected);
    worker.stop();
}
