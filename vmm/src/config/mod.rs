//! The machine a user asked for, validated: an impossible combination cannot be written down here. Everything below the
//! command line works from a [`VmConfig`] and never looks at a flag again. Used on the main thread, before the machine
//! exists.
//!
//! The way there: flags and the file of `--config` each become a [`Request`] (what was written, nothing filled in), the
//! flags are laid over the file, and [`Request::resolve`] yields the machine. Nothing here touches a host resource other
//! than the configuration file itself.

mod file;
mod list;
mod net;
mod options;
mod place;
mod request;
mod value;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use block::cache::CacheMode;
use block::choose::Access;
use block::engine::Aio;
use block::throttle::Limits;
use devices::virtio::blk::errors::OnError;

pub(crate) use file::{Entry, Source, scalar};
pub use file::{KEYS, to_toml};
pub(crate) use list::unknown_key;
pub use net::{DataPath, Forward, NET_KEYS, NetBackend, NetConfig, NetRequest, TapSource};
pub use options::{DISK_KEYS, MEMORY_KEYS, SERIAL_KEYS};
pub use place::{ConfigError, Place};
pub use request::{DiskRequest, Request};
pub(crate) use value::nearest;
pub use value::{format_size, size as parse_size};

/// The port of isa-debug-exit when none is named: QEMU's default.
pub const DEBUG_EXIT_PORT: u16 = 0x501;

/// The time between the power button and a stop by force, when none is named.
pub const GRACE: Duration = Duration::from_secs(30);

/// The most queues of a disk when their number is not said: more workers than this seldom find work.
pub const DISK_QUEUES: u16 = 4;

/// How long a queue of a disk looks for work when nothing is said, at most. On a virtual host it takes 40 to 100 us to wake a
/// thread, elsewhere less, and the time spent adapts to what has paid.
pub const DISK_POLL: Duration = Duration::from_micros(100);

/// Guest memory when none is named: 512 MiB, in bytes.
pub const MEMORY_SIZE: u64 = 512 << 20;

/// One virtual machine.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// The network interfaces, in the order of their PCI slots, after the disks.
    pub nets: Vec<NetConfig>,
    /// What is connected to COM1.
    pub serial: SerialConfig,
    /// The first of four ports of isa-debug-exit, if there is one. It lies clear of every other device's ports.
    pub debug_exit: Option<u16>,
    /// What a reset by the guest does.
    pub on_reboot: OnReboot,
    /// How long the guest has to power off after the power button was pressed. Whole seconds.
    pub grace: Duration,
    /// How statistics are printed when the machine ends, if they are.
    pub stats: Option<StatsFormat>,
}

impl VmConfig {
    /// The machine with paths that mean the same from every folder.
    pub fn absolute(mut self) -> Result<Self, ConfigError> {
        let absolute = |path: &Path| {
            std::path::absolute(path).map_err(|error| ConfigError::new(format!("{}: {error}", path.display())))
        };
        self.kernel = absolute(&self.kernel)?;
        self.initrd = self.initrd.as_deref().map(absolute).transpose()?;
        for disk in &mut self.disks {
            disk.path = absolute(&disk.path)?;
        }
        for net in &mut self.nets {
            if let NetBackend::Socket { path, .. } = &mut net.backend {
                *path = absolute(path)?;
            }
        }
        if let SerialConfig::File(path) | SerialConfig::Socket(path) = &mut self.serial {
            *path = absolute(path)?;
        }
        Ok(self)
    }
}

/// `--boot-protocol`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BootProtocol {
    /// What the image offers: the Linux protocol for a bzImage; PVH for an ELF that has the note, else Linux.
    #[default]
    Auto,
    /// The 64-bit entry of the Linux/x86 boot protocol.
    Linux,
    /// The PVH entry of an ELF image.
    Pvh,
}

impl BootProtocol {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Auto, Self::Linux, Self::Pvh];

    /// The name that users write.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Linux => "linux",
            Self::Pvh => "pvh",
        }
    }
}

/// `--memory`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryConfig {
    /// Bytes: a multiple of 4 KiB, of 2 MiB with `hugepages`; at least 64 MiB.
    pub size: u64,
    /// Back with huge pages (MAP_HUGETLB) and fail if there are not enough.
    pub hugepages: bool,
    /// Touch every page before the guest starts.
    pub prefault: bool,
    /// A MAP_SHARED memfd, which other processes can map.
    pub shared: bool,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self { size: MEMORY_SIZE, hugepages: false, prefault: false, shared: false }
    }
}

/// `--disk`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// The raw image or block device.
    pub path: PathBuf,
    /// Its name in logs and messages: given, or `disk0`, `disk1`, ...; unique.
    pub id: String,
    /// What the guest reads as its serial number; 1 to 20 bytes of printable ASCII (virtio 1.2, 5.2.6).
    pub serial: Option<String>,
    /// Whether the guest may write, and whether the image keeps it.
    pub access: Access,
    /// Only with [`Access::Snapshot`]: the folder of the file that takes what the guest writes; `None`: that of
    /// [`default_folder`](block::overlay::default_folder).
    pub snapshot_dir: Option<PathBuf>,
    /// What moves the bytes; `None`: what suits the image and the host (`auto`). It goes with `cache`.
    pub aio: Option<Aio>,
    /// What stands between a write of the guest and stable storage; `None`: with O_DIRECT where it works (`auto`).
    pub cache: Option<CacheMode>,
    /// Doorbells arrive through ioeventfds; off: they exit to the vCPU thread first.
    pub ioeventfd: bool,
    /// How many queues it has, each with a thread and an engine: at least 1, at most
    /// [`MAX_QUEUES`](devices::virtio::blk::MAX_QUEUES). Not said: one a CPU, at most [`DISK_QUEUES`].
    pub queues: u16,
    /// Entries of each queue: a power of two, one of [`QUEUE_SIZES`](devices::virtio::blk::QUEUE_SIZES).
    pub queue_size: u16,
    /// How long a queue's thread without work looks for some before it sleeps, at most: whole microseconds, up to
    /// [`LONGEST_POLL`](devices::virtio::blk::LONGEST_POLL). Not said: [`DISK_POLL`].
    pub poll: Duration,
    /// Requests for neighbouring parts of the disk that are available at once go to the host as one transfer.
    pub merge: bool,
    /// The most threads that `aio=threads` has for each queue; as many as pay, and those that are idle end.
    pub thread_pool_max: NonZeroUsize,
    /// What becomes of what the guest discards.
    pub discard: Discard,
    /// What an error of the host does when the guest reads: one of [`OnError::READS`].
    pub rerror: OnError,
    /// The same for everything else.
    pub werror: OnError,
    /// What the disk may do at most: at least one rate, bytes in multiples of 1 KiB, whole milliseconds of burst.
    pub limits: Option<Limits>,
}

/// What becomes of what a guest discards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Discard {
    /// Its blocks are given back to the host, those of what it zeroes too if it allows that.
    #[default]
    Unmap,
    /// Nothing: the guest is not offered to discard, and what it zeroes stays allocated.
    Ignore,
}

impl Discard {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Unmap, Self::Ignore];

    /// The name that users write.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unmap => "unmap",
            Self::Ignore => "ignore",
        }
    }
}

/// `--serial`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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

/// `--stats`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatsFormat {
    /// A block of lines for a person.
    Text,
    /// One line for a program.
    Json,
}

impl StatsFormat {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Text, Self::Json];

    /// The name that users write.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }
}

/// `--no-reboot`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnReboot {
    /// Start the machine again.
    #[default]
    Restart,
    /// End with exit code 0.
    Exit,
}
