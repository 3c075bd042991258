#![expect(clippy::cast_precision_loss, clippy::cast_sign_loss, reason = "the length of a bar")]
//! The results as tables for a terminal: one for each kind of work, a line for each way to do it, the fastest marked.

use std::fmt;

use super::plan::{Content, Subject, Work};
use super::{Manifest, Measured, NOISE, Results, Summary};
use crate::config::format_size;
use crate::doctor::KvmKind;

/// Letters of the longest bar.
const BAR: usize = 20;

/// From this block size on, bytes say more than requests.
const LARGE: u32 = 64 << 10;

impl fmt::Display for Results {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.manifest.fmt(out)?;
        for table in self.cells.chunk_by(|one, other| one.cell.work == other.cell.work) {
            writeln!(out)?;
            write_table(out, table)?;
        }
        writeln!(out, "\n* fastest   ? rounds differ by more than {:.0} %: worthless", NOISE * 100.0)?;
        writeln!(out, "io us: CPU time of a request in all threads but the vCPU's; the guest polls")?;
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
    format!("{content}, {} {bs}, depth {}{queues}", work.rw.name(), work.depth)
}

fn write_table(out: &mut fmt::Formatter<'_>, table: &[Measured]) -> fmt::Result {
    let Some(first) = table.first() else { return Ok(()) };
    let work = first.cell.work;
    let compared: Vec<Subject> = [Subject::Host, Subject::Qemu]
        .into_iter()
        .filter(|subject| table.iter().any(|row| row.summary.contains_key(subject)))
        .collect();
    let unit = if work.bs >= LARGE { "MiB/s" } else { "IOPS" };
    writeln!(out, "{}", heading(&work))?;
    write!(out, "  {:<9}{:<16}{:>9} {:<BAR$}", "engine", "cache", unit, "")?;
    for subject in &compared {
        write!(out, "{:>9}", format!("/ {}", subject.name()))?;
    }
    writeln!(out, "{:>9}{:>9}{:>8}{:>7}", "p50 us", "p99 us", "io us", "kicks")?;
    let ours = |row: &Measured| row.summary.get(&Subject::Skiff).map(|summary| summary.iops.median);
    let best = table.iter().filter_map(ours).fold(0.0, f64::max);
    for row in table {
        write_row(out, row, best, &compared)?;
    }
    Ok(())
}

fn write_row(out: &mut fmt::Formatter<'_>, row: &Measured, best: f64, compared: &[Subject]) -> fmt::Result {
    let (work, way) = (&row.cell.work, &row.cell.way);
    let cache = format!("{}{}{}", way.cache.name(), if way.ioeventfd { "" } else { " -ioev" }, way.polling(" poll="));
    let summary = row.summary.get(&Subject::Skiff);
    let mark = if summary.is_some_and(|summary| summary.iops.median >= best) { '*' } else { ' ' };
    write!(out, "{mark} {:<9}{cache:<16}", way.aio.name())?;
    if let Some(summary) = summary {
        let Summary { iops, p50_us, p99_us, io_us, kicks, noise, .. } = summary;
        let bar = "#".repeat(((iops.median / best.max(1.0)) * BAR as f64).round() as usize);
        write!(out, "{:>8}{} {bar:<BAR$}", figure(work, iops.median), if *noise { '?' } else { ' ' })?;
        for subject in compared {
            let ratio = row.summary.get(subject).and_then(|summary| summary.ratio);
            let text = ratio.map_or_else(
                || "-".to_owned(),
                |ratio| format!("{:.2}{}", ratio.median, if ratio.is_noise() { '?' } else { ' ' }),
            );
            write!(out, "{text:>9}")?;
        }
        writeln!(out, "{p50_us:>9.1}{p99_us:>9.1}{io_us:>8.2}{:>7.2}", kicks.unwrap_or_default())?;
    } else {
        writeln!(out, "{:>8}", "-")?;
    }
    row.errors.iter().try_for_each(|error| writeln!(out, "  failed: {error}"))
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
