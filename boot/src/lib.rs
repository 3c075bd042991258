//! Everything a kernel finds in memory and registers at its first instruction. Knows guest memory only, not KVM.
//!
//! [`load`] puts a kernel, its initrd and its parameters into guest memory and says, as plain data, how the first vCPU
//! starts. [`e820`] builds the memory map handed to it, [`acpi`] writes the firmware tables it points to. All of it runs
//! on the main thread while the machine is built; nothing here stays alive afterwards.
//!
//! Guest-physical addresses below 1 MiB that this crate writes (all of them RAM the kernel may reuse):
//!
//! | address | what |
//! |---|---|
//! | `0x500` | GDT |
//! | `0x6000` | PVH start info, module list, memory map |
//! | `0x7000` | zero page (`struct boot_params`) |
//! | `0x8000` | initial stack page |
//! | `0x9000` | page tables: PML4, PDPT, four page directories |
//! | `0x20000` | command line, at most 64 KiB |

use std::fs::File;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

pub mod acpi;
mod bytes;
mod bzimage;
mod cmdline;
pub mod e820;
mod elf;
mod error;
mod initrd;
mod kernel;
mod params;
mod payload;
mod pvh;
mod regs;
#[cfg(test)]
mod synthetic;

pub use error::{BootError, Subject};
pub use payload::{Compression, Payload};
pub use regs::{InitialState, Segment, Table};

/// How the caller wants the kernel to be entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// What the image offers: Linux for a bzImage, PVH for an ELF image with the note, else Linux.
    #[default]
    Auto,
    /// The 64-bit entry of the Linux/x86 boot protocol.
    Linux,
    /// The PVH entry of an ELF image.
    Pvh,
}

/// Who decompresses the payload of a bzImage. An ELF image has none and ignores this.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unpack {
    /// The guest, with the decompressor in its image: works with every compression, and KASLR stays on.
    #[default]
    Guest,
    /// We do, straight to the place the kernel runs at; see [`Payload`] for the compressions. The kernel then skips its
    /// decompressor and with it KASLR, which only that code does.
    Host,
}

/// What to load.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The kernel image. Its file position is moved.
    pub kernel: &'a File,
    /// The initial RAM disk. Its file position is moved.
    pub initrd: Option<&'a File>,
    /// The command line, without a NUL.
    pub cmdline: &'a str,
    /// How the kernel is entered.
    pub protocol: Protocol,
    /// Who decompresses a bzImage.
    pub unpack: Unpack,
    /// The memory map the kernel is given, sorted, at most [`e820::MAX_ENTRIES`] entries: see [`e820::map`].
    pub e820: &'a [e820::Entry],
    /// Guest-physical address of the ACPI RSDP.
    pub rsdp: u64,
}

/// The protocol a kernel is entered by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entered {
    /// The 64-bit entry of the Linux/x86 boot protocol.
    Linux,
    /// The PVH entry: 32-bit protected mode without paging.
    Pvh,
}

/// A kernel in guest memory, ready to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// The registers of the first vCPU.
    pub state: InitialState,
    /// The protocol that [`Protocol`] and the image led to.
    pub entered: Entered,
    /// The compression undone on the host, if it was.
    pub unpacked: Option<Compression>,
    /// Guest-physical range the kernel occupies until it has set itself up: start, and the first byte after it.
    pub kernel: (u64, u64),
    /// Guest-physical range of the initrd.
    pub initrd: Option<(u64, u64)>,
}

/// Writes the kernel, the initrd, the command line and the structures of the chosen protocol into guest memory.
///
/// Everything written lies inside `memory`, whatever the files contain. The memory need not be zero: what a kernel
/// expects to be zero is zeroed. After an error guest memory is in an unspecified state and must not be run.
///
/// # Errors
/// One [`BootError`] for each way an image cannot be booted; [`BootError::subject`] says which input it is about.
///
/// # Panics
/// If `request.e820` has more than [`e820::MAX_ENTRIES`] entries.
pub fn load(memory: &GuestMemoryMmap, request: &Request) -> Result<Loaded, BootError> {
    check_low_memory(memory)?;
    let kernel = kernel::load(memory, request)?;
    cmdline::write(memory, request.cmdline, kernel.cmdline_max)?;
    let initrd = match request.initrd {
        Some(file) => Some(initrd::load(memory, file, &kernel, request.e820)?),
        None => None,
    };
    let state = match kernel.entered {
        Entered::Linux => {
            params::write(memory, &kernel, initrd, request)?;
            regs::linux(memory, kernel.entry)?
        }
        Entered::Pvh => {
            pvh::write(memory, initrd, request)?;
            regs::pvh(memory, kernel.entry)?
        }
    };
    Ok(Loaded {
        state,
        entered: kernel.entered,
        unpacked: kernel.unpacked,
        kernel: (kernel.start, kernel.end),
        initrd: initrd.map(|initrd| (initrd.start, initrd.end)),
    })
}

/// Conventional memory, where the structures of the table above go, has to be there.
fn check_low_memory(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    let needed = cmdline::ADDRESS + cmdline::ROOM as u64;
    if memory.check_range(GuestAddress(0), needed as usize) {
        Ok(())
    } else {
        Err(BootError::MemoryTooSmall { needed, available: kernel::ram_below_hole(memory) })
    }
}
