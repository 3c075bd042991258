//! The link: up, lost and back.

use super::*;

/// Sends a frame of 100 bytes and waits until the device took it.
fn send(bench: &mut Bench) {
    bench.fill(DATA, &frame(100));
    bench.queues[1].add(&[readable(DATA, 112)]);
    bench.queues[1].kick(1);
    bench.used(1, 1);
}

#[test]
fn a_lost_port_takes_the_link_down_until_it_is_back() {
    let mut bench = Bench::active(PLAIN, 256);
    send(&mut bench);
    assert_eq!(status(&bench), 1);
    bench.ends.down.store(true, Ordering::SeqCst);
    send(&mut bench);
    wait(&bench.lines.config);
    assert_eq!(status(&bench), 0);
    send(&mut bench);
    let counted = bench.counted().tx;
    assert_eq!((counted.frames, counted.drops[DropReason::Link as usize]), (1, 2));
    bench.ends.down.store(false, Ordering::SeqCst);
    wait(&bench.lines.config);
    assert_eq!(status(&bench), 1);
    send(&mut bench);
    assert_eq!(bench.counted().tx.frames, 2);
    // Once each, not once a frame.
    assert!(bench.lines.config.read().is_err());
}

#[test]
fn of_several_ports_that_are_lost_at_once_one_says_so() {
    let mut bench = Bench::with(4, PLAIN | MQ, 256);
    bench.activate();
    let shown = |bench: &Bench| bench.net.log.lock().unwrap().shown();
    bench.ends.down.store(true, Ordering::SeqCst);
    bench.fill(DATA, &frame(100));
    for pair in 0..4 {
        // It is dropped when the pair knows that its port is lost.
        let queue = 2 * pair + 1;
        bench.queues[queue].add(&[readable(DATA, 112)]);
        bench.queues[queue].kick(1);
        bench.used(queue, 1);
    }
    wait(&bench.lines.config);
    assert_eq!((shown(&bench), status(&bench)), (1, 0));
    bench.ends.down.store(false, Ordering::SeqCst);
    wait(&bench.lines.config);
    assert_eq!((shown(&bench), status(&bench)), (2, 1));
}

#[test]
fn a_port_that_is_down_at_the_start_is_a_link_that_is_down() {
    let mut bench = Bench::new(PLAIN, 256);
    bench.ends.down.store(true, Ordering::SeqCst);
    bench.activate();
    wait(&bench.lines.config);
    assert_eq!(status(&bench), 0);
    bench.ends.down.store(false, Ordering::SeqCst);
    wait(&bench.lines.config);
    send(&mut bench);
    // And a reset forgets it, as nobody looks.
    bench.net.reset();
    assert_eq!(status(&bench), 1);
}

#[test]
fn room_wakes_nobody_while_the_port_is_lost() {
    let mut bench = Bench::new(PLAIN, 256);
    bench.ends.down.store(true, Ordering::SeqCst);
    for _ in 0..10 {
        bench.queues[0].add(&[writable(DATA, 1526)]);
    }
    bench.activate();
    wait(&bench.lines.config);
    bench.rests();
    bench.ends.down.store(false, Ordering::SeqCst);
    wait(&bench.lines.config);
    bench.hosts[0].send(&frame(100)).unwrap();
    assert_eq!(bench.used(0, 1)[0].1, 112);
}
