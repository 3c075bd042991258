//! Where handing a request to the kernel waits for it. fio(1) measures the time in io_submit and io_uring_enter as its
//! submission latency.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::{Value, json};

pub(crate) const EXPECTED: Duration = Duration::from_secs(60);

/// What is done, and fio's words for it. Each begins with a file of its own.
const CASES: [(&str, &str); 6] = [
    ("reading blocks that are there, O_DIRECT", "--rw=randread --direct=1"),
    ("writing blocks that are there, O_DIRECT", "--rw=randwrite --direct=1 --overwrite=1"),
    ("writing into holes, O_DIRECT", "--rw=randwrite --direct=1 --fallocate=truncate --size=4g"),
    ("writing beyond the end, O_DIRECT", "--rw=write --direct=1 --fallocate=none --file_append=1 --size=2g"),
    ("reading what is not cached, page cache", "--rw=randread --direct=0 --invalidate=1"),
    ("writing, page cache", "--rw=randwrite --direct=0 --overwrite=1"),
];

/// The kernel's interfaces, as fio calls them.
const INTERFACES: [(&str, &str); 2] = [("native", "libaio"), ("io_uring", "io_uring")];

/// 4 KiB requests, 8 in flight, for two seconds a case.
pub(crate) fn measure(folder: &Path) -> anyhow::Result<Value> {
    let scratch = tempfile::tempdir_in(folder)?;
    let mut rows = Vec::new();
    for (case, words) in CASES {
        for (aio, engine) in INTERFACES {
            let file = scratch.path().join("disk");
            let output = Command::new("fio")
                .args(["--name=submit", "--output-format=json", "--bs=4k", "--iodepth=8", "--size=256m", "--thread"])
                .args(["--time_based", "--runtime=2", "--randrepeat=1", "--percentile_list=50:99"])
                .arg(format!("--ioengine={engine}"))
                .arg(format!("--filename={}", file.display()))
                .args(words.split(' '))
                .output()
                .context("fio cannot be started; install it")?;
            ensure!(output.status.success(), "fio {words}: {}", String::from_utf8_lossy(&output.stderr).trim());
            let report = String::from_utf8(output.stdout)?;
            let report: Value = serde_json::from_str(report.get(report.find('{').unwrap_or(0)..).unwrap_or_default())?;
            rows.push(row(case, aio, &report).with_context(|| format!("fio {words}: no figures"))?);
            fs::remove_file(&file)?;
        }
    }
    Ok(json!({ "rows": rows }))
}

/// What is of interest in fio's report: microseconds in the call, and until the end.
fn row(case: &str, aio: &str, report: &Value) -> Option<Value> {
    let job = &report["jobs"][0];
    let side =
        ["read", "write"].into_iter().map(|side| &job[side]).find(|side| side["total_ios"].as_u64() > Some(0))?;
    let micros = |kind: &str, field: &str| side[kind][field].as_f64().map(|nanos| nanos / 1000.0);
    let (mean, max) = (micros("slat_ns", "mean")?, micros("slat_ns", "max")?);
    let total = micros("lat_ns", "mean")?;
    Some(json!({ "case": case, "aio": aio, "mean_us": mean, "max_us": max, "total_us": total }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_fio() {
        let write =
            json!({ "total_ios": 5, "slat_ns": { "mean": 1500.0, "max": 9000 }, "lat_ns": { "mean": 30_000.0 } });
        let report = json!({ "jobs": [{ "read": { "total_ios": 0 }, "write": write }] });
        let expected = json!({ "case": "c", "aio": "native", "mean_us": 1.5, "max_us": 9.0, "total_us": 30.0 });
        assert_eq!(row("c", "native", &report), Some(expected));
        assert_eq!(row("c", "native", &json!({})), None);
    }
}
