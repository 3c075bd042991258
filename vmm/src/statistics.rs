//! What `--stats` and SIGUSR1 print: the statistics of disks and network interfaces as text for a person or as one line of
//! JSON for a program, whose form is in docs/statistics.md. Main thread.

mod net;

use std::fmt::{self, Write as _};
use std::sync::Arc;

use devices::statistics::{Durations, SIZES};
use devices::virtio::blk::statistics::{KINDS, Kind, Snapshot, Stage, Statistics};
use devices::virtio::net::statistics::Statistics as NetStatistics;
use serde_json::{Value, json};

use self::net::Net;
use crate::config::{DiskConfig, StatsFormat};

/// The part of all requests that a column of latencies stands for, and its name.
const QUANTILES: [(&str, f64); 4] = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999)];

/// The numbers of all disks and interfaces at one moment.
pub struct Report {
    disks: Vec<Disk>,
    nets: Vec<Net>,
}

struct Disk {
    id: String,
    queues: Vec<Snapshot>,
}

impl Report {
    /// Takes a snapshot of `statistics`, which are those of `disks` in the same order, and of interfaces with their ids.
    pub fn new<'a>(
        disks: &[DiskConfig],
        statistics: &[Arc<Statistics>],
        nets: impl Iterator<Item = (&'a str, &'a NetStatistics)>,
    ) -> Self {
        let disks = disks.iter().zip(statistics);
        let disk =
            |(disk, counted): (&DiskConfig, &Arc<Statistics>)| Disk { id: disk.id.clone(), queues: counted.snapshot() };
        Self { disks: disks.map(disk).collect(), nets: nets.map(|(id, counted)| Net::new(id, counted)).collect() }
    }

    /// Whole lines.
    pub fn format(&self, format: StatsFormat) -> String {
        match format {
            StatsFormat::Text => self.to_string(),
            StatsFormat::Json => format!("{}\n", self.json()),
        }
    }

    fn json(&self) -> Value {
        let disk = |disk: &Disk| {
            let queues: Vec<_> = disk.queues.iter().map(queue_json).collect();
            json!({ "id": disk.id, "queues": queues })
        };
        let nets: Vec<_> = self.nets.iter().map(Net::json).collect();
        json!({ "disks": self.disks.iter().map(disk).collect::<Vec<_>>(), "nets": nets })
    }
}

fn queue_json(queue: &Snapshot) -> Value {
    let kinds = |numbers: &[u64; KINDS]| -> Value {
        Kind::ALL.iter().zip(numbers).map(|(kind, number)| (kind.name().to_owned(), json!(number))).collect()
    };
    let batches: Value = (0..SIZES).map(|class| ((1_u64 << class).to_string(), json!(queue.batches[class]))).collect();
    let latencies = queue.latencies.as_ref().map(|stages| -> Value {
        let stage = |(stage, durations): (&Stage, &Durations)| (stage.name().to_owned(), durations_json(durations));
        Stage::ALL.iter().zip(stages).map(stage).collect()
    });
    json!({
        "requests": kinds(&queue.requests),
        "bytes": kinds(&queue.bytes),
        "errors": kinds(&queue.errors),
        "kicks": queue.kicks,
        "interrupts": queue.interrupts,
        "merged": queue.merged,
        "submissions": queue.submissions,
        "batches": batches,
        "latency_ns": latencies,
    })
}

fn durations_json(durations: &Durations) -> Value {
    let mut all = json!({ "count": durations.count(), "mean": durations.mean(), "max": durations.max() });
    for (name, part) in QUANTILES {
        all[name] = durations.quantile(part).into();
    }
    all
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.disks.is_empty() && self.nets.is_empty() {
            return out.write_str("no disks, no network, no statistics\n");
        }
        self.disks.iter().try_for_each(|disk| write_disk(out, disk))?;
        self.nets.iter().try_for_each(|net| write!(out, "{net}"))
    }
}

fn write_disk(out: &mut fmt::Formatter<'_>, disk: &Disk) -> fmt::Result {
    let mut sum = Snapshot::default();
    disk.queues.iter().for_each(|queue| sum += queue);
    writeln!(out, "disk {}", disk.id)?;
    if disk.queues.is_empty() {
        return writeln!(out, "  no driver has used it");
    }
    writeln!(out, "  {:<10}{:>14}{:>20}{:>10}", "", "requests", "bytes", "errors")?;
    for (at, kind) in Kind::ALL.iter().enumerate().filter(|(at, _)| sum.requests[*at] > 0) {
        let (requests, bytes, errors) = (sum.requests[at], sum.bytes[at], sum.errors[at]);
        writeln!(out, "  {:<10}{requests:>14}{bytes:>20}{errors:>10}", kind.name())?;
    }
    for (index, queue) in disk.queues.iter().enumerate() {
        let requests = queue.requests.iter().sum::<u64>();
        let Snapshot { kicks, interrupts, merged, submissions, .. } = queue;
        let batches = queue.batches.iter().sum::<u64>();
        write!(out, "  queue {index}: {requests} requests, {batches} batches, {merged} merged, ")?;
        writeln!(out, "{submissions} submissions, {kicks} kicks, {interrupts} interrupts")?;
    }
    write_batches(out, &sum.batches)?;
    let Some(stages) = &sum.latencies else { return Ok(()) };
    write!(out, "  {:<10}{:>10}", "µs", "mean")?;
    QUANTILES.iter().try_for_each(|(name, _)| write!(out, "{name:>10}"))?;
    writeln!(out, "{:>10}", "max")?;
    for (stage, durations) in Stage::ALL.iter().zip(stages) {
        write!(out, "  {:<10}{}", stage.name(), Micros(durations.mean()))?;
        QUANTILES.iter().try_for_each(|(_, part)| write!(out, "{}", Micros(durations.quantile(*part))))?;
        writeln!(out, "{}", Micros(durations.max()))?;
    }
    Ok(())
}

fn write_batches(out: &mut fmt::Formatter<'_>, batches: &[u64; SIZES]) -> fmt::Result {
    let mut line = String::new();
    for (class, count) in batches.iter().enumerate().filter(|(_, count)| **count > 0) {
        let from = 1_u64 << class;
        let size = match class {
            0 => "1".to_owned(),
            _ if class == SIZES - 1 => format!("{from} or more"),
            _ => format!("{from}-{}", 2 * from - 1),
        };
        let comma = if line.is_empty() { "" } else { ", " };
        write!(line, "{comma}{count} of {size}")?;
    }
    if line.is_empty() { Ok(()) } else { writeln!(out, "  batches: {line}") }
}

/// Nanoseconds as microseconds, ten wide.
struct Micros(u64);

impl fmt::Display for Micros {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:>8}.{}", self.0 / 1000, self.0 % 1000 / 100)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn just(disks: Vec<Disk>) -> Report {
        Report { disks, nets: Vec::new() }
    }

    fn report(latencies: bool) -> Report {
        let mut durations = Durations::default();
        (0..10).for_each(|_| durations.record(Duration::from_micros(100)));
        let mut batches = [0; SIZES];
        (batches[0], batches[1], batches[SIZES - 1]) = (4, 3, 1);
        let latencies = latencies.then(|| [durations.clone(), durations.clone(), durations]);
        let (mut requests, mut bytes, mut errors) = ([0; KINDS], [0; KINDS], [0; KINDS]);
        requests[..3].copy_from_slice(&[10, 2, 1]);
        bytes[..2].copy_from_slice(&[40960, 1024]);
        errors[0] = 1;
        let queue = Snapshot {
            requests,
            bytes,
            errors,
            kicks: 7,
            interrupts: 6,
            merged: 5,
            submissions: 4,
            batches,
            latencies,
        };
        let idle = Snapshot::default();
        just(vec![Disk { id: "root".to_owned(), queues: vec![queue, idle] }])
    }

    #[test]
    fn text_for_a_person() {
        let expected = "\
disk root
                  requests               bytes    errors
  read                  10               40960         1
  write                  2                1024         0
  flush                  1                   0         0
  queue 0: 13 requests, 8 batches, 5 merged, 4 submissions, 7 kicks, 6 interrupts
  queue 1: 0 requests, 0 batches, 0 merged, 0 submissions, 0 kicks, 0 interrupts
  batches: 4 of 1, 3 of 2-3, 1 of 32768 or more
";
        assert_eq!(report(false).format(StatsFormat::Text), expected);
        let text = report(true).format(StatsFormat::Text);
        let heading = "  µs              mean       p50       p90       p99     p99.9       max\n";
        assert!(text.starts_with(expected) && text.contains(heading), "{text}");
        assert_eq!(text.lines().filter(|line| line.contains("100.")).count(), 3, "{text}");
        assert_eq!(just(Vec::new()).format(StatsFormat::Text), "no disks, no network, no statistics\n");
        let unused = just(vec![Disk { id: "data".to_owned(), queues: Vec::new() }]);
        assert_eq!(unused.format(StatsFormat::Text), "disk data\n  no driver has used it\n");
    }

    #[test]
    fn json_for_a_program_is_one_line() {
        let line = report(true).format(StatsFormat::Json);
        assert_eq!(line.find('\n'), Some(line.len() - 1));
        let value: Value = serde_json::from_str(&line).unwrap();
        let queue = &value["disks"][0]["queues"][0];
        assert_eq!(value["disks"][0]["id"], "root");
        let requests =
            json!({ "read": 10, "write": 2, "flush": 1, "discard": 0, "write-zeroes": 0, "identify": 0, "refused": 0 });
        assert_eq!(queue["requests"], requests);
        assert_eq!((&queue["bytes"]["read"], &queue["errors"]["read"]), (&json!(40960), &json!(1)));
        assert_eq!((&queue["kicks"], &queue["interrupts"], &queue["merged"]), (&json!(7), &json!(6), &json!(5)));
        assert_eq!(queue["submissions"], 4);
        assert_eq!((&queue["batches"]["2"], &queue["batches"]["4"]), (&json!(3), &json!(0)));
        for stage in ["queue", "engine", "total"] {
            let stage = &queue["latency_ns"][stage];
            assert_eq!(stage["count"], 10);
            for key in ["mean", "p50", "p90", "p99", "p99.9", "max"] {
                assert!(stage[key].as_u64().unwrap().abs_diff(100_000) <= 1000, "{key}: {stage}");
            }
        }
        assert_eq!(value["disks"][0]["queues"][1]["latency_ns"], Value::Null);
    }
}
