//! What the options of a disk do: each cell beside the one that differs in that option alone.

use std::fmt::Write as _;

use super::{Count, by_value, iops, micros, missing, ratio, section, table, word, work};
use crate::figures::{Cell, Results};

pub(super) fn page_cache(results: &Results) -> String {
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

pub(super) fn polling(results: &Results) -> String {
    let claim = "What polling buys and costs";
    let pairs = by_value(&results.cells("polling"), "poll_us", "100", "0");
    changes(claim, "polling", "`poll-us=100`", "`poll-us=0`", &pairs)
}

pub(super) fn sleeping(results: &Results) -> String {
    let claim = "What a guest that sleeps until the interrupt pays";
    let pairs = by_value(&results.cells("completion"), "completion", "interrupt", "poll");
    changes(claim, "completion", "interrupts", "a guest that polls", &pairs)
}

pub(super) fn merging(results: &Results) -> String {
    let claim = "The back end can merge adjacent requests, given a ring of reasonable size";
    let pairs = by_value(&results.cells("merging"), "merge", "true", "false");
    changes(claim, "merging", "`merge=on`", "`merge=off`", &pairs)
}

pub(super) fn ioeventfd(results: &Results) -> String {
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
