#![expect(clippy::cast_precision_loss, reason = "counts become figures for a report")]
//! The results of the parts, and figures taken from them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, ensure};
use serde_json::Value;

/// The files of the parts that were measured, by name.
#[derive(Debug, Default)]
pub(crate) struct Results(pub(crate) BTreeMap<String, Value>);

impl Results {
    /// Of all files in `folder`.
    ///
    /// # Errors
    /// When one is no JSON, or there is none.
    pub(crate) fn read(folder: &Path) -> anyhow::Result<Self> {
        let mut results = BTreeMap::new();
        for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            let name = path.file_stem().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            if path.extension().is_some_and(|extension| extension == "json") {
                let value = serde_json::from_str(&fs::read_to_string(&path)?);
                results.insert(name, value.with_context(|| path.display().to_string())?);
            }
        }
        ensure!(!results.is_empty(), "{}: no results; measure first", folder.display());
        Ok(Self(results))
    }

    /// The cells of a run of `skiff bench`; none of a part that was not measured.
    pub(crate) fn cells(&self, part: &str) -> Vec<Cell<'_>> {
        let cells = self.0.get(part).and_then(|results| results["cells"].as_array());
        cells.into_iter().flatten().map(Cell).collect()
    }
}

/// One cell of a run of `skiff bench` (docs/bench.md).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cell<'a>(&'a Value);

impl<'a> Cell<'a> {
    /// From the JSON of a cell.
    pub(crate) fn new(json: &'a Value) -> Self {
        Self(json)
    }

    /// A property of the cell as text.
    pub(crate) fn word(self, key: &str) -> String {
        match &self.0[key] {
            Value::String(word) => word.clone(),
            other => other.to_string(),
        }
    }

    /// A property of the cell as a number.
    pub(crate) fn number(self, key: &str) -> u64 {
        self.0[key].as_u64().unwrap_or_default()
    }

    /// Whether all `properties` have these values.
    pub(crate) fn is(self, properties: &[(&str, &str)]) -> bool {
        properties.iter().all(|(key, value)| self.word(key) == *value)
    }

    /// The median of requests per second of `subject`, of all rounds.
    pub(crate) fn iops(self, subject: &str) -> Option<f64> {
        let rounds = (0..self.rounds()).filter_map(|round| self.round(round, subject));
        Ratio::from(rounds.collect()).map(|of| of.median)
    }

    /// The median of a field of the summary of `subject`.
    pub(crate) fn median(self, subject: &str, field: &str) -> Option<f64> {
        self.0["summary"][subject][field].as_f64()
    }

    /// CPU time of skiff's vCPU in a second, in seconds: the least of the rounds.
    pub(crate) fn vcpu_share(self) -> Option<f64> {
        let rounds = (0..self.rounds()).filter_map(|round| {
            let cpu = self.0["rounds"][round]["skiff"]["vcpu_us"].as_f64()?;
            Some(cpu * self.round(round, "skiff")? / 1e6)
        });
        rounds.min_by(f64::total_cmp)
    }

    fn round(self, round: usize, subject: &str) -> Option<f64> {
        self.0["rounds"][round][subject]["iops"].as_f64()
    }

    /// How often it was measured.
    pub(crate) fn rounds(self) -> usize {
        self.0["rounds"].as_array().map_or(0, Vec::len)
    }

    /// Whether it does the same as `other`, but for the properties named.
    pub(crate) fn differs_only_in(self, other: Self, properties: &[&str]) -> bool {
        // All else in a cell is how it went.
        const RESULTS: [&str; 4] = ["chosen", "rounds", "errors", "summary"];
        let mut keys = self.0.as_object().into_iter().flatten().map(|(key, _)| key.as_str());
        keys.all(|key| RESULTS.contains(&key) || properties.contains(&key) || self.0[key] == other.0[key])
    }
}

/// A quotient of two figures: the median of the rounds' pairs, and the interval in which the true median is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Ratio {
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

/// Whether something holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Yes,
    No,
    /// The interval is on both sides.
    Open,
}

impl Ratio {
    /// Of the requests per second of two subjects, in one cell or in two of the same run, round by round.
    pub(crate) fn of(one: (Cell<'_>, &str), other: (Cell<'_>, &str)) -> Option<Self> {
        let rounds = one.0.rounds().min(other.0.rounds());
        let pairs = (0..rounds).filter_map(|round| Some(one.0.round(round, one.1)? / other.0.round(round, other.1)?));
        Self::from(pairs.filter(|ratio| ratio.is_finite()).collect())
    }

    /// From the rounds. The interval leaves out as many of the smallest and of the largest as [`beyond`] says.
    fn from(mut ratios: Vec<f64>) -> Option<Self> {
        ratios.sort_by(f64::total_cmp);
        let (beyond, half) = (beyond(ratios.len()), ratios.len() / 2);
        let (low, high) = (*ratios.get(beyond)?, *ratios.iter().nth_back(beyond)?);
        let even = ratios.len().is_multiple_of(2);
        let median = if even { f64::midpoint(ratios[half - 1], ratios[half]) } else { ratios[half] };
        Some(Self { median, low, high })
    }

    /// Whether it is at least `limit`.
    pub(crate) fn is_at_least(self, limit: f64) -> Verdict {
        match () {
            () if self.low >= limit => Verdict::Yes,
            () if self.high < limit => Verdict::No,
            () => Verdict::Open,
        }
    }

    /// For a table.
    pub(crate) fn text(self) -> String {
        format!("{:.2} ({:.2}-{:.2})", self.median, self.low, self.high)
    }
}

/// The chance that the true median of so many rounds is between the one that has `beyond` below it and the one that has as many
/// above it: that neither at most `beyond` rounds are below the true median, nor above it (binomial distribution).
fn chance(rounds: usize, beyond: usize) -> f64 {
    let mut ways = 1.0;
    let mut tail = 0.0;
    for below in 0..=beyond {
        tail += ways;
        ways *= (rounds - below) as f64 / (below + 1) as f64;
    }
    1.0 - 2.0 * tail / 2.0_f64.powf(rounds as f64)
}

/// How many rounds at each end may be left out so that the chance is still 95 %; none if it is less with all of them.
fn beyond(rounds: usize) -> usize {
    (1..rounds.div_ceil(2)).take_while(|beyond| chance(rounds, *beyond) >= 0.95).last().unwrap_or_default()
}

/// The chance in per cent that the true median of so many rounds is in the interval.
pub(crate) fn confidence(rounds: usize) -> f64 {
    100.0 * chance(rounds, beyond(rounds))
}

/// A part of a whole in per cent.
pub(crate) fn percent(part: u64, whole: u64) -> f64 {
    100.0 * part as f64 / whole.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn ratios_are_those_of_the_rounds_pairs() {
        let rounds =
            |figures: &[f64]| -> Value { figures.iter().map(|iops| json!({ "skiff": { "iops": iops } })).collect() };
        let one = json!({ "rounds": rounds(&[10.0, 40.0, 30.0]) });
        let other = json!({ "rounds": rounds(&[10.0, 20.0, 20.0]) });
        let ratio = Ratio::of((Cell(&one), "skiff"), (Cell(&other), "skiff")).unwrap();
        assert_eq!(ratio, Ratio { median: 1.5, low: 1.0, high: 2.0 });
        assert_eq!(ratio.text(), "1.50 (1.00-2.00)");
        assert_eq!(Ratio::of((Cell(&one), "skiff"), (Cell(&other), "host")), None);
        assert_eq!(Ratio::from(vec![1.0, 2.0]), Some(Ratio { median: 1.5, low: 1.0, high: 2.0 }));
        for (limit, verdict) in [(1.0, Verdict::Yes), (1.2, Verdict::Open), (2.1, Verdict::No)] {
            assert_eq!(ratio.is_at_least(limit), verdict);
        }
    }

    /// Conover, Practical Nonparametric Statistics: from 6 rounds all of them, of 12 the third to the tenth, of 18 the fifth to
    /// the fourteenth (the median's interval by the sign test).
    #[test]
    fn intervals_grow_narrower_with_the_rounds() {
        assert_eq!((confidence(2), confidence(6)), (50.0, 96.875));
        assert_eq!([2, 6, 8, 9, 12, 18].map(beyond), [0, 0, 0, 1, 2, 4]);
        assert!((confidence(12) - 96.14).abs() < 0.01 && (confidence(18) - 96.91).abs() < 0.01);
        let ratio = Ratio::from((1..=12).map(f64::from).collect()).unwrap();
        assert_eq!(ratio, Ratio { median: 6.5, low: 3.0, high: 10.0 });
    }

    #[test]
    fn cells_that_differ_in_one_thing() {
        let [one, other] = ["threads", "native"].map(|aio| json!({ "aio": aio, "depth": 1 }));
        assert!(Cell(&one).differs_only_in(Cell(&other), &["aio"]));
        assert!(!Cell(&one).differs_only_in(Cell(&other), &["depth"]));
        assert!(Cell(&one).is(&[("aio", "threads"), ("depth", "1")]));
    }
}
