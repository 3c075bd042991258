//! `skiff smoke`: files become scenarios, flags a plan, results go to the terminal and into files. Main thread.

mod new;

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Context;
use clap::{Args, Subcommand, ValueHint};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use skiff::config::ConfigError;
use skiff::exit;
use skiff::smoke::report::{Format, Progress, Target, colours, summary};
use skiff::smoke::{self, Plan, Scenario};

use super::Failure;

/// Boot kernels and images as scenarios say, and judge what they do
///
/// A scenario is a file: a machine, and steps such as a text to wait for on the console, a command to run at the prompt, how
/// the machine is to end. A kernel panic, a warning, a filesystem error, a machine that stops or resets by itself are noticed
/// whatever the steps wait for. Images are not written to, unless a scenario says so (snapshot = false): what guests write vanishes. docs/smoke.md
/// describes the format.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  Every scenario, as many at a time as this host has CPUs and memory for:
    skiff smoke scenarios/*.toml
  In CI: results that its server reads, and the console and disks of what failed:
    skiff smoke scenarios/*.toml --junit results.xml --html results.html --keep failures
  How often does it fail, two machines at a time:
    skiff smoke boot.toml --repeat 100 -j 2
  Look for mistakes in a scenario, and see its tests; nothing is started:
    skiff smoke boot.toml --list
  A first scenario for your kernel and your disk:
    skiff smoke new --kernel vmlinuz --disk root.img

Exit codes:
  0    all passed
  1    a test failed
  2    usage: flags or scenarios are wrong; nothing was started
  3    none failed, but the host could not run all of them, or the run was interrupted, or results cannot be written")]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(super) struct SmokeArgs {
    #[command(subcommand)]
    other: Option<Other>,
    /// The scenarios
    #[arg(value_name = "SCENARIO", value_hint = ValueHint::FilePath, required = true)]
    scenarios: Vec<PathBuf>,
    /// Machines at a time, if there is memory for them [default: as many as there are CPUs for]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    jobs: Option<u16>,
    /// Run each test so many times, and say how often it failed
    #[arg(long, value_name = "N", default_value_t = 1, hide_default_value = true,
        value_parser = clap::value_parser!(u32).range(1..=100_000))]
    repeat: u32,
    /// Only tests with this text in their name, as --list shows it; repeat for more
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,
    /// Keep the console, the messages and the disks of each test that does not pass, in a folder of its own in this one
    #[arg(long, value_name = "FOLDER", value_hint = ValueHint::DirPath)]
    keep: Option<PathBuf>,
    /// Print the names of the tests, and start nothing
    #[arg(long, visible_alias = "dry-run")]
    list: bool,
    /// Write the results into this file as JUnit XML, or to standard output if it is -
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Results")]
    junit: Option<PathBuf>,
    /// The same as JSON (docs/smoke-results.md)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Results")]
    json: Option<PathBuf>,
    /// The same as TAP, version 13
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Results")]
    tap: Option<PathBuf>,
    /// The same as a page with each console and its steps
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Results")]
    html: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Other {
    New(new::NewArgs),
}

/// The host could not do what it should: the code that [`smoke::Run::exit_code`] has for it.
const HOST: u8 = 3;

impl SmokeArgs {
    pub(super) fn run(&self) -> Result<u8, Failure> {
        if let Some(Other::New(new)) = &self.other {
            return new.run();
        }
        let plan = match self.plan() {
            Ok(plan) => plan,
            Err(errors) => {
                for error in errors {
                    super::log::last_line(&error.to_string());
                }
                return Ok(exit::USAGE);
            }
        };
        let tests = plan.tests();
        if tests.is_empty() {
            return Err(Failure::Usage(format!("--filter {}: no test has this in its name", self.filter.join(" "))));
        }
        if self.list {
            let names = tests.iter().fold(String::new(), |mut names, test| {
                // Writing to a String cannot fail.
                let _ = writeln!(names, "{test}");
                names
            });
            super::print(&names)?;
            return Ok(0);
        }
        let targets = self.targets()?;
        let stop = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, stop.clone()).context("signals")?;
        }
        let progress = Progress::on_stderr().context("no thread to show progress")?;
        let run = smoke::run(&plan, &stop, &progress);
        progress.finish();
        // Every file is tried before a closed standard output can end this.
        let failed: Vec<_> = targets.iter().filter_map(|target| target.write(&run).err()).collect();
        if targets.iter().any(Target::is_stdout) {
            let summary = summary(&run, colours(io::stderr().is_terminal()));
            // Somebody who is gone needs none.
            let _ = io::stderr().write_all(summary.as_bytes());
        } else {
            super::print(&summary(&run, colours(io::stdout().is_terminal())))?;
        }
        for error in &failed {
            super::log::last_line(&format!("{error:#}"));
        }
        Ok(match run.exit_code() {
            0 if !failed.is_empty() => HOST,
            code => code,
        })
    }

    /// Reads all scenarios.
    fn plan(&self) -> Result<Plan, Vec<ConfigError>> {
        let (mut scenarios, mut errors) = (Vec::<Scenario>::new(), Vec::new());
        for path in &self.scenarios {
            match Scenario::read(path) {
                Ok(scenario) => match scenarios.iter().find(|other| other.name == scenario.name) {
                    Some(other) => errors.push(taken(&scenario, &other.file)),
                    None => scenarios.push(scenario),
                },
                Err(more) => errors.extend(more),
            }
        }
        let (filters, keep) = (self.filter.clone(), self.keep.clone());
        let jobs = self.jobs.map(usize::from);
        if errors.is_empty() { Ok(Plan { scenarios, jobs, repeat: self.repeat, filters, keep }) } else { Err(errors) }
    }

    /// Where results go; each can be written.
    fn targets(&self) -> Result<Vec<Target>, Failure> {
        let files = [
            (Format::Junit, &self.junit),
            (Format::Json, &self.json),
            (Format::Tap, &self.tap),
            (Format::Html, &self.html),
        ];
        let targets: Vec<_> =
            files.iter().filter_map(|(format, path)| Some(Target::new(*format, path.as_deref()?))).collect();
        if targets.iter().filter(|target| target.is_stdout()).count() > 1 {
            return Err(Failure::Usage(
                "only one form of the results can go to standard output; name files".to_owned(),
            ));
        }
        let named: Vec<_> = files.iter().filter_map(|(_, path)| path.as_ref()).collect();
        if let Some(path) = named.iter().enumerate().find_map(|(at, path)| named[..at].contains(path).then_some(path)) {
            return Err(Failure::Usage(format!("{}: two forms of the results in one file; name two", path.display())));
        }
        for target in &targets {
            target.check().map_err(|error| Failure::Usage(format!("{error:#}")))?;
        }
        if let Some(folder) = &self.keep {
            std::fs::create_dir_all(folder).map_err(|error| {
                Failure::Usage(format!("--keep {}: {error}; name a folder that can be made", folder.display()))
            })?;
        }
        Ok(targets)
    }
}

/// Reports tell tests apart by their names.
fn taken(scenario: &Scenario, other: &Path) -> ConfigError {
    let (file, name) = (scenario.file.display(), &scenario.name);
    if scenario.file == other {
        return ConfigError::new(format!("{file}: named twice; name it once, or write --repeat 2"));
    }
    ConfigError::new(format!("{file}:1: the name {name:?} belongs to {}; write name = \"OTHER\"", other.display()))
}
