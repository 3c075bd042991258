//! `skiff bench`: flags become a plan, results go to the terminal and into a file. Main thread.

mod plan;
mod values;

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, ensure};
use block::cache::CacheMode;
use clap::{Args, Subcommand, ValueHint};
use guest::workload::Mix;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use skiff::bench::{self, Comparison, Completion, Content, Progress};
use skiff::config::parse_size;

use super::Failure;
use values::{AioOrAuto, block_size, cache, completion, content, engine, mix, opponents, seconds};

/// Compare engines and cache modes on this host's disk, beside the host without a machine
///
/// The guest is built in; no kernel and no image are needed, and a software KVM will do. Each cell is measured several
/// times, in turn with what it is compared with. The disk is a file made for it, which is gone afterwards however this
/// ends; --disk measures an image or block device of yours, and does not write to it without --destructive.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  Which engine for disks in this folder, in less than two minutes:
    skiff bench --dir /var/lib/images
  Everything, against QEMU too, for later:
    skiff bench --full --vs host,qemu --json full.json
  Sequential reads from a block device, which is not written to:
    skiff bench --disk /dev/vdb --rw read --bs 1M --depths 1,8
  What a change of the host did:
    skiff bench compare before.json after.json

Exit codes:
  0    everything was measured
  1    something failed, or it was interrupted; what was measured is shown
  2    usage")]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag")]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct BenchArgs {
    #[command(subcommand)]
    other: Option<Other>,
    /// Measure this image or block device
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath, conflicts_with_all = ["dir", "size", "content"])]
    disk: Option<PathBuf>,
    /// Let --rw change the content of --disk
    #[arg(long, requires = "disk")]
    destructive: bool,
    /// Make the files to measure in this folder [default: the current one]
    #[arg(long, value_name = "FOLDER", value_hint = ValueHint::DirPath)]
    dir: Option<PathBuf>,
    /// Bytes of each file [default: 1G]
    #[arg(long, value_parser = parse_size)]
    size: Option<u64>,
    /// What the files are made of: written, hole (no blocks: shows what all but the disk costs), preallocated
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = content)]
    content: Option<Vec<Content>>,
    /// Engines: threads, native, io_uring, auto (what skiff chooses) [default: all but auto]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = engine)]
    engines: Option<Vec<AioOrAuto>>,
    /// Cache modes [default: none,writeback]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = cache)]
    cache: Option<Vec<CacheMode>>,
    /// Requests in flight in each queue, 1 to 1024 [default: 1,32; with --full 1,4,32,128]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=1024))]
    depths: Option<Vec<u16>>,
    /// Bytes of a request [default: 4K; with --full 4K,64K,1M]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = block_size)]
    bs: Option<Vec<u32>>,
    /// Operations: randread, randwrite, read, write, randrw [default: randread; with --full all but randrw]
    ///
    /// One may have a block size of its own, as in read:1M; for the others it is that of --bs.
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = mix)]
    rw: Option<Vec<(Mix, Option<u32>)>>,
    /// Queues of the disk, 1 to 16 [default: 1; with --full 1,4]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=16))]
    queues: Option<Vec<u16>>,
    /// Doorbells through an ioeventfd, or through the vCPU's thread [default: on]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = ["on", "off"])]
    ioeventfd: Option<Vec<String>>,
    /// Microseconds that a worker may look for work before it sleeps [default: 100]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(0..=10_000))]
    poll_us: Option<Vec<u32>>,
    /// Requests for neighbouring bytes as one, or each on its own [default: on]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = ["on", "off"])]
    merge: Option<Vec<String>>,
    /// The most threads of the engine threads, for each queue, 1 to 64 [default: 64]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = clap::value_parser!(u8).range(1..=64))]
    thread_pool_max: Option<Vec<u8>>,
    /// How the guest learns of completions: poll (it looks all the time), interrupt (it sleeps) [default: poll]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = completion)]
    completion: Option<Vec<Completion>>,
    /// Threads that keep CPUs busy beside each measurement, 0 to 1024 [default: 0]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(0..=1024))]
    busy: Option<Vec<u16>>,
    /// Seconds that each measurement counts [default: 1; with --full 3]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    runtime: Option<Duration>,
    /// How often each cell is measured [default: 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    repeat: Option<u32>,
    /// What to compare with: host (the same engine without a machine), qemu, cloud-hypervisor, firecracker, all (those of
    /// them that are there), none
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "host", value_parser = opponents())]
    vs: Vec<String>,
    /// A small set of cells: the default
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// A large set of cells: an hour or more
    #[arg(long)]
    full: bool,
    /// Keep the vCPU on the first CPU and everything else off it
    #[arg(long)]
    pin: bool,
    /// Of the order of cells and operations
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Write the results into this file too, as JSON
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    json: Option<PathBuf>,
    /// Write every measurement into this file too, as comma-separated values
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    csv: Option<PathBuf>,
    /// Write a page with charts and tables into this file too
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    html: Option<PathBuf>,
    /// Write each chart into this folder too, as SVG
    #[arg(long, value_name = "FOLDER", value_hint = ValueHint::DirPath)]
    svg: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Other {
    Compare(CompareArgs),
}

/// Say what changed between two runs, beyond the noise of both
///
/// Exit code 1 if some cell became slower or fails now.
#[derive(Debug, Args)]
struct CompareArgs {
    /// The --json of the run before
    before: PathBuf,
    /// The --json of the run after
    after: PathBuf,
    /// Per cent that a change must exceed
    #[arg(long, value_name = "PERCENT", default_value_t = 5, value_parser = clap::value_parser!(u8).range(0..100))]
    threshold: u8,
}

impl CompareArgs {
    fn run(&self) -> Result<u8, Failure> {
        let comparison = Comparison::of(&self.before, &self.after, f64::from(self.threshold) / 100.0)?;
        super::print(&comparison.to_string())?;
        Ok(u8::from(comparison.is_regression()))
    }
}

impl BenchArgs {
    pub(super) fn run(&self) -> Result<u8, Failure> {
        if let Some(Other::Compare(compare)) = &self.other {
            return compare.run();
        }
        let plan = self.plan()?;
        self.check_outputs()?;
        let stop = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, stop.clone()).context("signals")?;
        }
        let results = bench::run(&plan, &stop, show)?;
        if io::stderr().is_terminal() {
            eprint!("\r\x1b[K");
        }
        super::print(&results.to_string())?;
        write("--json", self.json.as_deref(), || results.to_json() + "\n")?;
        write("--csv", self.csv.as_deref(), || results.to_csv())?;
        write("--html", self.html.as_deref(), || results.to_html())?;
        for (name, chart) in self.svg.iter().flat_map(|_| results.to_svg()) {
            write("--svg", self.svg.as_ref().map(|folder| folder.join(name)).as_deref(), || chart)?;
        }
        let well = results.complete && results.cells.iter().all(|cell| cell.errors.is_empty());
        Ok(u8::from(!well))
    }

    /// Whether what is asked for can be written, while nothing is lost yet. Leaves files as they are.
    fn check_outputs(&self) -> anyhow::Result<()> {
        for (flag, path) in [("--json", &self.json), ("--csv", &self.csv), ("--html", &self.html)] {
            let Some(path) = path else { continue };
            let is_new = path.symlink_metadata().is_err();
            let opened = fs::OpenOptions::new().append(true).create(true).open(path);
            opened.with_context(|| format!("{flag} {}", path.display()))?;
            if is_new {
                fs::remove_file(path).with_context(|| format!("{flag} {}", path.display()))?;
            }
        }
        let Some(folder) = &self.svg else { return Ok(()) };
        ensure!(folder.is_dir(), "--svg {}: no such folder; make it first", folder.display());
        Ok(())
    }
}

/// Writes a file that was asked for.
fn write(flag: &str, path: Option<&Path>, text: impl FnOnce() -> String) -> anyhow::Result<()> {
    let Some(path) = path else { return Ok(()) };
    fs::write(path, text()).with_context(|| format!("{flag} {}", path.display()))
}

/// One line on a terminal that is written over; nothing elsewhere.
fn show(progress: &Progress<'_>) {
    if !io::stderr().is_terminal() {
        return;
    }
    let Progress { done, total, elapsed, next } = progress;
    let line = match next {
        None => "preparing the disk".to_owned(),
        Some((cell, subject)) => {
            let left = if *done == 0 { None } else { Some(elapsed.as_secs() * (total - done) as u64 / *done as u64) };
            let left = left.map_or_else(String::new, |left| format!(", {}:{:02} left", left / 60, left % 60));
            let (work, way) = (cell.work, cell.way);
            let (aio, cache, rw) = (way.aio_name(), way.cache.name(), work.rw.name());
            format!("{done}/{total}{left}: {aio} {cache} {rw} depth {} ({})", work.depth, subject.name())
        }
    };
    // Progress is for a person; one who is gone needs none.
    let _ = write!(io::stderr(), "\r\x1b[K{line}");
}

#[cfg(test)]
mod tests;
