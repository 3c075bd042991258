//! The network benchmark: skiff beside QEMU with the same backend, guest to host and back, and requests with answers; what
//! that costs the threads that move the frames, and how many exits and interrupts. Prints; never passes or fails.
//!
//! docs/performance.md describes the method and records the figures. One thread, plus those that read the console of the
//! machine being measured.

mod cost;
mod measure;
mod table;

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::{Parser, ValueEnum};

use measure::{Bench, Row};
use table::Table;

/// Measure the network of skiff beside QEMU's, machine by machine in turn
///
/// Needs a KVM that can run a stock Linux kernel (in the lab there is one: `tests/lab/run`), network namespaces, and
/// resources/rootfs/tools built. Exits are counted where debugfs is mounted and readable.
#[derive(Debug, Parser)]
#[command(max_term_width = 120)]
struct Options {
    /// Rounds; in each, every machine is started once with every backend
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Seconds of each transfer
    #[arg(long, default_value_t = 2)]
    seconds: u32,
    /// What the frames go to
    #[arg(long, value_delimiter = ',', default_value = "tap,vhost,passt")]
    backends: Vec<Backend>,
    /// The machines, in the order of the first round
    #[arg(long, value_delimiter = ',', default_value = "skiff,qemu")]
    machines: Vec<Name>,
    /// Another build of skiff, the machine `other`
    #[arg(long, value_name = "PATH")]
    other: Option<PathBuf>,
    /// What is measured
    #[arg(long, value_delimiter = ',', default_value = "send,send4,receive,receive4,requests")]
    rows: Vec<Row>,
    /// Pairs of queues, and CPUs of the guest
    #[arg(long, default_value_t = 1)]
    queues: u32,
    /// Also print every sample, as it comes
    #[arg(long)]
    samples: bool,
}

/// A machine beside which others are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Name {
    Skiff,
    Qemu,
    /// Another build of skiff: --other
    Other,
}

/// What the frames go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Backend {
    /// A TAP interface, through the machine's own threads
    Tap,
    /// A TAP interface, through vhost-net
    Vhost,
    /// passt, joined through its socket
    Passt,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    if options.machines.is_empty() {
        bail!("--machines: name at least one");
    }
    if options.machines.contains(&Name::Other) && options.other.is_none() {
        bail!("--machines: other is what --other names");
    }
    let folder = tempfile::tempdir().context("no temporary folder")?;
    let initrd = tests::network::initrd(folder.path()).context("the guest has no tools")?;
    let bench = Bench {
        folder: folder.path(),
        initrd: &initrd,
        other: options.other.as_deref(),
        seconds: options.seconds,
        queues: options.queues,
    };
    let mut table = Table::default();
    for round in 0..options.runs {
        for backend in &options.backends {
            for turn in 0..options.machines.len() {
                let machine = options.machines[(turn + round) % options.machines.len()];
                for (row, sample) in bench.run(machine, *backend, &options.rows)? {
                    if options.samples {
                        println!("{round} {backend:?} {row:?} {machine:?} {sample:?}");
                    }
                    table.add(*backend, row, machine, sample);
                }
            }
        }
    }
    table.print(&options.machines);
    Ok(())
}
