//! The parts of a whole run: what is measured together, so that it can be compared round by round.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::figures::{Cell, Ratio, Verdict};
use crate::{order, submit};

/// One part. The results are one file.
#[derive(Debug)]
pub(crate) struct Part {
    /// Of the file.
    pub(crate) name: &'static str,
    work: Work,
}

#[derive(Debug)]
enum Work {
    /// `skiff bench` with these words; so many measurements a round.
    Bench(&'static str, u32),
    /// The same, and more rounds of the cells in which it stays open who is faster, skiff or QEMU.
    Decide(&'static str, u32),
    /// The order of sequential requests at the file.
    Order,
    /// Where io_submit and io_uring_enter wait.
    Submit,
}

use Work::{Bench, Decide, Order, Submit};

/// All of them, those first that more depends on. `--cache none` is O_DIRECT.
pub(crate) const PARTS: [Part; 12] = [
    Part { name: "known", work: Decide("--cache none --content written,hole --vs host,qemu", 36) },
    Part { name: "randread", work: Bench("--cache none --depths 1,32,128 --rw randread --vs host", 18) },
    Part { name: "randwrite", work: Bench("--cache none --depths 1,32,128 --rw randwrite --vs host", 18) },
    Part { name: "streams", work: Bench("--cache none --depths 1,32,128 --rw read:64K --vs host", 18) },
    Part { name: "polling", work: Bench("--cache none --content written,hole --poll-us 0,100 --vs none", 24) },
    Part {
        name: "ioeventfd",
        work: Bench(
            "--cache none --content hole --engines io_uring --poll-us 0,100 --ioeventfd on,off --busy 0,2 --vs none",
            16,
        ),
    },
    Part { name: "cache", work: Bench("--engines threads,io_uring --rw randread,randwrite --vs none", 16) },
    Part {
        name: "merging",
        work: Bench("--cache none --rw read:4K --depths 64,256,1024 --merge on,off --vs none", 18),
    },
    Part {
        name: "pools",
        work: Bench(
            "--cache none --engines threads --depths 32 --rw randread,read:64K --thread-pool-max 1,2,4,16,64 --vs none",
            10,
        ),
    },
    Part { name: "completion", work: Bench("--cache none --completion poll,interrupt --vs none", 12) },
    Part { name: "order", work: Order },
    Part { name: "submit", work: Submit },
];

/// Seconds that a measurement counts, and seconds that it takes besides: start, warm-up and end of a machine.
const RUNTIME: &str = "0.35";
const MEASUREMENT: Duration = Duration::from_millis(550);
/// Rounds that are added to an open cell, and to how many cells.
const MORE: u32 = 12;
const OPEN_CELLS: u32 = 4;
/// Each file.
const SIZE: &str = "512M";
const PREPARATION: Duration = Duration::from_secs(5);

impl Part {
    /// How long it takes, roughly.
    pub(crate) fn expected(&self, repeat: u32) -> Duration {
        match self.work {
            Bench(_, measurements) => MEASUREMENT * measurements * repeat + PREPARATION,
            Decide(_, measurements) => {
                let more = (MEASUREMENT * 2 * MORE + PREPARATION) * OPEN_CELLS;
                MEASUREMENT * measurements * repeat + PREPARATION + more
            }
            Order => order::EXPECTED,
            Submit => submit::EXPECTED,
        }
    }

    /// Measures it with this `skiff`, on files in `folder`, in so many rounds.
    pub(crate) fn measure(&self, skiff: &Path, folder: &Path, repeat: u32) -> anyhow::Result<Value> {
        match self.work {
            Bench(words, _) => bench(skiff, folder, repeat, words),
            Decide(words, _) => decide(skiff, folder, repeat, words),
            Order => order::measure(skiff, folder),
            Submit => submit::measure(folder),
        }
    }
}

/// Measures, and then the cells again in which it is open whether skiff is at least as fast as QEMU: those first of which it is
/// the least open.
fn decide(skiff: &Path, folder: &Path, repeat: u32, words: &str) -> anyhow::Result<Value> {
    let mut results = bench(skiff, folder, repeat, words)?;
    let Some(cells) = results["cells"].as_array_mut() else { return Ok(results) };
    let ratio = |cell: &Value| Ratio::of((Cell::new(cell), "skiff"), (Cell::new(cell), "qemu"));
    let open = |cell: &Value| ratio(cell).filter(|ratio| ratio.is_at_least(1.0) == Verdict::Open);
    let mut open: Vec<_> = cells.iter_mut().filter_map(|cell| Some((open(cell)?.median, cell))).collect();
    open.sort_by(|(one, _), (other, _)| (other - 1.0).abs().total_cmp(&(one - 1.0).abs()));
    for (_, cell) in open.into_iter().take(OPEN_CELLS as usize) {
        let word = |key: &str| Cell::new(cell).word(key);
        let words = format!(
            "--cache {} --content {} --engines {} --rw {}:{} --depths {} --vs qemu --seed 2",
            word("cache"),
            word("content"),
            word("aio"),
            word("rw"),
            word("bs"),
            word("depth")
        );
        let mut more = bench(skiff, folder, MORE, &words)?;
        let more = more["cells"][0]["rounds"].as_array_mut().map(std::mem::take).unwrap_or_default();
        cell["rounds"].as_array_mut().context("no rounds")?.extend(more);
    }
    Ok(results)
}

fn bench(skiff: &Path, folder: &Path, repeat: u32, words: &str) -> anyhow::Result<Value> {
    let scratch = tempfile::tempdir()?;
    let json = scratch.path().join("results.json");
    let mut command = Command::new(skiff);
    command.args(["bench", "--size", SIZE, "--runtime", RUNTIME, "--repeat", &repeat.to_string()]);
    // Busy threads are to be in the vCPU's way too.
    let pin = if words.contains("--busy") { None } else { Some("--pin") };
    command.args(pin).arg("--dir").arg(folder).arg("--json").arg(&json).args(words.split_ascii_whitespace());
    let output = command.output().with_context(|| format!("{} cannot be started", skiff.display()))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let text = std::fs::read_to_string(&json).with_context(|| format!("skiff bench {words}: {}", said.trim()))?;
    let results: Value = serde_json::from_str(&text)?;
    ensure!(results["complete"] == true, "skiff bench {words} was interrupted");
    for cell in results["cells"].as_array().into_iter().flatten() {
        for error in cell["errors"].as_array().into_iter().flatten() {
            eprintln!("failed: {error}");
        }
    }
    Ok(results)
}
