//! One queue of the disk under load: a fixed number of requests, each with its own header, buffer and descriptors, that
//! are used again and again.

use crate::blk::{Kind, OK, SECTOR};
use crate::cpu::{self, Mmio};
use crate::memory;
use crate::report::{Outcome, holds};
use crate::virtqueue::{Buffer, Virtqueue};
use crate::workload::{Operation, pattern};

/// A request between two turns of the rings.
#[derive(Clone, Copy)]
struct Slot {
    operation: Operation,
    /// It reads back what it wrote.
    again: bool,
    started: u64,
}

const SLOT_BYTES: u64 = size_of::<Slot>() as u64;

/// The parts of a request: its header, its data and its status.
pub(super) const PARTS: u16 = 3;

/// How a request ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Good,
    /// The device says that it failed.
    Failed,
    /// What was read is not what had to be there.
    Mismatch,
}

/// A completed request.
pub(super) struct Done {
    /// Its number, for the next one in its place.
    pub(super) number: u16,
    pub(super) end: End,
    pub(super) write: bool,
    /// It read back what it had written.
    pub(super) again: bool,
    pub(super) started: u64,
    pub(super) ended: u64,
}

/// One queue and its requests.
pub(super) struct Lane {
    pub(super) queue: Virtqueue,
    depth: u16,
    block: u32,
    /// Verify with the pattern of this seed, and of the one after it for what was written.
    verify: Option<u64>,
    slots: Mmio,
    headers: Mmio,
    statuses: Mmio,
    data: Mmio,
}

impl Lane {
    /// `depth` requests of `block` bytes, a multiple of 512, for which `queue` has room. Buffers are filled once with
    /// something that is not zero.
    pub(super) fn new(queue: Virtqueue, depth: u16, block: u32, verify: Option<u64>) -> Self {
        let entries = u64::from(depth);
        let lane = Self {
            queue,
            depth,
            block,
            verify,
            slots: memory::allocate(entries * SLOT_BYTES),
            headers: memory::allocate(entries * 16),
            statuses: memory::allocate(entries),
            data: memory::allocate(entries * u64::from(block)),
        };
        for offset in (0..entries * u64::from(block)).step_by(8) {
            lane.data.write(offset, pattern(0, offset));
        }
        lane
    }

    /// How many requests it keeps in flight.
    pub(super) fn depth(&self) -> u16 {
        self.depth
    }

    fn buffer(&self, number: u16) -> Mmio {
        Mmio(self.data.0 + u64::from(number) * u64::from(self.block))
    }

    /// Makes `operation` available as request `number`, which is not in flight.
    pub(super) fn start(&mut self, number: u16, operation: Operation) {
        if let Some(seed) = self.verify {
            let seed = if operation.write { seed + 1 } else { !seed };
            let buffer = self.buffer(number);
            for at in (0..u64::from(self.block)).step_by(8) {
                buffer.write(at, pattern(seed, operation.offset + at));
            }
        }
        self.publish(number, Slot { operation, again: false, started: cpu::ticks() });
    }

    /// Reads what request `number` wrote.
    pub(super) fn read_back(&mut self, number: u16) {
        let slot = self.slots.read::<Slot>(u64::from(number) * SLOT_BYTES);
        self.buffer(number).write(0, 0_u64);
        self.publish(number, Slot { again: true, started: cpu::ticks(), ..slot });
    }

    fn publish(&mut self, number: u16, slot: Slot) {
        self.slots.write(u64::from(number) * SLOT_BYTES, slot);
        let writes = slot.operation.write && !slot.again;
        let kind = if writes { Kind::Write } else { Kind::Read };
        let header = Mmio(self.headers.0 + u64::from(number) * 16);
        header.write(0, kind as u32);
        header.write(8, slot.operation.offset / SECTOR);
        let status = Mmio(self.statuses.0 + u64::from(number));
        status.write(0, !OK);
        let chain = [
            Buffer { address: header.0, bytes: 16, writable: false },
            Buffer { address: self.buffer(number).0, bytes: self.block, writable: !writes },
            Buffer { address: status.0, bytes: 1, writable: true },
        ];
        self.queue.add_at(number * self.queue.taken_by(PARTS), &chain);
    }

    /// Takes a completed request.
    pub(super) fn take(&mut self) -> Outcome<Option<Done>> {
        let Some((head, _)) = self.queue.take() else { return Ok(None) };
        let (number, ended) = (head / self.queue.taken_by(PARTS), cpu::ticks());
        holds("only requests in flight complete", number < self.depth)?;
        let slot = self.slots.read::<Slot>(u64::from(number) * SLOT_BYTES);
        let write = slot.operation.write && !slot.again;
        let end = match self.statuses.read::<u8>(number.into()) {
            OK if write || self.is_right(number, &slot) => End::Good,
            OK => End::Mismatch,
            _ => End::Failed,
        };
        Ok(Some(Done { number, end, write, again: slot.again, started: slot.started, ended }))
    }

    /// Whether each word has the disk's first pattern or the one of a write; after a write, the latter.
    fn is_right(&self, number: u16, slot: &Slot) -> bool {
        let Some(seed) = self.verify else { return true };
        let buffer = self.buffer(number);
        (0..u64::from(self.block)).step_by(8).all(|at| {
            let (word, offset) = (buffer.read::<u64>(at), slot.operation.offset + at);
            word == pattern(seed + 1, offset) || !slot.again && word == pattern(seed, offset)
        })
    }
}
