//! What becomes of a request that the host fails: QEMU's rerror= and werror=. Used by the queues' workers.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use block::engine::{Op, OpKind};
use vmm_sys_util::eventfd::EventFd;

use crate::pause::PauseLine;

/// What a host's error does. The meaning is QEMU's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// The guest gets VIRTIO_BLK_S_IOERR.
    #[default]
    Report,
    /// The guest is told that all is well.
    Ignore,
    /// The machine pauses; when it goes on the request is tried again.
    Stop,
    /// As `Stop` when there is no space left on the host, else as `Report`. Not for reads.
    Enospc,
}

impl OnError {
    /// What a write, or a flush, can do.
    pub const WRITES: [Self; 4] = [Self::Report, Self::Ignore, Self::Stop, Self::Enospc];
    /// What a read can do.
    pub const READS: [Self; 3] = [Self::Report, Self::Ignore, Self::Stop];

    /// The name that users write.
    pub fn name(self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Ignore => "ignore",
            Self::Stop => "stop",
            Self::Enospc => "enospc",
        }
    }
}

/// What errors do on one disk.
#[derive(Clone, Debug)]
pub struct Errors {
    /// Of reads.
    pub read: OnError,
    /// Of everything else.
    pub write: OnError,
    /// What stops the machine.
    pub pause: Arc<PauseLine>,
}

/// What becomes of one failed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Report,
    Ignore,
    Retry,
}

/// The failed requests of one queue that wait for the machine to go on. Never more than the queue has descriptors.
pub(super) struct Held {
    errors: Option<Errors>,
    failed: VecDeque<(Op, u16)>,
}

impl Held {
    /// None yet. Without `errors` there will never be any: all are reported.
    pub(super) fn new(errors: Option<Errors>) -> Self {
        Self { errors, failed: VecDeque::new() }
    }

    /// Written when the machine goes on; to be watched edge-triggered.
    pub(super) fn released(&self) -> Option<&EventFd> {
        self.errors.as_ref().map(|errors| errors.pause.released())
    }

    /// What to do with a request of `kind` that failed with `error`.
    pub(super) fn verdict(&self, kind: OpKind, error: &io::Error) -> Verdict {
        let Some(errors) = &self.errors else { return Verdict::Report };
        // A segment outside of guest memory is the driver's mistake, and would be so again.
        if error.raw_os_error() == Some(libc::EFAULT) {
            return Verdict::Report;
        }
        match if kind == OpKind::Read { errors.read } else { errors.write } {
            OnError::Ignore => Verdict::Ignore,
            OnError::Stop => Verdict::Retry,
            OnError::Enospc if error.raw_os_error() == Some(libc::ENOSPC) => Verdict::Retry,
            OnError::Report | OnError::Enospc => Verdict::Report,
        }
    }

    /// Keeps what is to be tried again and pauses the machine for `reason`.
    pub(super) fn keep(&mut self, op: Op, tag: u16, reason: String) {
        self.failed.push_back((op, tag));
        if let Some(errors) = &self.errors {
            errors.pause.pause(reason);
        }
    }

    /// A request that is to be tried again now: there is one until none is kept, if the machine goes on.
    pub(super) fn due(&mut self) -> Option<(Op, u16)> {
        let errors = self.errors.as_ref().filter(|_| !self.failed.is_empty())?;
        if errors.pause.is_paused() { None } else { self.failed.pop_front() }
    }
}
