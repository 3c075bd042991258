//! `skiff bench compare`: what changed between two runs, beyond the noise of both. Main thread.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, bail};
use serde_json::Value;

use super::SCHEMA;

/// The fields that tell cells apart, in the order of their names: those of [`Cell`](super::Cell).
const KEY: [&str; 13] = [
    "content",
    "rw",
    "bs",
    "depth",
    "queues",
    "busy",
    "aio",
    "cache",
    "ioeventfd",
    "poll_us",
    "merge",
    "thread_pool_max",
    "completion",
];

/// Two measurements of one cell: skiff's requests per second.
#[derive(Clone, Debug, PartialEq)]
struct Pair {
    cell: String,
    before: Range,
    after: Range,
}

/// The median of some rounds, and where the true one is likely to lie. Nobody knows of a single round.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Range {
    median: f64,
    low: f64,
    high: f64,
    single: bool,
}

/// What changed.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    pairs: Vec<Pair>,
    /// Cells that one of the runs measured once: nothing tells a change from noise.
    single: usize,
    /// Cells that were measured before and failed after.
    broken: Vec<String>,
    /// Cells that only one of the two runs has.
    unmatched: usize,
    threshold: f64,
}

impl Pair {
    fn ratio(&self) -> f64 {
        self.after.median / self.before.median
    }

    /// The interval of the one run does not reach into that of the other, and the medians differ by more than `threshold`.
    fn changed(&self, threshold: f64) -> bool {
        let apart = self.after.high < self.before.low || self.after.low > self.before.high;
        apart && (self.ratio() - 1.0).abs() > threshold
    }
}

impl Comparison {
    /// Of the JSON files of two runs. A change counts if it is more than `threshold`, a part of the first run's figure.
    ///
    /// # Errors
    /// When a file is none of ours, or they have no cell in common that was measured more than once.
    pub fn of(before: &Path, after: &Path, threshold: f64) -> anyhow::Result<Self> {
        let (before, after) = (read(before)?, read(after)?);
        Self::between(&before.measured, &after.measured, &after.failed, threshold)
    }

    fn between(
        before: &[(String, Range)],
        after: &[(String, Range)],
        failed: &[String],
        threshold: f64,
    ) -> anyhow::Result<Self> {
        let mut pairs: Vec<_> = before
            .iter()
            .filter_map(|(cell, before)| {
                let (_, after) = after.iter().find(|(other, _)| other == cell)?;
                Some(Pair { cell: cell.clone(), before: *before, after: *after })
            })
            .collect();
        let was_measured = |cell: &&String| before.iter().any(|(other, _)| other == *cell);
        let broken: Vec<_> = failed.iter().filter(was_measured).cloned().collect();
        if pairs.is_empty() && broken.is_empty() {
            bail!("the two runs have no cell in common; compare runs of the same --rw, --bs, --depths and so on");
        }
        let unmatched = before.len() + after.len() - 2 * pairs.len() - broken.len();
        let common = pairs.len();
        pairs.retain(|pair| !pair.before.single && !pair.after.single);
        let single = common - pairs.len();
        if pairs.is_empty() && broken.is_empty() {
            bail!("every cell was measured once: nothing tells a change from noise; measure with --repeat 3 or more");
        }
        Ok(Self { pairs, single, broken, unmatched, threshold })
    }

    /// Whether some cell became slower, or works no more.
    pub fn is_regression(&self) -> bool {
        !self.broken.is_empty() || self.pairs.iter().any(|pair| pair.changed(self.threshold) && pair.ratio() < 1.0)
    }
}

/// The cells of a report.
struct Report {
    /// With what skiff reached.
    measured: Vec<(String, Range)>,
    /// Nothing was reached, for something went wrong.
    failed: Vec<String>,
}

fn read(path: &Path) -> anyhow::Result<Report> {
    let place = || path.display().to_string();
    let text = fs::read_to_string(path).with_context(place)?;
    let report: Value =
        serde_json::from_str(&text).with_context(|| format!("{}: no report of skiff bench", place()))?;
    if report["schema"] != SCHEMA {
        bail!("{}: no report of this skiff bench; make it again with --json", place());
    }
    let cells = report["cells"].as_array().map_or(&[][..], Vec::as_slice);
    let failed = |cell: &&Value| range(cell).is_none() && cell["errors"].as_array().is_some_and(|all| !all.is_empty());
    Ok(Report {
        measured: cells.iter().filter_map(|cell| Some((name(cell), range(cell)?))).collect(),
        failed: cells.iter().filter(failed).map(name).collect(),
    })
}

fn name(cell: &Value) -> String {
    let word = |key: &str| match &cell[key] {
        Value::String(word) => word.clone(),
        other => format!("{key}={other}"),
    };
    KEY.map(word).join(" ")
}

fn range(cell: &Value) -> Option<Range> {
    let iops = &cell["summary"]["skiff"]["iops"];
    let number = |key: &str| iops[key].as_f64();
    let single = number("confidence")? == 0.0;
    Some(Range { median: number("median")?, low: number("low")?, high: number("high")?, single })
}

impl fmt::Display for Comparison {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for cell in &self.broken {
            writeln!(out, "failed            {cell}")?;
        }
        let mut alike = 0;
        for pair in &self.pairs {
            if !pair.changed(self.threshold) {
                alike += 1;
                continue;
            }
            let Pair { cell, before, after } = pair;
            let word = if pair.ratio() < 1.0 { "slower" } else { "faster" };
            let percent = (pair.ratio() - 1.0) * 100.0;
            writeln!(out, "{word} {percent:+6.1} %  {cell}: {:.0} -> {:.0} IOPS", before.median, after.median)?;
        }
        writeln!(
            out,
            "{alike} of {} cells are alike within their noise and {:.0} %",
            self.pairs.len(),
            self.threshold * 100.0
        )?;
        if self.single > 0 {
            writeln!(
                out,
                "{} cells were measured once and are not judged: nothing tells a change from noise; take --repeat 3 or more",
                self.single
            )?;
        }
        if self.unmatched > 0 {
            writeln!(out, "{} cells are in one of the two only", self.unmatched)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{Cell, Content, Way, Work};
    use guest::workload::Mix;

    fn one(cell: &str, low: f64, median: f64, high: f64) -> (String, Range) {
        (cell.to_owned(), Range { median, low, high, single: false })
    }

    #[test]
    fn only_what_is_beyond_noise_and_threshold_counts() {
        let before =
            [one("slow", 90.0, 100.0, 110.0), one("wide", 50.0, 100.0, 150.0), one("near", 99.0, 100.0, 100.5)];
        for (name, low, median, high, changed) in [
            ("slow", 70.0, 80.0, 89.0, true),
            ("slow", 111.0, 120.0, 130.0, true),
            ("slow", 70.0, 80.0, 91.0, false),
            ("wide", 60.0, 70.0, 80.0, false),
            ("near", 97.0, 98.0, 98.5, false),
        ] {
            let comparison = Comparison::between(&before, &[one(name, low, median, high)], &[], 0.05).unwrap();
            assert_eq!(comparison.pairs[0].changed(0.05), changed, "{name} {median}");
            assert_eq!(comparison.is_regression(), changed && median < 100.0, "{name} {median}");
            assert_eq!(comparison.unmatched, 2);
        }
    }

    #[test]
    fn in_words() {
        let before = [one("a", 90.0, 100.0, 110.0), one("b", 90.0, 100.0, 110.0), one("c", 1.0, 1.0, 1.0)];
        let after = [one("a", 70.0, 80.0, 85.0), one("b", 90.0, 101.0, 110.0)];
        let text = Comparison::between(&before, &after, &[], 0.05).unwrap().to_string();
        let expected = "slower  -20.0 %  a: 100 -> 80 IOPS\n1 of 2 cells are alike within their noise and 5 %\n\
                        1 cells are in one of the two only\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn a_single_round_is_not_judged() {
        let (mut once, twice) = (one("a", 100.0, 100.0, 100.0), one("b", 90.0, 100.0, 110.0));
        once.1.single = true;
        let after = [one("a", 70.0, 80.0, 85.0), one("b", 70.0, 80.0, 85.0)];
        let comparison = Comparison::between(&[once.clone(), twice], &after, &[], 0.05).unwrap();
        let expected = "slower  -20.0 %  b: 100 -> 80 IOPS\n0 of 1 cells are alike within their noise and 5 %\n\
                        1 cells were measured once and are not judged: nothing tells a change from noise; take --repeat 3 \
                        or more\n";
        assert_eq!(comparison.to_string(), expected);
        let error = Comparison::between(&[once], &after, &[], 0.05).unwrap_err().to_string();
        assert!(error.starts_with("every cell was measured once: "), "{error}");
    }

    /// Serde knows the fields of a cell.
    #[test]
    fn every_field_of_a_cell_tells_it_apart() {
        let work = Work { content: Content::Hole, rw: Mix::Read, bs: 512, depth: 1, queues: 1, busy: 0 };
        let cell = serde_json::to_value(Cell { work, way: Way::default() }).unwrap();
        let mut key = KEY.to_vec();
        key.sort_unstable();
        let mut fields: Vec<_> = cell.as_object().unwrap().keys().map(String::as_str).collect();
        fields.sort_unstable();
        assert_eq!(key, fields);
    }

    #[test]
    fn a_cell_that_works_no_more_is_a_regression() {
        let before = [one("a", 90.0, 100.0, 110.0), one("b", 90.0, 100.0, 110.0)];
        let failed = ["b".to_owned(), "new".to_owned()];
        let comparison = Comparison::between(&before, &before[..1], &failed, 0.05).unwrap();
        assert!(comparison.is_regression());
        let expected = "failed            b\n1 of 1 cells are alike within their noise and 5 %\n";
        assert_eq!(comparison.to_string(), expected);
        let folder = tempfile::tempdir().unwrap();
        let good = r#""errors":[],"summary":{"skiff":{"iops":{"median":1.0,"low":1.0,"high":1.0,"confidence":0.75}}}"#;
        let file = |name: &str, cell: &str| {
            let path = folder.path().join(name);
            fs::write(&path, format!("{{\"schema\":{SCHEMA},\"cells\":[{{\"rw\":\"read\",{cell}}}]}}")).unwrap();
            path
        };
        let good = file("good", good);
        let bad = file("bad", r#""errors":["no"],"summary":{}"#);
        assert!(Comparison::of(&good, &bad, 0.05).unwrap().is_regression());
        let interrupted = file("interrupted", r#""errors":[],"summary":{}"#);
        assert!(Comparison::of(&good, &interrupted, 0.05).is_err(), "nothing in common");
    }

    #[test]
    fn files_that_are_no_reports() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.json");
        for (text, message) in [("x", "no report of skiff bench"), ("{}", "no report of this skiff bench")] {
            fs::write(&file, text).unwrap();
            let error = format!("{:#}", Comparison::of(&file, &file, 0.05).unwrap_err());
            assert!(error.contains(message), "{error}");
        }
        fs::write(&file, format!(r#"{{"schema":{SCHEMA},"cells":[]}}"#)).unwrap();
        assert!(Comparison::of(&file, &file, 0.05).unwrap_err().to_string().contains("no cell in common"));
        assert!(Comparison::of(Path::new("/nonexistent"), &file, 0.05).is_err());
    }
}
