//! What a network device needs of its back end, and promises it: the seam between the device and what moves frames on the
//! host. A back end is made of opened resources; it knows neither names nor options. A port is owned by one thread at a
//! time: the device while it is reset, else the worker of its pair of queues.

use std::fmt::{self, Debug, Formatter};
use std::io;
use std::ops::{BitAnd, BitOr};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::buffers::Buffers;
use super::vhost::Vhost;

/// Bytes of `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6), which is in front of every frame in both directions.
pub const HEADER: usize = 12;

/// Bytes of the largest frame: a packet of 65535 bytes behind an Ethernet header with a VLAN tag.
pub const LARGEST_FRAME: usize = 65_535 + 18;

/// What is left undone in a frame: a checksum to be filled in, or a packet to be cut into segments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads(u8);

impl Offloads {
    /// Nothing: every frame is complete, and its header all zero.
    pub const NONE: Self = Self(0);
    /// Partial checksums; all others need it (5.1.3.1).
    pub const CSUM: Self = Self(1);
    /// TCP over IPv4.
    pub const TSO4: Self = Self(2);
    /// TCP over IPv6.
    pub const TSO6: Self = Self(4);
    /// TCP with ECN, over what of IPv4 and IPv6 is there.
    pub const ECN: Self = Self(8);
    /// UDP, as fragments.
    pub const UFO: Self = Self(16);
    /// UDP over IPv4, as datagrams.
    pub const USO4: Self = Self(32);
    /// UDP over IPv6, as datagrams.
    pub const USO6: Self = Self(64);
    /// UDP as datagrams, over both.
    pub const USO: Self = Self(96);
    /// All of them.
    pub const ALL: Self = Self(127);
    /// Those with which a frame may be longer than the link's.
    pub const SEGMENTED: Self = Self(127 & !1);

    #[cfg(test)]
    pub(super) fn bits(self) -> u8 {
        self.0
    }

    /// Whether all of `these` are in it.
    pub fn contains(self, these: Self) -> bool {
        self & these == these
    }
}

impl BitOr for Offloads {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitAnd for Offloads {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

/// Why a frame did not pass.
#[derive(Debug)]
pub enum Failure {
    /// There is none, or no room for one: the port's file tells when.
    NotNow,
    /// This frame cannot be sent, or came broken; it is gone, and the next one may do.
    Frame(io::Error),
    /// The host's side is gone or down. Nothing passes until [`Port::is_up`] says so.
    Lost(io::Error),
}

/// The host's side of one pair of queues. All calls come from one thread at a time and return at once.
pub trait Port: Send {
    /// What to poll: readable when [`Port::receive`] may yield something, writable when [`Port::send`] and [`Port::flush`]
    /// may take something. Nonblocking. It may be another one after [`Port::is_up`] said true.
    fn file(&self) -> BorrowedFd<'_>;

    /// Puts one whole frame into `room`: [`HEADER`] bytes of header, of which `num_buffers` is the device's to fill in, then
    /// the frame. Returns the bytes of both, at most the room's. What does not fit is cut off; the room has space for
    /// [`LARGEST_FRAME`] and a byte more, so what is cut was no frame.
    ///
    /// The room is lent for the call only. A port that got a part of a frame keeps it, and says [`Failure::NotNow`]; it may
    /// have written to the room then, for nothing in it counts.
    fn receive(&mut self, room: &Buffers<'_>) -> Result<usize, Failure>;

    /// Takes one whole frame, a header of [`HEADER`] bytes first, or nothing of it ([`Failure::NotNow`]: offer the same
    /// again). The guest can write to `frame` during the call and may have put anything into the header: what it says is
    /// checked by whoever believes it, and what it must not say is a [`Failure::Frame`]. What the host has not taken when
    /// this returns Ok the port keeps, until [`Port::flush`].
    fn send(&mut self, frame: &Buffers<'_>) -> Result<(), Failure>;

    /// Hands on what `send` took and kept; `true` if nothing is left. Called when the file is writable.
    fn flush(&mut self) -> Result<bool, Failure> {
        Ok(true)
    }

    /// From now on frames may be received with these left to the guest; a part of [`Backend::offloads`], and all ports' at once
    /// where they are one interface. Frames that wait in the host may still come otherwise. If it fails because the host's side is
    /// lost, it holds from when that is back.
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()>;

    /// Whether this port takes part, as one of several; with `false` it receives nothing. All do at first. If it fails because the
    /// host's side is lost, it holds from when that is back.
    fn set_enabled(&mut self, enabled: bool) -> io::Result<()>;

    /// Whether the host's side is there and up. Asked when the device starts, and after [`Failure::Lost`] several times a second
    /// until it is true; tries to connect to it again if that is what it takes. Offloads and [`Port::set_enabled`] are as they
    /// were set last then.
    fn is_up(&mut self) -> bool;

    /// Whether it still is, once it was, as far as looking tells; changes nothing. Asked about once a second, and when who moves
    /// frames in our place fails: not every file tells of its own accord that the host's side is gone.
    fn is_still_up(&self) -> bool {
        true
    }
}

/// The host's side of a whole device. Outlives the device: a machine that is built again shows it to the next one.
pub struct Backend {
    ports: Vec<Mutex<Box<dyn Port>>>,
    offloads: Offloads,
    /// One a port, if the kernel moves the frames.
    kernel: Vec<Arc<Vhost>>,
}

impl Backend {
    /// One port a pair of queues, at least one, which together do `offloads` in both directions.
    ///
    /// # Panics
    /// Without ports, or with more than [`MAX_PAIRS`](super::MAX_PAIRS).
    pub fn new(ports: Vec<Box<dyn Port>>, offloads: Offloads) -> Self {
        assert!((1..=usize::from(super::MAX_PAIRS)).contains(&ports.len()), "one port a pair of queues");
        Self { ports: ports.into_iter().map(Mutex::new).collect(), offloads, kernel: Vec::new() }
    }

    /// The same with the kernel moving the frames, one of `kernel` a port. The ports' files are queues of a TAP then.
    ///
    /// # Panics
    /// If there are not as many as ports.
    #[must_use]
    pub fn in_kernel(mut self, kernel: Vec<Vhost>) -> Self {
        assert_eq!(kernel.len(), self.ports.len(), "one a port");
        self.kernel = kernel.into_iter().map(Arc::new).collect();
        self
    }

    /// What moves the frames of `pair` in the kernel, if anything does.
    pub(super) fn kernel(&self, pair: u16) -> Option<Arc<Vhost>> {
        self.kernel.get(usize::from(pair)).cloned()
    }

    /// How many ports, and so pairs of queues.
    pub fn pairs(&self) -> u16 {
        self.ports.len() as u16
    }

    /// What it leaves to the guest, if that is willing, and does for it.
    pub fn offloads(&self) -> Offloads {
        self.offloads
    }

    /// The port of `pair`; the pair's worker keeps it as long as it runs.
    pub(super) fn port(&self, pair: u16) -> MutexGuard<'_, Box<dyn Port>> {
        self.ports[usize::from(pair)].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Debug for Backend {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        out.debug_struct("Backend")
            .field("pairs", &self.pairs())
            .field("offloads", &self.offloads)
            .finish_non_exhaustive()
    }
}
