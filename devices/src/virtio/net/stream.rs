#![expect(unsafe_code, reason = "sendmsg and recvmsg take raw guest memory")]
//! A connected stream socket as the back end of an interface, in the protocol of passt(1) and of QEMU's `-netdev stream`: in
//! front of each frame its length, 32 bits in network byte order. There are no headers and no offloads. Owned by the device
//! or the worker of the pair.

use std::io::{self, ErrorKind};
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;

use libc::{MSG_DONTWAIT, MSG_NOSIGNAL, iovec, msghdr};

use super::backend::{Failure, HEADER, LARGEST_FRAME, Offloads, Port};
use super::buffers::{Buffers, MAX_IOVECS};

/// Connects again. Called on the worker's thread, several times a second while the connection is lost, and returns at once:
/// with [`ErrorKind::WouldBlock`] if it takes longer.
pub type Reconnect = Box<dyn FnMut() -> io::Result<UnixStream> + Send>;

/// Bytes of the length in front of a frame.
const LENGTH: usize = 4;

/// The only port of such a back end.
pub struct Stream {
    socket: UnixStream,
    reconnect: Reconnect,
    lost: bool,
    incoming: Incoming,
    /// The end of a frame that the socket did not take at once.
    rest: Vec<u8>,
    /// Scratch space, empty between calls.
    iovecs: Vec<iovec>,
}

// SAFETY: the pointers in `iovecs` are there during a call only.
unsafe impl Send for Stream {}

/// What is known of the next frame.
#[derive(Debug, Default)]
struct Incoming {
    /// Its length, of which so many bytes have come.
    length: [u8; LENGTH],
    known: usize,
    /// The start of it, if a part has come.
    part: Vec<u8>,
}

impl Stream {
    /// Takes over a connected socket, and the way to get another when it is lost.
    ///
    /// # Errors
    /// If it cannot be made nonblocking.
    pub fn new(socket: UnixStream, reconnect: Reconnect) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let (incoming, rest, iovecs) = (Incoming::default(), Vec::new(), Vec::new());
        Ok(Self { socket, reconnect, lost: false, incoming, rest, iovecs })
    }

    /// The length of the next frame.
    fn length(&mut self) -> Result<usize, Failure> {
        while self.incoming.known < LENGTH {
            let Incoming { length, known, .. } = &mut self.incoming;
            let into = &mut length[*known..];
            self.iovecs.push(iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() });
            self.incoming.known += self.receive_message()?;
        }
        let length = u32::from_be_bytes(self.incoming.length) as usize;
        if (1..=LARGEST_FRAME).contains(&length) {
            return Ok(length);
        }
        // Where the next one starts cannot be believed either.
        Err(self.lose(io::Error::new(ErrorKind::InvalidData, format!("a frame of {length} bytes is announced"))))
    }

    /// Receives into `iovecs`, which are empty afterwards: how many bytes, at least 1.
    fn receive_message(&mut self) -> Result<usize, Failure> {
        // SAFETY: the buffers are memory of ours, or lent to the caller of this, and writable.
        let receive = |socket, message| unsafe { libc::recvmsg(socket, message, MSG_DONTWAIT) };
        match self.transfer(receive)? {
            0 => Err(self.lose(io::Error::new(ErrorKind::UnexpectedEof, "the other end closed the connection"))),
            count => Ok(count),
        }
    }

    /// Receives the frame of `length` bytes behind the header in `room`, and the length of the next one, if that has come.
    fn receive_frame(&mut self, length: usize, room: &Buffers<'_>) -> Result<(), Failure> {
        let start = self.incoming.part.len();
        if start == 0 {
            slice(&mut self.iovecs, room, HEADER, length);
        } else {
            self.incoming.part.resize(length, 0);
            let into = &mut self.incoming.part[start..];
            self.iovecs.push(iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() });
        }
        let mut next = [0; LENGTH];
        if self.iovecs.len() < MAX_IOVECS {
            self.iovecs.push(iovec { iov_base: next.as_mut_ptr().cast(), iov_len: LENGTH });
        }
        let received = self.receive_message();
        let end = start + received.as_ref().map_or(0, |count| *count);
        if end < length {
            // The rest comes later, perhaps to another place.
            self.incoming.part.resize(end, 0);
            if start == 0 {
                room.get(HEADER, &mut self.incoming.part);
            }
            return Err(received.err().unwrap_or(Failure::NotNow));
        }
        if start > 0 {
            room.put(HEADER, &self.incoming.part);
        }
        self.incoming.part.clear();
        (self.incoming.length, self.incoming.known) = (next, end - length);
        Ok(())
    }

    /// Sends `iovecs`, which are empty afterwards: how many bytes went.
    fn send_message(&mut self) -> Result<usize, Failure> {
        // SAFETY: the buffers are memory of ours, or lent to the caller of this.
        self.transfer(|socket, message| unsafe { libc::sendmsg(socket, message, MSG_DONTWAIT | MSG_NOSIGNAL) })
    }

    /// Has `call` move what is in `iovecs`, which are empty afterwards: how many bytes it says.
    fn transfer(&mut self, call: impl Fn(RawFd, *mut msghdr) -> isize) -> Result<usize, Failure> {
        // SAFETY: all zero is a valid msghdr.
        let mut message: msghdr = unsafe { mem::zeroed() };
        (message.msg_iov, message.msg_iovlen) = (self.iovecs.as_mut_ptr(), self.iovecs.len());
        let result = loop {
            if let Ok(count) = usize::try_from(call(self.socket.as_raw_fd(), &raw mut message)) {
                break Ok(count);
            }
            let error = io::Error::last_os_error();
            if error.kind() != ErrorKind::Interrupted {
                break Err(error);
            }
        };
        self.iovecs.clear();
        result.map_err(|error| self.failure(error))
    }

    fn failure(&mut self, error: io::Error) -> Failure {
        if error.kind() == ErrorKind::WouldBlock { Failure::NotNow } else { self.lose(error) }
    }

    fn lose(&mut self, error: io::Error) -> Failure {
        self.lost = true;
        Failure::Lost(error)
    }
}

impl Port for Stream {
    fn file(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn receive(&mut self, room: &Buffers<'_>) -> Result<usize, Failure> {
        let length = self.length()?;
        self.receive_frame(length, room)?;
        // Complete, and in one piece.
        room.put(0, &[0; HEADER]);
        Ok(HEADER + length)
    }

    fn send(&mut self, frame: &Buffers<'_>) -> Result<(), Failure> {
        let refused = |what| Failure::Frame(io::Error::new(ErrorKind::InvalidInput, what));
        let mut header = [0; HEADER];
        let length = frame.len().saturating_sub(HEADER);
        if frame.get(0, &mut header) < HEADER || !(1..=LARGEST_FRAME).contains(&length) {
            return Err(refused("a frame of no length that there is"));
        }
        // flags and gso_type (virtio 1.2, 5.1.6): nothing may be left to do.
        if header[..2] != [0; 2] {
            return Err(refused("a frame that is not complete"));
        }
        if !self.flush()? {
            return Err(Failure::NotNow);
        }
        let announced = (length as u32).to_be_bytes();
        self.iovecs.push(iovec { iov_base: announced.as_ptr().cast_mut().cast(), iov_len: LENGTH });
        slice(&mut self.iovecs, frame, HEADER, length);
        if self.iovecs.len() > MAX_IOVECS {
            self.iovecs.clear();
            return Err(refused("a frame in more pieces than the host takes"));
        }
        let sent = self.send_message()?;
        if sent < LENGTH + length {
            // The other end has the start, so it must get the rest.
            self.rest.extend(&announced[sent.min(LENGTH)..]);
            let (kept, gone) = (self.rest.len(), sent.saturating_sub(LENGTH));
            self.rest.resize(kept + length - gone, 0);
            frame.get(HEADER + gone, &mut self.rest[kept..]);
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<bool, Failure> {
        if self.rest.is_empty() {
            return Ok(true);
        }
        self.iovecs.push(iovec { iov_base: self.rest.as_mut_ptr().cast(), iov_len: self.rest.len() });
        match self.send_message() {
            Ok(sent) => drop(self.rest.drain(..sent)),
            Err(Failure::NotNow) => {}
            Err(failure) => return Err(failure),
        }
        Ok(self.rest.is_empty())
    }

    /// A frame is complete, whatever the driver would do.
    fn set_offloads(&mut self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }

    /// There is no other port that could take its place.
    fn set_enabled(&mut self, _enabled: bool) -> io::Result<()> {
        Ok(())
    }

    fn is_up(&mut self) -> bool {
        // Its end may have been seen by who polls it, and not by a read.
        if !self.lost && !hung_up(self.file()) {
            return true;
        }
        self.lost = true;
        let Ok(socket) = (self.reconnect)() else { return false };
        if socket.set_nonblocking(true).is_err() {
            return false;
        }
        // What was under way is gone with the connection.
        (self.socket, self.lost, self.incoming) = (socket, false, Incoming::default());
        self.rest.clear();
        true
    }
}

/// Whether the other end of `socket` is closed.
fn hung_up(socket: BorrowedFd<'_>) -> bool {
    let mut entry = libc::pollfd { fd: socket.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one entry, which the kernel fills in.
    let found = unsafe { libc::poll(&raw mut entry, 1, 0) };
    found > 0 && entry.revents & (libc::POLLHUP | libc::POLLERR) != 0
}

/// Appends the `len` bytes from `offset` on of `buffers` to `iovecs`, as far as they exist.
fn slice(iovecs: &mut Vec<iovec>, buffers: &Buffers<'_>, mut offset: usize, mut len: usize) {
    for buffer in buffers.iovecs() {
        if offset >= buffer.iov_len {
            offset -= buffer.iov_len;
            continue;
        }
        let count = (buffer.iov_len - offset).min(len);
        if count == 0 {
            return;
        }
        let start = buffer.iov_base.cast::<u8>().wrapping_add(offset);
        iovecs.push(iovec { iov_base: start.cast(), iov_len: count });
        (offset, len) = (0, len - count);
    }
}

#[cfg(test)]
mod tests;
