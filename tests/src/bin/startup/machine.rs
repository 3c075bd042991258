//! The machines that are compared, and how each is started: 1 vCPU, 256 MiB, COM1 on standard output, nothing else.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

use crate::guest::Guest;
use crate::kvm;
use crate::process::Process;

/// Bytes of guest memory.
pub(crate) const MEMORY: u64 = 256 << 20;

/// Which machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Name {
    /// `skiff run`
    Skiff,
    /// `qemu-system-x86_64 -M microvm,rtc=on -bios qboot.rom`
    Microvm,
    /// `qemu-system-x86_64 -M q35`
    Q35,
    /// Another build of skiff.
    #[value(skip)]
    Other,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(match self {
            Self::Skiff => "skiff",
            Self::Microvm => "microvm",
            Self::Q35 => "q35",
            Self::Other => "other",
        })
    }
}

/// A machine that can be started.
pub(crate) struct Machine {
    pub(crate) name: Name,
    pub(crate) program: PathBuf,
}

impl Machine {
    pub(crate) fn new(name: Name, skiff: &Path) -> anyhow::Result<Self> {
        let program = match name {
            Name::Skiff | Name::Other => skiff.to_owned(),
            Name::Microvm | Name::Q35 => find("qemu-system-x86_64")?,
        };
        if !program.is_file() {
            bail!("{}: no such program; build it with cargo build --release -p skiff", program.display());
        }
        Ok(Self { name, program })
    }

    /// Executes the machine.
    pub(crate) fn start(&self, guest: &Guest) -> anyhow::Result<Process> {
        let mut command = Command::new(&self.program);
        match self.name {
            Name::Skiff | Name::Other => command.args(skiff_words(guest)),
            Name::Microvm => command.args(["-M", "microvm,rtc=on", "-bios", "qboot.rom"]).args(qemu_words(guest)),
            Name::Q35 => command.args(["-M", "q35"]).args(qemu_words(guest)),
        };
        Process::start(&mut command).with_context(|| format!("{}", self.program.display()))
    }
}

fn skiff_words(guest: &Guest) -> Vec<OsString> {
    let mut words = words(&["run", "--serial", "stdio", "--cpus", "1", "--memory", "256M", "--cmdline", guest.cmdline]);
    words.extend(["--kernel".into(), guest.kernel.clone().into()]);
    if let Some(initrd) = &guest.initrd {
        words.extend(["--initrd".into(), initrd.into()]);
    }
    words
}

fn qemu_words(guest: &Guest) -> Vec<OsString> {
    // QEMU sets a feature MSR that the software KVM lacks, and gives up.
    let cpu = if kvm::is_software() { "host,-arch-capabilities" } else { "host" };
    let mut words = words(&["-accel", "kvm", "-cpu", cpu, "-smp", "1", "-m", "256", "-nodefaults", "-no-user-config"]);
    words.extend(self::words(&["-display", "none", "-serial", "stdio", "-no-reboot", "-append", guest.cmdline]));
    words.extend(["-kernel".into(), guest.kernel.clone().into()]);
    if let Some(initrd) = &guest.initrd {
        words.extend(["-initrd".into(), initrd.into()]);
    }
    words
}

fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(Into::into).collect()
}

fn find(program: &str) -> anyhow::Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
        .with_context(|| format!("{program} is not on PATH; install qemu-system-x86, or leave it out with --machines"))
}
