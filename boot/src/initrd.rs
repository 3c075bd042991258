//! The initial RAM disk: as high as the kernel can reach, so that the kernel has the room below it to itself. Loaded by
//! the main thread while the machine is built.

use std::fs::File;

use vm_memory::GuestMemoryMmap;

use crate::BootError;
use crate::bytes::{align_up, read_into_guest};
use crate::e820::{Entry, Kind};
use crate::kernel::Kernel;

const PAGE: u64 = 0x1000;
/// The fields for its address and size have 32 bits, and RAM from here on is above the PCI hole.
const HIGHEST: u64 = 1 << 32;

/// Where an initrd lies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Initrd {
    /// First address, page aligned.
    pub(crate) start: u64,
    /// First address after its last byte.
    pub(crate) end: u64,
}

/// Loads `file` above the kernel.
pub(crate) fn load(
    memory: &GuestMemoryMmap,
    file: &File,
    kernel: &Kernel,
    e820: &[Entry],
) -> Result<Initrd, BootError> {
    let metadata = file.metadata().map_err(BootError::ReadInitrd)?;
    if !metadata.is_file() {
        return Err(BootError::InitrdNotAFile);
    }
    if metadata.len() == 0 {
        return Err(BootError::EmptyInitrd);
    }
    let start = place(metadata.len(), kernel.end, kernel.initrd_max, e820)?;
    read_into_guest(memory, start, file, 0, metadata.len()).map_err(|error| BootError::ReadInitrd(error.into()))?;
    Ok(Initrd { start, end: start + metadata.len() })
}

/// The highest page in RAM, at or above `floor`, from where `size` bytes end at or below `max`.
fn place(size: u64, floor: u64, max: u64, e820: &[Entry]) -> Result<u64, BootError> {
    let limit = max.saturating_add(1).min(HIGHEST);
    let mut free = 0;
    let mut highest = None;
    for ram in e820.iter().filter(|entry| entry.kind == Kind::Ram) {
        let low = align_up(ram.base.max(floor), PAGE).unwrap_or(u64::MAX);
        let high = ram.end().min(limit);
        free = free.max(high.saturating_sub(low));
        let start = high.checked_sub(size).map(|start| start & !(PAGE - 1));
        highest = highest.max(start.filter(|start| *start >= low));
    }
    highest.ok_or(BootError::InitrdTooBig { size, free, limit })
}
