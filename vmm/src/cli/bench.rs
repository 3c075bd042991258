//! `skiff bench`: flags become a plan, results go to the terminal and into a file. Main thread.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, ensure};
use block::cache::CacheMode;
use block::engine::Aio;
use block::engine::threads::DEFAULT_THREADS;
use clap::{Args, Subcommand, ValueHint};
use guest::workload::Mix;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use skiff::bench::{self, AUTO, Axes, Comparison, Completion, Content, POLL_US, Place, Plan, Progress, Subject};
use skiff::config::{format_size, parse_size};

use super::Failure;

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
    /// The most threads of the engine threads, for each queue, 1 to 64 [default: 16]
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
    /// What to compare with: host (the same engine without a machine), qemu, none
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "host", value_parser = ["host", "qemu", "none"])]
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

    fn plan(&self) -> Result<Plan, Failure> {
        self.check_lists()?;
        let axes = self.axes();
        let place = match &self.disk {
            Some(path) => Place::Given(path.clone()),
            None => Place::Own(self.dir.clone().unwrap_or_else(|| ".".into()), self.size.unwrap_or(1 << 30)),
        };
        let usage = |line: String| Err(Failure::Usage(line));
        if let Some(path) = &self.disk
            && let Some(mix) = axes.mixes.iter().map(|(mix, _)| mix).find(|mix| mix.writes())
            && !self.destructive
        {
            let (mix, path) = (mix.name(), path.display());
            return usage(format!(
                "--rw {mix} would overwrite {path}; say --destructive if nobody needs what is on it"
            ));
        }
        let largest = axes.cells().iter().map(|cell| cell.work.bs).max().unwrap_or_default();
        match place {
            Place::Own(_, size) if size < largest.into() || size % 4096 != 0 => {
                return usage("--size: at least one block, and a multiple of 4K".to_owned());
            }
            _ => {}
        }
        if axes.cells().is_empty() {
            return usage("--engines native goes past the page cache; add --cache none or directsync".to_owned());
        }
        let against = [("host", Subject::Host), ("qemu", Subject::Qemu)];
        let against = against.into_iter().filter(|(name, _)| self.vs.iter().any(|said| said == name));
        let runtime = self.runtime.unwrap_or(Duration::from_secs(if self.full { 3 } else { 1 }));
        Ok(Plan {
            axes,
            place,
            runtime,
            warm_up: runtime / 10,
            repeat: self.repeat.unwrap_or(3),
            against: against.map(|(_, subject)| subject).collect(),
            pin: self.pin,
            seed: self.seed,
        })
    }

    /// Nothing is asked for twice, and nothing beside "none".
    fn check_lists(&self) -> Result<(), Failure> {
        if self.vs.len() > 1 && self.vs.iter().any(|said| said == "none") {
            return Err(Failure::Usage("--vs none compares with nothing; leave out none, or the others".to_owned()));
        }
        let own = |(mix, block): &(Mix, Option<u32>)| match block {
            Some(block) => format!("{}:{}", mix.name(), format_size((*block).into())),
            None => mix.name().to_owned(),
        };
        once("--vs", Some(&self.vs), Clone::clone)?;
        once("--content", self.content.as_ref(), |content| content.name().to_owned())?;
        once("--engines", self.engines.as_ref(), |engine| engine.0.map_or(AUTO, Aio::name).to_owned())?;
        once("--cache", self.cache.as_ref(), |cache| cache.name().to_owned())?;
        once("--depths", self.depths.as_ref(), u16::to_string)?;
        once("--bs", self.bs.as_ref(), |block| format_size((*block).into()))?;
        once("--rw", self.rw.as_ref(), own)?;
        once("--queues", self.queues.as_ref(), u16::to_string)?;
        once("--ioeventfd", self.ioeventfd.as_ref(), Clone::clone)?;
        once("--poll-us", self.poll_us.as_ref(), u32::to_string)?;
        once("--merge", self.merge.as_ref(), Clone::clone)?;
        once("--thread-pool-max", self.thread_pool_max.as_ref(), u8::to_string)?;
        once("--completion", self.completion.as_ref(), |completion| completion.name().to_owned())?;
        once("--busy", self.busy.as_ref(), u16::to_string)
    }

    fn axes(&self) -> Axes {
        fn or<T: Clone>(said: Option<&Vec<T>>, full: bool, all: &[T], few: &[T]) -> Vec<T> {
            said.cloned().unwrap_or_else(|| if full { all } else { few }.to_vec())
        }
        let (full, own) = (self.full && !self.quick, [Content::Written, Content::Hole]);
        let mixes = [Mix::RandRead, Mix::RandWrite, Mix::Read, Mix::Write].map(|mix| (mix, None));
        // Without --destructive an image of the user's is only read.
        let all_mixes: Vec<_> =
            mixes.into_iter().filter(|(mix, _)| self.disk.is_none() || self.destructive || !mix.writes()).collect();
        let switches = |said: &Option<Vec<String>>| -> Vec<bool> {
            said.as_ref().map_or_else(|| vec![true], |said| said.iter().map(|word| word == "on").collect())
        };
        let pools = self.thread_pool_max.iter().flatten().filter_map(|threads| NonZeroUsize::new((*threads).into()));
        let pools: Vec<_> = pools.collect();
        let engines: Option<Vec<_>> = self.engines.as_ref().map(|said| said.iter().map(|engine| engine.0).collect());
        let all = Aio::ALL.map(Some);
        let contents = or(self.content.as_ref(), full, &own, &own[..1]);
        Axes {
            contents: if self.disk.is_some() { vec![Content::Given] } else { contents },
            mixes: or(self.rw.as_ref(), full, &all_mixes, &mixes[..1]),
            blocks: or(self.bs.as_ref(), full, &[4 << 10, 64 << 10, 1 << 20], &[4 << 10]),
            depths: or(self.depths.as_ref(), full, &[1, 4, 32, 128], &[1, 32]),
            queues: or(self.queues.as_ref(), full, &[1, 4], &[1]),
            busy: or(self.busy.as_ref(), full, &[0], &[0]),
            engines: or(engines.as_ref(), full, &all, &all),
            caches: or(
                self.cache.as_ref(),
                full,
                &[CacheMode::None, CacheMode::Writeback],
                &[CacheMode::None, CacheMode::Writeback],
            ),
            ioeventfds: switches(&self.ioeventfd),
            polls: or(self.poll_us.as_ref(), full, &[POLL_US], &[POLL_US]),
            merges: switches(&self.merge),
            pools: if pools.is_empty() { vec![DEFAULT_THREADS] } else { pools },
            completions: or(self.completion.as_ref(), full, &[Completion::Poll], &[Completion::Poll]),
        }
    }
}

/// An error if the list of `flag` has something twice.
fn once<T>(flag: &str, list: Option<&Vec<T>>, name: fn(&T) -> String) -> Result<(), Failure> {
    let names: Vec<_> = list.into_iter().flatten().map(name).collect();
    let twice = names.iter().enumerate().find(|(at, name)| names[..*at].contains(name));
    twice.map_or(Ok(()), |(_, name)| Err(Failure::Usage(format!("{flag} has {name} twice; say it once"))))
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

/// The one of `all` that is called `text`.
fn named<T: Copy>(text: &str, all: &[T], name: fn(T) -> &'static str) -> Result<T, String> {
    let found = all.iter().copied().find(|one| name(*one) == text);
    let names = || all.iter().map(|one| name(*one)).collect::<Vec<_>>().join(", ");
    found.ok_or_else(|| format!("say one of {}", names()))
}

fn content(text: &str) -> Result<Content, String> {
    named(text, &Content::OWN, Content::name)
}

/// An engine of the list, or none where that is left to skiff.
#[derive(Clone, Copy, Debug)]
struct AioOrAuto(Option<Aio>);

fn engine(text: &str) -> Result<AioOrAuto, String> {
    if text == AUTO {
        return Ok(AioOrAuto(None));
    }
    named(text, &Aio::ALL, Aio::name).map(|aio| AioOrAuto(Some(aio))).map_err(|names| format!("{names}, {AUTO}"))
}

fn completion(text: &str) -> Result<Completion, String> {
    named(text, &Completion::ALL, Completion::name)
}

fn cache(text: &str) -> Result<CacheMode, String> {
    named(text, &CacheMode::ALL, CacheMode::name)
}

/// A mix, and the block size behind a colon.
fn mix(text: &str) -> Result<(Mix, Option<u32>), String> {
    let (name, block) = text.split_once(':').map_or((text, None), |(name, block)| (name, Some(block)));
    Ok((named(name, &Mix::ALL, Mix::name)?, block.map(block_size).transpose()?))
}

fn block_size(text: &str) -> Result<u32, String> {
    let bytes = if text.bytes().all(|byte| byte.is_ascii_digit()) {
        text.parse().map_err(|_| "not a size; write it like 4K".to_owned())?
    } else {
        parse_size(text)?
    };
    let good = bytes % 512 == 0 && (512..=4 << 20).contains(&bytes);
    if good { Ok(bytes as u32) } else { Err("a multiple of 512 bytes, at most 4M".to_owned()) }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.strip_suffix('s').unwrap_or(text).parse::<f64>();
    let good = seconds.ok().filter(|seconds| (0.01..=3600.0).contains(seconds));
    good.map(Duration::from_secs_f64).ok_or_else(|| "seconds between 0.01 and 3600, such as 3 or 0.5".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn plan(args: &str) -> Result<Plan, String> {
        let words = ["skiff", "bench"].into_iter().chain(args.split_ascii_whitespace());
        let cli = Cli::try_parse_from(words).map_err(|error| error.to_string())?;
        let Command::Bench(bench) = cli.command else { panic!("{cli:?}") };
        bench.plan().map_err(|error| format!("{error:?}"))
    }

    #[test]
    fn the_default_is_quick() {
        let plan = plan("").unwrap();
        assert_eq!(plan.axes, super::tests::plan("--quick").unwrap().axes);
        assert_eq!(plan.place, Place::Own(".".into(), 1 << 30));
        assert_eq!(plan.subjects(), [Subject::Skiff, Subject::Host]);
        // Under two minutes: a second each, a tenth of warm-up, and half a second to start and end a machine.
        assert!(plan.measurements() as u64 * 1600 < 110_000, "{}", plan.measurements());
    }

    #[test]
    fn lists() {
        let plan = plan(
            "--dir /d --size 64M --content hole,written --engines io_uring,native --cache none --depths 1,128 --bs 512,1M \
             --rw read:64K,randrw --queues 1,4 --ioeventfd on,off --poll-us 0,32 --runtime 0.5s --repeat 2 --vs none \
             --pin --seed 9 --merge off,on --thread-pool-max 1,16 --completion interrupt,poll --busy 0,2",
        )
        .unwrap();
        let axes = Axes {
            contents: vec![Content::Hole, Content::Written],
            mixes: vec![(Mix::Read, Some(64 << 10)), (Mix::RandRw, None)],
            blocks: vec![512, 1 << 20],
            depths: vec![1, 128],
            queues: vec![1, 4],
            busy: vec![0, 2],
            engines: vec![Some(Aio::IoUring), Some(Aio::Native)],
            caches: vec![CacheMode::None],
            ioeventfds: vec![true, false],
            polls: vec![0, 32],
            merges: vec![false, true],
            pools: vec![NonZeroUsize::MIN, DEFAULT_THREADS],
            completions: vec![Completion::Interrupt, Completion::Poll],
        };
        let (runtime, warm_up) = (Duration::from_millis(500), Duration::from_millis(50));
        let place = Place::Own("/d".into(), 64 << 20);
        assert_eq!(plan, Plan { axes, place, runtime, warm_up, repeat: 2, against: Vec::new(), pin: true, seed: 9 });
    }

    #[test]
    fn an_image_of_the_users_is_not_written_unless_told() {
        for rw in ["randwrite", "write", "read,randrw"] {
            let error = plan(&format!("--disk /dev/vdb --rw {rw}")).unwrap_err();
            assert!(error.contains("would overwrite /dev/vdb; say --destructive"), "{error}");
            assert!(plan(&format!("--disk /dev/vdb --rw {rw} --destructive")).is_ok());
        }
        assert!(plan("--disk /dev/vdb --full").unwrap().axes.mixes.iter().all(|(mix, _)| !mix.writes()));
        assert!(plan("--destructive").is_err());
    }

    #[test]
    fn values_that_are_none() {
        for (args, message) in [
            ("--engines aio", "say one of threads, native, io_uring, auto"),
            ("--engines native,auto,native", "--engines has native twice; say it once"),
            ("--vs none,host", "--vs none compares with nothing; leave out none, or the others"),
            ("--vs qemu,qemu", "--vs has qemu twice; say it once"),
            ("--depths 1,32,1", "--depths has 1 twice; say it once"),
            ("--bs 4K,4096", "--bs has 4K twice; say it once"),
            ("--rw read:4K,read,read:4096", "--rw has read:4K twice; say it once"),
            ("--merge on,on", "--merge has on twice; say it once"),
            ("--thread-pool-max 65", "65 is not in 1..=64"),
            ("--completion irq", "say one of poll, interrupt"),
            ("--cache off", "say one of writeback, none,"),
            ("--rw trim", "say one of randread, randwrite, read, write, randrw"),
            ("--content given", "say one of written, hole, preallocated"),
            ("--bs 1000", "a multiple of 512 bytes, at most 4M"),
            ("--bs 8M", "a multiple of 512 bytes, at most 4M"),
            ("--depths 0", "0 is not in 1..=1024"),
            ("--runtime 0", "seconds between 0.01 and 3600"),
            ("--size 4K --bs 8K", "--size: at least one block"),
            ("--size 4K --rw read:1M", "--size: at least one block"),
            ("--rw read:1000", "a multiple of 512 bytes"),
            ("--engines native --cache writeback", "--engines native goes past the page cache"),
            ("--quick --full", "cannot be used with"),
            ("--disk x --dir y", "cannot be used with"),
        ] {
            let error = plan(args).unwrap_err();
            assert!(error.contains(message), "{args}: {error}");
        }
    }
}
