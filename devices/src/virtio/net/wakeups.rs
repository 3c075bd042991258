//! What wakes the worker of a pair: its epoll instance. Owned by the worker.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// The driver gave room for frames.
pub(super) const ROOM: u64 = 0;
/// The driver has frames to send.
pub(super) const FRAMES: u64 = 1;
/// The port has a frame, or takes some.
pub(super) const PORT: u64 = 2;
/// The worker is to stop.
pub(super) const STOP: u64 = 3;
/// The driver has a command, or settings changed.
pub(super) const SETTINGS: u64 = 4;
/// The kernel can do nothing with a ring.
pub(super) const BROKEN: u64 = 5;
/// Plus the number of a queue: the kernel used buffers of it, and nobody else tells the driver.
pub(super) const RELAY: u64 = 1 << 32;

/// The epoll instance, and what it said last.
pub(super) struct Wakeups {
    epoll: Epoll,
    /// What the port's file is watched for, if it is.
    port: Option<EventSet>,
    events: [EpollEvent; 8],
    count: usize,
}

impl Wakeups {
    /// # Errors
    /// When the host gives no epoll instance.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new()?, port: None, events: [EpollEvent::default(); 8], count: 0 })
    }

    /// Each write of `event` wakes, and nobody need read it: waking is all it is for. It must stay open.
    pub(super) fn at_each_write(&self, event: &EventFd, why: u64) -> io::Result<()> {
        self.add(event, EventSet::IN | EventSet::EDGE_TRIGGERED, why)
    }

    /// There is no sleep while `event` is readable. It must stay open.
    pub(super) fn while_readable(&self, event: &EventFd, why: u64) -> io::Result<()> {
        self.add(event, EventSet::IN, why)
    }

    fn add(&self, event: &EventFd, set: EventSet, why: u64) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(set, why))
    }

    /// From now on the port's `file` wakes for what is `wanted`, each time that it comes; not at all for `None`.
    pub(super) fn watch_port(&mut self, file: BorrowedFd<'_>, wanted: Option<EventSet>) -> io::Result<()> {
        let wanted = wanted.map(|set| set | EventSet::EDGE_TRIGGERED);
        let operation = match (self.port, wanted) {
            (was, wanted) if was == wanted => return Ok(()),
            (None, _) => ControlOperation::Add,
            (_, None) => ControlOperation::Delete,
            _ => ControlOperation::Modify,
        };
        self.port = wanted;
        let event = EpollEvent::new(wanted.unwrap_or(EventSet::empty()), PORT);
        self.epoll.ctl(operation, file.as_raw_fd(), event)
    }

    /// Sleeps up to `patience` milliseconds, for ever if that is -1, or looks only if it is 0. Whether anything woke it.
    pub(super) fn wait(&mut self, patience: i32) -> io::Result<bool> {
        self.count = match self.epoll.wait(patience, &mut self.events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        Ok(self.count > 0)
    }

    /// What woke it last.
    fn last(&self) -> impl Iterator<Item = &EpollEvent> {
        self.events.iter().take(self.count)
    }

    /// Whether that did.
    pub(super) fn woke(&self, why: u64) -> bool {
        self.last().any(|event| event.data() == why)
    }

    /// Whether the port's file said that its other side is gone.
    pub(super) fn port_is_gone(&self) -> bool {
        let gone = EventSet::ERROR | EventSet::HANG_UP;
        self.last().any(|event| event.data() == PORT && event.event_set().intersects(gone))
    }

    /// The queues of which [`RELAY`] told.
    pub(super) fn relayed(&self) -> impl Iterator<Item = u16> {
        self.last().filter_map(|event| event.data().checked_sub(RELAY)).map(|queue| queue as u16)
    }
}
