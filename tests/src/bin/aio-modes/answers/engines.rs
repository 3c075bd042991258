//! What is said of threads, linux-aio and io_uring.

use std::fmt::Write as _;

use serde_json::Value;

use super::{Count, NEAR, SKIFF, by_engine, iops, micros, missing, ratio, section, side_by_side, table, word, work};
use crate::figures::{Cell, Results, percent};

pub(super) fn pool(results: &Results) -> String {
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

pub(super) fn cost(results: &Results) -> String {
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

pub(super) fn order(results: &Results) -> String {
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

pub(super) fn waiting(results: &Results) -> String {
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
pub(super) fn where_only_native_waits(results: &Results) -> String {
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

pub(super) fn io_uring(results: &Results) -> String {
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
