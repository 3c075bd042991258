//! Frames through a socket pair, whole and in pieces; the far end speaks the protocol by hand.

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;

use proptest::prelude::*;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::virtio::net::buffers::BufferList;

const BUFFERS: u64 = 0x1000;
/// A header with everything set, which must not get into a frame, nor stay where one is received.
const STALE: [u8; HEADER] = [0xff; HEADER];

/// Guest memory in which a frame with its header is spread over buffers of these sizes.
struct Room {
    list: BufferList,
}

impl Room {
    fn new(sizes: &[usize]) -> Self {
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap());
        let mut list = BufferList::new(memory, 1);
        let mut at = BUFFERS;
        for &size in sizes {
            assert!(list.push(GuestAddress(at), size));
            // Not next to each other.
            at += size as u64 + 64;
        }
        let room = Self { list };
        room.buffers().put(0, &STALE);
        room
    }

    fn buffers(&self) -> Buffers<'_> {
        self.list.first(self.list.count())
    }

    fn with(sizes: &[usize], header: [u8; HEADER], frame: &[u8]) -> Self {
        let room = Self::new(sizes);
        room.buffers().put(0, &header);
        room.buffers().put(HEADER, frame);
        room
    }

    /// What is in it.
    fn content(&self, len: usize) -> Vec<u8> {
        let mut content = vec![0; len];
        assert_eq!(self.buffers().get(0, &mut content), len);
        content
    }
}

fn never() -> Reconnect {
    Box::new(|| Err(ErrorKind::ConnectionRefused.into()))
}

fn connected() -> (Stream, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    (Stream::new(near, never()).unwrap(), far)
}

fn frame(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

/// As the protocol has it (passt, tap.c; QEMU, net/stream.c): the length in network byte order, then the frame.
fn message(frame: &[u8]) -> Vec<u8> {
    [&u32::try_from(frame.len()).unwrap().to_be_bytes()[..], frame].concat()
}

fn whole() -> Room {
    Room::new(&[HEADER + LARGEST_FRAME + 1])
}

fn not_now<T>(result: &Result<T, Failure>) -> bool {
    matches!(result, Err(Failure::NotNow))
}

#[test]
fn a_frame_comes_behind_a_header_of_zeroes() {
    let (mut stream, mut far) = connected();
    let room = whole();
    assert!(not_now(&stream.receive(&room.buffers())));
    for len in [1, 42, 60, 1514, 65_535, LARGEST_FRAME] {
        let frame = frame(len, 7);
        let sent = message(&frame);
        let writer = thread::spawn({
            let mut far = far.try_clone().unwrap();
            move || far.write_all(&sent).unwrap()
        });
        let received = loop {
            match stream.receive(&room.buffers()) {
                Ok(received) => break received,
                Err(Failure::NotNow) => thread::yield_now(),
                Err(failure) => panic!("{failure:?}"),
            }
        };
        writer.join().unwrap();
        assert_eq!(received, HEADER + len);
        assert_eq!(room.content(received), [&[0; HEADER][..], &frame].concat());
        room.buffers().put(0, &STALE);
    }
    far.write_all(&message(&frame(9, 1))).unwrap();
    assert_eq!(stream.receive(&room.buffers()).unwrap(), HEADER + 9);
}

#[test]
fn many_frames_in_one_write_come_one_by_one() {
    let (mut stream, mut far) = connected();
    let frames: Vec<_> = (1..100).map(|at| frame(at * 7, at as u8)).collect();
    far.write_all(&frames.iter().flat_map(|frame| message(frame)).collect::<Vec<_>>()).unwrap();
    let room = Room::new(&[5, 7, 100, 1, 9000, 70_000]);
    for frame in &frames {
        let received = stream.receive(&room.buffers()).unwrap();
        assert_eq!(room.content(received), [&[0; HEADER][..], frame].concat());
    }
    assert!(not_now(&stream.receive(&room.buffers())));
}

#[test]
fn what_came_of_a_frame_is_kept_wherever_the_rest_goes() {
    let (mut stream, mut far) = connected();
    let frame = frame(100, 3);
    let bytes = message(&frame);
    for split in 1..bytes.len() {
        far.write_all(&bytes[..split]).unwrap();
        assert!(not_now(&stream.receive(&whole().buffers())), "{split}");
        far.write_all(&bytes[split..]).unwrap();
        let elsewhere = Room::new(&[3, 9, 50, 70_000]);
        assert_eq!(stream.receive(&elsewhere.buffers()).unwrap(), HEADER + 100, "{split}");
        assert_eq!(elsewhere.content(HEADER + 100)[HEADER..], frame, "{split}");
    }
}

#[test]
fn a_frame_is_sent_behind_its_length_and_without_its_header() {
    let (mut stream, mut far) = connected();
    for sizes in [&[2000][..], &[HEADER, 2000], &[3, 9, 1, 2000], &[HEADER + 10, 20, 30, 1500]] {
        let frame = frame(sizes.iter().sum::<usize>() - HEADER, 9);
        let room = Room::with(sizes, [0; HEADER], &frame);
        stream.send(&room.buffers()).unwrap();
        let mut got = vec![0; 4 + frame.len()];
        far.read_exact(&mut got).unwrap();
        assert_eq!(got, message(&frame));
    }
    assert!(stream.flush().unwrap());
}

#[test]
fn what_a_guest_must_not_send_is_refused() {
    let (mut stream, mut far) = connected();
    let checksum = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let segments = [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let refused = [
        Room::with(&[100], checksum, &[0; 88]),
        Room::with(&[100], segments, &[0; 88]),
        Room::with(&[HEADER], [0; HEADER], &[]),
        Room::with(&[HEADER - 1], [0; HEADER], &[]),
        Room::with(&[HEADER + LARGEST_FRAME + 1], [0; HEADER], &[]),
    ];
    for room in &refused {
        assert!(matches!(stream.send(&room.buffers()), Err(Failure::Frame(_))));
    }
    // num_buffers and the fields of offloads that are not used mean nothing (virtio 1.2, 5.1.6.2).
    let meaningless = [0, 0, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14];
    stream.send(&Room::with(&[HEADER + 3], meaningless, b"abc").buffers()).unwrap();
    let mut got = [0; 7];
    far.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"\0\0\0\x03abc");
}

#[test]
fn a_frame_that_was_taken_in_part_goes_on_before_the_next() {
    let (mut stream, mut far) = connected();
    far.set_nonblocking(true).unwrap();
    let (mut expected, mut got) = (Vec::new(), Vec::new());
    let mut drain = |got: &mut Vec<u8>, most: usize| {
        let mut bytes = vec![0; most];
        while let Ok(count @ 1..) = far.read(&mut bytes) {
            got.extend(&bytes[..count]);
            if count < most {
                break;
            }
        }
    };
    let mut kept = 0;
    for number in 0..2000_usize {
        let frame = frame(1 + number * 37 % LARGEST_FRAME, number as u8);
        let room = Room::with(&[HEADER, frame.len()], [0; HEADER], &frame);
        loop {
            match stream.send(&room.buffers()) {
                Ok(()) => break,
                Err(Failure::NotNow) => drain(&mut got, 1000),
                Err(failure) => panic!("{failure:?}"),
            }
        }
        kept += usize::from(!stream.rest.is_empty());
        expected.extend(message(&frame));
    }
    assert!(kept > 0, "the socket took all of every frame at once: this tried nothing");
    while !stream.flush().unwrap() {
        drain(&mut got, 4096);
    }
    drain(&mut got, 1 << 20);
    assert!(got == expected, "{} bytes of {}", got.len(), expected.len());
}

#[test]
fn a_lost_connection_is_said_once_and_made_anew() {
    let (near, far) = UnixStream::pair().unwrap();
    let (sender, receiver) = mpsc::channel();
    let reconnect = move || receiver.try_recv().map_err(|_| ErrorKind::WouldBlock.into());
    let mut stream = Stream::new(near, Box::new(reconnect)).unwrap();
    let room = whole();
    // The start of a frame, which will not have an end.
    (&far).write_all(&message(&[1; 60])[..20]).unwrap();
    assert!(not_now(&stream.receive(&room.buffers())));
    drop(far);
    assert!(matches!(stream.receive(&room.buffers()), Err(Failure::Lost(_))));
    assert!(matches!(stream.send(&Room::with(&[40], [0; HEADER], &[2; 28]).buffers()), Err(Failure::Lost(_))));
    assert!(!stream.is_up() && !stream.is_up());
    let (near, mut far) = UnixStream::pair().unwrap();
    sender.send(near).unwrap();
    assert!(stream.is_up() && stream.is_up());
    far.write_all(&message(b"again")).unwrap();
    assert_eq!(stream.receive(&room.buffers()).unwrap(), HEADER + 5);
    assert_eq!(room.content(HEADER + 5)[HEADER..], *b"again");
}

#[test]
fn a_connection_that_ended_is_not_up_before_anybody_reads() {
    let (mut stream, far) = connected();
    assert!(stream.is_up());
    drop(far);
    assert!(!stream.is_up());
}

#[test]
fn a_length_that_no_frame_has_ends_the_connection() {
    for length in [0, LARGEST_FRAME as u32 + 1, u32::MAX] {
        let (mut stream, mut far) = connected();
        far.write_all(&length.to_be_bytes()).unwrap();
        assert!(matches!(stream.receive(&whole().buffers()), Err(Failure::Lost(_))), "{length}");
        assert!(!stream.is_up());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_pieces_make_the_same_frames(
        lens in proptest::collection::vec(1..3000_usize, 1..20), cuts in proptest::collection::vec(1..4000_usize, 1..20),
        head in 1..40_usize,
    ) {
        let (mut stream, mut far) = connected();
        let frames: Vec<_> = lens.iter().enumerate().map(|(at, &len)| frame(len, at as u8)).collect();
        let bytes: Vec<_> = frames.iter().flat_map(|frame| message(frame)).collect();
        let room = Room::new(&[head, 70_000]);
        let (mut rest, mut cuts, mut got) = (&bytes[..], cuts.iter().cycle(), Vec::new());
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
            far.write_all(now).unwrap();
            rest = later;
            while let Ok(count) = stream.receive(&room.buffers()) {
                got.push(room.content(count)[HEADER..].to_vec());
            }
        }
        prop_assert_eq!(got, frames);
    }
}
