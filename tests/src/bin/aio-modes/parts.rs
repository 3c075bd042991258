//! The parts of a whole run: what is measured together, so that it can be compared round by round.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;

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
    /// The order of sequential requests at the file.
    Order,
    /// Where io_submit and io_uring_enter wait.
    Submit,
}

use Work::{Bench, Order, Submit};

/// All of them. `--cache none` is O_DIRECT.
pub(crate) const PARTS: [Part; 12] = [
    Part { name: "randread", work: Bench("--cache none --depths 1,4,32,128 --rw randread --vs host", 24) },
    Part { name: "randwrite", work: Bench("--cache none --depths 1,4,32,128 --rw randwrite --vs host", 24) },
    Part { name: "streams", work: Bench("--cache none --depths 1,4,32,128 --rw read:64K --vs host", 24) },
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
    Part { name: "qemu", work: Bench("--cache none --content written,hole --vs qemu", 24) },
    Part { name: "order", work: Order },
    Part { name: "submit", work: Submit },
];

/// Seconds that a measurement counts, and seconds that it takes besides: start, warm-up and end of a machine.
const RUNTIME: &str = "0.4";
const MEASUREMENT: Duration = Duration::from_millis(600);
/// Each file.
const SIZE: &str = "512M";
const PREPARATION: Duration = Duration::from_secs(5);

impl Part {
    /// How long it takes, roughly.
    pub(crate) fn expected(&self, repeat: u32) -> Duration {
        match self.work {
            Bench(_, measurements) => MEASUREMENT * measurements * repeat + PREPARATION,
            Order => order::EXPECTED,
            Submit => submit::EXPECTED,
        }
    }

    /// Measures it with this `skiff`, on files in `folder`, in so many rounds.
    pub(crate) fn measure(&self, skiff: &Path, folder: &Path, repeat: u32) -> anyhow::Result<Value> {
        match self.work {
            Bench(words, _) => bench(skiff, folder, repeat, words),
            Order => order::measure(skiff, folder),
            Submit => submit::measure(folder),
        }
    }
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
