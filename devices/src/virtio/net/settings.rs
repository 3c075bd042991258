//! What a driver sets while the device runs. The control queue changes it; each worker has a copy, which it renews before it
//! receives, so that what was set holds everywhere before the driver is told so.

use std::io;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::filter::Filter;
use super::header::Rules;

/// The settings of one interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Settings {
    pub(super) rules: Rules,
    pub(super) filter: Filter,
    /// Pairs of queues that receive, from the first on.
    pub(super) pairs: u16,
}

/// The settings as the workers share them.
pub(super) struct Shared {
    current: Mutex<Settings>,
    /// Grows with each change.
    generation: AtomicU64,
    /// Pairs that have a worker.
    workers: u16,
    /// Of those, besides the one that changes them, how many have not seen the last change.
    unaware: AtomicU16,
    /// Written at a change. Watched edge-triggered, and never read.
    changed: EventFd,
    /// Written when all have seen it. The same.
    seen: EventFd,
}

impl Shared {
    /// # Errors
    /// When the host gives no eventfds.
    pub(super) fn new(settings: Settings, workers: u16) -> io::Result<Self> {
        Ok(Self {
            current: Mutex::new(settings),
            generation: AtomicU64::new(0),
            workers,
            unaware: AtomicU16::new(0),
            changed: EventFd::new(EFD_NONBLOCK)?,
            seen: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    pub(super) fn current(&self) -> MutexGuard<'_, Settings> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn workers(&self) -> u16 {
        self.workers
    }

    pub(super) fn changed(&self) -> &EventFd {
        &self.changed
    }

    pub(super) fn seen(&self) -> &EventFd {
        &self.seen
    }

    /// Changes the settings for all workers. Not before [`Shared::is_seen`] of the last change.
    pub(super) fn change(&self, settings: Settings) {
        *self.current() = settings;
        self.unaware.store(self.workers - 1, Ordering::Release);
        self.generation.fetch_add(1, Ordering::AcqRel);
        signal(&self.changed);
    }

    /// Another worker has seen the last change.
    pub(super) fn acknowledge(&self) {
        if self.unaware.fetch_sub(1, Ordering::AcqRel) == 1 {
            signal(&self.seen);
        }
    }

    /// Whether all other workers have seen the last change.
    pub(super) fn is_seen(&self) -> bool {
        self.unaware.load(Ordering::Acquire) == 0
    }
}

/// One worker's copy.
pub(super) struct Copy {
    pub(super) settings: Settings,
    generation: u64,
}

impl Copy {
    pub(super) fn new(shared: &Shared) -> Self {
        let settings = shared.current();
        Self { settings: settings.clone(), generation: shared.generation.load(Ordering::Acquire) }
    }

    /// Whether they had changed. When they hold, the worker says so with [`Shared::acknowledge`], unless it did it.
    pub(super) fn renew(&mut self, shared: &Shared) -> bool {
        let generation = shared.generation.load(Ordering::Acquire);
        if generation == self.generation {
            return false;
        }
        self.generation = generation;
        self.settings.clone_from(&shared.current());
        true
    }
}

fn signal(event: &EventFd) {
    // Nobody reads it, and it takes 2^64 writes to fill it.
    let _ = event.write(1);
}
