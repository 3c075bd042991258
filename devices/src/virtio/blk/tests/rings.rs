//! Broken and busy rings, interrupts, resets.

use std::sync::atomic::{self, Ordering};

use super::*;

#[test]
fn what_cannot_be_answered_needs_a_reset_which_repairs_it() {
    let (_image, mut blk, mut guest) = running(PLAIN);
    let status = writable(STATUS + 1, 1);
    let chains = [
        vec![readable(HEADERS, 16)],
        vec![readable(HEADERS, 16), readable(DATA, 512)],
        vec![readable(HEADERS, 16), writable(DATA, 0)],
        vec![readable(HEADERS, 16), writable(1 << 40, 1)],
        vec![readable(HEADERS, 16), writable(MEMORY as u64 - 4, 5)],
        vec![readable(HEADERS, 16), writable(u64::MAX, 2)],
        vec![status, readable(HEADERS, 16)],
        vec![readable(HEADERS, 16), status, readable(DATA, 512)],
    ];
    for chain in chains {
        guest.header(GET_ID, 0);
        guest.driver.add(&chain);
        guest.kick.write(1).unwrap();
        wait(&guest.line.reset);
        // It no longer listens.
        guest.offer(FLUSH, 0, &[]);
        guest.kick.write(1).unwrap();
        blk.reset();
        assert_eq!(guest.driver.used(), None, "{chain:x?}");
        guest.restart();
        guest.activate(&mut blk);
        assert_eq!(guest.request(IN, 0, &[writable(DATA, 512)]), (OK, 513));
        blk.reset();
        guest.restart();
        guest.activate(&mut blk);
    }
}

#[test]
fn a_broken_ring_or_a_repeated_head_needs_a_reset() {
    let (_image, mut blk, mut guest) = running(PLAIN);
    guest.driver.set_avail_idx(QUEUE_SIZE + 1);
    guest.kick.write(1).unwrap();
    wait(&guest.line.reset);
    blk.reset();
    guest.restart();
    // Both are there before the device looks: the first is still in flight when it takes the second.
    let (head, _) = guest.offer(FLUSH, 0, &[]);
    guest.driver.publish(head);
    guest.activate(&mut blk);
    wait(&guest.line.reset);
    blk.reset();
    guest.restart();
    guest.activate(&mut blk);
    assert_eq!(guest.request(FLUSH, 0, &[]), (OK, 1));
}

#[test]
fn a_full_ring_is_answered_with_few_interrupts() {
    let (_image, mut blk, mut guest) = running(PLAIN);
    blk.reset();
    for _ in 0..QUEUE_SIZE / 4 {
        guest.offer(0xffff, 0, &[writable(DATA, 512), writable(DATA, 512)]);
    }
    assert_eq!(guest.driver.free(), 0);
    guest.activate(&mut blk);
    wait(&guest.line.queue);
    blk.reset();
    let used = std::iter::from_fn(|| guest.driver.used()).count();
    assert_eq!(used, usize::from(QUEUE_SIZE / 4));
    assert!(guest.line.queue.read().is_err(), "one batch, one interrupt");
}

#[test]
fn no_interrupt_is_raised_that_the_driver_does_not_want() {
    let (_image, mut blk, mut guest) = running(PLAIN);
    guest.driver.want_interrupts(false);
    guest.offer(FLUSH, 0, &[]);
    guest.kick.write(1).unwrap();
    while guest.driver.used().is_none() {
        std::thread::yield_now();
    }
    blk.reset();
    assert!(guest.line.queue.read().is_err());
}

#[test]
fn with_event_idx_the_driver_chooses_the_interrupt() {
    let (_image, mut blk, mut guest) = running(EVENT_IDX);
    // 2.7.7.2: an interrupt when the entry with index 2, the third, is used.
    guest.driver.set_used_event(2);
    for expected in [false, false, true, false, false] {
        guest.offer(FLUSH, 0, &[]);
        guest.kick.write(1).unwrap();
        while guest.driver.used().is_none() {
            std::thread::yield_now();
        }
        if expected {
            wait(&guest.line.queue);
        }
    }
    blk.reset();
    assert!(guest.line.queue.read().is_err(), "no other interrupt");
}

/// A driver that notifies only when it is asked to, and sleeps whenever it waits: nothing may be left lying.
#[test]
fn no_request_and_no_interrupt_is_lost() {
    for features in [PLAIN, EVENT_IDX] {
        let event_idx = features == EVENT_IDX;
        let (_image, _blk, mut guest) = running(features);
        let (mut offered, mut used) = (0_u16, 0_u16);
        while used < 5000 {
            // Between one and five in flight, so that the device falls asleep again and again.
            while offered < 5000 && offered - used <= offered % 5 {
                guest.requests = 0;
                let kind = if offered.is_multiple_of(3) { GET_ID } else { IN };
                guest.offer(kind, 0, &[writable(DATA, 512)]);
                offered += 1;
                if guest.driver.must_notify(event_idx, 1) {
                    guest.kick.write(1).unwrap();
                }
            }
            let before = used;
            while guest.driver.used().is_some() {
                used += 1;
            }
            if used == before {
                guest.driver.set_used_event(used);
                atomic::fence(Ordering::SeqCst);
                match guest.driver.used() {
                    Some(_) => used += 1,
                    None => wait(&guest.line.queue),
                }
            }
        }
        assert_eq!(offered, used);
    }
}

#[test]
fn reset_leaves_nothing_in_flight() {
    let (_image, mut blk, mut guest) = running(PLAIN);
    for _ in 0..30 {
        for n in 0..64 {
            let data = DATA + n * 4096;
            match n % 3 {
                0 => guest.offer(OUT, n * 8, &[readable(data, 4096)]),
                1 => guest.offer(FLUSH, 0, &[]),
                _ => guest.offer(IN, n * 8, &[writable(data, 4096)]),
            };
        }
        guest.kick.write(1).unwrap();
        std::thread::yield_now();
        blk.reset();
        // The memory is the driver's again; what it writes there stays.
        let everything = pattern(MEMORY, 3);
        guest.fill(0, &everything);
        blk.reset();
        assert!(guest.bytes(0, MEMORY) == everything);
        guest.restart();
        guest.activate(&mut blk);
        assert_eq!(guest.request(IN, 0, &[writable(DATA, 512)]), (OK, 513));
    }
    drop(blk);
    assert_eq!(Arc::strong_count(&guest.memory), 2, "only the guest and its driver still hold the memory");
}
