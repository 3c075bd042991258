//! A run: the cells of the table, as a product of lists, and against whom and how long they are measured.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::slice;
use std::time::Duration;

use block::cache::CacheMode;
use block::engine::Aio;
use block::engine::threads::DEFAULT_THREADS;
use guest::workload::Mix;

use super::cell::{Cell, Completion, Content, Way, Work};
use super::subject::Subject;

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
    /// Whoever of these is not there is left out, and that is no error.
    pub if_there: bool,
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
    use crate::bench::POLL_US;

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
}
