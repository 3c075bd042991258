//! What is measured: the cells of the table, and against what.

use std::path::PathBuf;
use std::slice;
use std::time::Duration;

use block::cache::CacheMode;
use block::engine::Aio;
use guest::workload::Mix;
use serde::{Serialize, Serializer};

use crate::config::DISK_POLL;

/// [`DISK_POLL`] in microseconds.
pub const POLL_US: u32 = DISK_POLL.as_micros() as u32;

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
}

/// One way to do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Way {
    /// What moves the bytes.
    #[serde(serialize_with = "aio_name")]
    pub aio: Aio,
    /// Through or past the page cache.
    #[serde(serialize_with = "cache_name")]
    pub cache: CacheMode,
    /// Whether doorbells arrive through ioeventfds.
    pub ioeventfd: bool,
    /// How long a worker may look for work before it sleeps, in microseconds.
    pub poll_us: u32,
}

impl Way {
    /// What to say of polling after `name`, unless it is as usual.
    pub(super) fn polling(self, name: &str) -> String {
        if self.poll_us == POLL_US { String::new() } else { format!("{name}{}", self.poll_us) }
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

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn aio_name<S: Serializer>(aio: &Aio, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(aio.name())
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
    /// See [`Way::aio`].
    pub engines: Vec<Aio>,
    /// See [`Way::cache`].
    pub caches: Vec<CacheMode>,
    /// See [`Way::ioeventfd`].
    pub ioeventfds: Vec<bool>,
    /// See [`Way::poll_us`].
    pub polls: Vec<u32>,
}

impl Axes {
    /// Every kind of work, those on the same disk together.
    fn works(&self) -> Vec<Work> {
        let mut works = Vec::new();
        for &content in &self.contents {
            for &(rw, own) in &self.mixes {
                for &bs in own.as_ref().map_or(self.blocks.as_slice(), slice::from_ref) {
                    for &queues in &self.queues {
                        works.extend(self.depths.iter().map(|&depth| Work { content, rw, bs, depth, queues }));
                    }
                }
            }
        }
        works
    }

    /// Every way that exists: Linux AIO goes past the page cache only.
    fn ways(&self) -> Vec<Way> {
        let mut ways = Vec::new();
        for &aio in &self.engines {
            for &cache in self.caches.iter().filter(|cache| aio.goes_with(**cache)) {
                for &ioeventfd in &self.ioeventfds {
                    ways.extend(self.polls.iter().map(|&poll_us| Way { aio, cache, ioeventfd, poll_us }));
                }
            }
        }
        ways
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
            engines: Aio::ALL.to_vec(),
            caches: vec![CacheMode::None, CacheMode::Writeback],
            ioeventfds: vec![true],
            polls: vec![POLL_US],
        };
        let cells = axes.cells();
        // Three engines in two cache modes, less native through the page cache.
        assert_eq!(cells.len(), 2 * (2 + 1) * 2 * 5);
        let large = |cell: &Cell| cell.work.bs == 1 << 20;
        assert!(cells.iter().all(|cell| large(cell) == (cell.work.rw == Mix::Read)));
        assert!(cells.iter().all(|cell| cell.way.aio != Aio::Native || cell.way.cache == CacheMode::None));
        assert!(cells[..5].iter().all(|cell| cell.work == cells[0].work), "one kind of work together");
    }
}
