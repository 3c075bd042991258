//! The machine a user asked for, validated: an impossible combination cannot be written down here. Everything below the
//! command line works from a [`VmConfig`] and never looks at a flag again.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

/// One virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VmConfig {
    /// The kernel image: bzImage or ELF.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel command line, without a NUL.
    pub cmdline: String,
    /// How the kernel is entered.
    pub boot_protocol: BootProtocol,
    /// Number of vCPUs, at least 1; checked against KVM's limit when the machine is built.
    pub cpus: u32,
    /// Guest memory.
    pub memory: MemoryConfig,
    /// The disks, in the order of their PCI slots.
    pub disks: Vec<DiskConfig>,
    /// What is connected to COM1.
    pub serial: SerialConfig,
    /// The port of isa-debug-exit, if there is one.
    pub debug_exit: Option<u16>,
    /// What a reset by the guest does.
    pub on_reboot: OnReboot,
    /// How long the guest has to power off after the power button was pressed.
    pub grace: Duration,
}

/// `--boot-protocol`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum BootProtocol {
    /// What the image offers: the Linux protocol for a bzImage; PVH for an ELF that has the note, else Linux.
    #[default]
    Auto,
    /// The 64-bit entry of the Linux/x86 boot protocol.
    Linux,
    /// The PVH entry of an ELF image.
    Pvh,
}

/// `--memory`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryConfig {
    /// Bytes: a multiple of 4 KiB, at least 64 MiB.
    pub size: u64,
    /// Back with huge pages (MAP_HUGETLB) and fail if there are not enough.
    pub hugepages: bool,
    /// Touch every page before the guest starts.
    pub prefault: bool,
    /// A MAP_SHARED memfd, which other processes can map.
    pub shared: bool,
}

/// `--disk`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DiskConfig {
    /// The raw image or block device.
    pub path: PathBuf,
    /// Its name in logs and messages: given, or `disk0`, `disk1`, ...; unique.
    pub id: String,
    /// What the guest reads as its serial number; at most 20 bytes of printable ASCII (virtio 1.2, 5.2.6).
    pub serial: Option<String>,
    /// The guest may not write.
    pub readonly: bool,
    /// Doorbells arrive through ioeventfds; off: they exit to the vCPU thread first.
    pub ioeventfd: bool,
}

/// `--serial`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SerialConfig {
    /// Standard input and output; raw if it is a terminal.
    #[default]
    Stdio,
    /// Output into a file, no input.
    File(PathBuf),
    /// A new pseudoterminal; its name is logged.
    Pty,
    /// A listening Unix socket, one client at a time.
    Socket(PathBuf),
    /// Output is discarded.
    None,
}

/// `--no-reboot`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnReboot {
    /// Start the machine again.
    #[default]
    Restart,
    /// End with exit code 0.
    Exit,
}
