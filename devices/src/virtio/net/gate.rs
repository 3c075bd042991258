//! Holds the frames of one direction back for the rate limits of their interface. Owned by the worker of the pair, which never
//! waits in it.

use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use block::throttle::{BURST, Direction, Limits as Rated, Rates, Throttle};

/// What an interface may do at most, each if it is given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes a second to the guest.
    pub rx_bytes: Option<NonZeroU64>,
    /// Bytes a second from the guest.
    pub tx_bytes: Option<NonZeroU64>,
    /// Frames a second, both ways together.
    pub frames: Option<NonZeroU64>,
}

impl Limits {
    /// The limits at work, shared by all pairs; `None` if there are none. An idle interface saves up what its rates yield in
    /// 100 ms.
    pub(super) fn throttle(&self, now: Instant) -> Limited {
        let rated = Rated {
            requests: Rates { total: self.frames, ..Rates::default() },
            bytes: Rates { total: None, read: self.rx_bytes, write: self.tx_bytes },
            burst: BURST,
        };
        (*self != Self::default()).then(|| Arc::new(Mutex::new(Throttle::new(&rated, now))))
    }
}

/// The limits of an interface, shared by its pairs; none if it has none.
pub(super) type Limited = Option<Arc<Mutex<Throttle>>>;

/// The gate of one direction. A frame is weighed when it has passed, for what comes is not known before; so one frame passes
/// early, and the next one waits the longer.
pub(super) struct Gate {
    throttle: Limited,
    direction: Direction,
    /// Closed until then.
    due: Option<Instant>,
}

impl Gate {
    /// To the guest, or from it.
    pub(super) fn new(throttle: Limited, direction: Direction) -> Self {
        Self { throttle, direction, due: None }
    }

    /// A frame of `bytes` passed.
    pub(super) fn passed(&mut self, bytes: usize) {
        let Some(throttle) = &self.throttle else { return };
        let now = Instant::now();
        let mut throttle = throttle.lock().unwrap_or_else(PoisonError::into_inner);
        let due = throttle.reserve(self.direction, bytes as u64, now);
        self.due = Some(due).filter(|due| *due > now);
    }

    /// Whether a frame may pass.
    pub(super) fn is_open(&mut self) -> bool {
        self.due = self.due.filter(|due| *due > Instant::now());
        self.due.is_none()
    }

    /// How long it stays closed.
    pub(super) fn patience(&self) -> Option<Duration> {
        self.due.map(|due| due.saturating_duration_since(Instant::now()))
    }
}
