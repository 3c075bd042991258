//! Commands of the driver.

use super::*;

// virtio 1.2, 5.1.3 and 5.1.6.5.
const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
const CTRL_VQ: u64 = 1 << 17;
const CTRL_RX: u64 = 1 << 18;
const CTRL_RX_EXTRA: u64 = 1 << 20;
const CTRL_MAC_ADDR: u64 = 1 << 23;
const ALL: u64 = PLAIN | CTRL_VQ | CTRL_RX | CTRL_RX_EXTRA | CTRL_MAC_ADDR | CTRL_GUEST_OFFLOADS | SEGMENTED;

const OK: u8 = 0;
const ERR: u8 = 1;

/// Where commands and answers are.
const COMMAND: u64 = DATA + 0x80_0000;
const ANSWER: u64 = DATA + 0x90_0000;

/// Sends `class`, `command` and `data` by the last queue, and waits for the answer.
fn command(bench: &mut Bench, class: u8, command: u8, data: &[u8]) -> u8 {
    let queue = bench.control;
    bench.fill(COMMAND, &[&[class, command], data].concat());
    bench.fill(ANSWER, &[UNTOUCHED; 2]);
    let mut chain = vec![readable(COMMAND, 2), readable(COMMAND + 2, data.len() as u32), writable(ANSWER, 1)];
    chain.retain(|segment| segment.len > 0);
    let head = bench.queues[queue].add(&chain);
    bench.queues[queue].kick(1);
    assert_eq!(bench.used(queue, 1), [(head, 1)]);
    assert_eq!(bench.bytes(ANSWER + 1, 1), [UNTOUCHED]);
    bench.bytes(ANSWER, 1)[0]
}

fn mac(bench: &Bench) -> [u8; 6] {
    let mut mac = [0; 6];
    bench.net.read_config(0, &mut mac);
    mac
}

/// Whether a frame to `address` reaches the driver. A broadcast after it does.
fn reaches(bench: &mut Bench, address: [u8; 6]) -> bool {
    for _ in 0..2 {
        bench.queues[0].add(&[writable(DATA, 1526)]);
    }
    bench.queues[0].kick(2);
    let mut sent = frame(60);
    for (address, len) in [(address, 60), ([0xff; 6], 61)] {
        sent.resize(HEADER + len, 0);
        sent[HEADER..HEADER + 6].copy_from_slice(&address);
        bench.hosts[0].send(&sent).unwrap();
    }
    let reached = bench.used(0, 1)[0].1 == HEADER as u32 + 60;
    if reached {
        bench.used(0, 1);
    }
    reached
}

#[test]
fn receive_modes_and_addresses() {
    let (other, group) = ([2, 0, 0, 0, 0, 9], [0x33, 0x33, 0, 0, 0, 1]);
    let mut bench = Bench::active(ALL, 256);
    let reached = |bench: &mut Bench| [MAC, other, group].map(|address| reaches(bench, address));
    assert_eq!(reached(&mut bench), [true; 3], "promiscuous at first");
    assert_eq!(command(&mut bench, 0, 0, &[0]), OK);
    assert_eq!(reached(&mut bench), [true, false, false]);
    assert_eq!(bench.counted().rx.drops[DropReason::Filtered as usize], 2);
    assert_eq!(command(&mut bench, 0, 1, &[1]), OK);
    assert_eq!(reached(&mut bench), [true, false, true], "all multicast");
    assert_eq!(command(&mut bench, 0, 1, &[0]), OK);
    let table = [&[1, 0, 0, 0][..], &other, &[1, 0, 0, 0], &group].concat();
    assert_eq!(command(&mut bench, 1, 0, &table), OK);
    assert_eq!(reached(&mut bench), [true; 3], "by the table");
    // Without the last byte, and with a count that is not there.
    assert_eq!(command(&mut bench, 1, 0, &table[..table.len() - 1]), ERR);
    assert_eq!(command(&mut bench, 1, 0, &[0xff, 0xff, 0xff, 0xff, 1, 2, 3]), ERR);
    assert_eq!(reached(&mut bench), [true; 3], "as before");
    assert_eq!(command(&mut bench, 1, 0, &[0; 8]), OK);
    assert_eq!(command(&mut bench, 1, 1, &other), OK);
    assert_eq!((mac(&bench), reached(&mut bench)), (other, [false, true, false]));
    assert_eq!(command(&mut bench, 1, 1, &group), ERR, "no interface is a group");
    bench.net.reset();
    assert_eq!(mac(&bench), MAC);
}

#[test]
fn more_addresses_than_are_kept_let_all_through() {
    let mut bench = Bench::active(ALL, 256);
    assert_eq!(command(&mut bench, 0, 0, &[0]), OK);
    let mut table = vec![65, 0, 0, 0];
    table.resize(4 + 65 * 6, 2);
    table.extend([0; 4]);
    assert_eq!(command(&mut bench, 1, 0, &table), OK);
    assert!(reaches(&mut bench, [6, 0, 0, 0, 0, 1]));
    assert!(!reaches(&mut bench, [7, 0, 0, 0, 0, 1]));
}

#[test]
fn offloads_can_be_given_up_and_taken_again() {
    let mut bench = Bench::active(ALL, 256);
    assert!(reaches(&mut bench, MAC), "it runs");
    // CSUM and TSO4, as in `Offloads`.
    assert_eq!(bench.ends.offloads.load(Ordering::SeqCst), 3);
    assert_eq!(command(&mut bench, 5, 0, &0_u64.to_le_bytes()), OK);
    assert_eq!(bench.ends.offloads.load(Ordering::SeqCst), 0);
    // NEEDS_CSUM: it waited since before.
    bench.hosts[0].send(&frame_with(1, 0, 60)).unwrap();
    assert!(reaches(&mut bench, MAC));
    assert_eq!(bench.counted().rx.drops[DropReason::Offload as usize], 1);
    assert_eq!(command(&mut bench, 5, 0, &SEGMENTED.to_le_bytes()), OK);
    assert_eq!(bench.ends.offloads.load(Ordering::SeqCst), 3);
    assert_eq!(command(&mut bench, 5, 0, &(1_u64 << 8).to_le_bytes()), ERR, "TSO6 was not agreed on");
}

#[test]
fn what_is_not_a_command_is_an_error() {
    let mut bench = Bench::active(ALL & !CTRL_RX_EXTRA, 256);
    for (class, number, data) in [
        (0, 6, &[1][..]),
        (0, 0, &[]),
        (0, 2, &[1]),
        (1, 2, &MAC),
        (1, 1, &MAC[..5]),
        (2, 0, &[1, 0]),
        (3, 0, &[]),
        (4, 0, &[1, 0]),
        (5, 1, &[0; 8]),
        (255, 255, &[255; 64]),
    ] {
        assert_eq!(command(&mut bench, class, number, data), ERR, "{class} {number} {data:?}");
    }
    let queue = bench.control;
    let head = bench.queues[queue].add(&[writable(ANSWER, 1)]);
    bench.queues[queue].kick(1);
    assert_eq!(bench.used(queue, 1), [(head, 1)]);
    assert_eq!(bench.bytes(ANSWER, 1), [ERR]);
    // Without a place for the answer there is nothing to say.
    bench.queues[queue].add(&[readable(COMMAND, 2)]);
    bench.queues[queue].kick(1);
    wait(&bench.lines.reset);
}

#[test]
fn pairs_receive_as_the_driver_says() {
    let mut bench = Bench::with(4, ALL | MQ, 256);
    bench.activate();
    let mut pairs = [0; 2];
    bench.net.read_config(8, &mut pairs);
    assert_eq!(u16::from_le_bytes(pairs), 4);
    for pair in 0..4 {
        bench.queues[2 * pair].add(&[writable(DATA + 0x1_0000 * pair as u64, 1526)]);
        bench.queues[2 * pair].kick(1);
    }
    assert_eq!(command(&mut bench, 4, 0, &[1, 0]), OK);
    assert_eq!(bench.ends.enabled.load(Ordering::SeqCst), 0b0001);
    for wrong in [0, 5, 0x8001_u16] {
        assert_eq!(command(&mut bench, 4, 0, &wrong.to_le_bytes()), ERR);
    }
    for pair in 0..4 {
        bench.hosts[pair].send(&frame(60 + pair)).unwrap();
    }
    assert_eq!(bench.used(0, 1)[0].1, 72);
    assert_eq!(command(&mut bench, 4, 0, &[3, 0]), OK);
    assert_eq!(bench.ends.enabled.load(Ordering::SeqCst), 0b0111);
    assert_eq!((bench.used(2, 1)[0].1, bench.used(4, 1)[0].1), (73, 74));
    assert_eq!(command(&mut bench, 4, 0, &[4, 0]), OK);
    assert_eq!(bench.used(6, 1)[0].1, 75);
    // All send, whether they receive or not.
    assert_eq!(command(&mut bench, 4, 0, &[1, 0]), OK);
    for pair in 0..4 {
        bench.fill(DATA, &frame(70));
        bench.queues[2 * pair + 1].add(&[readable(DATA, 82)]);
        bench.queues[2 * pair + 1].kick(1);
        bench.used(2 * pair + 1, 1);
        assert_eq!(bench.hosts[pair].recv(&mut [0; 100]).unwrap(), 82);
    }
}

#[test]
fn room_wakes_nobody_for_a_pair_that_does_not_receive() {
    let mut bench = Bench::with(2, PLAIN | MQ, 256);
    for _ in 0..10 {
        bench.queues[2].add(&[writable(DATA, 1526)]);
    }
    bench.activate();
    bench.rests();
}

#[test]
fn a_command_that_was_there_before_the_device_ran_is_answered() {
    // The worker that obeys it may be quicker than the start of the others.
    for _ in 0..50 {
        let mut bench = Bench::with(8, ALL | MQ, 256);
        let queue = bench.control;
        bench.fill(COMMAND, &[4, 0, 8, 0]);
        bench.queues[queue].add(&[readable(COMMAND, 4), writable(ANSWER, 1)]);
        bench.queues[queue].kick(1);
        bench.activate();
        bench.used(queue, 1);
        assert_eq!(bench.bytes(ANSWER, 1), [OK]);
    }
}

#[test]
fn without_mq_the_third_queue_is_for_commands() {
    let mut bench = Bench::with(2, ALL, 256);
    bench.activate();
    assert_eq!(bench.control, 2);
    assert_eq!(command(&mut bench, 0, 0, &[0]), OK);
    assert_eq!(command(&mut bench, 4, 0, &[1, 0]), ERR);
    assert_eq!(bench.ends.enabled.load(Ordering::SeqCst), 0b01);
}
