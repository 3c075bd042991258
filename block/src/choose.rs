//! The choice of an engine and a cache mode: a pure function of what was asked for and of the facts about image and host,
//! with its reasons. The two tables below are all there is to it. Runs on the thread that opens a disk.

use std::fmt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::cache::CacheMode;
use crate::disk::{Disk, DiskError};
use crate::engine::{Aio, Engines, Unusable};
use crate::extents::Blocks;
use crate::facts::{Direct, Facts, Kind};
use crate::filesystem::Nature;

/// What was asked for. `None` leaves it to [`choose`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// The engine.
    pub aio: Option<Aio>,
    /// The cache mode.
    pub cache: Option<CacheMode>,
    /// What is done with the image.
    pub access: Access,
}

/// What a disk does with its image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// The guest reads and writes it.
    #[default]
    Write,
    /// The guest reads it, and may not write.
    Read,
    /// The guest reads it, and what it writes goes to a file of ours that nobody sees afterwards.
    Snapshot,
}

impl Access {
    /// Whether the image itself is written to.
    pub fn writes(self) -> bool {
        self == Self::Write
    }
}

impl Wish {
    /// How many engines a disk of that many `queues` needs at a time.
    pub fn rings(self, queues: u16) -> u16 {
        // The image has one, and what is written over it another.
        if self.access == Access::Snapshot { queues * 2 } else { queues }
    }
}

/// What a disk runs on, and why.
#[derive(Clone, Debug)]
pub struct Choice {
    /// The cache mode.
    pub cache: CacheMode,
    /// Why this one, in a line.
    pub cache_why: String,
    /// The engine, and what to fall back to should it not start after all.
    pub engines: Engines,
    /// Why this one, in a line.
    pub aio_why: String,
    /// Engines that would have been preferred, and why this host does not have them.
    pub missing: Vec<Unusable>,
}

impl fmt::Display for Choice {
    /// In one line, for the log.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (aio, cache) = (self.engines.best().name(), self.cache.name());
        write!(out, "aio={aio} ({}), cache={cache} ({})", self.aio_why, self.cache_why)?;
        self.missing
            .iter()
            .try_for_each(|missing| write!(out, "; aio={} not: {}", missing.aio().name(), missing.reason()))
    }
}

/// Why what was asked for cannot be had. One line with the remedy.
#[derive(Debug, Error)]
pub enum Refusal {
    /// The image cannot be used so.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The host does not have the engine.
    #[error("disk image {path:?}: {unusable}")]
    Engine {
        /// The image.
        path: PathBuf,
        /// The engine, the reason and the remedy.
        unusable: Unusable,
    },
    /// linux-aio through the page cache.
    #[error(
        "disk image {path:?}: aio=native needs cache=none or cache=directsync, which cannot be had: {why}; use aio=io_uring \
         or aio=threads"
    )]
    Native {
        /// The image.
        path: PathBuf,
        /// Why there is no O_DIRECT.
        why: String,
    },
}

/// One row of a table: the first whose condition holds decides.
struct Rule<T: 'static> {
    when: fn(&Case) -> bool,
    choose: T,
    why: &'static str,
}

/// What the conditions look at.
struct Case<'a> {
    facts: &'a Facts,
    wish: Wish,
    /// Decided before the engine.
    cache: CacheMode,
}

use Aio::{IoUring, Native, Threads};

/// The cache modes offered are those that promise the guest the same, where anything is kept.
const CACHES: [Rule<CacheMode>; 7] = [
    Rule {
        when: |it| it.wish.aio == Some(Native) && direct_works(it),
        choose: CacheMode::None,
        why: "aio=native is asynchronous only with O_DIRECT, which works here",
    },
    Rule {
        when: |it| it.wish.access == Access::Snapshot,
        choose: CacheMode::Unsafe,
        why: "what is written to a snapshot is not kept, so there is nothing to make stable; and machines that share the \
              image share its page cache",
    },
    Rule {
        when: |it| it.facts.nature() == Nature::Memory,
        choose: CacheMode::Writeback,
        why: "the image is in memory: there is no page cache to pass by",
    },
    Rule {
        when: |it| it.facts.direct == Direct::Missing,
        choose: CacheMode::Writeback,
        why: "the filesystem does not offer O_DIRECT",
    },
    Rule {
        when: |it| matches!(it.facts.direct, Direct::Failed(_)),
        choose: CacheMode::Writeback,
        why: "O_DIRECT fails here",
    },
    Rule {
        when: cuts_a_block,
        choose: CacheMode::Writeback,
        why: "the size is no multiple of the blocks that O_DIRECT writes",
    },
    Rule {
        when: |_| true,
        choose: CacheMode::None,
        why: "O_DIRECT works: what the guest caches is not cached twice, and the promise is that of writeback",
    },
];

/// Engines, best first. What the host lacks is passed over; `threads` is always there.
const ENGINES: [Rule<&[Aio]>; 12] = [
    Rule {
        when: |it| buffered(it) && it.facts.nature() == Nature::Memory,
        choose: &[IoUring, Threads],
        why: "in memory io_uring costs least",
    },
    Rule {
        when: |it| buffered(it) && it.facts.nowait,
        choose: &[IoUring, Threads],
        why: "through the page cache io_uring reads what is cached within the system call, and waits for the rest without \
              a thread",
    },
    Rule {
        when: buffered,
        choose: &[Threads],
        why: "the filesystem cannot be asked not to wait: io_uring would be a smaller pool of threads",
    },
    Rule {
        when: |it| it.facts.nature() == Nature::Memory,
        choose: &[IoUring, Threads],
        why: "O_DIRECT means nothing in memory: linux-aio would copy all bytes within io_submit",
    },
    Rule {
        when: |it| !it.facts.nowait,
        choose: &[Threads],
        why: "the filesystem cannot be asked not to wait: io_uring would be a smaller pool of threads, and linux-aio may \
              wait within io_submit",
    },
    Rule {
        when: |it| it.wish.access == Access::Snapshot,
        choose: &[IoUring, Native, Threads],
        why: "what is written goes to a new file, which is all holes: linux-aio would wait for blocks within io_submit, which \
              io_uring leaves to the kernel's threads",
    },
    Rule {
        when: |it| matches!(it.facts.kind, Kind::Device { .. }),
        choose: &[Native, IoUring, Threads],
        why: "a block device has nothing to allocate: io_submit does not wait, and linux-aio costs least",
    },
    Rule {
        when: |it| it.facts.nature() == Nature::CopyOnWrite,
        choose: &[IoUring, Threads],
        why: "every write goes to a new place: linux-aio would wait for it within io_submit",
    },
    Rule {
        when: |it| !it.wish.access.writes(),
        choose: &[Native, IoUring, Threads],
        why: "reading allocates nothing: io_submit does not wait, and linux-aio costs least",
    },
    Rule {
        when: |it| it.facts.blocks().are_complete(),
        choose: &[Native, IoUring, Threads],
        why: "every byte has its block: io_submit does not wait, and linux-aio costs least",
    },
    Rule {
        when: |it| it.facts.blocks() == Blocks::Shared,
        choose: &[IoUring, Native, Threads],
        why: "blocks are shared with a copy: linux-aio would wait for new ones within io_submit, which io_uring leaves to \
              the kernel's threads",
    },
    Rule {
        when: |_| true,
        choose: &[IoUring, Native, Threads],
        why: "the file has holes: linux-aio would wait for blocks within io_submit, which io_uring leaves to the kernel's \
              threads",
    },
];

fn buffered(it: &Case) -> bool {
    !it.cache.is_direct()
}

/// The last block is not whole, and will be written.
fn cuts_a_block(it: &Case) -> bool {
    let Direct::Works(alignment) = it.facts.direct else { return false };
    it.wish.access.writes() && !it.facts.size.is_multiple_of(alignment.block)
}

fn direct_works(it: &Case) -> bool {
    matches!(it.facts.direct, Direct::Works(_)) && !cuts_a_block(it)
}

impl Facts {
    fn nature(&self) -> Nature {
        match &self.kind {
            Kind::File { filesystem, .. } => filesystem.nature,
            Kind::Device { .. } => Nature::Blocks,
        }
    }

    fn blocks(&self) -> Blocks {
        match self.kind {
            Kind::File { blocks, .. } => blocks,
            Kind::Device { .. } => Blocks::Written,
        }
    }
}

fn first<T: Copy>(rules: &'static [Rule<T>], case: &Case) -> &'static Rule<T> {
    rules.iter().find(|rule| (rule.when)(case)).expect("the last rule always holds")
}

/// What a disk with these `facts` runs on when `wish` was asked for. What was asked for is kept to, or refused.
///
/// # Errors
/// When it cannot be had.
pub fn choose(facts: &Facts, wish: Wish) -> Result<Choice, Refusal> {
    let case = |cache| Case { facts, wish, cache };
    let asked = || "as asked for".to_owned();
    let (cache, cache_why) = if let Some(cache) = wish.cache {
        (cache, asked())
    } else {
        let rule = first(&CACHES, &case(CacheMode::default()));
        (rule.choose, reason(rule.why, facts))
    };
    let case = case(cache);
    check_direct(&case)?;
    let Some(aio) = wish.aio else {
        let rule = first(&ENGINES, &case);
        let usable = |aio: &Aio| facts.host.offers(*aio).is_ok();
        let engines: Vec<_> = rule.choose.iter().copied().filter(usable).collect();
        let better = rule.choose.iter().take_while(|aio| !usable(aio));
        let missing = better.filter_map(|aio| facts.host.offers(*aio).clone().err()).collect();
        return Ok(Choice { cache, cache_why, engines: Engines::new(engines), aio_why: rule.why.to_owned(), missing });
    };
    if !aio.goes_with(cache) {
        return Err(Refusal::Native { path: facts.path.clone(), why: cache_why });
    }
    if let Err(unusable) = facts.host.offers(aio) {
        return Err(Refusal::Engine { path: facts.path.clone(), unusable: unusable.clone() });
    }
    Ok(Choice { cache, cache_why, engines: Engines::only(aio), aio_why: asked(), missing: Vec::new() })
}

/// `why`, with what the host said if it did.
fn reason(why: &str, facts: &Facts) -> String {
    match &facts.direct {
        Direct::Failed(said) if why.contains("fails") => format!("{why} ({said})"),
        _ => why.to_owned(),
    }
}

/// Refuses a direct mode where there is none.
fn check_direct(case: &Case) -> Result<(), DiskError> {
    let (path, cache) = (case.facts.path.clone(), case.cache);
    match (&case.facts.direct, cache.is_direct()) {
        (Direct::Missing, true) => Err(DiskError::NotDirect { path, cache }),
        (Direct::Failed(said), true) => Err(DiskError::Io { path, error: std::io::Error::other(said.clone()) }),
        (Direct::Works(alignment), true) if cuts_a_block(case) => {
            Err(DiskError::Block { path, size: case.facts.size, block: alignment.block, cache })
        }
        _ => Ok(()),
    }
}

/// Opens and locks the image at `path` as `wish` says, with what [`choose`] makes of the rest, for a disk called `id` of
/// that many `queues`. Nothing is written to. Of a snapshot it is the image that is opened, for reading: the caller puts
/// something [over](crate::overlay::over) it.
///
/// # Errors
/// When the image cannot be used, or what was asked for cannot be had.
pub fn open(path: &Path, id: &str, wish: Wish, queues: u16) -> Result<(Disk, Choice), Refusal> {
    let mut facts = Facts::gather(path, wish.rings(queues))?;
    let (choice, readonly) = (choose(&facts, wish)?, !wish.access.writes());
    match Disk::open(path, readonly, choice.cache, id) {
        // It is not what it was a moment ago, as an image that is still being made.
        Err(error @ (DiskError::NotDirect { .. } | DiskError::Block { .. })) if wish.cache.is_none() => {
            facts.direct = Direct::Failed(error.to_string());
            let choice = choose(&facts, wish)?;
            Ok((Disk::open(path, readonly, choice.cache, id)?, choice))
        }
        disk => Ok((disk?, choice)),
    }
}

#[cfg(test)]
mod tests;
