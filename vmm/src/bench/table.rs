#![expect(clippy::cast_precision_loss, clippy::cast_sign_loss, reason = "the length of a bar")]
//! The results as tables for a terminal: one for each kind of work, a line for each way to do it, the fastest marked.

use std::fmt;

use super::cell::{AUTO, Content, Way, Work};
use super::stats::interval;
use super::subject::Subject;
use super::{Manifest, Measured, Middle, NOISE, Results, Summary};
use crate::config::format_size;
use crate::doctor::KvmKind;

/// Letters of the longest bar.
const BAR: usize = 10;

/// From this block size on, bytes say more than requests.
const LARGE: u32 = 64 << 10;

impl fmt::Display for Results {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.manifest.fmt(out)?;
        for table in self.cells.chunk_by(|one, other| one.cell.work == other.cell.work) {
            writeln!(out)?;
            write_table(out, table)?;
        }
        writeln!(out, "\n* fastest   ? the interval is wider than {:.0} %: worthless", NOISE * 100.0)?;
        writeln!(out, "{}", Confidence(self.manifest.repeat))?;
        writeln!(out, "io us: CPU time of a request in all threads but the vCPU's")?;
        writeln!(out, "kicks, intr, calls: doorbells, interrupts, io_submit or io_uring_enter calls for a request")?;
        writeln!(out, "batch: requests that went to the engine at once")?;
        self.left_out.iter().try_for_each(|line| writeln!(out, "{line}"))?;
        if !self.complete {
            writeln!(out, "INTERRUPTED: not all was measured")?;
        }
        Ok(())
    }
}

impl fmt::Display for Manifest {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { skiff, kernel, processor, cpus, storage, .. } = self;
        let kvm = match self.kvm {
            Some(KvmKind::Hardware) => "hardware KVM",
            Some(KvmKind::Software { .. }) => "software KVM",
            None => "KVM",
        };
        writeln!(out, "skiff {skiff}, Linux {kernel}, {processor} x {cpus}, {kvm}")?;
        write!(out, "disk: {}", storage.path)?;
        if let Some(size) = storage.size {
            write!(out, ", files of {}", format_size(size))?;
        }
        if let Some(filesystem) = &storage.filesystem {
            write!(out, ", {filesystem}")?;
        }
        if let Some(device) = &storage.device {
            write!(out, " on {device}")?;
        }
        writeln!(out, "; {} x {} s a cell, seed {}", self.repeat, self.runtime, self.seed)
    }
}

fn heading(work: &Work) -> String {
    let content = match work.content {
        Content::Given => "the image",
        Content::Written => "written file",
        Content::Hole => "hole file",
        Content::Preallocated => "preallocated file",
    };
    let queues = if work.queues > 1 { format!(" in each of {} queues", work.queues) } else { String::new() };
    let bs = format_size(work.bs.into()).to_lowercase();
    let busy = if work.busy > 0 { format!(", {} busy threads beside it", work.busy) } else { String::new() };
    format!("{content}, {} {bs}, depth {}{queues}{busy}", work.rw.name(), work.depth)
}

fn write_table(out: &mut fmt::Formatter<'_>, table: &[Measured]) -> fmt::Result {
    let Some(first) = table.first() else { return Ok(()) };
    let work = first.cell.work;
    let settings = table.iter().map(|row| settings(&row.cell.way).len()).max().unwrap_or_default().max(10);
    let compared: Vec<Subject> = Subject::OTHERS
        .into_iter()
        .filter(|subject| table.iter().any(|row| row.summary.contains_key(subject)))
        .collect();
    let unit = if work.bs >= LARGE { "MiB/s" } else { "IOPS" };
    writeln!(out, "{}", heading(&work))?;
    write!(out, "  {:<9}{:<settings$}{unit:>9} {:<INTERVAL$}{:<BAR$}", "engine", "cache", "", "")?;
    for subject in &compared {
        // A long name takes the room of the range.
        write!(out, "{:<22}", format!("{:>9}", format!("/ {}", subject.name())))?;
    }
    write!(out, "{:>9}{:>9}{:>8}", "p50 us", "p99 us", "io us")?;
    writeln!(out, "{:>7}{:>7}{:>7}{:>7}", "kicks", "intr", "batch", "calls")?;
    let ours = |row: &Measured| row.summary.get(&Subject::Skiff).map(|summary| summary.iops.median);
    let best = table.iter().filter_map(ours).fold(0.0, f64::max);
    for row in table {
        write_row(out, row, best, &compared, settings)?;
    }
    Ok(())
}

/// The letters of a range in brackets.
const INTERVAL: usize = 17;

/// Cache mode and what else there is to say, as options.
fn settings(way: &Way) -> String {
    [way.cache.name().to_owned()].into_iter().chain(way.unusual()).collect::<Vec<_>>().join(",")
}

/// What the ranges mean after so many rounds.
struct Confidence(u32);

impl fmt::Display for Confidence {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (_, confidence) = interval(self.0 as usize);
        if confidence == 0.0 {
            return out.write_str("measured once: nothing tells a difference from noise; take --repeat 6 for 95 %");
        }
        let percent = (confidence * 100.0).floor();
        write!(out, "(low-high): the true median is there with {percent:.0} % confidence")?;
        if percent < 95.0 { out.write_str(" (--repeat 6: 95 %)") } else { Ok(()) }
    }
}

fn write_row(
    out: &mut fmt::Formatter<'_>,
    row: &Measured,
    best: f64,
    compared: &[Subject],
    width: usize,
) -> fmt::Result {
    let (work, way) = (&row.cell.work, &row.cell.way);
    let cache = settings(way);
    let summary = row.summary.get(&Subject::Skiff);
    let mark = if summary.is_some_and(|summary| summary.iops.median >= best) { '*' } else { ' ' };
    write!(out, "{mark} {:<9}{cache:<width$}", way.aio_name())?;
    if let Some(summary) = summary {
        let Summary { iops, p50_us, p99_us, io_us, kicks, interrupts, batch, submissions, noise, .. } = summary;
        let bar = "#".repeat(((iops.median / best.max(1.0)) * BAR as f64).round() as usize);
        let interval = range(*iops, |value| figure(work, value));
        let doubt = if *noise { '?' } else { ' ' };
        write!(out, "{:>8}{doubt} {interval:<INTERVAL$}{bar:<BAR$}", figure(work, iops.median))?;
        for subject in compared {
            let ratio = row.summary.get(subject).and_then(|summary| summary.ratio);
            let Some(ratio) = ratio else {
                write!(out, "{:>8} {:<13}", "-", "")?;
                continue;
            };
            let doubt = if ratio.is_noise() { '?' } else { ' ' };
            write!(out, "{:>8.2}{doubt} {:<12}", ratio.median, range(ratio, |value| format!("{value:.2}")))?;
        }
        write!(out, "{p50_us:>9.1}{p99_us:>9.1}{io_us:>8.2}")?;
        for count in [kicks, interrupts, batch, submissions] {
            write!(out, "{:>7}", count.map_or_else(|| "-".to_owned(), |count| format!("{count:.2}")))?;
        }
        writeln!(out)?;
    } else {
        writeln!(out, "{:>8}", "-")?;
    }
    if let Some(aio) = row.chosen {
        writeln!(out, "  {AUTO} is {}", aio.name())?;
    }
    row.errors.iter().try_for_each(|error| writeln!(out, "  failed: {error}"))
}

/// Where the true median is, in brackets; nothing after a single round.
fn range(middle: Middle, name: impl Fn(f64) -> String) -> String {
    if middle.is_single() { String::new() } else { format!("({}-{})", name(middle.low), name(middle.high)) }
}

/// Requests or MiB per second.
fn figure(work: &Work, iops: f64) -> String {
    if work.bs >= LARGE {
        return format!("{:.0}", iops * f64::from(work.bs) / f64::from(1 << 20));
    }
    match iops {
        0.0..10e3 => format!("{iops:.0}"),
        10e3..1e6 => format!("{:.1}k", iops / 1e3),
        _ => format!("{:.2}M", iops / 1e6),
    }
}

#[cfg(test)]
mod tests;
