//! Samples, and the tables made of them: median, smallest and largest of all rounds, and the median of the ratios of
//! each round's pair.
#![expect(clippy::cast_precision_loss, reason = "KiB and counts of exits stay far below 2^52")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde::Serialize;

use crate::guest::Kind;
use crate::machine::{Machine, Name};

/// KiB of a process, its guest's memory left out.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Memory {
    pub(crate) resident: u64,
    pub(crate) private_dirty: u64,
}

/// What a machine costs while its guest has nothing to do.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Idle {
    /// As a fraction of a core.
    pub(crate) cpu: f64,
    pub(crate) memory: Memory,
}

/// What one run showed.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Sample {
    /// From exec to the guest's marker.
    pub(crate) reached: Duration,
    /// KVM's counters when the marker came.
    pub(crate) exits: BTreeMap<String, u64>,
    /// CPU and memory of the idle guest's machine; none where only the start was measured.
    pub(crate) idle: Option<Idle>,
}

/// All samples of a benchmark run.
#[derive(Serialize)]
pub(crate) struct Report {
    machines: Vec<Name>,
    samples: BTreeMap<Kind, BTreeMap<Name, Vec<Sample>>>,
    /// KiB of the stripped program.
    binary_size: BTreeMap<Name, u64>,
    idle_seconds: u64,
    skipped: Vec<String>,
}

impl Report {
    pub(crate) fn new(machines: &[Machine], idle_seconds: u64) -> Self {
        let mut report = Self {
            machines: machines.iter().map(|machine| machine.name).collect(),
            samples: BTreeMap::new(),
            binary_size: BTreeMap::new(),
            idle_seconds,
            skipped: Vec::new(),
        };
        for machine in machines {
            match stripped_size(&machine.program) {
                Some(bytes) => _ = report.binary_size.insert(machine.name, bytes >> 10),
                None => report.skip(&format!("binary size of {}: strip (package binutils) failed", machine.name)),
            }
        }
        report
    }

    pub(crate) fn add(&mut self, machine: Name, guest: Kind, sample: Sample) {
        self.samples.entry(guest).or_default().entry(machine).or_default().push(sample);
    }

    /// Notes what was not measured, and why.
    pub(crate) fn skip(&mut self, what: &str) {
        self.skipped.push(what.to_owned());
    }

    pub(crate) fn print_json(&self) -> anyhow::Result<()> {
        println!("{}", serde_json::to_string_pretty(self)?);
        Ok(())
    }

    pub(crate) fn print_tables(&self) {
        for (guest, samples) in &self.samples {
            self.print_guest(*guest, samples);
        }
        println!("stripped program, KiB");
        for (name, size) in &self.binary_size {
            println!("{name:>10} {size:>8}");
        }
        for skipped in &self.skipped {
            println!("skipped: {skipped}");
        }
    }

    fn print_guest(&self, guest: Kind, samples: &BTreeMap<Name, Vec<Sample>>) {
        let rounds = samples.values().map(Vec::len).max().unwrap_or(0);
        let (title, reached) = match guest {
            Kind::Bare => ("a guest of a few instructions", "exec to first output, ms"),
            Kind::Linux => ("a stock Linux kernel", "exec to init, ms"),
        };
        println!("guest {guest}: {title}; {rounds} rounds: median (smallest-largest)");
        self.print_heads();
        let memory = |sample: &Sample| Some(sample.idle?.memory);
        self.print_row(samples, reached, 1, |sample| Some(sample.reached.as_secs_f64() * 1e3));
        self.print_row(samples, "resident beyond guest memory, KiB", 0, |sample| Some(memory(sample)?.resident as f64));
        self.print_row(samples, "private dirty beyond guest memory, KiB", 0, |sample| {
            Some(memory(sample)?.private_dirty as f64)
        });
        let idle = format!("idle CPU over {} s, % of a core", self.idle_seconds);
        self.print_row(samples, &idle, 2, |sample| Some(sample.idle?.cpu * 100.0));

        let counters: BTreeSet<_> = samples.values().flatten().flat_map(|sample| sample.exits.keys()).collect();
        for counter in &counters {
            self.print_row(samples, &format!("KVM {counter}"), 0, |sample| {
                Some(sample.exits.get(*counter).copied().unwrap_or(0) as f64)
            });
        }
        if counters.is_empty() {
            println!("skipped: KVM's counters: /sys/kernel/debug/kvm has none that can be read (mounted? root?)");
        }
        println!();
    }

    fn print_heads(&self) {
        print!("{:<42}", "");
        for machine in &self.machines {
            print!(" {machine:<26}");
        }
        for machine in self.machines.iter().skip(1) {
            print!(" {:<14}", format!("{}/{machine}", self.machines[0]));
        }
        println!();
    }

    fn print_row(
        &self,
        samples: &BTreeMap<Name, Vec<Sample>>,
        label: &str,
        digits: usize,
        of: impl Fn(&Sample) -> Option<f64>,
    ) {
        let columns: Vec<Vec<f64>> = self
            .machines
            .iter()
            .map(|name| samples.get(name).into_iter().flatten().filter_map(&of).collect())
            .collect();
        if columns.iter().all(Vec::is_empty) {
            return;
        }
        print!("{label:<42}");
        for column in &columns {
            let (low, high) = column.iter().fold((f64::MAX, f64::MIN), |(low, high), x| (low.min(*x), high.max(*x)));
            let cell = format!("{:.digits$} ({low:.digits$}-{high:.digits$})", median(column));
            print!(" {cell:<26}");
        }
        for other in columns.iter().skip(1) {
            let ratios: Vec<f64> = columns[0].iter().zip(other).map(|(ours, theirs)| ours / theirs).collect();
            let ratio = median(&ratios);
            print!(" {:<14}", if ratio.is_finite() { format!("{ratio:.3}") } else { "-".into() });
        }
        println!();
    }
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => values[len / 2],
        len => f64::midpoint(values[len / 2 - 1], values[len / 2]),
    }
}

/// Bytes of the program after `strip`, in a copy.
fn stripped_size(program: &Path) -> Option<u64> {
    let copy = tempfile::NamedTempFile::new().ok()?;
    let done = Command::new("strip").arg("-o").arg(copy.path()).arg(program).status().ok()?;
    done.success().then(|| copy.path().metadata().ok().map(|file| file.len()))?
}
