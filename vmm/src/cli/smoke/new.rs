//! `skiff smoke new`: flags become a wish, and what was written is said. Main thread.

use std::path::PathBuf;

use clap::{Args, ValueHint};
use skiff::smoke::new::{Wanted, new};

use crate::cli::{Failure, print};

/// Write a first scenario for a kernel and a root filesystem, and say what to do next
///
/// Looks into the files (with debugfs of e2fsprogs into an ext filesystem) to find out what the guest is, where its root
/// filesystem lies and whether root can log in. Nothing is started and no file is overwritten.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  skiff smoke new --kernel vmlinuz --initrd initrd.img --disk root.img -o boot.toml")]
pub(super) struct NewArgs {
    /// The kernel: bzImage or ELF
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    kernel: PathBuf,
    /// The initial RAM disk
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    initrd: Option<PathBuf>,
    /// The disk with the root filesystem: a raw image or a block device
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    disk: PathBuf,
    /// The new scenario
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath, default_value = "smoke.toml")]
    output: PathBuf,
}

impl NewArgs {
    pub(super) fn run(&self) -> Result<u8, Failure> {
        let Self { kernel, initrd, disk, output } = self;
        let (kernel, disk, output) = (kernel.clone(), disk.clone(), output.clone());
        let said = new(&Wanted { kernel, initrd: initrd.clone(), disk, output });
        print(&said.map_err(|error| Failure::Usage(format!("{error:#}")))?)?;
        Ok(0)
    }
}
