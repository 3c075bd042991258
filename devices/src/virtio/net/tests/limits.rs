//! Rate limits. No time is measured: with rates this low, what is over the limit would come in minutes.

use std::num::NonZeroU64;
use std::thread;
use std::time::Duration;

use super::*;

fn limited(limits: Limits) -> Bench {
    let mut bench = Bench::new(PLAIN, 256);
    bench.net.limited = limits.throttle(Instant::now());
    bench.activate();
    bench
}

/// Offers ten frames of 1000 bytes each way. How many passed, when so many did at least.
fn passed(limits: Limits, least: (usize, usize)) -> (u64, u64) {
    let mut bench = limited(limits);
    bench.fill(DATA, &frame(1000));
    for _ in 0..10 {
        bench.queues[1].add(&[readable(DATA, 1012)]);
        bench.queues[0].add(&[writable(DATA + 0x1000, 1526)]);
        bench.hosts[0].send(&frame(1000)).unwrap();
    }
    bench.queues[0].kick.write(1).unwrap();
    bench.queues[1].kick.write(1).unwrap();
    bench.used(0, least.0);
    bench.used(1, least.1);
    // A reset finds the worker awake, whatever waits.
    bench.net.reset();
    let counted = bench.counted();
    assert_eq!((counted.rx.drops, counted.tx.drops), ([0; DROPS], [0; DROPS]));
    (counted.rx.frames, counted.tx.frames)
}

#[test]
fn what_is_over_the_limit_waits() {
    let rate = NonZeroU64::new;
    // In 100 ms they yield less than a frame: one passes and leaves a debt, the next one passes early, all others wait.
    assert_eq!(passed(Limits { rx_bytes: rate(1024), ..Limits::default() }, (2, 10)), (2, 10));
    assert_eq!(passed(Limits { tx_bytes: rate(1024), ..Limits::default() }, (10, 2)), (10, 2));
    let both = Limits { rx_bytes: rate(1024), tx_bytes: rate(1024), frames: None };
    assert_eq!(passed(both, (2, 2)), (2, 2));
    // Both ways together: whoever asks next passes early in its own direction.
    let (received, sent) = passed(Limits { frames: rate(1), ..Limits::default() }, (1, 1));
    assert!(received >= 1 && sent >= 1 && received + sent <= 3, "{received} {sent}");
}

#[test]
fn what_waited_passes_in_time() {
    // A hundred a second, of which ten at once.
    let mut bench = limited(Limits { frames: NonZeroU64::new(100), ..Limits::default() });
    bench.fill(DATA, &frame(100));
    for _ in 0..30 {
        bench.queues[1].add(&[readable(DATA, 112)]);
    }
    bench.queues[1].kick(30);
    bench.used(1, 30);
    assert_eq!(bench.counted().tx.frames, 30);
}

#[test]
fn a_lost_port_is_not_waited_for_by_a_limit() {
    let mut bench = limited(Limits { rx_bytes: NonZeroU64::new(4096), ..Limits::default() });
    bench.fill(DATA, &frame(1000));
    for _ in 0..10 {
        bench.queues[0].add(&[writable(DATA + 0x1000, 1526)]);
        bench.hosts[0].send(&frame(1000)).unwrap();
    }
    bench.queues[0].kick.write(1).unwrap();
    // The third has to wait, and by then the port is lost.
    bench.used(0, 2);
    bench.ends.down.store(true, Ordering::SeqCst);
    bench.queues[1].add(&[readable(DATA, 1012)]);
    bench.queues[1].kick.write(1).unwrap();
    bench.used(1, 1);
    let looks = || bench.ends.looks.load(Ordering::SeqCst);
    let until = looks() + 8;
    while looks() < until {
        thread::sleep(Duration::from_millis(10));
    }
    // proc_pid_schedstat(5): first the nanoseconds on a CPU. A thread that never sleeps would have taken most of two seconds.
    let thread = Path::new("/proc").join(&*bench.ends.thread.lock().unwrap()).join("schedstat");
    let spent: u64 = fs::read_to_string(thread).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(spent < 200_000_000, "{spent} ns of a CPU, with nothing to do");
}

#[test]
fn room_wakes_nobody_while_a_limit_holds() {
    let mut bench = Bench::new(PLAIN | MRG_RXBUF | SEGMENTED, 256);
    bench.net.limited = Limits { rx_bytes: NonZeroU64::new(1024), ..Limits::default() }.throttle(Instant::now());
    // Each has room for any frame, so no more than one is taken in advance, and the others stay in the ring.
    for at in 0..4 {
        bench.queues[0].add(&[writable(DATA + 0x2_0000 * at, 0x1_1000)]);
        bench.hosts[0].send(&frame(50_000)).unwrap();
    }
    bench.activate();
    // The third would have to wait for a minute and a half.
    bench.used(0, 2);
    bench.rests();
}
