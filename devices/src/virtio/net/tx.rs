//! Sending: frames from the chains of a transmit queue to a port. Owned by the worker of the pair.

use std::io;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::Broken;
use super::backend::{Failure, HEADER, LARGEST_FRAME, Port};
use super::buffers::{BufferList, MAX_IOVECS};
use super::statistics::{Counts, DropReason};
use crate::virtio::queue::{Chain, Virtqueue};

/// Bytes of an Ethernet header, the shortest frame.
const ETHERNET: usize = 14;

/// What became of a look for one frame.
#[derive(Debug)]
pub(super) enum Sent {
    /// The port has one of so many bytes, without its header.
    Frame(usize),
    /// It was dropped, and counted.
    Dropped,
    /// The driver has none.
    Nothing,
    /// The port takes none just now.
    Blocked,
    /// The port is lost.
    Lost(io::Error),
}

/// One transmit queue.
pub(super) struct Sender {
    pub(super) queue: Virtqueue,
    chain: Chain,
    list: BufferList,
    /// The head of the chain in the list and the bytes of its frame, if one waits for the port.
    pending: Option<(u16, usize)>,
}

impl Sender {
    pub(super) fn new(queue: Virtqueue, memory: Arc<GuestMemoryMmap>) -> Self {
        Self { queue, chain: Chain::default(), list: BufferList::new(memory, 0), pending: None }
    }

    /// Gives a frame to `port`, or drops it if there is none because it is lost.
    pub(super) fn send(&mut self, port: Option<&mut dyn Port>, counts: &Counts) -> Result<Sent, Broken> {
        if self.pending.is_none() && !self.take(counts)? {
            return Ok(Sent::Nothing);
        }
        // Taken and dropped already.
        let Some((head, bytes)) = self.pending else { return Ok(Sent::Dropped) };
        let Some(port) = port else {
            counts.dropped(DropReason::Link);
            self.finish(head);
            return Ok(Sent::Dropped);
        };
        let sent = match port.send(&self.list.first(self.list.count())) {
            Ok(()) => {
                counts.passed(bytes);
                Sent::Frame(bytes)
            }
            Err(Failure::NotNow) => return Ok(Sent::Blocked),
            Err(Failure::Lost(error)) => return Ok(Sent::Lost(error)),
            Err(Failure::Frame(_)) => {
                counts.dropped(DropReason::Host);
                Sent::Dropped
            }
        };
        self.finish(head);
        Ok(sent)
    }

    /// Takes the next chain; `false` if there is none. What cannot be a frame is dropped.
    fn take(&mut self, counts: &Counts) -> Result<bool, Broken> {
        if !self.queue.pop(&mut self.chain)? {
            return Ok(false);
        }
        let (head, mut len) = (self.chain.head, 0);
        for segment in &self.chain.segments {
            len += segment.len as usize;
            if segment.writable || !self.list.push(segment.address, segment.len as usize) {
                return Err(Broken::Buffer(head));
            }
        }
        let fits = (HEADER + ETHERNET..=HEADER + LARGEST_FRAME).contains(&len) && self.list.count() <= MAX_IOVECS;
        if fits {
            self.pending = Some((head, len - HEADER));
        } else {
            counts.dropped(DropReason::Length);
            self.finish(head);
        }
        Ok(true)
    }

    /// Gives the chain in the list back to the driver.
    fn finish(&mut self, head: u16) {
        self.queue.push(head, 0);
        self.list.pop_front(self.list.count());
        self.pending = None;
    }
}
