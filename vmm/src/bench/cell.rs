//! What is measured: one kind of work on one kind of disk, done in one way.

use std::fmt::Display;
use std::num::NonZeroUsize;

use block::cache::CacheMode;
use block::engine::Aio;
use block::engine::threads::DEFAULT_THREADS;
use guest::workload::Mix;
use serde::{Serialize, Serializer};

use crate::config::DISK_POLL;

/// [`DISK_POLL`] in microseconds.
pub const POLL_US: u32 = DISK_POLL.as_micros() as u32;

/// What users write to leave the engine to skiff.
pub const AUTO: &str = "auto";

/// What the disk's file is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Content {
    /// Every block was written.
    Written,
    /// No block is there: the host answers reads without a disk, which shows what everything else costs.
    Hole,
    /// Blocks are reserved, but none was written.
    Preallocated,
    /// The image of the user's.
    Given,
}

impl Content {
    /// Those that a file of our own can have.
    pub const OWN: [Self; 3] = [Self::Written, Self::Hole, Self::Preallocated];

    /// The name that users write.
    pub fn name(self) -> &'static str {
        match self {
            Self::Written => "written",
            Self::Hole => "hole",
            Self::Preallocated => "preallocated",
            Self::Given => "given",
        }
    }
}

/// One kind of work on one kind of disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Work {
    /// What the file is made of.
    pub content: Content,
    /// Which operations.
    #[serde(serialize_with = "mix_name")]
    pub rw: Mix,
    /// Bytes of each.
    pub bs: u32,
    /// Operations in flight in each queue.
    pub depth: u16,
    /// Queues.
    pub queues: u16,
    /// Threads beside it that do nothing but keep CPUs busy.
    pub busy: u16,
}

/// How the guest learns that requests completed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Completion {
    /// It looks at the used ring again and again.
    #[default]
    Poll,
    /// It sleeps until an interrupt.
    Interrupt,
}

impl Completion {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Poll, Self::Interrupt];

    /// The name that users write.
    pub fn name(self) -> &'static str {
        match self {
            Self::Poll => "poll",
            Self::Interrupt => "interrupt",
        }
    }
}

/// One way to do it. The default is that of a disk of which nothing is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Way {
    /// What moves the bytes; `None` leaves it to skiff.
    #[serde(serialize_with = "aio_name")]
    pub aio: Option<Aio>,
    /// Through or past the page cache.
    #[serde(serialize_with = "cache_name")]
    pub cache: CacheMode,
    /// Whether doorbells arrive through ioeventfds.
    pub ioeventfd: bool,
    /// How long a worker may look for work before it sleeps, in microseconds.
    pub poll_us: u32,
    /// Whether requests for neighbouring bytes go to the host as one.
    pub merge: bool,
    /// The most threads of a pool.
    pub thread_pool_max: NonZeroUsize,
    /// How the guest learns that requests completed.
    pub completion: Completion,
}

impl Default for Way {
    fn default() -> Self {
        Self {
            aio: None,
            cache: CacheMode::None,
            ioeventfd: true,
            poll_us: POLL_US,
            merge: true,
            thread_pool_max: DEFAULT_THREADS,
            completion: Completion::Poll,
        }
    }
}

impl Way {
    /// The name of [`Way::aio`] that users write.
    pub fn aio_name(&self) -> &'static str {
        self.aio.map_or(AUTO, Aio::name)
    }

    /// What is not as usual besides engine and cache mode, each as an option and its value.
    pub fn unusual(&self) -> Vec<String> {
        let usual = Self::default();
        let switch = |on| if on { "on" } else { "off" };
        let mut words = Vec::new();
        let mut word = |differs: bool, name: &str, value: &dyn Display| {
            words.extend(differs.then(|| format!("{name}={value}")));
        };
        word(self.ioeventfd != usual.ioeventfd, "ioeventfd", &switch(self.ioeventfd));
        word(self.poll_us != usual.poll_us, "poll-us", &self.poll_us);
        word(self.merge != usual.merge, "merge", &switch(self.merge));
        word(self.thread_pool_max != usual.thread_pool_max, "thread-pool-max", &self.thread_pool_max);
        word(self.completion != usual.completion, "completion", &self.completion.name());
        words
    }
}

/// One cell of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Cell {
    /// What is done.
    #[serde(flatten)]
    pub work: Work,
    /// How.
    #[serde(flatten)]
    pub way: Way,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn mix_name<S: Serializer>(mix: &Mix, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(mix.name())
}

#[expect(clippy::trivially_copy_pass_by_ref, clippy::ref_option, reason = "serde passes references")]
fn aio_name<S: Serializer>(aio: &Option<Aio>, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(aio.map_or(AUTO, Aio::name))
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn cache_name<S: Serializer>(cache: &CacheMode, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(cache.name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_unusual_is_told_in_the_words_of_the_options() {
        assert_eq!(Way::default().unusual(), Vec::<String>::new());
        let way = Way {
            ioeventfd: false,
            poll_us: 0,
            merge: false,
            thread_pool_max: NonZeroUsize::MIN,
            completion: Completion::Interrupt,
            ..Way::default()
        };
        let words = ["ioeventfd=off", "poll-us=0", "merge=off", "thread-pool-max=1", "completion=interrupt"];
        assert_eq!((way.aio_name(), way.unusual()), ("auto", words.map(str::to_owned).to_vec()));
    }
}
