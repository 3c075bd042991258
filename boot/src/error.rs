//! Why a kernel cannot be booted: one line each, saying what was found and what to do. Raised on the main thread while
//! the machine is built; the caller puts the option and the path in front.

use std::io;

use vm_memory::GuestMemoryError;

/// Which input a [`BootError`] is about, for the caller to name the option and the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// The kernel image.
    Kernel,
    /// The initial RAM disk.
    Initrd,
    /// The command line.
    Cmdline,
    /// The size of guest memory.
    Memory,
}

const KERNELS: &str = "a kernel is a bzImage (on Debian /boot/vmlinuz-*) or an uncompressed x86-64 ELF vmlinux";

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// The kernel file has no bytes.
    #[error("the file is empty; {KERNELS}")]
    EmptyKernel,
    /// The kernel file is a directory, pipe or device.
    #[error("not a regular file; {KERNELS}")]
    KernelNotAFile,
    /// Reading the kernel failed.
    #[error("cannot read the kernel: {0}")]
    ReadKernel(#[source] io::Error),
    /// Neither a bzImage nor an ELF file.
    #[error("not a kernel: it looks like {looks_like}; {KERNELS}")]
    NotAKernel {
        /// What the first bytes look like, with an article.
        looks_like: &'static str,
    },
    /// A file of the right kind, but with fields that contradict each other.
    #[error("damaged {kind}: {what}; copy or install the kernel again")]
    Damaged {
        /// "bzImage" or "ELF kernel".
        kind: &'static str,
        /// The contradiction.
        what: &'static str,
    },
    /// The file ends before the image does.
    #[error("truncated {kind}: its header promises {expected} bytes, the file has {found}; copy the kernel again")]
    Truncated {
        /// "bzImage" or "ELF kernel".
        kind: &'static str,
        /// Bytes the header asks for.
        expected: u64,
        /// Bytes in the file.
        found: u64,
    },
    /// A bzImage older than boot protocol 2.12, which has no 64-bit entry.
    #[error(
        "bzImage of boot protocol {}.{:02}, older than 2.12 (Linux 3.8), has no 64-bit entry; use a newer kernel",
        .version >> 8, .version & 0xff
    )]
    BzImageTooOld {
        /// `version` of the setup header.
        version: u16,
    },
    /// A bzImage of a 32-bit kernel.
    #[error("bzImage of a 32-bit kernel (no 64-bit entry); use an x86-64 kernel (on Debian linux-image-amd64)")]
    BzImageNot64Bit,
    /// PVH was asked of a bzImage that stays packed.
    #[error("a bzImage has no PVH entry; boot it by the Linux protocol, or give its uncompressed ELF vmlinux for PVH")]
    PvhNeedsElf,
    /// PVH was asked of an ELF image that has no such entry.
    #[error(
        "ELF kernel without the PVH note (XEN_ELFNOTE_PHYS32_ENTRY); boot it by the Linux protocol, or build it with \
         CONFIG_PVH=y"
    )]
    NoPvhNote,
    /// ELFCLASS32.
    #[error("32-bit ELF file; only x86-64 kernels can be booted, use a 64-bit build")]
    Elf32,
    /// An ELF file of another architecture.
    #[error("ELF file for {machine}; this machine is x86-64, use an x86-64 kernel")]
    WrongMachine {
        /// The architecture's name, or "another architecture".
        machine: &'static str,
    },
    /// An x86-64 ELF file that is something else than a kernel.
    #[error("ELF file, but {what}, not a kernel; {KERNELS}")]
    NotAKernelElf {
        /// What it is, with an article.
        what: &'static str,
    },
    /// A part of the kernel is linked to an address where this machine has no RAM for it.
    #[error(
        "the kernel wants to be at {start:#x}..{end:#x}, which is not RAM above 1 MiB of this machine; link it \
         elsewhere"
    )]
    OutsideRam {
        /// First guest-physical address.
        start: u64,
        /// First address after it.
        end: u64,
    },
    /// The kernel would fit a machine with more memory.
    #[error("the kernel needs at least {} MiB of memory, the machine has {}; give it more", mib(*.needed), mib_down(*.available))]
    MemoryTooSmall {
        /// Bytes of RAM from address 0 that would do.
        needed: u64,
        /// Bytes of RAM from address 0 up to the first hole.
        available: u64,
    },
    /// The initrd file has no bytes.
    #[error("the file is empty; give an initrd (on Debian /boot/initrd.img-*), or boot without one")]
    EmptyInitrd,
    /// The initrd file is a directory, pipe or device.
    #[error("not a regular file; give an initrd (on Debian /boot/initrd.img-*)")]
    InitrdNotAFile,
    /// Reading the initrd failed.
    #[error("cannot read the initrd: {0}")]
    ReadInitrd(#[source] io::Error),
    /// No room above or below the kernel in the memory it may use.
    #[error(
        "the initrd of {} MiB does not fit: {} MiB are free beside the kernel (below {limit:#x}); give the machine more \
         memory or make the initrd smaller",
        mib(*.size), mib_down(*.free)
    )]
    InitrdTooBig {
        /// Bytes of the initrd.
        size: u64,
        /// Bytes free for it.
        free: u64,
        /// The first address it may not reach.
        limit: u64,
    },
    /// Longer than the kernel can take.
    #[error("the command line has {len} bytes, this kernel takes at most {max}; shorten it")]
    CmdlineTooLong {
        /// Bytes given.
        len: usize,
        /// Bytes the kernel takes, without the NUL.
        max: usize,
    },
    /// A NUL byte would end it early.
    #[error("the command line contains a NUL byte at position {position}; remove it")]
    CmdlineNul {
        /// Bytes before the NUL.
        position: usize,
    },
    /// The ACPI tables of this many CPUs do not fit their space.
    #[error("the ACPI tables of {cpus} CPUs take {size} bytes, there is room for {room}; use fewer CPUs")]
    AcpiTooBig {
        /// CPUs described.
        cpus: usize,
        /// Bytes of all tables.
        size: u64,
        /// Bytes there are.
        room: u64,
    },
    /// Guest memory refused an access.
    #[error("cannot write guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

impl BootError {
    /// The input to blame.
    pub fn subject(&self) -> Subject {
        match self {
            Self::EmptyInitrd | Self::InitrdNotAFile | Self::ReadInitrd(_) | Self::InitrdTooBig { .. } => {
                Subject::Initrd
            }
            Self::CmdlineTooLong { .. } | Self::CmdlineNul { .. } => Subject::Cmdline,
            Self::MemoryTooSmall { .. } | Self::AcpiTooBig { .. } | Self::Memory(_) => Subject::Memory,
            _ => Subject::Kernel,
        }
    }
}

/// Whole MiB, rounded up.
fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// Whole MiB, rounded down: what there is must not look bigger than it is.
fn mib_down(bytes: u64) -> u64 {
    bytes >> 20
}
