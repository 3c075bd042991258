//! Frames from the host.

use std::collections::VecDeque;
use std::time::Instant;

use proptest::prelude::*;

use super::*;

/// Gives the device a chain of one buffer of `len` bytes for each of `addresses`.
fn give(bench: &mut Bench, addresses: impl Iterator<Item = u64>, len: u32) -> Vec<u16> {
    let heads: Vec<_> = addresses.map(|address| bench.queues[0].add(&[writable(address, len)])).collect();
    bench.queues[0].kick(heads.len() as u16);
    heads
}

#[test]
fn a_frame_arrives_with_one_buffer_in_its_header() {
    for features in [PLAIN, PLAIN | EVENT_IDX, PLAIN | MRG_RXBUF] {
        let mut bench = Bench::active(features, 256);
        for round in 0..20 {
            let heads = give(&mut bench, [DATA].into_iter(), 1526);
            let mut sent = frame(60 + 70 * round);
            bench.hosts[0].send(&sent).unwrap();
            assert_eq!(bench.used(0, 1), [(heads[0], sent.len() as u32)]);
            sent[10] = 1;
            assert!(bench.bytes(DATA, sent.len()) == sent);
            assert_eq!(bench.bytes(DATA + 1526, 1), [UNTOUCHED]);
        }
        assert_eq!((bench.counted().rx.frames, bench.counted().rx.drops), (20, [0; DROPS]));
    }
}

#[test]
fn a_large_frame_is_spread_and_shown_at_once() {
    let mut bench = Bench::active(PLAIN | MRG_RXBUF | SEGMENTED, 256);
    let heads = give(&mut bench, (0..50).map(|at| DATA + at * 0x1000), 1536);
    let mut sent = frame(65_549);
    bench.hosts[0].send(&sent).unwrap();
    let used = bench.used(0, 43);
    assert_eq!(used.iter().map(|one| one.0).collect::<Vec<_>>(), heads[..43]);
    assert_eq!(used.iter().map(|one| one.1 as usize).sum::<usize>(), sent.len());
    sent[10] = 43;
    let pieces = used.iter().enumerate().map(|(at, one)| bench.bytes(DATA + at as u64 * 0x1000, one.1 as usize));
    assert!(pieces.collect::<Vec<_>>().concat() == sent);
    assert_eq!(bench.queues[0].driver.used(), None);
}

#[test]
fn a_frame_waits_for_room_and_loses_nothing() {
    let mut bench = Bench::active(PLAIN | MRG_RXBUF | SEGMENTED, 256);
    let mut sent = frame(5000);
    bench.hosts[0].send(&sent).unwrap();
    bench.hosts[0].send(&frame(100)).unwrap();
    give(&mut bench, [DATA].into_iter(), 1000);
    give(&mut bench, [DATA + 1000].into_iter(), 2000);
    give(&mut bench, [DATA + 3000].into_iter(), 3000);
    assert_eq!(bench.used(0, 3).iter().map(|one| one.1).collect::<Vec<_>>(), [1000, 2000, 2012]);
    sent[10] = 3;
    assert!(bench.bytes(DATA, 5012) == sent);
    give(&mut bench, [DATA].into_iter(), 200);
    assert_eq!(bench.used(0, 1)[0].1, 112);
    assert_eq!(bench.counted().rx.drops, [0; DROPS]);
}

#[test]
fn what_no_buffer_holds_is_dropped_and_the_next_frame_passes() {
    // Not mergeable: one chain a frame.
    let mut bench = Bench::active(PLAIN, 256);
    bench.hosts[0].send(&frame(1515)).unwrap();
    bench.hosts[0].send(&frame(1514)).unwrap();
    give(&mut bench, [DATA].into_iter(), 1526);
    assert_eq!(bench.used(0, 1)[0].1, 1526);
    assert_eq!(bench.counted().rx.drops[DropReason::NoBuffer as usize], 1);
    // Mergeable, and all that the ring holds is not enough.
    let mut bench = Bench::active(PLAIN | MRG_RXBUF | SEGMENTED, 4);
    bench.hosts[0].send(&frame(500)).unwrap();
    bench.hosts[0].send(&frame(300)).unwrap();
    give(&mut bench, (0..4).map(|at| DATA + at * 0x1000), 100);
    let lens: Vec<_> = bench.used(0, 4).iter().map(|one| one.1).collect();
    assert_eq!((lens, bench.counted().rx.drops[DropReason::NoBuffer as usize]), (vec![100, 100, 100, 12], 1));
}

#[test]
fn what_is_no_frame_is_dropped() {
    let mut bench = Bench::active(PLAIN | MRG_RXBUF | SEGMENTED, 256);
    bench.hosts[0].send(&[0; HEADER - 1]).unwrap();
    bench.hosts[0].send(&frame(65_554)).unwrap();
    bench.hosts[0].send(&frame(65_553)).unwrap();
    give(&mut bench, (0..50).map(|at| DATA + at * 0x1000), 2048);
    bench.used(0, 33);
    let counted = bench.counted().rx;
    assert_eq!((counted.frames, counted.bytes, counted.drops[DropReason::Length as usize]), (1, 65_553, 2));
}

#[test]
fn flags_tell_only_what_was_agreed_on() {
    for (features, flags, seen) in [(PLAIN, 2, 0), (PLAIN | GUEST_CSUM, 2, 2), (PLAIN | GUEST_CSUM, 1, 1)] {
        let mut bench = Bench::active(features, 256);
        // DATA_VALID and NEEDS_CSUM (5.1.6).
        bench.hosts[0].send(&frame_with(flags, 0, 60)).unwrap();
        give(&mut bench, [DATA].into_iter(), 1526);
        bench.used(0, 1);
        assert_eq!(bench.bytes(DATA, 1), [seen]);
    }
    // NEEDS_CSUM; TCPV4, TCPV6 with and without ECN, UDP, UDP_L4, and what does not exist.
    for (flags, gso) in [(1, 0), (0, 1), (0, 4), (0, 0x81), (0, 3), (0, 5), (0, 2)] {
        let mut bench = Bench::active(PLAIN, 256);
        bench.hosts[0].send(&frame_with(flags, gso, 60)).unwrap();
        bench.hosts[0].send(&frame(61)).unwrap();
        give(&mut bench, [DATA].into_iter(), 1526);
        assert_eq!(bench.used(0, 1)[0].1, 73, "{flags} {gso}");
        assert_eq!(bench.counted().rx.drops[DropReason::Offload as usize], 1);
    }
}

#[test]
fn without_room_the_port_is_left_alone() {
    let mut bench = Bench::active(PLAIN, 256);
    give(&mut bench, [DATA].into_iter(), 1526);
    for len in 60..64 {
        bench.hosts[0].send(&frame(len)).unwrap();
    }
    assert_eq!(bench.used(0, 1)[0].1, 72);
    for len in 61..64 {
        assert_eq!(bench.queues[0].used(), None);
        give(&mut bench, [DATA].into_iter(), 1526);
        assert_eq!(bench.used(0, 1)[0].1, HEADER as u32 + len);
    }
}

/// What epoll instances watch `file` for, as proc_pid_fdinfo(5) shows it.
fn watched(file: i32) -> Vec<EventSet> {
    let entries =
        fs::read_dir("/proc/self/fdinfo").unwrap().filter_map(|entry| fs::read_to_string(entry.ok()?.path()).ok());
    let lines = entries.flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>());
    let of_file = lines.filter_map(|line| {
        let mut words = line.strip_prefix("tfd:")?.split_whitespace();
        let is_it = words.next()? == file.to_string();
        words.next().filter(|word| is_it && *word == "events:")?;
        u32::from_str_radix(words.next()?, 16).ok()
    });
    of_file.map(EventSet::from_bits_truncate).collect()
}

/// Waits until the worker watches its file for frames, or does not any more. It has one epoll instance.
fn until_watched(bench: &Bench, expected: bool) {
    let patience = Instant::now() + Duration::from_secs(60);
    loop {
        let found = watched(bench.ends.file.load(Ordering::SeqCst));
        if let [events] = found[..]
            && events.contains(EventSet::IN) == expected
        {
            return;
        }
        assert!(Instant::now() < patience, "watched for {found:?}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until the worker sleeps, having asked for its file for the last time, and returns how often it did.
fn asleep(bench: &Bench) -> u64 {
    let files = || bench.ends.files.load(Ordering::SeqCst);
    loop {
        let before = files();
        thread::sleep(Duration::from_millis(50));
        if files() == before {
            return before;
        }
    }
}

#[test]
fn frames_wake_nobody_while_there_is_no_room() {
    const FRAMES: u64 = 60;
    for features in [PLAIN, PLAIN | EVENT_IDX, PLAIN | MRG_RXBUF] {
        let mut bench = Bench::active(features, 256);
        give(&mut bench, [DATA].into_iter(), 1526);
        bench.hosts[0].send(&frame(60)).unwrap();
        bench.used(0, 1);
        // The only buffer is used; what comes now waits in the socket, which keeps a few, and gets the next.
        until_watched(&bench, false);
        let began = Instant::now();
        let before = asleep(&bench);
        let receives = bench.ends.receives.load(Ordering::SeqCst);
        bench.hosts[0].set_nonblocking(true).unwrap();
        let mut sent = 0;
        for _ in 0..FRAMES {
            sent += u64::from(bench.hosts[0].send(&frame(61)).is_ok());
            thread::sleep(Duration::from_millis(1));
        }
        assert!(sent > 3, "{sent} frames");
        assert_eq!(bench.ends.receives.load(Ordering::SeqCst), receives, "nobody was asked for a frame");
        // It wakes once a second to see that the port is still there, and not once a frame.
        let woke = bench.ends.files.load(Ordering::SeqCst) - before;
        let seconds = began.elapsed().as_secs();
        assert!(woke <= 2 + seconds, "woke {woke} times in {seconds} s, while {sent} frames came");
        // Room for all of them and one more, and the port is watched again.
        give(&mut bench, (0..=sent).map(|at| DATA + 0x1000 * at), 1526);
        bench.used(0, sent as usize);
        until_watched(&bench, true);
        assert_eq!(bench.counted().rx.drops, [0; DROPS]);
    }
}

#[test]
fn what_is_there_already_needs_one_interrupt() {
    // Without EVENT_IDX: a driver that wants an interrupt for all that it is shown.
    let mut bench = Bench::new(PLAIN | MRG_RXBUF | SEGMENTED, 256);
    for _ in 0..5 {
        bench.hosts[0].send(&frame(20_000)).unwrap();
    }
    give(&mut bench, (0..60).map(|at| DATA + at * 0x1000), 4096);
    bench.activate();
    bench.used(0, 25);
    bench.net.reset();
    assert_eq!((bench.counted().rx.frames, bench.counted().rx.interrupts), (5, 1));
}

#[test]
fn nobody_is_asked_twice_for_what_he_does_not_have() {
    let mut bench = Bench::active(PLAIN | EVENT_IDX, 256);
    give(&mut bench, (0..100).map(|at| DATA + at * 0x1000), 1526);
    for round in 0..100 {
        bench.hosts[0].send(&frame(60)).unwrap();
        bench.used(0, 1);
        bench.fill(DATA + 0x10_0000, &frame(60));
        bench.queues[1].add(&[readable(DATA + 0x10_0000, 72)]);
        bench.queues[1].kick(1);
        bench.used(1, 1);
        // One that brings the frame and one that shows that there are no more; none when the driver sends. And at the start.
        let receives = bench.ends.receives.load(Ordering::SeqCst);
        assert!(receives <= 2 * (round + 1) + 2, "{receives} in round {round}");
    }
}

#[derive(Clone, Debug)]
enum Step {
    Give(u32),
    Send(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![4 => (12..4000_u32).prop_map(Step::Give), 1 => (14..30_000_usize).prop_map(Step::Send)];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Against 5.1.6.4: a frame fills as many buffers as it needs, in order, all but the last to the brim; the first tells how
    /// many, and all of them are used at once.
    #[test]
    fn any_frames_find_their_place_in_any_buffers(steps in steps(), event_idx: bool) {
        let features = PLAIN | MRG_RXBUF | SEGMENTED | if event_idx { EVENT_IDX } else { 0 };
        let mut bench = Bench::active(features, 256);
        let (mut given, mut sent) = (VecDeque::new(), VecDeque::new());
        // At the end there is room for all: 5 frames are as much as the sockets hold.
        for step in steps.into_iter().chain((0..50).map(|_| Step::Give(4000))) {
            match step {
                Step::Give(len) => {
                    let address = DATA + 0x1000 * given.len() as u64;
                    given.push_back((give(&mut bench, [address].into_iter(), len)[0], address, len));
                }
                Step::Send(len) if sent.len() < 5 => {
                    bench.hosts[0].send(&frame(len)).unwrap();
                    sent.push_back(frame(len));
                }
                Step::Send(_) => {}
            }
        }
        for frame in sent {
            let mut received = Vec::new();
            let mut count = 0;
            while received.len() < frame.len() {
                let (head, len) = if count == 0 { bench.used(0, 1)[0] } else { bench.queues[0].used().expect("used at once") };
                let (expected, address, room) = given.pop_front().unwrap();
                prop_assert_eq!((head, len as usize), (expected, (room as usize).min(frame.len() - received.len())));
                received.extend(bench.bytes(address, len as usize));
                count += 1;
            }
            prop_assert_eq!(&received[10..12], &[count, 0][..]);
            prop_assert!(received[12..] == frame[12..]);
        }
        prop_assert_eq!(bench.counted().rx.drops, [0; DROPS]);
    }
}
