//! The startup benchmark: skiff beside QEMU's microvm and q35, from exec to the guest's first instruction and to its
//! init, the exits on the way, and what the machine then costs while the guest is idle. Prints; never passes or fails.
//!
//! docs/performance.md describes the method and records the figures. One thread, plus one that reads the console of the
//! machine being measured.

mod guest;
mod kvm;
mod machine;
mod process;
mod report;
mod trace;

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Parser;

use guest::{Guest, Kind};
use machine::{Machine, Name};
use report::{Idle, Report, Sample};

/// Measure the start of skiff beside QEMU, run by run in turn
///
/// Needs /dev/kvm; the Linux guest also needs a KVM that can run one (in the lab there is one: `tests/lab/run`).
/// Exits are counted where debugfs is mounted and readable.
#[derive(Debug, Parser)]
#[command(max_term_width = 120)]
struct Options {
    /// Rounds; in each, every machine runs every guest once
    #[arg(long, default_value_t = 7)]
    runs: usize,
    /// Seconds over which an idle guest's CPU time is taken, and its memory after them; 0: only measure the start
    #[arg(long, default_value_t = 5)]
    idle: u64,
    /// The machines, in the order of the first round
    #[arg(long, value_delimiter = ',', default_value = "skiff,microvm,q35")]
    machines: Vec<Name>,
    /// The guests: bare (a few instructions of our own) and linux (the stock kernel)
    #[arg(long, value_delimiter = ',', default_value = "bare,linux")]
    guests: Vec<Kind>,
    /// The skiff to measure [default: the one beside this program]
    #[arg(long, value_name = "FILE")]
    skiff: Option<PathBuf>,
    /// Another build of skiff, measured as the machine "other"
    #[arg(long, value_name = "FILE")]
    other: Option<PathBuf>,
    /// The kernel of the Linux guest [default: target/linux/vmlinuz]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Instead of measuring, boot each machine once and print its exits by port, address and register
    #[arg(long)]
    profile: bool,
    /// Print all samples as JSON instead of tables
    #[arg(long)]
    json: bool,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let folder = std::env::current_exe()?.parent().context("this program lies in no folder")?.to_owned();
    let machines = machines(&options, &folder)?;
    let scratch = tempfile::tempdir().context("no temporary folder")?;
    let mut report = Report::new(&machines, options.idle);
    let mut guests = Vec::new();
    for kind in &options.guests {
        match kind {
            Kind::Linux if kvm::is_software() => report.skip(
                "guest linux: the KVM of this host is a software one, which cannot run a stock kernel; \
                 use tests/lab/run",
            ),
            Kind::Linux => {
                let kernel = options.kernel.clone().unwrap_or_else(|| folder.join("../../linux/vmlinuz"));
                guests.push(Guest::linux(scratch.path(), &kernel)?);
            }
            Kind::Bare => guests.push(Guest::bare(scratch.path())?),
        }
    }
    if options.profile {
        return profile(&machines, &guests);
    }
    // Of a program just built, pages that are not written back yet would count as private and dirty.
    Command::new("sync").status().context("sync")?;
    measure(&options, &machines, &guests, &mut report)?;
    if options.json {
        return report.print_json();
    }
    report.print_tables();
    Ok(())
}

/// The machines to measure: each program once.
fn machines(options: &Options, folder: &std::path::Path) -> anyhow::Result<Vec<Machine>> {
    let skiff = options.skiff.clone().unwrap_or_else(|| folder.join("skiff"));
    let mut machines = Vec::new();
    for name in &options.machines {
        machines.push(Machine::new(*name, &skiff)?);
    }
    if let Some(other) = &options.other {
        machines.push(Machine::new(Name::Other, other)?);
    }
    if machines.is_empty() {
        bail!("--machines: name at least one");
    }
    Ok(machines)
}

/// Every machine with every guest, in a new order each round. Round 0 only fills the host's caches.
fn measure(options: &Options, machines: &[Machine], guests: &[Guest], report: &mut Report) -> anyhow::Result<()> {
    for round in 0..=options.runs {
        for guest in guests {
            for turn in 0..machines.len() {
                let machine = &machines[(turn + round) % machines.len()];
                eprint!("\r\x1b[Kround {round} of {}: {} {}", options.runs, machine.name, guest.kind);
                let idle = if round == 0 { Duration::ZERO } else { Duration::from_secs(options.idle) };
                let sample = run(machine, guest, idle)?;
                if round > 0 {
                    report.add(machine.name, guest.kind, sample);
                }
            }
        }
    }
    eprintln!();
    Ok(())
}

/// One machine, from exec until it is killed.
fn run(machine: &Machine, guest: &Guest, idle: Duration) -> anyhow::Result<Sample> {
    let mut process = machine.start(guest)?;
    let reached = process.wait_for(guest.marker)?;
    let exits = kvm::statistics(process.id());
    if idle.is_zero() {
        return Ok(Sample { reached, exits, idle: None });
    }
    // The guest's first housekeeping is not idling.
    std::thread::sleep(Duration::from_secs(1));
    let cpu = process.idle_cpu(idle)?;
    let memory = process.memory_beyond(machine::MEMORY)?;
    Ok(Sample { reached, exits, idle: Some(Idle { cpu, memory }) })
}

/// Where the exits of each machine come from, in one traced boot.
fn profile(machines: &[Machine], guests: &[Guest]) -> anyhow::Result<()> {
    for guest in guests {
        for machine in machines {
            let trace = trace::Trace::start()?;
            let mut process = machine.start(guest)?;
            process.wait_for(guest.marker)?;
            let tables = trace.read()?;
            drop(process);
            println!("{} {}", machine.name, guest.kind);
            for table in tables {
                println!("{table}");
            }
        }
    }
    Ok(())
}
