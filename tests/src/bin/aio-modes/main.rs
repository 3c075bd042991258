//! `aio-modes`: measures what people have argued about asynchronous I/O for virtual disks, by `skiff bench`, fio(1) and the
//! kernel's own trace, and writes a document from the results. One thread.
//!
//! Measurements are parts of at most about two minutes; each leaves a file, and what is there already is not measured
//! again. The document is made from these files alone: every verdict in it is computed.

mod answers;
mod figures;
mod order;
mod parts;
mod submit;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Parser;

use parts::{PARTS, Part};

/// Measure what has been argued about aio modes, and write the answers
///
/// Needs /dev/kvm. fio and root rights (for the kernel's trace) answer two of the questions; without them the document says
/// that they are open. A whole run takes about a quarter of an hour and wants a quiet host with two CPUs.
#[derive(Debug, Parser)]
#[command(max_term_width = 120)]
struct Options {
    /// Make the disks in this folder, on the filesystem to be measured
    #[arg(long, value_name = "FOLDER", default_value = ".")]
    dir: PathBuf,
    /// Keep the results of the parts in this folder; what is there is not measured again
    #[arg(long, value_name = "FOLDER", default_value = "target/aio-modes")]
    results: PathBuf,
    /// Begin no part that would not end within so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 86_400)]
    within: u64,
    /// Rounds of each part; 6 give intervals of 96 % confidence
    #[arg(long, value_name = "N", default_value_t = 6, value_parser = clap::value_parser!(u32).range(2..=100))]
    repeat: u32,
    /// Measure these parts only
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    only: Option<Vec<String>>,
    /// Write the document into this file; measures nothing
    #[arg(long, value_name = "FILE")]
    write: Option<PathBuf>,
    /// The skiff to measure [default: the one beside this program]
    #[arg(long, value_name = "FILE")]
    skiff: Option<PathBuf>,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    if let Some(path) = &options.write {
        let text = answers::document(&figures::Results::read(&options.results)?);
        return fs::write(path, text).with_context(|| path.display().to_string());
    }
    fs::create_dir_all(&options.results).with_context(|| options.results.display().to_string())?;
    let beside = std::env::current_exe()?.with_file_name("skiff");
    let skiff = options.skiff.clone().unwrap_or(beside);
    let start = Instant::now();
    for part in wanted(&options)? {
        let file = options.results.join(format!("{}.json", part.name));
        if file.exists() {
            eprintln!("{}: is there", part.name);
            continue;
        }
        let expected = part.expected(options.repeat);
        if start.elapsed() + expected > Duration::from_secs(options.within) {
            eprintln!("{}: takes about {} s, not now", part.name, expected.as_secs());
            continue;
        }
        eprintln!("{}: takes about {} s", part.name, expected.as_secs());
        let began = Instant::now();
        let results = part.measure(&skiff, &options.dir, options.repeat);
        let results = results.with_context(|| format!("the part {}", part.name))?;
        fs::write(&file, serde_json::to_string_pretty(&results)?).with_context(|| file.display().to_string())?;
        eprintln!("{}: took {} s", part.name, began.elapsed().as_secs());
    }
    Ok(())
}

fn wanted(options: &Options) -> anyhow::Result<Vec<&'static Part>> {
    let Some(only) = &options.only else { return Ok(PARTS.iter().collect()) };
    let part = |name: &String| {
        let Some(part) = PARTS.iter().find(|part| part.name == name) else {
            let names: Vec<_> = PARTS.iter().map(|part| part.name).collect();
            bail!("--only {name}: no such part; there are {}", names.join(", "));
        };
        Ok(part)
    };
    only.iter().map(part).collect()
}
