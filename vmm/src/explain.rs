//! `skiff disk explain` and `skiff disk engines`: what a disk would run on and why, what this host offers. Runs on the main
//! thread and changes nothing.
//!
//! An [`Explanation`] as JSON (`skiff disk explain --json`) is one object:
//!
//! | field | value |
//! |---|---|
//! | `schema` | 1; a new number if a field ever changes its meaning |
//! | `version` | the version of skiff |
//! | `path` | the image, as it was given |
//! | `aio`, `cache` | what a machine would use |
//! | `aio_why`, `cache_why` | a line each |
//! | `fallbacks` | the engines that are tried should that one not start after all, best first |
//! | `missing` | engines that would be preferred and that the host lacks: objects of `aio`, `reason`, `remedy` |
//! | `evidence` | objects of `name`, a short word that stays the same, and `fact`, a line |
//! | `changes` | what would make it another choice: objects of `change`, `aio`, `cache` |
//! | `probe` | null, or with `--measure` objects of `aio`, `depth`, `reads_per_second`, `microseconds` |
//!
//! The [`Offers`] of a host as JSON: `schema`, `version`, and `engines`, objects of `aio`, `works`, `reason` and `remedy`;
//! the last two are null where it works.

use std::fmt::{self, Display, Formatter};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use block::alternatives::{Alternative, alternatives};
use block::cache::CacheMode;
use block::choose::{Access, Choice, Wish, choose};
use block::direct::Alignment;
use block::disk::{self, Disk};
use block::engine::{Aio, Unusable};
use block::extents::Blocks;
use block::facts::{Direct, Facts, Host, Kind};
use block::filesystem::Filesystem;
use block::measure::measure;
use block::overlay;
use serde::Serialize;

use crate::config::format_size;

/// The version of the JSON forms.
const SCHEMA: u32 = 1;

/// How long each engine is measured at each depth.
const PROBE: Duration = Duration::from_millis(300);

/// Reads under way at a time when measured.
const DEPTHS: [u16; 2] = [1, 32];

/// Why a disk runs on what it does.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explanation {
    schema: u32,
    version: &'static str,
    path: String,
    aio: &'static str,
    cache: &'static str,
    aio_why: String,
    cache_why: String,
    fallbacks: Vec<&'static str>,
    missing: Vec<Missing>,
    evidence: Vec<Evidence>,
    changes: Vec<Other>,
    probe: Option<Vec<Probe>>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
struct Missing {
    aio: &'static str,
    reason: String,
    remedy: &'static str,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
struct Evidence {
    name: &'static str,
    fact: String,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
struct Other {
    change: String,
    aio: &'static str,
    cache: &'static str,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
struct Probe {
    aio: &'static str,
    depth: u16,
    reads_per_second: u64,
    microseconds: f64,
}

impl Explanation {
    /// Looks at the image at `path`, of which a disk of that many `queues` is to be made as `wish` says. With `measured`
    /// every engine that works also reads from it for a moment.
    ///
    /// # Errors
    /// When a machine would not start with it, in the same words; that someone else uses the image is no error.
    pub fn of(path: &Path, wish: Wish, queues: u16, measured: bool) -> anyhow::Result<Self> {
        let facts = Facts::gather(path, wish.rings(queues))?;
        if wish.access.writes() {
            disk::check_writable(path)?;
        }
        let choice = choose(&facts, wish)?;
        facts.check_size()?;
        let probe = measured.then(|| probe(path, &facts, choice.cache)).transpose()?;
        let mut evidence = evidence(&facts);
        let user = disk::user_of(path).map_or("by nobody that can be seen".to_owned(), |user| format!("by {user}"));
        evidence.push(Evidence { name: "in use", fact: user });
        if wish.access == Access::Snapshot {
            evidence.push(overlay());
        }
        Ok(Self { evidence, probe, ..Self::new(&facts, wish, choice) })
    }

    fn new(facts: &Facts, wish: Wish, choice: Choice) -> Self {
        let changes = alternatives(facts, wish, &choice).into_iter().map(|Alternative { change, choice }| Other {
            change,
            aio: choice.engines.best().name(),
            cache: choice.cache.name(),
        });
        Self {
            schema: SCHEMA,
            version: env!("CARGO_PKG_VERSION"),
            path: facts.path.display().to_string(),
            aio: choice.engines.best().name(),
            cache: choice.cache.name(),
            changes: changes.collect(),
            fallbacks: choice.engines.fallbacks().iter().map(|aio| aio.name()).collect(),
            missing: choice.missing.iter().map(Missing::new).collect(),
            aio_why: choice.aio_why,
            cache_why: choice.cache_why,
            evidence: Vec::new(),
            probe: None,
        }
    }

    /// The explanation as JSON, in the form documented above.
    ///
    /// # Panics
    /// Never: texts and finite numbers have a JSON form.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("texts and numbers have a JSON form")
    }
}

impl Missing {
    fn new(unusable: &Unusable) -> Self {
        Self { aio: unusable.aio().name(), reason: unusable.reason().to_owned(), remedy: unusable.remedy() }
    }
}

/// Reads through every engine that works, in that cache mode.
fn probe(path: &Path, facts: &Facts, cache: CacheMode) -> anyhow::Result<Vec<Probe>> {
    let disk = Arc::new(Disk::look(path, cache, "probe")?);
    let mut probes = Vec::new();
    for aio in Aio::ALL.into_iter().filter(|aio| aio.goes_with(cache) && facts.host.offers(*aio).is_ok()) {
        for depth in DEPTHS {
            let figures =
                measure(&disk, aio, depth, PROBE).with_context(|| format!("--measure: aio={}", aio.name()))?;
            let per_second = u128::from(figures.reads) * 1_000_000 / figures.time.as_micros().max(1);
            let reads = u32::try_from(figures.reads).unwrap_or(u32::MAX);
            let each = (figures.time * depth.into()).checked_div(reads).unwrap_or_default();
            let microseconds = (each.as_secs_f64() * 1e7).round() / 10.0;
            probes.push(Probe { aio: aio.name(), depth, reads_per_second: per_second as u64, microseconds });
        }
    }
    Ok(probes)
}

fn evidence(facts: &Facts) -> Vec<Evidence> {
    let size = format_size(facts.size);
    let image = match &facts.kind {
        Kind::File { filesystem, .. } => format!("a file of {size} on {}", filesystem.name),
        Kind::Device { backing: Some(file), .. } => format!("a loop device of {size} over {file}"),
        Kind::Device { rotational: true, .. } => format!("a block device of {size} that turns, or says so"),
        Kind::Device { .. } => format!("a block device of {size}"),
    };
    let mut evidence = vec![Evidence { name: "image", fact: image }];
    if let Kind::File { blocks, .. } = facts.kind {
        let blocks = match blocks {
            Blocks::Written => "every byte has its block and was written".to_owned(),
            Blocks::Reserved => "every byte has its block, some were never written".to_owned(),
            Blocks::Shared => "some are shared with a copy of the file (reflink)".to_owned(),
            Blocks::Sparse { allocated } => {
                format!("{} of {size} have blocks, the rest is holes", format_size(allocated))
            }
        };
        evidence.push(Evidence { name: "blocks", fact: blocks });
    }
    let direct = match &facts.direct {
        Direct::Works(Alignment { memory, block }) => {
            format!("works, in blocks of {block} bytes, from memory at multiples of {memory}")
        }
        Direct::Missing => "not offered by the filesystem".to_owned(),
        Direct::Failed(said) => format!("fails: {said}"),
    };
    evidence.push(Evidence { name: "O_DIRECT", fact: direct });
    let nowait = if facts.nowait {
        "reads can be asked not to wait"
    } else {
        "reads cannot be asked not to wait: io_uring hands each transfer to a thread of the kernel"
    };
    evidence.push(Evidence { name: "RWF_NOWAIT", fact: nowait.to_owned() });
    let offer =
        |aio: Aio| facts.host.offers(aio).as_ref().map_or_else(|missing| missing.reason().to_owned(), |()| works());
    let room = facts.host.native_room.map_or(String::new(), |room| format!("; {room} requests are left on this host"));
    evidence.push(Evidence { name: "linux-aio", fact: offer(Aio::Native) + &room });
    evidence.push(Evidence { name: "io_uring", fact: offer(Aio::IoUring) });
    evidence.push(Evidence { name: "kernel", fact: format!("Linux {}", facts.host.kernel) });
    evidence
}

/// Where the writes of a snapshot go, if the user does not say.
fn overlay() -> Evidence {
    let folder = overlay::default_folder();
    let filesystem = File::open(&folder).map_or("no folder", |folder| Filesystem::of(&folder).name);
    let fact =
        format!("a file without a name in {} ({filesystem}), unless snapshot-dir= names another", folder.display());
    Evidence { name: "snapshot", fact }
}

fn works() -> String {
    "works".to_owned()
}

impl Display for Explanation {
    /// For a person: the choice with its reasons, the evidence, what would change it.
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        writeln!(out, "{}: aio={}, cache={}\n", self.path, self.aio, self.cache)?;
        writeln!(out, "Why:")?;
        writeln!(out, "  cache={:<12} {}", self.cache, self.cache_why)?;
        writeln!(out, "  aio={:<14} {}", self.aio, self.aio_why)?;
        for Missing { aio, reason, remedy } in &self.missing {
            writeln!(out, "  not aio={aio:<10} {reason}; {remedy}")?;
        }
        if !self.fallbacks.is_empty() {
            writeln!(out, "  {:<18} {}", "should it not start", self.fallbacks.join(", then "))?;
        }
        writeln!(out, "\nEvidence:")?;
        for Evidence { name, fact } in &self.evidence {
            writeln!(out, "  {name:<18} {fact}")?;
        }
        if !self.changes.is_empty() {
            writeln!(out, "\nWhat would change it:")?;
        }
        for Other { change, aio, cache } in &self.changes {
            writeln!(out, "  {change}: aio={aio}, cache={cache}")?;
        }
        let Some(probes) = &self.probe else { return Ok(()) };
        writeln!(
            out,
            "\nProbe: random reads of 4 KiB for {} ms each, beside whatever else runs here:",
            PROBE.as_millis()
        )?;
        writeln!(out, "  {:<18} {:>5} {:>12} {:>12}", "", "depth", "reads/s", "us each")?;
        for Probe { aio, depth, reads_per_second, microseconds } in probes {
            writeln!(out, "  aio={aio:<14} {depth:>5} {reads_per_second:>12} {microseconds:>12.1}")?;
        }
        Ok(())
    }
}

/// What a host offers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Offers {
    schema: u32,
    version: &'static str,
    engines: Vec<Offer>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
struct Offer {
    aio: &'static str,
    works: bool,
    reason: Option<String>,
    remedy: Option<&'static str>,
}

impl Offers {
    /// Asks this host for one of each.
    pub fn of_this_host() -> Self {
        Self::new(&Host::gather(1))
    }

    fn new(host: &Host) -> Self {
        let engines = Aio::ALL.into_iter().map(|aio| {
            let missing = host.offers(aio).as_ref().err();
            Offer {
                aio: aio.name(),
                works: missing.is_none(),
                reason: missing.map(|missing| missing.reason().to_owned()),
                remedy: missing.map(Unusable::remedy),
            }
        });
        Self { schema: SCHEMA, version: env!("CARGO_PKG_VERSION"), engines: engines.collect() }
    }

    /// The list as JSON, in the form documented above.
    ///
    /// # Panics
    /// Never: texts have a JSON form.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("texts have a JSON form")
    }
}

impl Display for Offers {
    /// A line for each, and one more for the remedy where it is missing.
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        for Offer { aio, reason, remedy, .. } in &self.engines {
            writeln!(out, "aio={aio:<10} {}", reason.as_deref().unwrap_or("works"))?;
            if let Some(remedy) = remedy {
                writeln!(out, "{:<14} -> {remedy}", "")?;
            }
        }
        Ok(())
    }
}
