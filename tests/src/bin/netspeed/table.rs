//! The tables: medians of all rounds, and the median of the ratios of each round's pair.

use std::collections::BTreeMap;

use crate::measure::{Row, Sample};
use crate::{Backend, Name};

/// All samples.
#[derive(Default)]
pub(crate) struct Table(BTreeMap<(Backend, Row), BTreeMap<Name, Vec<Sample>>>);

impl Table {
    pub(crate) fn add(&mut self, backend: Backend, row: Row, machine: Name, sample: Sample) {
        self.0.entry((backend, row)).or_default().entry(machine).or_default().push(sample);
    }

    /// A line a row, the first of `machines` over each of the others; a MiB or a request is what costs are for.
    pub(crate) fn print(&self, machines: &[Name]) {
        println!("{:<16} {:<6} {:>20} {:>8} {:>8} {:>8}", "", "", "MiB/s or requests/s", "CPU us", "exits", "irqs");
        for ((backend, row), samples) in &self.0 {
            for name in machines {
                let Some(mine) = samples.get(name) else { continue };
                let of = |value: fn(&Sample) -> f64| median(mine.iter().map(value));
                let title = format!("{backend:?} {row:?}").to_lowercase();
                let (cpu, exits) = (of(|sample| sample.cost.cpu), of(|sample| sample.cost.exits));
                let interrupts = of(|sample| sample.cost.interrupts);
                let speeds = mine.iter().map(|sample| sample.speed);
                let (low, high) = speeds.fold((f64::MAX, f64::MIN), |(low, high), x| (low.min(x), high.max(x)));
                let speed = format!("{:.0} ({low:.0}-{high:.0})", of(|sample| sample.speed));
                let name = format!("{name:?}").to_lowercase();
                println!("{title:<16} {name:<6} {speed:>20} {cpu:>8.1} {exits:>8.2} {interrupts:>8.2}");
            }
            let Some(ours) = samples.get(&machines[0]) else { continue };
            for name in &machines[1..] {
                let Some(theirs) = samples.get(name) else { continue };
                let ratio = |value: fn(&Sample) -> f64| {
                    median(ours.iter().zip(theirs).map(|(ours, theirs)| value(ours) / value(theirs)))
                };
                let (speed, cpu) = (ratio(|sample| sample.speed), ratio(|sample| sample.cost.cpu));
                let (exits, interrupts) = (ratio(|sample| sample.cost.exits), ratio(|sample| sample.cost.interrupts));
                println!("{:<16} {:<6} {speed:>20.2} {cpu:>8.2} {exits:>8.2} {interrupts:>8.2}", "", "ratio");
            }
        }
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => values[len / 2],
        len => f64::midpoint(values[len / 2 - 1], values[len / 2]),
    }
}
