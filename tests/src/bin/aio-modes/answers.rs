//! The document: each claim, the figures it is judged by, and a verdict that follows from them. No figure and no verdict
//! stands here.

mod engines;
mod others;
mod switches;

use serde_json::Value;

use crate::figures::{Cell, Ratio, Results, Verdict, confidence};

const ENGINES: [&str; 3] = ["threads", "native", "io_uring"];

/// Of skiff itself, in the JSON of `skiff bench`.
const SKIFF: &str = "skiff";

/// Within 10 %.
const NEAR: f64 = 0.9;

const HEAD: &str = "\
# What has been argued about aio modes, and what this machine says

`threads` is a pool of threads with blocking system calls, `native` is Linux AIO (io_submit), `io_uring` is io_uring.
Each claim below is judged by figures of one run. This file is written by a program, text and verdicts included, and
made again by

```
cargo build --release -p skiff -p tests --bin skiff --bin aio-modes
aio=target/x86_64-unknown-linux-gnu/release/aio-modes
$aio --dir FOLDER && $aio --write docs/aio-modes.md
```

in less than a quarter of an hour on a quiet host; `--within 160` measures a few parts at a time and the next call goes
on.
";

const METHOD: &str = "\
A guest that polls keeps requests in flight ([bench.md](bench.md)); 4 KiB each unless something else is said, past the
page cache (`cache=none`) unless that is the question, and the vCPU has a CPU of its own (`--pin`) except where CPUs are
to be busy. A *written* file has all its blocks, a *hole* file has none, so no disk takes part. Ratios are medians of
the rounds' pairs, with the interval in which the true median is (order statistics: nothing is assumed of the figures).
A claim holds if the whole interval says so, it does not if none of it does, and else it is open: this run cannot tell.
CPU time is that of all threads but the vCPU's.
";

/// The whole document.
pub(crate) fn document(results: &Results) -> String {
    let mut text = format!("{HEAD}\n{METHOD}\n{}", circumstances(results));
    let sections = [
        engines::pool(results),
        engines::cost(results),
        engines::order(results),
        engines::waiting(results),
        switches::page_cache(results),
        engines::io_uring(results),
        switches::polling(results),
        switches::ioeventfd(results),
        switches::merging(results),
        switches::sleeping(results),
        others::vcpu(results),
        others::host(results),
        others::known(results),
    ];
    for section in sections {
        text.push('\n');
        text.push_str(&section);
    }
    text.lines().map(wrapped).collect()
}

/// Letters of a line, but for those of tables.
const WIDTH: usize = 120;

/// A line as one or more that are not too long; tables and headings have no other form.
fn wrapped(line: &str) -> String {
    if line.starts_with(['|', '#']) || line.chars().count() <= WIDTH {
        return format!("{line}\n");
    }
    let (mut text, mut length) = (String::new(), 0);
    for word in line.split(' ') {
        let room = if length == 0 { 0 } else { length + 1 } + word.chars().count();
        if length > 0 && room > WIDTH {
            text.push('\n');
            length = 0;
        }
        if length > 0 {
            text.push(' ');
            length += 1;
        }
        text.push_str(word);
        length += word.chars().count();
    }
    text + "\n"
}

fn circumstances(results: &Results) -> String {
    let Some(manifest) = results.0.values().map(|part| &part["manifest"]).find(|manifest| manifest.is_object()) else {
        return "No part was measured with skiff bench.\n".to_owned();
    };
    let word = |value: &Value| value.as_str().unwrap_or("unknown").to_owned();
    let storage = &manifest["storage"];
    let repeat = manifest["repeat"].as_u64().and_then(|rounds| usize::try_from(rounds).ok()).unwrap_or_default();
    format!(
        "Linux {}, {} x {}, KVM: {}, {} on {}; skiff {}; {repeat} rounds, {:.0} % confidence, {} s each.\n",
        word(&manifest["kernel"]),
        word(&manifest["processor"]),
        manifest["cpus"],
        kvm(&manifest["kvm"]),
        word(&storage["filesystem"]),
        word(&storage["device"]),
        word(&manifest["skiff"]),
        confidence(repeat).floor(),
        manifest["runtime"],
    )
}

fn kvm(kind: &Value) -> String {
    let name = kind.as_str().map(str::to_owned).or_else(|| Some(kind.as_object()?.keys().next()?.clone()));
    name.map_or_else(|| "unknown".to_owned(), |name| name.to_lowercase())
}

/// A section with a claim as its heading.
fn section(claim: &str, verdict: &str, table: &str) -> String {
    let gap = if table.is_empty() { "" } else { "\n" };
    format!("## {claim}\n{verdict}\n{gap}{table}")
}

/// What stands where a part was not measured.
fn missing(claim: &str, part: &str) -> String {
    section(claim, &format!("Open: the part `{part}` was not measured here."), "")
}

fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let line = |cells: Vec<&str>| format!("| {} |\n", cells.join(" | "));
    let mut text = line(head.to_vec()) + &line(vec!["---"; head.len()]);
    text.extend(rows.iter().map(|row| line(row.iter().map(String::as_str).collect())));
    text
}

/// Verdicts, counted.
#[derive(Default)]
struct Count {
    yes: usize,
    no: usize,
    open: usize,
}

impl Count {
    fn of(verdicts: impl IntoIterator<Item = Verdict>) -> Self {
        let mut count = Self::default();
        for verdict in verdicts {
            match verdict {
                Verdict::Yes => count.yes += 1,
                Verdict::No => count.no += 1,
                Verdict::Open => count.open += 1,
            }
        }
        count
    }

    fn all(&self) -> usize {
        self.yes + self.no + self.open
    }

    /// A claim about all cells.
    fn verdict(&self) -> &'static str {
        match self {
            Self { no: 0, open: 0, .. } => "It holds",
            Self { yes: 0, open: 0, .. } => "It does not hold",
            Self { yes: 0, no: 0, .. } => "Open",
            Self { no: 0, .. } => "It holds where this run can tell",
            Self { yes: 0, .. } => "It does not hold where this run can tell",
            _ => "It holds in some cells and not in others",
        }
    }

    fn cells(&self) -> String {
        format!("yes in {}, no in {}, open in {} of {} cells", self.yes, self.no, self.open, self.all())
    }
}

fn word(verdict: Verdict) -> String {
    match verdict {
        Verdict::Yes => "yes",
        Verdict::No => "no",
        Verdict::Open => "open",
    }
    .to_owned()
}

/// Cells that differ in the engine alone, in the order of [`ENGINES`].
fn by_engine<'a>(cells: &[Cell<'a>]) -> Vec<[Cell<'a>; 3]> {
    let first = cells.iter().filter(|cell| cell.word("aio") == ENGINES[0]);
    let same = |one: &Cell<'a>| {
        let of =
            |aio| cells.iter().copied().find(|cell| cell.word("aio") == aio && cell.differs_only_in(*one, &["aio"]));
        Some([*one, of(ENGINES[1])?, of(ENGINES[2])?])
    };
    first.filter_map(same).collect()
}

/// Pairs of cells that differ in `key` alone.
fn by_value<'a>(cells: &[Cell<'a>], key: &str, one: &str, other: &str) -> Vec<(Cell<'a>, Cell<'a>)> {
    let first = cells.iter().filter(|cell| cell.word(key) == one);
    let second = |first: &Cell<'a>| {
        cells.iter().copied().find(|cell| cell.word(key) == other && cell.differs_only_in(*first, &[key]))
    };
    first.filter_map(|first| Some((*first, second(first)?))).collect()
}

fn ratio(one: Cell<'_>, other: Cell<'_>) -> Option<Ratio> {
    Ratio::of((one, SKIFF), (other, SKIFF))
}

fn work(cell: Cell<'_>) -> String {
    let block = match cell.number("bs") >> 10 {
        4 => String::new(),
        kibibytes => format!(" {kibibytes}K"),
    };
    let content = if cell.word("content") == "written" { String::new() } else { format!("{}, ", cell.word("content")) };
    format!("{content}{}{block}, {} in flight", cell.word("rw"), cell.word("depth"))
}

fn iops(cell: Cell<'_>) -> String {
    match cell.iops(SKIFF) {
        None => "-".to_owned(),
        Some(iops @ 1e4..) => format!("{:.1}k", iops / 1e3),
        Some(iops) => format!("{iops:.0}"),
    }
}

fn micros(cell: Cell<'_>, field: &str) -> String {
    cell.median(SKIFF, field).map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"))
}

/// The cells of the parts in which the engines stand side by side on a written file.
fn side_by_side(results: &Results) -> Vec<[Cell<'_>; 3]> {
    ["randread", "randwrite", "streams"].iter().flat_map(|part| by_engine(&results.cells(part))).collect()
}

#[cfg(test)]
mod tests;
