//! Which engine moves a disk's bytes: a choice of the user's, with QEMU's words.

use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;

use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::snapshot::Snapshot;
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
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("aio={}: {reason}; {remedy}, or use aio=threads", .aio.name())]
pub struct Unusable {
    aio: Aio,
    reason: String,
    remedy: &'static str,
}

impl Unusable {
    /// `aio` cannot be used for `reason`; `remedy` is what to do about it. Each is a part of a line.
    pub(crate) fn new(aio: Aio, reason: String, remedy: &'static str) -> Self {
        Self { aio, reason, remedy }
    }

    /// The engine.
    pub fn aio(&self) -> Aio {
        self.aio
    }

    /// Why not, in a line.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// What to do about it, in a line.
    pub fn remedy(&self) -> &'static str {
        self.remedy
    }
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

    /// Asks the host for what a disk of that many `queues` takes, and gives it back.
    ///
    /// # Errors
    /// When it is not to be had.
    pub fn probe(self, queues: u16) -> Result<(), Unusable> {
        let (reason, remedy) = match self {
            Self::Threads => return Ok(()),
            Self::Native => match native::probe(queues) {
                Ok(()) => return Ok(()),
                Err(missing) => (missing.to_string(), missing.remedy()),
            },
            Self::IoUring => match uring::probe(queues) {
                Ok(()) => return Ok(()),
                Err(missing) => (missing.to_string(), missing.remedy()),
            },
        };
        Err(Unusable::new(self, reason, remedy))
    }

    /// An engine for one queue of `disk`, whose threads are called `name` (at most 15 bytes are visible to the host).
    ///
    /// # Errors
    /// What the host refuses.
    pub fn start(self, disk: Arc<Disk>, name: &str) -> io::Result<Box<dyn Engine>> {
        self.start_with(disk, name, DEFAULT_THREADS)
    }

    /// As [`Aio::start`]; if it is a pool, of at most so many `threads`.
    fn start_with(self, disk: Arc<Disk>, name: &str, threads: NonZeroUsize) -> io::Result<Box<dyn Engine>> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        let Some(backing) = disk.backing() else { return self.announce(disk, name, threads, event) };
        let image = self.announce(backing.image.clone(), name, threads, event.try_clone()?)?;
        let overlay = self.announce(disk.clone(), name, threads, event)?;
        Ok(Box::new(Snapshot::new(image, overlay, disk)))
    }

    /// An engine for the file of `disk` alone, which announces on `event`.
    fn announce(
        self,
        disk: Arc<Disk>,
        name: &str,
        threads: NonZeroUsize,
        event: EventFd,
    ) -> io::Result<Box<dyn Engine>> {
        match self {
            Self::Threads => Ok(Box::new(ThreadPool::announcing(disk, threads, name, event)?)),
            Self::Native => native::start(disk, name, event),
            Self::IoUring => uring::start(disk, name, event),
        }
    }
}

/// The engines for a disk, best first: the next is for where the host refuses the one before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Engines {
    order: Vec<Aio>,
    threads: NonZeroUsize,
}

impl Default for Engines {
    fn default() -> Self {
        Self::only(Aio::default())
    }
}

impl Engines {
    /// This one or none.
    pub fn only(aio: Aio) -> Self {
        Self::new(vec![aio])
    }

    /// These in their order.
    ///
    /// # Panics
    /// If there are none.
    pub(crate) fn new(engines: Vec<Aio>) -> Self {
        assert!(!engines.is_empty(), "a disk has an engine");
        Self { order: engines, threads: DEFAULT_THREADS }
    }

    /// These, with at most so many threads in the pool of each queue if they are [`Aio::Threads`].
    #[must_use]
    pub fn with_threads(self, threads: NonZeroUsize) -> Self {
        Self { threads, ..self }
    }

    /// The one that is meant to run.
    pub fn best(&self) -> Aio {
        self.order[0]
    }

    /// What is tried after it, in order.
    pub fn fallbacks(&self) -> &[Aio] {
        &self.order[1..]
    }

    /// An engine for one queue of `disk`, as [`Aio::start`]: the best that starts. If that is not the best of all, also a
    /// line that says why.
    ///
    /// # Errors
    /// What the host refuses, when none starts.
    pub fn start(&self, disk: &Arc<Disk>, name: &str) -> io::Result<(Box<dyn Engine>, Option<String>)> {
        let mut failed = Vec::new();
        for &aio in &self.order {
            match aio.start_with(disk.clone(), name, self.threads) {
                Ok(engine) if failed.is_empty() => return Ok((engine, None)),
                Ok(engine) => {
                    return Ok((engine, Some(format!("{}; it runs on aio={}", failed.join("; "), aio.name()))));
                }
                Err(error) if Some(&aio) == self.order.last() => return Err(error),
                Err(error) => failed.push(format!("aio={} cannot be started now ({error})", aio.name())),
            }
        }
        unreachable!("there is an engine")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::OpKind;
    use crate::engine::conformance::{disk, memory, op};

    #[test]
    fn a_pool_has_as_many_threads_as_it_may() {
        let (_dir, _path, disk) = disk(1 << 20);
        let memory = memory(1 << 20);
        let engines = Engines::only(Aio::Threads).with_threads(NonZeroUsize::MIN);
        let (mut engine, _) = engines.start(&disk, "test-alone-io").unwrap();
        for tag in 0..200 {
            engine.push(op(OpKind::Read, 0, &[(0, 4096)], &memory), tag);
        }
        let mut completions = Vec::new();
        engine.drain(&mut completions);
        assert_eq!(completions.len(), 200);
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        let names = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
        assert_eq!(names.filter(|name| name == "test-alone-io\n").count(), 1);
    }
}
