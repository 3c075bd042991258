//! A measurement inside a machine: skiff, QEMU, Cloud Hypervisor or Firecracker as a child process with the guest in it, so
//! that its CPU time is its own and nothing of it is left afterwards. The guest says when it is ready and when it is done, and
//! waits each time, so that the counters of the process are read where nothing runs.

mod conversation;
mod programs;
mod terminal;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::Context;
use block::engine::Aio;

use super::cell::{Cell, Completion};
use super::pin::Pin;
use super::sample::Sample;
use super::subject::Subject;
use conversation::{Conversation, Measure};
use programs::Program;

/// How long a machine may say nothing, besides the time it measures.
const HUNG: Duration = Duration::from_secs(60);

/// A trial only shows that the guest runs.
const TRIAL: Timing = Timing { warm_up: Duration::ZERO, runtime: Duration::from_millis(10) };

/// How long to measure.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    pub(super) warm_up: Duration,
    pub(super) runtime: Duration,
}

/// What all machines of a run have in common.
#[derive(Clone, Debug)]
pub(super) struct Machines<'a> {
    /// The guest's image.
    pub(super) guest: PathBuf,
    /// Where files that configure a machine are made, without a name.
    pub(super) folder: &'a Path,
    /// The rate of the guests' TSC.
    pub(super) tsc_khz: u32,
    pub(super) timing: Timing,
    pub(super) seed: u64,
    pub(super) pin: Option<Pin>,
    pub(super) stop: &'a AtomicBool,
}

impl Machines<'_> {
    /// Measures `cell` on the image at `disk` under `subject`, which is not the host. `aio` is the engine of the cell, or what
    /// skiff chooses if the cell leaves it to skiff: others have no such choice.
    ///
    /// # Errors
    /// When the machine does not start or the guest does not succeed: what it said last. Or when it is to stop.
    pub(super) fn run(&self, subject: Subject, cell: &Cell, aio: Aio, disk: &Path) -> anyhow::Result<Sample> {
        self.measure(subject, cell, aio, disk).with_context(|| format!("{} under {}", describe(cell), subject.name()))
    }

    fn measure(&self, subject: Subject, cell: &Cell, aio: Aio, disk: &Path) -> anyhow::Result<Sample> {
        // The file that configures it is there until it has ended.
        let Program { command, on_terminal, config: _config } = self.program(subject, cell, aio, disk)?;
        let patience = HUNG + self.timing.warm_up + self.timing.runtime;
        Conversation::start(command, on_terminal, self.stop, patience)?.measure(&Measure {
            tsc_khz: self.tsc_khz,
            pin: self.pin.as_ref(),
            counts: subject == Subject::Skiff,
            has_exit_port: subject.has_exit_port(),
        })
    }

    /// Whether the guest runs under `subject` at all: it reads a few blocks as `cell` would.
    ///
    /// # Errors
    /// Why not: what the program said last.
    pub(super) fn try_out(&self, subject: Subject, cell: &Cell, aio: Aio, disk: &Path) -> anyhow::Result<()> {
        let mut cell = *cell;
        cell.work.rw = guest::workload::Mix::RandRead;
        let machines = Machines { timing: TRIAL, ..self.clone() };
        machines.measure(subject, &cell, aio, disk).map(drop)
    }

    /// 64 MiB besides the buffers, in MiB.
    fn memory(cell: &Cell) -> u64 {
        let buffers = u64::from(cell.work.bs) * u64::from(cell.work.depth) * u64::from(cell.work.queues);
        64 + 2 * u64::from(cell.work.queues) + buffers.div_ceil(1 << 20)
    }

    fn words(&self, cell: &Cell) -> String {
        let (work, timing) = (&cell.work, &self.timing);
        let mut words = format!("bench pace=on rw={} bs={} depth={}", work.rw.name(), work.bs, work.depth);
        let (runtime, warm_up) = (timing.runtime.as_millis(), timing.warm_up.as_millis());
        let _ = write!(words, " queues={} runtime={runtime} warmup={warm_up}", work.queues);
        let poll = if cell.way.completion == Completion::Poll { "on" } else { "off" };
        let _ = write!(words, " tsc_khz={} seed={} poll={poll}", self.tsc_khz, self.seed);
        words
    }
}

/// A cell in a few words.
pub(super) fn describe(cell: &Cell) -> String {
    let (work, way) = (&cell.work, &cell.way);
    let way: Vec<_> =
        [format!("aio={},cache={}", way.aio_name(), way.cache.name())].into_iter().chain(way.unusual()).collect();
    format!("{} rw={} bs={} depth={}", way.join(","), work.rw.name(), work.bs, work.depth)
}
