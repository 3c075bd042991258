//! Frames of every size from the host, through each kind of socket a test can have, into buffers as each kind of driver gives
//! them. `tests/tests/linux/net/sizes.rs` has them in Linux, where that is possible: this needs no KVM, and its host can send
//! all of them through both sockets, also those without a whole Ethernet header.

use std::io::{IoSlice, Write};
use std::os::unix::net::UnixStream;

use super::*;
use crate::virtio::net::stream::Stream;

const LARGEST: usize = 65_550;

/// A prime, so that no two frames begin alike.
const PERIOD: usize = 100_003;

/// What frames are made of: pseudo-random bytes (Marsaglia's xorshift64).
fn content() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..(PERIOD + LARGEST).div_ceil(8)).flat_map(|_| next()).collect()
}

fn frame_of(content: &[u8], size: usize) -> &[u8] {
    &content[size * 7919 % PERIOD..][..size]
}

/// Chains of buffers that the driver has in the ring all the time, at a place of its own each.
#[derive(Clone, Copy)]
struct Chains {
    count: u64,
    /// Bytes of the buffers of each.
    buffers: &'static [u32],
}

impl Chains {
    const MERGEABLE: Self = Self { count: 100, buffers: &[1536] };
    /// A header's room apart, and the largest frame's in three pieces.
    const WHOLE: Self = Self { count: 8, buffers: &[12, 4096, 30_000, 40_000] };

    fn address(self, slot: u64) -> u64 {
        let len: u32 = self.buffers.iter().sum();
        DATA + slot * u64::from(len.next_multiple_of(64))
    }

    fn give(self, bench: &mut Bench, slot: u64) -> u16 {
        let mut at = self.address(slot);
        let piece = |len: &u32| {
            at += u64::from(*len);
            writable(at - u64::from(*len), *len)
        };
        bench.queues[0].add(&self.buffers.iter().map(piece).collect::<Vec<_>>())
    }
}

/// Every size in order, sent by `send` from another thread as fast as it can.
fn all_arrive(mut bench: Bench, chains: Chains, mut send: impl FnMut(&[u8]) + Send) {
    let content = content();
    let is_mergeable = bench.features & MRG_RXBUF != 0;
    thread::scope(|scope| {
        scope.spawn(|| (1..=LARGEST).for_each(|size| send(frame_of(&content, size))));
        let mut slots: VecDeque<(u16, u64)> =
            (0..chains.count).map(|slot| (chains.give(&mut bench, slot), slot)).collect();
        bench.queues[0].kick(chains.count as u16);
        for size in 1..=LARGEST {
            let mut received = Vec::with_capacity(HEADER + size);
            let mut spread = 0;
            while received.len() < HEADER + size {
                let (head, len) = bench.used(0, 1)[0];
                let (expected, slot) = slots.pop_front().unwrap();
                assert_eq!(head, expected, "a frame of {size} bytes");
                received.extend(bench.bytes(chains.address(slot), len as usize));
                slots.push_back((chains.give(&mut bench, slot), slot));
                spread += 1;
            }
            bench.queues[0].kick(spread);
            let (header, frame) = received.split_at(HEADER);
            assert!(is_mergeable || spread == 1);
            // 5.1.6.4.1: nothing is left to do, and so many buffers.
            assert_eq!(header, [&[0; 10][..], &spread.to_le_bytes()].concat(), "a frame of {size} bytes");
            assert!(frame == frame_of(&content, size), "a frame of {size} bytes is not what was sent");
        }
    });
    let counted = bench.counted().rx;
    assert_eq!((counted.frames, counted.drops), (LARGEST as u64, [0; DROPS]));
}

/// One frame a datagram, as a TAP has one a read.
fn through_datagrams(features: u64, chains: Chains) {
    let bench = Bench::active(PLAIN | EVENT_IDX | features, 256);
    let host = bench.hosts[0].try_clone().unwrap();
    let mut message = Vec::new();
    all_arrive(bench, chains, |frame| {
        message.clear();
        message.extend([0; HEADER]);
        message.extend(frame);
        host.send(&message).unwrap();
    });
}

/// One after the other, each behind its length.
fn through_a_stream(features: u64, chains: Chains) {
    let (near, mut far) = UnixStream::pair().unwrap();
    let port = Stream::new(near, Box::new(|| Err(io::ErrorKind::ConnectionRefused.into()))).unwrap();
    let backend = Backend::new(vec![Box::new(port)], Offloads::NONE);
    let mut bench = Bench::over(backend, PLAIN | EVENT_IDX | features, 256);
    bench.activate();
    all_arrive(bench, chains, |frame| {
        let length = (frame.len() as u32).to_be_bytes();
        let mut parts = &mut [IoSlice::new(&length), IoSlice::new(frame)][..];
        while !parts.is_empty() {
            let sent = far.write_vectored(parts).unwrap();
            IoSlice::advance_slices(&mut parts, sent);
        }
    });
}

#[test]
fn all_arrive_in_several_buffers() {
    through_datagrams(MRG_RXBUF | SEGMENTED, Chains::MERGEABLE);
}

#[test]
fn all_arrive_in_one_chain_each() {
    through_datagrams(SEGMENTED, Chains::WHOLE);
}

#[test]
fn all_arrive_from_a_stream_in_several_buffers() {
    through_a_stream(MRG_RXBUF, Chains::MERGEABLE);
}

#[test]
fn all_arrive_from_a_stream_in_one_chain_each() {
    through_a_stream(0, Chains::WHOLE);
}
