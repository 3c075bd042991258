//! One scenario, understood and checked: nothing in it can be impossible any more. Made by `parse.rs`.

use std::path::PathBuf;
use std::time::Duration;

use super::pattern::Pattern;
use super::trouble::Rules;
use crate::config::VmConfig;

/// A file of scenarios has one: machines, and what to do with each.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// `name`, or the name of its file without `.toml`.
    pub name: String,
    /// As it was named.
    pub file: PathBuf,
    /// From the start of a machine to its last step; it is killed then.
    pub timeout: Duration,
    /// The machines: one, or one for each cell of the matrix.
    pub cells: Vec<Cell>,
    pub(super) rules: Rules,
    pub(super) steps: Vec<Step>,
}

/// One machine of a scenario.
#[derive(Clone, Debug)]
pub struct Cell {
    /// What the matrix gives to it, as it is written.
    pub keys: Vec<(String, String)>,
    /// The machine. Its disks are snapshots, unless the scenario says otherwise.
    pub machine: VmConfig,
}

/// One thing to do, or to wait for.
#[derive(Clone, Debug)]
pub(super) struct Step {
    /// `boot.toml:12`.
    pub(super) place: String,
    /// In a few words.
    pub(super) title: String,
    pub(super) action: Action,
    /// Its own limit; it never outlasts that of the scenario.
    pub(super) timeout: Option<Duration>,
    /// How long the console may say nothing meanwhile; `None`: as long as it likes.
    pub(super) silence: Option<Silence>,
    pub(super) measure: Option<Measuring>,
}

/// How long a console may say nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Silence {
    pub(super) limit: Duration,
    /// By the scenario; else it is half of its time.
    pub(super) is_said: bool,
}

/// A time to take when a step is passed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Measuring {
    pub(super) name: String,
    pub(super) max: Option<Duration>,
    /// From the begin of the step, not of the machine.
    pub(super) since_step: bool,
}

#[derive(Clone, Debug)]
pub(super) enum Action {
    /// Until this is on the console.
    Wait(Pattern),
    /// Types these bytes.
    Send(Vec<u8>),
    /// Has the shell run a command; `None`: any status will do.
    Run {
        command: String,
        status: Option<u8>,
        output: Option<Pattern>,
    },
    Pause(Duration),
    PowerButton,
    /// Until the machine ends so.
    Expect(Ending),
    /// A file of the host, after the end.
    CheckFile {
        path: PathBuf,
        content: Content,
    },
    /// A disk, after the end: its position in the machine; the filesystem in this partition, or the only one there is.
    CheckDisk {
        disk: usize,
        partition: Option<u32>,
        check: DiskCheck,
    },
}

/// How a machine is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    Poweroff,
    /// Goes on afterwards unless the machine has `no-reboot`.
    Reboot,
    Panic,
    TripleFault,
    /// The exit code of `skiff run`.
    Code(u8),
}

#[derive(Clone, Debug)]
pub(super) enum DiskCheck {
    /// e2fsck finds nothing to repair.
    Clean,
    /// A file in its ext filesystem.
    File { path: String, content: Content },
}

/// What is asked of a file.
#[derive(Clone, Debug)]
pub(super) enum Content {
    Exists,
    Absent,
    Equals(String),
    Has(Pattern),
}

impl Scenario {
    /// Whether a step looks at this disk after the machine's end, so that what is written to it must be kept until then.
    pub(super) fn checks_disk(&self, disk: usize) -> bool {
        self.steps.iter().any(|step| matches!(step.action, Action::CheckDisk { disk: checked, .. } if checked == disk))
    }
}

impl Action {
    /// Whether it needs a machine that runs.
    pub(super) fn needs_machine(&self) -> bool {
        !matches!(self, Self::CheckFile { .. } | Self::CheckDisk { .. })
    }

    /// Whether the machine has ended when it is passed.
    pub(super) fn ends_machine(&self, no_reboot: bool) -> bool {
        matches!(self, Self::Expect(ending) if *ending != Ending::Reboot || no_reboot)
    }
}
