//! What is measured: the cells of the table, and against what.

use std::fmt::Display;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::slice;
use std::time::Duration;

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

/// The values of each property; the cells are all combinations that exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Axes {
    /// See [`Work::content`].
    pub contents: Vec<Content>,
    /// See [`Work::rw`], with a block size of its own or in each of `blocks`.
    pub mixes: Vec<(Mix, Option<u32>)>,
    /// See [`Work::bs`].
    pub blocks: Vec<u32>,
    /// See [`Work::depth`].
    pub depths: Vec<u16>,
    /// See [`Work::queues`].
    pub queues: Vec<u16>,
    /// See [`Work::busy`].
    pub busy: Vec<u16>,
    /// See [`Way::aio`].
    pub engines: Vec<Option<Aio>>,
    /// See [`Way::cache`].
    pub caches: Vec<CacheMode>,
    /// See [`Way::ioeventfd`].
    pub ioeventfds: Vec<bool>,
    /// See [`Way::poll_us`].
    pub polls: Vec<u32>,
    /// See [`Way::merge`].
    pub merges: Vec<bool>,
    /// See [`Way::thread_pool_max`].
    pub pools: Vec<NonZeroUsize>,
    /// See [`Way::completion`].
    pub completions: Vec<Completion>,
}

/// One property with all of its values: each of `some` in each of its forms.
fn each<T: Copy, V>(some: Vec<T>, values: &[V], with: impl Fn(T, &V) -> T) -> Vec<T> {
    some.into_iter().flat_map(|one| values.iter().map(|value| with(one, value)).collect::<Vec<_>>()).collect()
}

impl Axes {
    /// Every kind of work, those on the same disk together.
    fn works(&self) -> Vec<Work> {
        let mut works = Vec::new();
        for &content in &self.contents {
            for &(rw, own) in &self.mixes {
                for &bs in own.as_ref().map_or(self.blocks.as_slice(), slice::from_ref) {
                    works.push(Work { content, rw, bs, depth: 0, queues: 0, busy: 0 });
                }
            }
        }
        works = each(works, &self.queues, |work, &queues| Work { queues, ..work });
        works = each(works, &self.busy, |work, &busy| Work { busy, ..work });
        each(works, &self.depths, |work, &depth| Work { depth, ..work })
    }

    /// Every way that exists: Linux AIO goes past the page cache only, and only threads are a pool.
    fn ways(&self) -> Vec<Way> {
        let mut ways = Vec::new();
        for &aio in &self.engines {
            let pools = if aio == Some(Aio::Threads) { self.pools.as_slice() } else { &[DEFAULT_THREADS] };
            for &cache in self.caches.iter().filter(|cache| aio.is_none_or(|aio| aio.goes_with(**cache))) {
                let way = Way { aio, cache, ..Way::default() };
                ways.extend(pools.iter().map(|&thread_pool_max| Way { thread_pool_max, ..way }));
            }
        }
        ways = each(ways, &self.ioeventfds, |way, &ioeventfd| Way { ioeventfd, ..way });
        ways = each(ways, &self.polls, |way, &poll_us| Way { poll_us, ..way });
        ways = each(ways, &self.merges, |way, &merge| Way { merge, ..way });
        each(ways, &self.completions, |way, &completion| Way { completion, ..way })
    }

    /// The cells in the order of the table: those of one kind of work together.
    pub fn cells(&self) -> Vec<Cell> {
        let ways = self.ways();
        self.works().into_iter().flat_map(|work| ways.iter().map(move |&way| Cell { work, way })).collect()
    }
}

/// Who does the work of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Subject {
    /// A guest of skiff.
    Skiff,
    /// The same engine on the host, without a machine around it.
    Host,
    /// The same guest under QEMU, with an I/O thread.
    Qemu,
}

impl Subject {
    /// The name that users write.
    pub fn name(self) -> &'static str {
        match self {
            Self::Skiff => "skiff",
            Self::Host => "host",
            Self::Qemu => "qemu",
        }
    }
}

/// Where the disk is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// An image or block device of the user's.
    Given(PathBuf),
    /// Files of our own in this folder, of so many bytes each.
    Own(PathBuf, u64),
}

/// A whole run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The cells.
    pub axes: Axes,
    /// The disk.
    pub place: Place,
    /// How long each measurement counts.
    pub runtime: Duration,
    /// How long each runs before it counts.
    pub warm_up: Duration,
    /// How often each cell is measured.
    pub repeat: u32,
    /// What skiff is compared with.
    pub against: Vec<Subject>,
    /// Keep the vCPU on one CPU and everything else off it.
    pub pin: bool,
    /// Of the order of the cells and of the operations.
    pub seed: u64,
}

impl Plan {
    /// Skiff and what it is compared with.
    pub fn subjects(&self) -> Vec<Subject> {
        [Subject::Skiff].into_iter().chain(self.against.iter().copied()).collect()
    }

    /// Measurements in all.
    pub fn measurements(&self) -> usize {
        self.axes.cells().len() * self.subjects().len() * self.repeat as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_all_combinations_that_exist() {
        let axes = Axes {
            contents: vec![Content::Written, Content::Hole],
            mixes: vec![(Mix::RandRead, None), (Mix::Read, Some(1 << 20))],
            blocks: vec![4096, 65536],
            depths: vec![1, 32],
            queues: vec![1],
            busy: vec![0],
            engines: Aio::ALL.map(Some).into_iter().chain([None]).collect(),
            caches: vec![CacheMode::None, CacheMode::Writeback],
            ioeventfds: vec![true],
            polls: vec![POLL_US],
            merges: vec![true],
            pools: vec![DEFAULT_THREADS],
            completions: vec![Completion::Poll],
        };
        let cells = axes.cells();
        // Three engines and auto in two cache modes, less native through the page cache.
        assert_eq!(cells.len(), 2 * (2 + 1) * 2 * 7);
        let large = |cell: &Cell| cell.work.bs == 1 << 20;
        assert!(cells.iter().all(|cell| large(cell) == (cell.work.rw == Mix::Read)));
        assert!(cells.iter().all(|cell| cell.way.aio != Some(Aio::Native) || cell.way.cache == CacheMode::None));
        assert!(cells[..7].iter().all(|cell| cell.work == cells[0].work), "one kind of work together");
        let few = NonZeroUsize::MIN;
        let more = Axes {
            merges: vec![true, false],
            pools: vec![few, DEFAULT_THREADS],
            completions: Completion::ALL.to_vec(),
            busy: vec![0, 2],
            ..axes
        };
        // Two sizes of the pool of threads in two cache modes, and five ways without one.
        assert_eq!(more.cells().len(), 2 * 2 * (2 + 1) * 2 * (4 + 5) * 2 * 2);
        let is_pool = |cell: &Cell| cell.way.aio == Some(Aio::Threads);
        assert!(more.cells().iter().all(|cell| cell.way.thread_pool_max == DEFAULT_THREADS || is_pool(cell)));
    }

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
