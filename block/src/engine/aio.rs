//! Which engine moves a disk's bytes: a choice of the user's, with QEMU's words.

use std::io;
use std::sync::Arc;

use thiserror::Error;

use super::threads::{DEFAULT_THREADS, ThreadPool};
use super::{Engine, native, uring};
use crate::cache::CacheMode;
use crate::disk::Disk;

/// An engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Aio {
    /// A pool of threads with blocking system calls. Works everywhere.
    #[default]
    Threads,
    /// Linux AIO. Asynchronous only past the page cache.
    Native,
    /// io_uring.
    IoUring,
}

/// Why an engine cannot be used on this host. One line with the remedy.
#[derive(Debug, Error)]
#[error("aio={}: {reason}; {remedy}, or use aio=threads", .aio.name())]
pub struct Unusable {
    aio: Aio,
    reason: String,
    remedy: &'static str,
}

impl Aio {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Threads, Self::Native, Self::IoUring];

    /// The name that users write.
    pub fn name(self) -> &'static str {
        match self {
            Self::Threads => "threads",
            Self::Native => "native",
            Self::IoUring => "io_uring",
        }
    }

    /// Whether it can serve a disk that was opened so.
    pub fn goes_with(self, cache: CacheMode) -> bool {
        self != Self::Native || cache.is_direct()
    }

    /// Asks the host for one, and gives it back.
    ///
    /// # Errors
    /// When there is none to be had.
    pub fn probe(self) -> Result<(), Unusable> {
        let (reason, remedy) = match self {
            Self::Threads => return Ok(()),
            Self::Native => match native::probe() {
                Ok(()) => return Ok(()),
                Err(missing) => (missing.to_string(), missing.remedy()),
            },
            Self::IoUring => match uring::probe() {
                Ok(()) => return Ok(()),
                Err(missing) => (missing.to_string(), missing.remedy()),
            },
        };
        Err(Unusable { aio: self, reason, remedy })
    }

    /// An engine for one queue of `disk`, whose threads are called `name` (at most 15 bytes are visible to the host).
    ///
    /// # Errors
    /// What the host refuses.
    pub fn start(self, disk: Arc<Disk>, name: &str) -> io::Result<Box<dyn Engine>> {
        match self {
            Self::Threads => Ok(Box::new(ThreadPool::new(disk, DEFAULT_THREADS, name)?)),
            Self::Native => native::start(disk, name),
            Self::IoUring => uring::start(disk, name),
        }
    }
}
