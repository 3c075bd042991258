//! Sections from fixed figures: the verdict follows them, whichever they are.

use super::engines::{cost, io_uring, order, pool, waiting, where_only_native_waits};
use super::others::{host, known, vcpu};
use super::switches::merging;
use super::*;
use serde_json::json;

/// A cell of 4 KiB random reads with these rounds, skiff's and the host's.
fn cell(aio: &str, depth: u64, rounds: &[(f64, f64)], more: &Value) -> Value {
    let middle = |figures: Vec<f64>| json!({ "median": figures[figures.len() / 2] });
    let of = |subject: fn(&(f64, f64)) -> f64| middle(rounds.iter().map(subject).collect());
    let skiff = json!({
        "iops": of(|round| round.0), "p50_us": 50.0, "p99_us": 100.0, "io_us": if aio == "threads" { 9.5 } else { 4.25 },
        "submissions": if aio == "threads" { Value::Null } else { json!(0.125) },
    });
    let rounds: Vec<_> = rounds
        .iter()
        .map(|round| json!({ "skiff": { "iops": round.0, "vcpu_us": 1e6 / round.0 }, "host": { "iops": round.1 } }))
        .collect();
    let mut cell = json!({
        "content": "written", "rw": "randread", "bs": 4096, "depth": depth, "queues": 1, "busy": 0, "aio": aio,
        "cache": "none", "ioeventfd": true, "poll_us": 100, "merge": true, "thread_pool_max": 16, "completion": "poll",
        "rounds": rounds, "summary": { "skiff": skiff, "host": { "iops": of(|round| round.1) } },
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        cell[key] = value.clone();
    }
    cell
}

fn results(part: &str, content: Value) -> Results {
    Results([(part.to_owned(), content)].into())
}

fn side_by_side_at(threads: f64) -> Results {
    let cells = [("threads", threads), ("native", 1.0), ("io_uring", 1.2)]
        .map(|(aio, factor)| cell(aio, 32, &[99e3, 100e3, 101e3].map(|iops| (factor * iops, 100e3)), &json!({})));
    results("randread", json!({ "cells": cells }))
}

#[test]
fn a_section() {
    let expected = "\
## A sane pool of threads comes within 10 % of linux-aio, seeks and streams alike
It holds: yes in 1, no in 0, open in 0 of 1 cells.

|  | threads /s | native /s | io_uring /s | threads/native | within 10 % |
| --- | --- | --- | --- | --- | --- |
| randread, 32 in flight | 95.0k | 100.0k | 120.0k | 0.95 (0.95-0.95) | yes |
";
    assert_eq!(pool(&side_by_side_at(0.95)), expected);
}

#[test]
fn verdicts_follow_the_figures() {
    assert!(pool(&side_by_side_at(0.8)).contains("\nIt does not hold: yes in 0, no in 1, open in 0 of 1 cells."));
    let rounds = [(85e3, 1.0), (100e3, 1.0), (95e3, 1.0)];
    let native = cell("native", 1, &[(100e3, 1.0); 3], &json!({}));
    let cells = [cell("threads", 1, &rounds, &json!({})), native, cell("io_uring", 1, &rounds, &json!({}))];
    assert!(
        pool(&results("randread", json!({ "cells": cells })))
            .contains("\nOpen: yes in 0, no in 0, open in 1 of 1 cells.")
    );
    assert!(cost(&side_by_side_at(1.0)).contains("costs between +5.2 and +5.2 us of CPU time a request here"));
    assert!(
        io_uring(&side_by_side_at(1.0))
            .contains("\nIt is faster than both others, beyond the interval, in 1 of 1 cells")
    );
    assert!(
        io_uring(&side_by_side_at(1.3))
            .contains("\nIt is faster than both others, beyond the interval, in 0 of 1 cells")
    );
    assert!(
        host(&side_by_side_at(0.95))
            .contains("\nIt holds: at least 0.90 of the same engine without a machine? yes in 3")
    );
    let text = host(&side_by_side_at(0.5));
    assert!(
        text.contains("\nIt holds in some cells and not in others: ") && text.contains("yes in 2, no in 1"),
        "{text}"
    );
}

#[test]
fn a_switch() {
    let with = |merge: bool, iops: f64| cell("native", 64, &[(iops, 1.0); 2], &json!({ "merge": merge, "rw": "read" }));
    for (on, off, words) in [
        (200e3, 100e3, "more requests a second than with `merge=off` in 1, fewer in 0 of 1 cells; 0 open."),
        (100e3, 200e3, "more requests a second than with `merge=off` in 0, fewer in 1 of 1 cells; 0 open."),
        (100e3, 100e3, "more requests a second than with `merge=off` in 0, fewer in 0 of 1 cells; 1 open."),
    ] {
        let text = merging(&results("merging", json!({ "cells": [with(true, on), with(false, off)] })));
        assert!(text.contains(words), "{text}");
        assert!(text.contains("| native, read, 64 in flight | "), "{text}");
    }
}

#[test]
fn the_order_of_requests() {
    let rows = |back: [u64; 3]| -> Value {
        let row = |(aio, back)| json!({ "aio": aio, "depth": 32, "requests": 1000, "backwards": back });
        ENGINES.into_iter().zip(back).map(row).collect()
    };
    for (back, words) in [
        ([200, 0, 3], "It holds of threads, and of linux-aio: with 32 in flight 20.00 %"),
        ([1, 0, 0], "It hardly holds of threads, and of linux-aio: "),
        ([200, 100, 0], "It holds of threads, but linux-aio does not keep the order either: "),
    ] {
        let text = order(&results("order", json!({ "rows": rows(back) })));
        assert!(text.contains(words), "{text}");
    }
}

#[test]
fn where_a_call_waits() {
    let row = |case: &str, mean: f64| json!({ "case": case, "aio": "native", "mean_us": mean, "max_us": 2000.0, "total_us": 800.0 });
    let text = waiting(&results("submit", json!({ "rows": [row("one", 90.0), row("other", 5.0)] })));
    let only = where_only_native_waits(&results("submit", json!({ "rows": [row("one", 90.0), row("other", 5.0)] })));
    assert_eq!(only, " io_submit waits, and it does not: one.");
    assert!(text.contains("\nio_submit waits: one (at most 2.0 ms). It does not: other (at most 2.0 ms).\n"), "{text}");
}

#[test]
fn what_was_not_measured_is_open() {
    let text = document(&Results::default());
    let sections = text.matches("\n## ").count();
    assert_eq!((sections, text.matches("Open: the part `").count()), (13, 13), "{text}");
}

/// A vCPU that waited in one round has not all of its CPU.
#[test]
fn what_vcpus_do_meanwhile() {
    let mut results = side_by_side_at(1.0);
    assert!(vcpu(&results).contains("\nIt holds: ") && vcpu(&results).contains("| 1.000 | 1.000 | 1.000 |"));
    let part = results.0.get_mut("randread").unwrap();
    part["cells"][1]["rounds"][2]["skiff"]["vcpu_us"] = json!(5.0);
    let text = vcpu(&results);
    assert!(text.contains("\nIt holds where this run can tell: ") && text.contains(" | 0.505 | "), "{text}");
}

#[test]
fn aims_follow_content_and_depth() {
    for (content, depth, of_host, words) in [
        ("written", 32, 0.96, "0.95: yes"),
        ("written", 32, 0.94, "0.95: no"),
        ("written", 1, 0.86, "0.85: yes"),
        ("hole", 1, 0.61, "0.60: yes"),
        ("hole", 32, 0.59, "0.60: no"),
    ] {
        let mut cell = cell("native", depth, &[(of_host * 100e3, 100e3); 6], &json!({ "content": content }));
        for round in cell["rounds"].as_array_mut().unwrap() {
            round["qemu"] = json!({ "iops": of_host * 40e3 });
        }
        let text = known(&results("known", json!({ "cells": [cell] })));
        assert!(text.contains(&format!("| {words} | 2.50 (2.50-2.50) | yes |")), "{text}");
        let holes =
            if content == "hole" { "yes in 0, no in 1, open in 0 of 1" } else { "yes in 0, no in 0, open in 0 of 0" };
        assert!(text.contains(&format!("on holes? {holes} cells.")), "{text}");
        assert!(!text.contains("more rounds"), "{text}");
    }
}

/// Of 6 rounds an interval is right with 96.88 %, of 18 with 96.91 % (Conover, as in figures.rs): both with 93.79 %.
#[test]
fn rounds_that_were_added_are_told() {
    let of = |rounds| {
        let mut cell = cell("native", 1, &[(1.0, 1.0); 3], &json!({}));
        let round = json!({ "skiff": { "iops": 1.0 }, "host": { "iops": 1.0 }, "qemu": { "iops": 1.0 } });
        cell["rounds"] = vec![round; rounds].into();
        cell
    };
    let text = known(&results("known", json!({ "cells": [of(6), of(18), of(6)] })));
    assert!(text.contains("12 more rounds") && text.contains("is right with 93 % at least, not 96 %.\n"), "{text}");
}

#[test]
fn lines_are_not_too_long() {
    let line = "0123456789 ".repeat(25);
    let text = wrapped(line.trim_end());
    // Eleven letters a word, but for the last of a line: eleven words in 120.
    assert_eq!(text.lines().map(str::len).collect::<Vec<_>>(), [120, 120, 32]);
    assert_eq!(text.replace('\n', " "), line);
    for same in ["", "| a table is as wide as it is |", "aio=target", "  indented code"] {
        assert_eq!(wrapped(same), format!("{same}\n"));
    }
}
