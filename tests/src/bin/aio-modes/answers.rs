//! The document: each claim, the figures it is judged by, and a verdict that follows from them. No figure and no verdict
//! stands here.

use std::fmt::Write as _;

use serde_json::Value;

use crate::figures::{Cell, Ratio, Results, Verdict, confidence, percent};

const ENGINES: [&str; 3] = ["threads", "native", "io_uring"];

/// Of skiff itself, in the JSON of `skiff bench`.
const SKIFF: &str = "skiff";

/// Within 10 %.
const NEAR: f64 = 0.9;

const HEAD: &str = "\
# What has been argued about aio modes, and what this machine says

`threads` is a pool of threads with blocking system calls, `native` is Linux AIO (io_submit), `io_uring` is io_uring. Each
claim below is judged by figures of one run. This file is written by a program, text and verdicts included, and made again by

```
cargo build --release -p skiff -p tests --bin skiff --bin aio-modes
aio=target/x86_64-unknown-linux-gnu/release/aio-modes
$aio --dir FOLDER && $aio --write docs/aio-modes.md
```

in about a quarter of an hour on a quiet host; `--within 160` measures a few parts at a time and the next call goes on.
";

const METHOD: &str = "\
A guest that polls keeps requests in flight ([bench.md](bench.md)); 4 KiB each unless something else is said, past the page
cache (`cache=none`) unless that is the question, and the vCPU has a CPU of its own (`--pin`) except where CPUs are to be
busy. A *written* file has all its blocks, a *hole* file has none, so no disk
takes part. Ratios are medians of the rounds' pairs, with the interval in which the true median is. A claim holds if the
whole interval says so, it does not if none of it does, and else it is open. CPU time is that of all threads but the vCPU's.
";

/// The whole document.
pub(crate) fn document(results: &Results) -> String {
    let mut text = format!("{HEAD}\n{METHOD}\n{}", circumstances(results));
    let sections = [
        pool(results),
        cost(results),
        order(results),
        waiting(results),
        page_cache(results),
        io_uring(results),
        polling(results),
        ioeventfd(results),
        merging(results),
        sleeping(results),
        host(results),
        qemu(results),
    ];
    for section in sections {
        text.push('\n');
        text.push_str(&section);
    }
    text
}

fn circumstances(results: &Results) -> String {
    let Some(manifest) = results.0.values().map(|part| &part["manifest"]).find(|manifest| manifest.is_object()) else {
        return "No part was measured with skiff bench.\n".to_owned();
    };
    let word = |value: &Value| value.as_str().unwrap_or("unknown").to_owned();
    let storage = &manifest["storage"];
    let repeat = manifest["repeat"].as_u64().unwrap_or_default();
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
    match cell.median(SKIFF, "iops") {
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

fn pool(results: &Results) -> String {
    let claim = "A sane pool of threads comes within 10 % of linux-aio, seeks and streams alike";
    let mut verdicts = Vec::new();
    let mut rows = Vec::new();
    for [threads, native, uring] in side_by_side(results) {
        let Some(ratio) = ratio(threads, native) else { continue };
        let verdict = ratio.is_at_least(NEAR);
        verdicts.push(verdict);
        rows.push(vec![work(threads), iops(threads), iops(native), iops(uring), ratio.text(), word(verdict)]);
    }
    if rows.is_empty() {
        return missing(claim, "randread");
    }
    let count = Count::of(verdicts);
    let pools = results.cells("pools");
    let mut verdict = format!("{}: {}.", count.verdict(), count.cells());
    for rw in ["randread", "read"] {
        let of_rw: Vec<_> = pools.iter().copied().filter(|cell| cell.word("rw") == rw).collect();
        let _ = write!(verdict, "{}", pool_sizes(&of_rw));
    }
    section(
        claim,
        &verdict,
        &table(&["", "threads /s", "native /s", "io_uring /s", "threads/native", "within 10 %"], &rows),
    )
}

/// What the size of the pool does.
fn pool_sizes(cells: &[Cell<'_>]) -> String {
    let Some(one) = cells.iter().copied().find(|cell| cell.word("thread_pool_max") == "1") else {
        return String::new();
    };
    let sizes = cells.iter().filter(|cell| cell.word("thread_pool_max") != "1");
    let sizes: Vec<_> = sizes
        .filter_map(|cell| Some(format!("{} with {}", ratio(*cell, one)?.text(), cell.word("thread_pool_max"))))
        .collect();
    format!(
        "\nOne thread alone does {}/s of {}; more of them, as a part of that: {}.",
        iops(one),
        work(one),
        sizes.join(", ")
    )
}

fn cost(results: &Results) -> String {
    let claim = "A pool of threads costs a few microseconds a request";
    let mut rows = Vec::new();
    let mut differences = Vec::new();
    for [threads, native, uring] in side_by_side(results) {
        let cpu = |cell: Cell<'_>| cell.median(SKIFF, "io_us");
        let (Some(ours), Some(theirs)) = (cpu(threads), cpu(native)) else { continue };
        differences.push(ours - theirs);
        let [p50, p50_native] = [threads, native].map(|cell| cell.median(SKIFF, "p50_us").unwrap_or_default());
        let figures = [threads, native, uring].map(|cell| micros(cell, "io_us"));
        let mut row = vec![work(threads)];
        row.extend(figures);
        row.extend([format!("{:+.2}", ours - theirs), format!("{:+.1}", p50 - p50_native)]);
        rows.push(row);
    }
    let (Some(least), Some(most)) =
        (differences.iter().copied().reduce(f64::min), differences.iter().copied().reduce(f64::max))
    else {
        return missing(claim, "randread");
    };
    let verdict = format!(
        "Beside linux-aio it costs between {least:+.1} and {most:+.1} us of CPU time a request here. At 10,000 requests a second \
         each microsecond is 1 % of a CPU."
    );
    let head =
        ["CPU us a request", "threads", "native", "io_uring", "threads - native", "median latency, threads - native"];
    section(claim, &verdict, &table(&head, &rows))
}

fn order(results: &Results) -> String {
    let claim = "Threads send sequential requests out of order; linux-aio keeps the order";
    let part = results.0.get("order").and_then(|part| part["rows"].as_array());
    let Some(part) = part.filter(|rows| !rows.is_empty()) else { return missing(claim, "order") };
    let share = |row: &Value| {
        percent(row["backwards"].as_u64().unwrap_or_default(), row["requests"].as_u64().unwrap_or_default())
    };
    let deep = |aio: &str| part.iter().find(|row| row["aio"] == aio && row["depth"] == 32).map(share);
    let rows: Vec<_> = part
        .iter()
        .map(|row| {
            let text = |key: &str| row[key].as_str().map_or_else(|| row[key].to_string(), str::to_owned);
            vec![text("aio"), text("depth"), text("requests"), text("backwards"), format!("{:.3} %", share(row))]
        })
        .collect();
    let verdict = match (deep("threads"), deep("native"), deep("io_uring")) {
        (Some(threads), Some(native), Some(uring)) => {
            let first = if threads > 1.0 { "It holds of threads" } else { "It hardly holds of threads" };
            let second = if native < 0.1 { "and of linux-aio" } else { "but linux-aio does not keep the order either" };
            format!(
                "{first}, {second}: with 32 in flight {threads:.2} % of the requests begin behind a later one with threads, \
                 {native:.3} % with linux-aio, {uring:.3} % with io_uring."
            )
        }
        _ => "Open: not every engine was seen.".to_owned(),
    };
    let note = "Sequential reads of 4 KiB, not merged, as the kernel's event `iomap_dio_rw_begin` sees them begin.\n\n";
    let table = table(&["engine", "in flight", "requests", "begin behind a later one", ""], &rows);
    section(claim, &verdict, &(note.to_owned() + &table))
}

fn waiting(results: &Results) -> String {
    let claim = "linux-aio is asynchronous only with O_DIRECT, and not on every file; elsewhere io_submit waits";
    let part = results.0.get("submit").and_then(|part| part["rows"].as_array());
    let Some(part) = part.filter(|rows| !rows.is_empty()) else { return missing(claim, "submit") };
    let (mut rows, mut waits, mut free) = (Vec::new(), Vec::new(), Vec::new());
    for row in part {
        let number = |key: &str| row[key].as_f64().unwrap_or_default();
        let case = row["case"].as_str().unwrap_or_default();
        let blocks = waits_in_call(row);
        if row["aio"] == "native" {
            if blocks { &mut waits } else { &mut free }
                .push(format!("{case} (at most {:.1} ms)", number("max_us") / 1000.0));
        }
        rows.push(vec![
            case.to_owned(),
            row["aio"].as_str().unwrap_or_default().to_owned(),
            format!("{:.1}", number("mean_us")),
            format!("{:.1}", number("max_us") / 1000.0),
            format!("{:.0}", number("total_us")),
            if blocks { "waits" } else { "does not" }.to_owned(),
        ]);
    }
    let list = |cases: &[String]| if cases.is_empty() { "nowhere".to_owned() } else { cases.join("; ") };
    let verdict = format!("io_submit waits: {}. It does not: {}.", list(&waits), list(&free));
    let note = "fio, 4 KiB, 8 in flight, one thread: the time in the call that hands a request over, and until its end. A call \
                waits where 8 of them, one after the other, take more than half of a request's time.\n\n";
    let head = ["", "interface", "in the call, mean us", "longest, ms", "until the end, mean us", ""];
    section(claim, &verdict, &(note.to_owned() + &table(&head, &rows)))
}

/// Whether a row of the part `submit` spends most of a request's time in the call that only should begin it.
fn waits_in_call(row: &Value) -> bool {
    let number = |key: &str| row[key].as_f64().unwrap_or_default();
    8.0 * number("mean_us") > 0.5 * number("total_us")
}

/// Cases in which io_submit waits and io_uring_enter does not.
fn where_only_native_waits(results: &Results) -> String {
    let rows = results.0.get("submit").and_then(|part| part["rows"].as_array());
    let waits = |case: &Value, aio: &str| {
        let mut rows = rows.into_iter().flatten();
        rows.any(|row| row["case"] == *case && row["aio"] == aio && waits_in_call(row))
    };
    let native = rows.into_iter().flatten().filter(|row| row["aio"] == "native").map(|row| &row["case"]);
    let cases: Vec<_> =
        native.filter(|case| waits(case, "native") && !waits(case, "io_uring")).filter_map(Value::as_str).collect();
    if cases.is_empty() { String::new() } else { format!(" io_submit waits, and it does not: {}.", cases.join("; ")) }
}

fn page_cache(results: &Results) -> String {
    let claim = "O_DIRECT instead of the page cache cures file-backed disks";
    let pairs = by_value(&results.cells("cache"), "cache", "none", "writeback");
    let mut verdicts = Vec::new();
    let mut rows = Vec::new();
    for (direct, buffered) in pairs {
        let Some(ratio) = ratio(direct, buffered) else { continue };
        let verdict = ratio.is_at_least(1.0);
        verdicts.push(verdict);
        let p99 = [direct, buffered].map(|cell| micros(cell, "p99_us"));
        let mut row = vec![direct.word("aio"), work(direct), iops(direct), iops(buffered), ratio.text()];
        row.extend(p99);
        row.push(word(verdict));
        rows.push(row);
    }
    if rows.is_empty() {
        return missing(claim, "cache");
    }
    let count = Count::of(verdicts);
    let verdict = format!(
        "Is O_DIRECT at least as fast? {}. The file fits into the host's memory and was just written, so the page cache answers \
         reads from memory and the disk has no part in its figures: they are the most it can give.",
        count.cells()
    );
    let head =
        ["engine", "", "none /s", "writeback /s", "none/writeback", "p99 us, none", "p99 us, writeback", "as fast"];
    section(claim, &verdict, &table(&head, &rows))
}

fn io_uring(results: &Results) -> String {
    let claim = "Where io_uring pays";
    let mut rows = Vec::new();
    let (mut faster, mut cheaper, mut all) = (0, 0, 0);
    let holes: Vec<_> = results
        .cells("polling")
        .into_iter()
        .filter(|cell| cell.is(&[("poll_us", "100"), ("content", "hole")]))
        .collect();
    for [threads, native, uring] in side_by_side(results).into_iter().chain(by_engine(&holes)) {
        let (Some(to_threads), Some(to_native)) = (ratio(uring, threads), ratio(uring, native)) else { continue };
        let cpu = [threads, native, uring].map(|cell| cell.median(SKIFF, "io_us").unwrap_or(f64::INFINITY));
        let is_faster = to_threads.low > 1.0 && to_native.low > 1.0;
        all += 1;
        faster += usize::from(is_faster);
        cheaper += usize::from(cpu[2] < cpu[0].min(cpu[1]));
        rows.push(vec![
            work(uring),
            to_threads.text(),
            to_native.text(),
            micros(uring, "io_us"),
            micros(native, "submissions"),
            micros(uring, "submissions"),
            if is_faster { "fastest" } else { "" }.to_owned(),
        ]);
    }
    if rows.is_empty() {
        return missing(claim, "randread");
    }
    let verdict = format!(
        "It is faster than both others, beyond the interval, in {faster} of {all} cells, and takes the least CPU time in \
         {cheaper}.{}",
        where_only_native_waits(results)
    );
    let head = [
        "",
        "io_uring/threads",
        "io_uring/native",
        "CPU us a request",
        "calls a request, native",
        "calls a request, io_uring",
        "",
    ];
    section(claim, &verdict, &table(&head, &rows))
}

fn polling(results: &Results) -> String {
    let claim = "What polling buys and costs";
    let pairs = by_value(&results.cells("polling"), "poll_us", "100", "0");
    changes(claim, "polling", "`poll-us=100`", "`poll-us=0`", &pairs)
}

fn sleeping(results: &Results) -> String {
    let claim = "What a guest that sleeps until the interrupt pays";
    let pairs = by_value(&results.cells("completion"), "completion", "interrupt", "poll");
    changes(claim, "completion", "interrupts", "a guest that polls", &pairs)
}

fn merging(results: &Results) -> String {
    let claim = "The back end can merge adjacent requests, given a ring of reasonable size";
    let pairs = by_value(&results.cells("merging"), "merge", "true", "false");
    changes(claim, "merging", "`merge=on`", "`merge=off`", &pairs)
}

fn ioeventfd(results: &Results) -> String {
    let claim = "ioeventfd helps guests that burn system time on I/O, and may add latency on a busy host";
    let mut text = String::new();
    let cells = results.cells("ioeventfd");
    for (busy, host) in [("0", "an idle host"), ("2", "a host with two other busy threads")] {
        let of_host: Vec<_> = cells.iter().copied().filter(|cell| cell.word("busy") == busy).collect();
        let pairs = by_value(&of_host, "ioeventfd", "true", "false");
        if pairs.is_empty() {
            return missing(claim, "ioeventfd");
        }
        let first = text.is_empty();
        let part = changes(claim, "ioeventfd", "`ioeventfd=on`", "`ioeventfd=off`", &pairs);
        let body = part.split_once('\n').map_or("", |(_, body)| body);
        let _ = write!(text, "{}On {host}: {body}", if first { "" } else { "\n" });
    }
    format!("## {claim}\n{text}")
}

/// What a switch does: requests, latency and CPU time with it as parts of those without.
fn changes(claim: &str, part: &str, with: &str, without: &str, pairs: &[(Cell<'_>, Cell<'_>)]) -> String {
    let mut rows = Vec::new();
    let (mut faster, mut slower, mut open) = (0, 0, 0);
    for (on, off) in pairs {
        let Some(ratio) = ratio(*on, *off) else { continue };
        match () {
            () if ratio.low > 1.0 => faster += 1,
            () if ratio.high < 1.0 => slower += 1,
            () => open += 1,
        }
        let poll = if part == "polling" || on.number("poll_us") == 100 {
            String::new()
        } else {
            format!(", poll-us={}", on.word("poll_us"))
        };
        let mut row = vec![format!("{}, {}{poll}", on.word("aio"), work(*on)), iops(*off), ratio.text()];
        for field in ["p50_us", "p99_us", "io_us", "submissions"] {
            row.push(format!("{} / {}", micros(*on, field), micros(*off, field)));
        }
        rows.push(row);
    }
    if rows.is_empty() {
        return missing(claim, part);
    }
    let verdict = format!(
        "With {with} more requests a second than with {without} in {faster}, fewer in {slower} of {} cells; {open} open.",
        rows.len()
    );
    let head =
        ["", "without /s", "with/without", "p50 us, with / without", "p99 us", "CPU us a request", "calls a request"];
    section(claim, &verdict, &table(&head, &rows))
}

fn host(results: &Results) -> String {
    let claim = "Native AIO past the page cache makes user-space back ends as good as the kernel's own";
    compared(results, claim, &["randread", "randwrite", "streams"], "host", "the same engine without a machine", NEAR)
}

fn qemu(results: &Results) -> String {
    compared(results, "skiff is never behind QEMU", &["qemu"], "qemu", "QEMU with an I/O thread", 1.0)
}

fn compared(results: &Results, claim: &str, parts: &[&str], subject: &str, whom: &str, limit: f64) -> String {
    let mut verdicts = Vec::new();
    let mut rows = Vec::new();
    for cell in parts.iter().flat_map(|part| results.cells(part)) {
        let Some(ratio) = Ratio::of((cell, SKIFF), (cell, subject)) else { continue };
        let verdict = ratio.is_at_least(limit);
        verdicts.push(verdict);
        let theirs = cell.median(subject, "iops").unwrap_or_default();
        rows.push(vec![
            format!("{}, {}", cell.word("aio"), work(cell)),
            iops(cell),
            format!("{theirs:.0}"),
            ratio.text(),
            word(verdict),
        ]);
    }
    if rows.is_empty() {
        return missing(claim, parts.first().copied().unwrap_or_default());
    }
    let count = Count::of(verdicts);
    let verdict = format!("{}: at least {limit:.2} of {whom}? {}.", count.verdict(), count.cells());
    let of = format!("skiff/{subject}");
    section(claim, &verdict, &table(&["", "skiff /s", &format!("{subject} /s"), &of, "at least"], &rows))
}

#[cfg(test)]
mod tests;
