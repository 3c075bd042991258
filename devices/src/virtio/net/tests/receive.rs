//! Frames from the host.

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
