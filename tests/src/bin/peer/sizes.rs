//! Raw frames of every size, one way: one end sends them, many at once, the other compares each with what was sent and
//! says which it has. A frame tells its size in its source address, so even the shortest tells all that it should be.
#![expect(unsafe_code, reason = "std knows no receive buffers of sockets")]

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use anyhow::{Context, bail, ensure};

use crate::content::{Content, PIECE};
use crate::packet;

/// Destination, source and type.
const HEADER: usize = 14;

/// A VLAN tag between source and type (IEEE 802.1Q): the VLAN with the number 5.
const TAG: [u8; 4] = [0x81, 0, 0, 5];

/// The most that a frame without one has on a TAP device of Linux.
const UNTAGGED: usize = 65_535;

/// What a frame is, in the second byte of its source address.
const DATA: u8 = 0;
const QUESTION: u8 = 1;
const ANSWER: u8 = 2;

/// Frames under way at once, and their bytes, unless it is one. The queue of a TAP has 500 to 1000.
const WINDOW: usize = 128;
const WINDOW_BYTES: usize = 4 << 20;

/// What the receiving socket keeps, with all that the kernel needs besides: several windows.
static KEPT: libc::c_int = 64 << 20;

/// How often a frame is sent, and its receiver asked.
const TRIES: u32 = 200;
const PATIENCE: Duration = Duration::from_millis(500);

/// What frames are sent to: an interface, through a packet socket, or a machine.
struct Wire {
    socket: File,
    /// It connected to our socket, and has the length of each frame in front of it, as passt(1) does.
    is_stream: bool,
}

impl Wire {
    /// An interface by its name, or the path of a socket that somebody is to connect to.
    fn open(name: &str) -> anyhow::Result<Self> {
        if !name.starts_with('/') {
            let socket = packet::open(name, false)?;
            socket.set_read_timeout(Some(PATIENCE))?;
            return Ok(Self { socket: OwnedFd::from(socket).into(), is_stream: false });
        }
        let listener = UnixListener::bind(name).with_context(|| name.to_owned())?;
        println!("serving");
        let (socket, _) = listener.accept()?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { socket: OwnedFd::from(socket).into(), is_stream: true })
    }

    fn send(&self, frame: &[&[u8]]) -> anyhow::Result<()> {
        let size: usize = frame.iter().map(|part| part.len()).sum();
        let length = u32::try_from(size)?.to_be_bytes();
        let length = if self.is_stream { &length[..] } else { &[] };
        let mut parts: Vec<_> = [length].iter().chain(frame).map(|part| IoSlice::new(part)).collect();
        let mut rest = &mut parts[..];
        while !rest.is_empty() {
            match (&self.socket).write_vectored(rest) {
                Ok(sent) => IoSlice::advance_slices(&mut rest, sent),
                // A full queue is a loss like any other.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => return Ok(()),
                Err(error) => return Err(error).with_context(|| format!("a frame of {size} bytes")),
            }
        }
        Ok(())
    }

    /// The next frame, in `buffer`; `None` if none comes for a while.
    fn receive<'a>(&self, buffer: &'a mut [u8]) -> anyhow::Result<Option<&'a [u8]>> {
        let mut socket = &self.socket;
        let mut length = [0; 4];
        let received = if self.is_stream {
            let size = socket.read_exact(&mut length).map(|()| u32::from_be_bytes(length) as usize);
            size.and_then(|size| socket.read_exact(&mut buffer[..size]).map(|()| size))
        } else {
            socket.read(buffer)
        };
        match received {
            Ok(size) => Ok(Some(&buffer[..size])),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error).context("receiving"),
        }
    }
}

/// To everybody, from who tells what it is and a number, of our type.
fn header(what: u8, number: usize) -> [u8; HEADER] {
    let mut header = [0xff; HEADER];
    header[6..8].copy_from_slice(&[2, what]);
    header[8..12].copy_from_slice(&(number as u32).to_be_bytes());
    header[12..].copy_from_slice(&packet::ETHERTYPE.to_be_bytes());
    header
}

/// What a frame of ours is, its number, and what is behind its header.
fn parse(frame: &[u8]) -> Option<(u8, usize, &[u8])> {
    let (start, rest) = frame.split_at_checked(HEADER)?;
    let number = u32::from_be_bytes(start[8..12].try_into().ok()?) as usize;
    (start == header(start[7], number)).then_some((start[7], number, rest))
}

/// Sends frames of all of `sizes` until who counts at the other end has all of [`HEADER`] and more, each of which Linux gives to
/// programs. Smaller ones are sent once.
pub(crate) fn send(to: &str, sizes: &[usize]) -> anyhow::Result<()> {
    ensure!(sizes.iter().all(|size| (1..=PIECE + HEADER).contains(size)), "sizes from 1 to {}", PIECE + HEADER);
    let (content, wire) = (Content::new(), Wire::open(to)?);
    // Nobody may count yet.
    missing(&wire, 0, &BTreeSet::new())?;
    let (tiny, mut rest): (Vec<usize>, Vec<usize>) = sizes.iter().partition(|size| **size < HEADER);
    for size in tiny {
        wire.send(&[&header(DATA, size)[..size]])?;
    }
    let mut again = 0;
    while let Some(largest) = rest.first().max(rest.last()) {
        let count = (WINDOW_BYTES / largest).clamp(1, WINDOW).min(rest.len());
        let mut window: BTreeSet<usize> = rest.drain(..count).collect();
        for _ in 0..TRIES {
            for &size in &window {
                send_one(&wire, &content, size)?;
            }
            window = missing(&wire, rest.len(), &window)?;
            again += window.len();
            if window.is_empty() {
                break;
            }
        }
        ensure!(window.is_empty(), "frames that never arrive: {window:?}");
    }
    println!("intact: frames of {} sizes; {again} sent again", sizes.len());
    Ok(())
}

fn send_one(wire: &Wire, content: &Content, size: usize) -> anyhow::Result<()> {
    let header = header(DATA, size);
    let (addresses, ethertype) = header.split_at(HEADER - 2);
    let tag = if !wire.is_stream && size > UNTAGGED { &TAG[..] } else { &[] };
    let payload = &content.at(size as u64, 0)[..size - HEADER - tag.len()];
    wire.send(&[addresses, tag, ethertype, payload])
}

/// Which of these `sizes` the other end says it has not. The `number` is the question's.
fn missing(wire: &Wire, number: usize, sizes: &BTreeSet<usize>) -> anyhow::Result<BTreeSet<usize>> {
    let question: Vec<u8> = sizes.iter().flat_map(|size| (*size as u32).to_be_bytes()).collect();
    let mut buffer = vec![0; 2 * PIECE];
    for _ in 0..TRIES {
        wire.send(&[&header(QUESTION, number), &question])?;
        while let Some(frame) = wire.receive(&mut buffer)? {
            if let Some((ANSWER, of, answer)) = parse(frame)
                && of == number
            {
                return Ok(numbers(answer).collect());
            }
        }
    }
    bail!("nobody says whether frames of {sizes:?} bytes arrive")
}

/// As they are in a question and its answer.
fn numbers(bytes: &[u8]) -> impl Iterator<Item = usize> {
    bytes.chunks_exact(4).filter_map(|four| Some(u32::from_be_bytes(four.try_into().ok()?) as usize))
}

/// Compares frames as [`send`] sends them, and answers its questions, for ever; says what is not intact.
pub(crate) fn count(interface: &str) -> anyhow::Result<()> {
    let (content, socket) = (Content::new(), packet::open(interface, false)?);
    let size = mem::size_of_val(&KEPT) as libc::socklen_t;
    // SAFETY: the kernel reads an int.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, (&raw const KEPT).cast(), size)
    };
    ensure!(result == 0, "SO_RCVBUFFORCE: {}", std::io::Error::last_os_error());
    println!("serving");
    let mut arrived = BTreeSet::new();
    let mut buffer = vec![0; 2 * PIECE];
    loop {
        let received = socket.recv(&mut buffer)?;
        match parse(&buffer[..received]) {
            Some((DATA, size, rest)) if is_whole(&content, size, rest) => _ = arrived.insert(size),
            Some((QUESTION, number, sizes)) => {
                let missing = numbers(sizes).filter(|size| !arrived.contains(size));
                let mut answer = header(ANSWER, number).to_vec();
                answer.extend(missing.flat_map(|size| (size as u32).to_be_bytes()));
                // It will be asked again.
                let _ = socket.send(&answer);
            }
            _ => println!("a frame of {received} bytes is not what was sent"),
        }
    }
}

/// Whether `rest` is behind the header of a frame of `size` bytes. The kernel takes a tag out, which only the largest have.
fn is_whole(content: &Content, size: usize, rest: &[u8]) -> bool {
    let sizes = [size.checked_sub(HEADER), size.checked_sub(HEADER + TAG.len()).filter(|_| size > UNTAGGED)];
    sizes.contains(&Some(rest.len())) && *rest == content.at(size as u64, 0)[..rest.len()]
}
