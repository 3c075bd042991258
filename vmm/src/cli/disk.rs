//! `skiff disk`: what a disk would run on and why, and which engines this host offers. Main thread.

use std::path::PathBuf;

use block::cache::CacheMode;
use block::choose::{Access, Wish};
use block::engine::Aio;
use clap::{Args, Subcommand};
use skiff::explain::{Explanation, Offers};

use super::Failure;

/// Explain on what a disk would run, or list the engines this host offers
#[derive(Debug, Args)]
#[command(arg_required_else_help = false, after_help = EXAMPLES)]
pub(super) struct DiskArgs {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  Which engine and cache mode a machine would use for an image, and why:
    skiff disk explain root.img
  The same with a short read-only measurement of each engine:
    skiff disk explain root.img --measure
  Which engines this host offers, and what to do for the others:
    skiff disk engines";

#[derive(Debug, Subcommand)]
enum Command {
    Explain(ExplainArgs),
    Engines(EnginesArgs),
}

/// Say which engine and cache mode a disk would use, on what evidence, and what would change it
///
/// Nothing is written, and the image may be in use.
#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
struct ExplainArgs {
    /// The raw image or block device
    #[arg(value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    path: PathBuf,
    /// The engine asked for
    #[arg(long, value_name = "ENGINE", value_parser = AIO, default_value = "auto")]
    aio: String,
    /// The cache mode asked for
    #[arg(long, value_name = "MODE", value_parser = CACHE, default_value = "auto")]
    cache: String,
    /// As a disk that the guest may not write
    #[arg(long)]
    readonly: bool,
    /// As a disk with snapshot=on: the image stays as it is
    #[arg(long, conflicts_with = "readonly")]
    snapshot: bool,
    /// The number of queues: each needs an engine
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: u16,
    /// Read from it through each engine for a moment, and print how fast that was
    #[arg(long)]
    measure: bool,
    /// Print the explanation as JSON
    #[arg(long)]
    json: bool,
}

const AIO: [&str; 4] = ["auto", "threads", "native", "io_uring"];
const CACHE: [&str; 6] = ["auto", "writeback", "none", "writethrough", "directsync", "unsafe"];

/// List the engines this host offers, and what to do for those it does not
#[derive(Debug, Args)]
struct EnginesArgs {
    /// Print the list as JSON
    #[arg(long)]
    json: bool,
}

impl DiskArgs {
    pub(super) fn run(&self) -> Result<u8, Failure> {
        match &self.command {
            Command::Explain(args) => args.run(),
            Command::Engines(args) => args.run(),
        }
    }
}

impl ExplainArgs {
    fn run(&self) -> Result<u8, Failure> {
        let wish = self.wish();
        if wish.aio.zip(wish.cache).is_some_and(|(aio, cache)| !aio.goes_with(cache)) {
            let (aio, cache) = (&self.aio, &self.cache);
            return Err(Failure::Usage(format!(
                "--aio {aio} --cache {cache}: aio={aio} needs cache=none or cache=directsync; leave --cache out"
            )));
        }
        let explanation = Explanation::of(&self.path, wish, self.queues, self.measure)?;
        super::print(&if self.json { explanation.to_json() + "\n" } else { explanation.to_string() })?;
        Ok(0)
    }

    fn wish(&self) -> Wish {
        Wish {
            aio: Aio::ALL.into_iter().find(|aio| aio.name() == self.aio),
            cache: CacheMode::ALL.into_iter().find(|cache| cache.name() == self.cache),
            access: match (self.readonly, self.snapshot) {
                (true, _) => Access::Read,
                (_, true) => Access::Snapshot,
                _ => Access::Write,
            },
        }
    }
}

impl EnginesArgs {
    fn run(&self) -> Result<u8, Failure> {
        let engines = Offers::of_this_host();
        super::print(&if self.json { engines.to_json() + "\n" } else { engines.to_string() })?;
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_engine_and_cache_mode_can_be_asked_for() {
        assert!(AIO[1..].iter().eq(Aio::ALL.map(Aio::name).iter()));
        assert!(CACHE[1..].iter().eq(CacheMode::ALL.map(CacheMode::name).iter()));
    }
}
