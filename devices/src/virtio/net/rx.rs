//! Receiving: frames from a port into the buffers of a receive queue. Owned by the worker of the pair.

use std::collections::VecDeque;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::Broken;
use super::backend::{Failure, HEADER, LARGEST_FRAME, Port};
use super::buffers::{BufferList, MAX_IOVECS};
use super::header::{self, Rules};
use super::settings::Settings;
use super::statistics::{Counts, DropReason};
use crate::virtio::queue::{Chain, Virtqueue};

/// A frame and a byte more, which tells a frame that is too long.
const ROOM: usize = HEADER + LARGEST_FRAME + 1;

/// What became of a look for one frame.
#[derive(Debug)]
pub(super) enum Received {
    /// The guest has one of so many bytes, without its header, once the queue is published.
    Frame(usize),
    /// It was dropped, and counted.
    Dropped,
    /// The port has none.
    Nothing,
    /// The guest gives no room for one.
    NoRoom,
    /// The port is lost.
    Lost(std::io::Error),
}

/// One receive queue.
pub(super) struct Receiver {
    pub(super) queue: Virtqueue,
    mergeable: bool,
    chain: Chain,
    list: BufferList,
    /// Chains taken from the ring, whose buffers are in the list. At most one a buffer of a system call.
    ready: VecDeque<Ready>,
    /// Bytes of all of them.
    len: usize,
    /// How much of that a frame of any size finds room in, as far as the guest gives it.
    wanted: usize,
    /// A frame that did not fit what the guest gave: its bytes, and how many of them are in guest memory, the rest being in
    /// the spill.
    spilled: Option<(usize, usize)>,
}

/// A chain to be filled.
struct Ready {
    head: u16,
    buffers: usize,
    len: usize,
}

impl Receiver {
    pub(super) fn new(queue: Virtqueue, memory: Arc<GuestMemoryMmap>, rules: Rules) -> Self {
        // Without segments to put together few frames are longer than a page, and those find their place too.
        let wanted = if rules.mergeable && rules.takes_segmented() { ROOM } else { HEADER + 4096 };
        Self {
            queue,
            mergeable: rules.mergeable,
            chain: Chain::default(),
            list: BufferList::new(memory, ROOM),
            ready: VecDeque::new(),
            len: 0,
            wanted,
            spilled: None,
        }
    }

    /// Takes a frame from `port`, if there is one and room for it.
    pub(super) fn receive(
        &mut self,
        port: &mut dyn Port,
        settings: &Settings,
        counts: &Counts,
    ) -> Result<Received, Broken> {
        if self.spilled.is_some() {
            return self.place_spilled(settings, counts);
        }
        self.gather(self.wanted)?;
        let Some(first) = self.ready.front() else { return Ok(Received::NoRoom) };
        let buffers = if self.mergeable { self.list.count() } else { first.buffers };
        let (result, held) = self.list.fill(buffers, |room| port.receive(room));
        match result {
            Ok(bytes) if !(HEADER..ROOM).contains(&bytes) => Ok(dropped(counts, DropReason::Length)),
            Ok(bytes) if bytes <= held => Ok(self.deliver(bytes, settings, counts)),
            Ok(_) if !self.mergeable => Ok(dropped(counts, DropReason::NoBuffer)),
            Ok(bytes) => {
                self.spilled = Some((bytes, held));
                self.place_spilled(settings, counts)
            }
            Err(Failure::NotNow) => Ok(Received::Nothing),
            Err(Failure::Frame(_)) => Ok(dropped(counts, DropReason::Host)),
            Err(Failure::Lost(error)) => Ok(Received::Lost(error)),
        }
    }

    /// Whether the guest must give more before anything can be received.
    pub(super) fn lacks_room(&self) -> bool {
        self.ready.is_empty() || self.spilled.is_some()
    }

    /// Takes chains until there are `wanted` bytes, or the ring is empty, or there is more than a system call takes.
    fn gather(&mut self, wanted: usize) -> Result<(), Broken> {
        while self.len < wanted && self.list.count() < MAX_IOVECS && self.queue.pop(&mut self.chain)? {
            let (head, before) = (self.chain.head, self.list.count());
            let mut len = 0;
            for segment in &self.chain.segments {
                let inside = segment.writable && self.list.push(segment.address, segment.len as usize);
                len += segment.len as usize;
                if !inside {
                    return Err(Broken::Buffer(head));
                }
            }
            // The header must fit, or the driver would not find the number of buffers (5.1.6.3.1).
            if len < HEADER {
                return Err(Broken::Short(head));
            }
            self.ready.push_back(Ready { head, buffers: self.list.count() - before, len });
            self.len += len;
        }
        Ok(())
    }

    /// Copies the end of a frame from the spill, as soon as there is enough room for it.
    fn place_spilled(&mut self, settings: &Settings, counts: &Counts) -> Result<Received, Broken> {
        let Some((bytes, held)) = self.spilled else { return Ok(Received::Nothing) };
        self.gather(bytes)?;
        if self.len >= bytes {
            self.spilled = None;
            self.list.unspill(held, bytes - held);
            return Ok(self.deliver(bytes, settings, counts));
        }
        // When the driver has nothing more to give, this frame would wait for ever.
        if self.ready.len() < self.queue.size().into() && self.list.count() < MAX_IOVECS {
            return Ok(Received::NoRoom);
        }
        self.spilled = None;
        Ok(dropped(counts, DropReason::NoBuffer))
    }

    /// Gives the frame in the first `bytes` of the buffers to the driver, if it may have it.
    fn deliver(&mut self, bytes: usize, settings: &Settings, counts: &Counts) -> Received {
        let mut spread = 0;
        let mut room = 0;
        while room < bytes {
            room += self.ready[spread].len;
            spread += 1;
        }
        let buffers = self.ready.iter().take(spread).map(|ready| ready.buffers).sum();
        let frame = self.list.first(buffers);
        if let Err(reason) = header::finish(&frame, spread as u16, settings.rules, &settings.filter) {
            return dropped(counts, reason);
        }
        let mut left = bytes;
        for ready in self.ready.drain(..spread) {
            let written = left.min(ready.len);
            self.queue.push(ready.head, written as u32);
            self.len -= ready.len;
            left -= written;
        }
        self.list.pop_front(buffers);
        counts.passed(bytes - HEADER);
        Received::Frame(bytes - HEADER)
    }
}

/// A frame was dropped; its buffers, if it got any, are for the next one.
fn dropped(counts: &Counts, reason: DropReason) -> Received {
    counts.dropped(reason);
    Received::Dropped
}
