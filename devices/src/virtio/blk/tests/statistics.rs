//! What is counted, against what the driver did.

use std::time::Duration;

use block::engine::{Completion, Engine, Op};

use super::*;
use crate::statistics::Durations;
use crate::virtio::blk::statistics::{Kind, Recorder, Snapshot, Statistics};

fn counted(latencies: bool) -> (Image, Blk, Arc<Statistics>) {
    let (image, statistics) = (Image::new(), Arc::new(Statistics::new(latencies)));
    let blk = image.open_for(&BlkOptions { statistics: statistics.clone(), ..BlkOptions::default() });
    (image, blk, statistics)
}

/// The only queue's numbers.
fn only(statistics: &Statistics) -> Snapshot {
    let mut queues = statistics.snapshot();
    assert_eq!(queues.len(), 1);
    queues.remove(0)
}

fn of(kind: Kind, numbers: &[u64]) -> u64 {
    numbers[Kind::ALL.iter().position(|one| *one == kind).unwrap()]
}

#[test]
fn requests_bytes_and_errors_by_kind_over_a_reset() {
    let (_image, mut blk, statistics) = counted(false);
    assert!(statistics.snapshot().is_empty(), "no queue ran yet");
    for round in 1..=2 {
        let mut guest = Guest::new(PLAIN);
        guest.activate(&mut blk);
        for n in 0..3 {
            assert_eq!(guest.request(OUT, n, &[readable(DATA, 512), readable(DATA, 1024)]).0, OK);
        }
        assert_eq!(guest.request(IN, 0, &[writable(DATA, 4096)]).0, OK);
        assert_eq!(guest.request(IN, 0, &[writable(MEMORY as u64 - 256, 512)]).0, IOERR);
        assert_eq!(guest.request(IN, SECTORS, &[writable(DATA, 512)]).0, IOERR);
        assert_eq!(guest.request(0xffff, 0, &[writable(DATA, 512)]).0, UNSUPP);
        assert_eq!(guest.request(FLUSH, 0, &[]).0, OK);
        assert_eq!(guest.request(GET_ID, 0, &[writable(DATA, 20)]).0, OK);
        blk.reset();
        let all = only(&statistics);
        for (kind, requests, bytes, errors) in [
            (Kind::Write, 3, 3 * 1536, 0),
            (Kind::Read, 2, 4096, 1),
            (Kind::Flush, 1, 0, 0),
            (Kind::Identify, 1, 0, 0),
            (Kind::Refused, 2, 0, 2),
        ] {
            let found = (of(kind, &all.requests), of(kind, &all.bytes), of(kind, &all.errors));
            assert_eq!(found, (round * requests, round * bytes, round * errors), "{kind:?}");
        }
        assert_eq!(all.interrupts, round * 9, "one request at a time, one interrupt each");
        assert!((1..=round * 9).contains(&all.kicks), "{} wake-ups by 9 notifications a round", all.kicks);
        assert_eq!(all.batches.iter().sum::<u64>(), round * 6, "six a round go to the engine, each alone");
        assert_eq!(all.batches[0], round * 6);
        assert!(all.latencies.is_none());
    }
}

#[test]
fn what_waits_together_is_one_batch() {
    let (_image, mut blk, statistics) = counted(true);
    let mut guest = Guest::new(PLAIN);
    for n in 0..20 {
        guest.offer(IN, n, &[writable(DATA + 512 * n, 512)]);
    }
    guest.activate(&mut blk);
    for _ in 0..20 {
        guest.turn();
    }
    blk.reset();
    let all = only(&statistics);
    // 20 is in the class of 16 to 31.
    assert_eq!((all.batches[4], all.batches.iter().sum::<u64>()), (1, 1));
    assert_eq!(all.merged, 19, "they are neighbours");
    let [queue, engine, total] = all.latencies.unwrap();
    assert_eq!([queue.count(), engine.count(), total.count()], [20; 3]);
    assert!(total.max() >= engine.max() && total.max() >= queue.max() && engine.max() > 0);
}

/// Calls the kernel with every second op.
struct Pairs(u64);

impl Engine for Pairs {
    fn push(&mut self, _op: Op, _tag: u16) {
        unreachable!("nothing is given to it");
    }
    fn submit(&mut self) {}
    fn reap(&mut self, _completions: &mut Vec<Completion>) {}
    fn has_completed(&mut self) -> bool {
        false
    }
    fn completion_event(&self) -> &EventFd {
        unreachable!("nobody waits for it")
    }
    fn drain(&mut self, _completions: &mut Vec<Completion>) {}
    fn submissions(&self) -> u64 {
        self.0 / 2
    }
}

/// What an engine hands over before it is told to is in the host from then on. Of the time that passes before the last is
/// handed over, none is the queue's for those, and all of it is for the last.
#[test]
fn what_is_handed_over_early_waits_in_the_host() {
    const PASSES: Duration = Duration::from_millis(20);
    let statistics = Statistics::new(true);
    let (mut record, mut engine) = (Recorder::new(statistics.queue(0), 8), Pairs(0));
    for _round in 0..2 {
        for head in 0..5 {
            record.taken(head, Kind::Read, 512);
            engine.0 += 1;
            record.handed(head, &engine);
        }
        std::thread::sleep(PASSES);
        engine.0 += 1;
        record.submitting(&engine);
        for head in 0..5 {
            record.completed(head, true);
        }
        record.reaped();
    }
    drop(record);
    let [queue, host, _total] = only(&statistics).latencies.unwrap();
    let least = PASSES.as_nanos() as u64;
    // To two digits: a little less may be told.
    let long = |stage: &Durations, part| stage.quantile(part) >= least * 9 / 10;
    assert!(long(&queue, 1.0), "the fifth of each round waited in the queue");
    assert!(long(&host, 0.25), "four of five waited in the host");
}

/// Snapshots are taken all the time while the queue works: none blocks it, and nothing is lost.
#[test]
fn a_reader_disturbs_nothing() {
    let (_image, mut blk, statistics) = counted(true);
    let mut guest = Guest::new(PLAIN);
    guest.activate(&mut blk);
    let reader = {
        let statistics = Arc::downgrade(&statistics);
        std::thread::spawn(move || {
            let mut last = 0;
            while let Some(statistics) = statistics.upgrade() {
                let mut sum = Snapshot::default();
                statistics.snapshot().iter().for_each(|queue| sum += queue);
                let now = sum.requests.iter().sum::<u64>();
                assert!(now >= last);
                last = now;
            }
        })
    };
    for n in 0..2000 {
        guest.requests = 0;
        assert_eq!(guest.request(IN, n % SECTORS, &[writable(DATA, 512)]).0, OK);
    }
    drop(blk);
    let all = only(&statistics);
    drop(statistics);
    reader.join().unwrap();
    assert_eq!(of(Kind::Read, &all.requests), 2000);
    assert!(all.latencies.unwrap().iter().all(|stage| stage.count() == 2000));
}
