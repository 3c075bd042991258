//! `skiff bench`: how fast this host's disks are through each engine and cache mode, beside the same engine without a
//! machine and the same guest under other programs. The work is done by the bare-metal guest, which the binary carries along, in
//! child processes; all else runs on the main thread.
//!
//! Measurements of one cell stand next to each other in time, and each round has its own order: what disturbs the host
//! disturbs all that are compared. docs/bench.md describes the JSON form of the results.

mod busy;
mod cell;
mod chart;
mod compare;
mod csv;
mod field;
mod host;
mod image;
mod machine;
mod manifest;
mod pin;
mod plan;
mod sample;
mod stats;
mod subject;
mod table;
mod usage;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use block::cache::CacheMode;
use block::choose::{self, Access, Wish};
use block::disk::Disk;
use block::engine::Aio;
use guest::workload::pattern;
use serde::{Serialize, Serializer};

pub use cell::{AUTO, Cell, Completion, Content, POLL_US, Way, Work};
pub use compare::Comparison;
pub use manifest::Manifest;
pub use plan::{Axes, Place, Plan};
pub use sample::{Latency, Sample};
pub use stats::{Middle, NOISE};
pub use subject::Subject;

use busy::Busy;
use field::Field;
use image::Image;
pub(crate) use image::Nameless;
use machine::{Machines, Timing};
use pin::Pin;

/// The version of the JSON form.
const SCHEMA: u32 = 2;

/// How far a run is, for whoever waits.
#[derive(Debug)]
pub struct Progress<'a> {
    /// Measurements that are over.
    pub done: usize,
    /// Measurements in all.
    pub total: usize,
    /// Since the first began.
    pub elapsed: Duration,
    /// The one that begins; `None` while the disk is prepared.
    pub next: Option<(&'a Cell, Subject)>,
}

/// One cell and its measurements.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// What was measured.
    #[serde(flatten)]
    pub cell: Cell,
    /// What skiff chose where the engine was left to it.
    #[serde(serialize_with = "chosen_name")]
    pub chosen: Option<Aio>,
    /// Who reached what, round by round; who failed is not in it.
    pub rounds: Vec<BTreeMap<Subject, Sample>>,
    /// What went wrong, once each.
    pub errors: Vec<String>,
    /// The rounds summed up, for each who was measured.
    pub summary: BTreeMap<Subject, Summary>,
}

#[expect(clippy::trivially_copy_pass_by_ref, clippy::ref_option, reason = "serde passes references")]
fn chosen_name<S: Serializer>(aio: &Option<Aio>, to: S) -> Result<S::Ok, S::Error> {
    aio.map(Aio::name).serialize(to)
}

/// What the rounds of one subject come to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Requests per second.
    pub iops: Middle,
    /// Skiff's requests per second as a part of this subject's, round by round.
    pub ratio: Option<Middle>,
    /// Medians of the samples' fields of the same names.
    pub p50_us: f64,
    /// See `p50_us`.
    pub p99_us: f64,
    /// See `p50_us`.
    pub vcpu_us: Option<f64>,
    /// See `p50_us`.
    pub io_us: f64,
    /// See `p50_us`.
    pub io_switches: f64,
    /// See `p50_us`.
    pub kicks: Option<f64>,
    /// See `p50_us`.
    pub interrupts: Option<f64>,
    /// See `p50_us`.
    pub batch: Option<f64>,
    /// See `p50_us`.
    pub submissions: Option<f64>,
    /// The interval of `iops` is too wide to say anything.
    pub noise: bool,
}

impl Measured {
    /// Nothing yet. What skiff chooses is known where the engine is left to it.
    fn new(cell: Cell, chosen: Option<Aio>) -> Self {
        Self { cell, chosen, rounds: Vec::new(), errors: Vec::new(), summary: BTreeMap::new() }
    }

    /// The cell's own, or what skiff chose.
    fn engine(&self) -> Aio {
        self.cell.way.aio.or(self.chosen).expect("one of the two names it")
    }

    fn sum_up(&mut self) {
        for subject in [Subject::Skiff].into_iter().chain(Subject::OTHERS) {
            if let Some(summary) = self.summary_of(subject) {
                self.summary.insert(subject, summary);
            }
        }
    }

    fn summary_of(&self, subject: Subject) -> Option<Summary> {
        let samples = || self.rounds.iter().filter_map(|round| round.get(&subject));
        let median = |field: fn(&Sample) -> Option<f64>| Middle::of(samples().filter_map(field)).map(|of| of.median);
        let always = |field: fn(&Sample) -> Option<f64>| median(field).unwrap_or_default();
        let iops = Middle::of(samples().map(|sample| sample.iops))?;
        let ratios = self.rounds.iter().filter_map(|round| {
            let (ours, theirs) = (round.get(&Subject::Skiff)?, round.get(&subject)?);
            Some(ours.iops / theirs.iops)
        });
        Some(Summary {
            iops,
            ratio: if subject == Subject::Skiff { None } else { Middle::of(ratios) },
            p50_us: always(|sample| Some(sample.latency_us.p50)),
            p99_us: always(|sample| Some(sample.latency_us.p99)),
            vcpu_us: median(|sample| sample.vcpu_us),
            io_us: always(|sample| Some(sample.io_us)),
            io_switches: always(|sample| Some(sample.io_switches)),
            kicks: median(|sample| sample.kicks),
            interrupts: median(|sample| sample.interrupts),
            batch: median(|sample| sample.batch),
            submissions: median(|sample| sample.submissions),
            noise: iops.is_noise(),
        })
    }
}

/// The results of a run. Displayed as tables for a person.
#[derive(Clone, Debug, Serialize)]
pub struct Results {
    schema: u32,
    /// Whether every measurement was made: nobody interrupted the run.
    pub complete: bool,
    /// Who was not asked for some of the work, or for none, and why.
    pub left_out: Vec<String>,
    /// Where and how.
    pub manifest: Manifest,
    /// The cells, those of one kind of work together.
    pub cells: Vec<Measured>,
}

impl Results {
    /// The results as JSON.
    ///
    /// # Panics
    /// Never: texts and finite numbers have a JSON form.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("texts and numbers have a JSON form")
    }
}

/// Measures what `plan` says, until the end or until `stop` becomes true; whatever was measured by then is returned. A cell
/// that fails does not keep others from being measured.
///
/// # Errors
/// When it cannot begin: no KVM, an engine that the host lacks, no such disk, no room for one, a program that is asked for and
/// is not there or does not run the guest.
pub fn run(plan: &Plan, stop: &AtomicBool, mut progress: impl FnMut(&Progress)) -> anyhow::Result<Results> {
    let tsc_khz = tsc_khz()?;
    for aio in plan.axes.engines.iter().flatten() {
        aio.probe(1)?;
    }
    let mut field = Field::of(plan)?;
    let manifest = Manifest::new(plan, &field.subjects);
    let pin = if plan.pin { Some(Pin::this_process()?) } else { None };
    let mut report = Progress { done: 0, total: plan.measurements(), elapsed: Duration::ZERO, next: None };
    progress(&report);
    let images = prepare(plan, stop)?;
    let folder = plan.place.folder();
    let guest = Nameless::new(folder)?;
    guest.write_all(guest::ELF).context("--dir: the guest has no room there")?;
    let timing = Timing { warm_up: plan.warm_up, runtime: plan.runtime };
    let machines = Machines { guest: guest.path(), folder, tsc_khz, timing, seed: plan.seed, pin, stop };
    let with_engine = |cell: Cell| {
        let left_to_skiff = cell.way.aio.is_none().then(|| chosen(&cell, &images[&cell.work.content].path()));
        Ok(Measured::new(cell, left_to_skiff.transpose()?))
    };
    let mut cells = plan.axes.cells().into_iter().map(with_engine).collect::<anyhow::Result<Vec<_>>>()?;
    field.try_out(&machines, &cells, &images)?;
    report.total = cells.iter().map(|cell| field.able(cell).count()).sum::<usize>() * plan.repeat as usize;
    let start = Instant::now();
    'all: for round in 0..plan.repeat {
        for index in shuffled(cells.len(), plan.seed.wrapping_add(round.into())) {
            let measured = &mut cells[index];
            let image = &images[&measured.cell.work.content];
            let mut samples = BTreeMap::new();
            let subjects: Vec<_> = field.able(measured).collect();
            let turn = plan.seed.wrapping_add(u64::from(round) << 32 | index as u64);
            for subject in shuffled(subjects.len(), turn).into_iter().map(|at| subjects[at]) {
                if stop.load(Ordering::Relaxed) {
                    break 'all;
                }
                progress(&Progress { elapsed: start.elapsed(), next: Some((&measured.cell, subject)), ..report });
                match measure(&machines, subject, measured, image) {
                    Ok(sample) => _ = samples.insert(subject, sample),
                    Err(_) if stop.load(Ordering::Relaxed) => {}
                    Err(error) => {
                        let error = format!("{error:#}");
                        if !measured.errors.contains(&error) {
                            measured.errors.push(error);
                        }
                    }
                }
                report.done += 1;
            }
            measured.rounds.push(samples);
        }
    }
    cells.iter_mut().for_each(Measured::sum_up);
    let (complete, left_out) = (!stop.load(Ordering::Relaxed), field.left_out);
    Ok(Results { schema: SCHEMA, complete, left_out, manifest, cells })
}

/// The disks of the plan, by content.
fn prepare(plan: &Plan, stop: &AtomicBool) -> anyhow::Result<BTreeMap<Content, Image>> {
    match &plan.place {
        Place::Given(path) => {
            Disk::look(path, CacheMode::Writeback, "bench").context("--disk")?;
            Ok(BTreeMap::from([(Content::Given, Image::Given(path.clone()))]))
        }
        Place::Own(folder, size) => {
            let make = |&content| Ok((content, Image::make(folder, *size, content, stop)?));
            plan.axes.contents.iter().map(make).collect()
        }
    }
}

fn measure(machines: &Machines<'_>, subject: Subject, measured: &Measured, image: &Image) -> anyhow::Result<Sample> {
    let (cell, aio, path) = (&measured.cell, measured.engine(), image.path());
    let busy = Busy::start(cell.work.busy)?;
    let sample = match subject {
        Subject::Host => {
            host::run(cell, aio, &path, machines).with_context(|| format!("{} on the host", machine::describe(cell)))
        }
        _ => machines.run(subject, cell, aio, &path),
    };
    drop(busy);
    if cell.work.rw.writes() {
        image.restore().context("the disk cannot be put back as it was")?;
    }
    let sample = sample?;
    ensure!(
        sample.requests > 0,
        "{} under {}: no request completed in {} s; give it a longer --runtime",
        machine::describe(cell),
        subject.name(),
        sample.seconds
    );
    Ok(sample)
}

/// What skiff will choose for the image at `path`, which nobody uses just now.
fn chosen(cell: &Cell, path: &Path) -> anyhow::Result<Aio> {
    let access = if cell.work.rw.writes() { Access::Write } else { Access::Read };
    let wish = Wish { aio: None, cache: Some(cell.way.cache), access };
    let (_, choice) = choose::open(path, "bench", wish, cell.work.queues)?;
    Ok(choice.engines.best())
}

/// The rate of a guest's TSC, which KVM knows.
fn tsc_khz() -> anyhow::Result<u32> {
    let kvm = crate::kvm::open()?;
    let rate = crate::kvm::create_vm(&kvm).and_then(|vm| vm.create_vcpu(0)).and_then(|vcpu| vcpu.get_tsc_khz());
    let rate = rate.context("/dev/kvm: KVM does not tell the rate of the TSC")?;
    ensure!(rate > 0, "/dev/kvm: KVM does not know the rate of the TSC");
    Ok(rate)
}

/// The numbers below `count` in an order that follows from `seed` (Fisher and Yates).
fn shuffled(count: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        let other = (u128::from(pattern(seed, last as u64)) * (last as u128 + 1)) >> 64;
        order.swap(last, other as usize);
    }
    order
}

impl Place {
    /// Where the guest's image is put: by the disk, or where temporary files go.
    fn folder(&self) -> &Path {
        match self {
            Self::Given(_) => Path::new("/tmp"),
            Self::Own(folder, _) => folder,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn shuffling_keeps_all(count in 0..100_usize, seed: u64) {
            let mut order = shuffled(count, seed);
            prop_assert_eq!(&order, &shuffled(count, seed));
            order.sort_unstable();
            prop_assert_eq!(order, (0..count).collect::<Vec<_>>());
        }
    }

    #[test]
    fn every_order_comes_up() {
        let orders: std::collections::HashSet<_> = (0..200).map(|seed| shuffled(3, seed)).collect();
        assert_eq!(orders.len(), 6);
    }
}
