//! Where requests wait for the rate limits of their disk. Owned by a queue's worker, which never waits in it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use block::engine::{Op, OpKind};
use block::throttle::{Direction, Throttle};

/// The limits of a disk, shared by its queues; none if it has none.
pub(super) type Limited = Option<Arc<Mutex<Throttle>>>;

/// The gate of one queue. What waits keeps its order among reads, and among the rest; flushes pass.
pub(super) struct Gate {
    throttle: Limited,
    reads: Lane,
    writes: Lane,
}

/// Requests that wait, the first of them until `due`: it alone has reserved.
#[derive(Default)]
struct Lane {
    waiting: VecDeque<(Op, u16)>,
    due: Option<Instant>,
}

impl Gate {
    pub(super) fn new(throttle: Limited) -> Self {
        Self { throttle, reads: Lane::default(), writes: Lane::default() }
    }

    /// Gives `op` back if it may go to the engine now; else keeps it until [`Gate::due`] yields it.
    pub(super) fn admit(&mut self, op: Op, tag: u16) -> Option<(Op, u16)> {
        let (Some(throttle), Some(direction)) = (&self.throttle, direction(&op)) else { return Some((op, tag)) };
        let lane = if direction == Direction::Read { &mut self.reads } else { &mut self.writes };
        lane.waiting.push_back((op, tag));
        // Whoever waits before it has reserved already.
        if lane.due.is_some() { None } else { lane.next(&mut lock(throttle), direction, Instant::now()) }
    }

    /// A request whose time has come, if there is one. Ask until there is none.
    pub(super) fn due(&mut self) -> Option<(Op, u16)> {
        let throttle = self.throttle.as_ref().filter(|_| self.reads.due.or(self.writes.due).is_some())?;
        let now = Instant::now();
        for (lane, direction) in [(&mut self.reads, Direction::Read), (&mut self.writes, Direction::Write)] {
            if lane.due.is_some_and(|due| due <= now) {
                let first = lane.waiting.pop_front();
                lane.reserve(&mut lock(throttle), direction, now);
                return first;
            }
        }
        None
    }

    /// Milliseconds until something is due, rounded up; -1 if nothing waits.
    pub(super) fn patience(&self) -> i32 {
        let due = [self.reads.due, self.writes.due].into_iter().flatten().min();
        due.map_or(-1, |due| {
            let nanos = due.saturating_duration_since(Instant::now()).as_nanos();
            i32::try_from(nanos.div_ceil(1_000_000)).unwrap_or(i32::MAX)
        })
    }
}

impl Drop for Gate {
    /// Gives back what was reserved and will not be used, so that the next driver does not pay for it.
    fn drop(&mut self) {
        let Some(throttle) = &self.throttle else { return };
        for (lane, direction) in [(&self.reads, Direction::Read), (&self.writes, Direction::Write)] {
            if let (Some(_), Some((op, _))) = (lane.due, lane.waiting.front()) {
                lock(throttle).refund(direction, bytes(op));
            }
        }
    }
}

impl Lane {
    /// The first request reserves; it comes back if it need not wait.
    fn next(&mut self, throttle: &mut Throttle, direction: Direction, now: Instant) -> Option<(Op, u16)> {
        self.reserve(throttle, direction, now);
        if self.due? > now {
            return None;
        }
        self.due = None;
        self.waiting.pop_front()
    }

    /// The first request, if there is one, takes what it needs.
    fn reserve(&mut self, throttle: &mut Throttle, direction: Direction, now: Instant) {
        self.due = self.waiting.front().map(|(op, _)| throttle.reserve(direction, bytes(op), now));
    }
}

fn lock(throttle: &Mutex<Throttle>) -> MutexGuard<'_, Throttle> {
    throttle.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The limits a request is subject to; none for a flush. One that changes a range is a write.
fn direction(op: &Op) -> Option<Direction> {
    match op.kind {
        OpKind::Read => Some(Direction::Read),
        OpKind::Write { .. } | OpKind::Discard { .. } | OpKind::WriteZeroes { .. } => Some(Direction::Write),
        OpKind::Flush => None,
    }
}

/// Bytes of data: what the host moves, or may have to write. A discard has none.
fn bytes(op: &Op) -> u64 {
    match op.kind {
        OpKind::WriteZeroes { .. } => op.ranges.iter().map(|range| range.end - range.start).sum(),
        _ => op.segments.iter().map(|segment| u64::from(segment.1)).sum(),
    }
}
