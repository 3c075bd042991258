//! Drivers that do what they must not.

use super::*;

/// Offers `chain` on `queue`: it comes back unused by the host, or the device needs a reset.
fn offer(chain: &[Segment], queue: usize) -> (Bench, bool) {
    let mut bench = Bench::active(PLAIN | MRG_RXBUF, 256);
    bench.queues[queue].driver.add_indirect(DATA + 0x40_0000, chain);
    bench.queues[queue].kick(1);
    let epoll = Epoll::new().unwrap();
    for (event, data) in [(&bench.lines.queues[queue], 0), (&bench.lines.reset, 1)] {
        epoll.ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(EventSet::IN, data)).unwrap();
    }
    let mut events = [EpollEvent::default()];
    assert_eq!(epoll.wait(60_000, &mut events).unwrap(), 1, "nothing happened");
    (bench, events[0].data() == 1)
}

#[test]
fn chains_that_cannot_be_trusted_need_a_reset() {
    let outside = MEMORY as u64 - 4;
    for (queue, chain) in [
        (0, &[readable(DATA, 1526)][..]),
        (0, &[writable(DATA, 12), readable(DATA, 1514)]),
        (0, &[writable(DATA, 11)]),
        (0, &[writable(DATA, 0)]),
        (0, &[writable(DATA, 12), writable(outside, 5)]),
        (0, &[writable(u64::MAX, 1526)]),
        (1, &[writable(DATA, 100)]),
        (1, &[readable(DATA, 100), writable(DATA, 1)]),
        (1, &[readable(outside, 100)]),
        (1, &[readable(DATA, u32::MAX)]),
    ] {
        let (mut bench, broken) = offer(chain, queue);
        assert!(broken, "{queue} {chain:?}");
        // A reset repairs it.
        bench.net.reset();
        bench.queues[queue].driver = Driver::new(bench.memory.clone(), RINGS + queue as u64 * 0x8000, 256);
        bench.activate();
        bench.fill(DATA, &frame(60));
        bench.queues[1].add(&[readable(DATA, 72)]);
        bench.queues[1].kick(1);
        bench.used(1, 1);
    }
}

#[test]
fn frames_that_are_none_are_dropped_and_counted() {
    let many: Vec<_> = (0..1024).map(|_| readable(DATA, 1)).collect();
    for (chain, dropped) in [
        (&[readable(DATA, 0)][..], true),
        (&[readable(DATA, 12)], true),
        (&[readable(DATA, 12), readable(DATA, 13)], true),
        (&[readable(DATA, 12), readable(DATA, 0), readable(DATA, 14)], false),
        (&[readable(DATA, 12), readable(DATA, 65_553)], false),
        (&[readable(DATA, 12), readable(DATA, 65_554)], true),
        (&[readable(DATA, 0x20_0000); 2], true),
        (&many, false),
    ] {
        let (mut bench, broken) = offer(chain, 1);
        assert!(!broken, "{chain:?}");
        assert_eq!(bench.used(1, 1)[0].1, 0);
        let (counted, link) = (bench.counted().tx, status(&bench));
        let length = counted.drops[DropReason::Length as usize];
        assert_eq!((counted.frames, length, link), (u64::from(!dropped), u64::from(dropped), 1), "{chain:?}");
    }
}

#[test]
fn a_broken_ring_stops_all_pairs() {
    let mut bench = Bench::with(2, PLAIN | MQ, 256);
    bench.activate();
    bench.queues[1].driver.set_avail_idx(300);
    bench.queues[1].kick.write(1).unwrap();
    wait(&bench.lines.reset);
    while !bench.net.workers.iter().all(Worker::is_finished) {
        std::thread::yield_now();
    }
}

#[test]
fn a_driver_may_enable_any_queues() {
    for enabled in [&[][..], &[0], &[1], &[2], &[3, 4], &[1, 2]] {
        let mut bench = Bench::with(2, PLAIN | MQ, 256);
        bench.activate_only(|index| enabled.contains(&index));
        for &index in enabled.iter().filter(|index| **index % 2 == 1) {
            let index = usize::from(index);
            bench.fill(DATA, &frame(60));
            bench.queues[index].add(&[readable(DATA, 72)]);
            bench.queues[index].kick(1);
            bench.used(index, 1);
            assert_eq!(bench.hosts[index / 2].recv(&mut [0; 100]).unwrap(), 72);
        }
        bench.net.reset();
    }
}

#[test]
fn a_host_that_takes_nothing_does_not_keep_the_device() {
    let mut bench = Bench::active(PLAIN, 256);
    // The sockets hold a few frames.
    bench.fill(DATA, &frame(30_000));
    for _ in 0..100 {
        bench.queues[1].add(&[readable(DATA, 30_012)]);
    }
    bench.queues[1].kick(100);
    bench.used(1, 1);
    bench.net.reset();
    // What was taken is whole, and the frame that waited was not.
    bench.hosts[0].set_nonblocking(true).unwrap();
    let (mut count, mut received) = (0, vec![0; 40_000]);
    while let Ok(len) = bench.hosts[0].recv(&mut received) {
        assert_eq!(len, 30_012);
        count += 1;
    }
    assert!((1..100).contains(&count) && bench.counted().tx.frames == count);
    assert_eq!(bench.counted().tx.drops, [0; DROPS]);
}

#[test]
fn a_frame_waits_until_the_host_takes_it() {
    let mut bench = Bench::active(PLAIN, 256);
    for round in 0..100 {
        bench.fill(DATA + round * 0x8000, &frame(30_000 + round as usize));
        bench.queues[1].add(&[readable(DATA + round * 0x8000, 30_012 + round as u32)]);
    }
    bench.queues[1].kick(100);
    for round in 0..100 {
        let mut received = vec![0; 40_000];
        let count = bench.hosts[0].recv(&mut received).unwrap();
        assert!(received[..count] == frame(30_000 + round));
    }
    bench.used(1, 100);
    assert_eq!((bench.counted().tx.frames, bench.counted().tx.drops), (100, [0; DROPS]));
}

#[test]
fn resets_under_load_lose_no_port() {
    let mut bench = Bench::with(2, PLAIN | MRG_RXBUF | MQ | EVENT_IDX, 256);
    let done = Arc::new(AtomicBool::new(false));
    let hosts: Vec<_> = bench.hosts.drain(..).collect();
    let threads = hosts.into_iter().map(|host| {
        let done = done.clone();
        host.set_nonblocking(true).unwrap();
        std::thread::spawn(move || {
            let (frame, mut received) = (frame(1000), vec![0; 2000]);
            while !done.load(Ordering::SeqCst) {
                let sent = host.send(&frame);
                while let Ok(len) = host.recv(&mut received) {
                    assert!(received[..len] == frame, "a frame is whole or not there");
                }
                if sent.is_err() {
                    std::thread::yield_now();
                }
            }
        })
    });
    let threads: Vec<_> = threads.collect();
    bench.fill(DATA, &frame(1000));
    for round in 0..100 {
        for (index, queue) in (0..).zip(&mut bench.queues) {
            (queue.driver, queue.used) = (Driver::new(bench.memory.clone(), RINGS + index * 0x8000, 256), 0);
        }
        bench.activate();
        for at in 0..32 {
            for pair in 0..2 {
                bench.queues[2 * pair].add(&[writable(DATA + 0x10_0000 + at * 0x1000, 0x1000)]);
                bench.queues[2 * pair + 1].add(&[readable(DATA, 1012)]);
            }
        }
        bench.queues.iter().for_each(|queue| queue.kick(32));
        // Frames pass in each of its lives; then it ends in the midst of them.
        bench.used(1 + 2 * (round % 2), 1 + round % 7);
        bench.used(0, 1 + round % 5);
        bench.net.reset();
    }
    done.store(true, Ordering::SeqCst);
    for thread in threads {
        thread.join().unwrap();
    }
    assert!(bench.lines.reset.read().is_err(), "no queue broke");
}
