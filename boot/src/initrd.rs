//! The initial RAM disk: as high as the kernel can reach, so that the kernel has the room below it to itself; in a small
//! machine below the kernel. Loaded by the main thread while the machine is built.

use std::fs::File;
use std::ops::Range;

use vm_memory::GuestMemoryMmap;

use crate::BootError;
use crate::bytes::{align_up, read_into_guest};
use crate::e820::{Entry, Kind};
use crate::kernel::Kernel;

const PAGE: u64 = 0x1000;
/// The fields for its address and size have 32 bits, and RAM from here on is above the PCI hole.
const HIGHEST: u64 = 1 << 32;

/// Below are the structures of the boot protocols, and firmware's tables.
const CONVENTIONAL_END: u64 = 1 << 20;

/// Where an initrd lies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Initrd {
    /// First address, page aligned.
    pub(crate) start: u64,
    /// First address after its last byte.
    pub(crate) end: u64,
}

/// Loads `file` above the kernel, or below it where there is no room above.
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
    let start = place(metadata.len(), kernel.start..kernel.end, kernel.initrd_max, e820)?;
    read_into_guest(memory, start, file, 0, metadata.len()).map_err(|error| BootError::ReadInitrd(error.into()))?;
    Ok(Initrd { start, end: start + metadata.len() })
}

/// The highest page in RAM, outside `kernel` and conventional memory, from where `size` bytes end at or below `max`.
fn place(size: u64, kernel: Range<u64>, max: u64, e820: &[Entry]) -> Result<u64, BootError> {
    let limit = max.saturating_add(1).min(HIGHEST);
    let mut free = 0;
    for side in [kernel.end..limit, CONVENTIONAL_END..kernel.start.min(limit)] {
        let mut highest = None;
        for ram in e820.iter().filter(|entry| entry.kind == Kind::Ram) {
            let low = align_up(ram.base.max(side.start), PAGE).unwrap_or(u64::MAX);
            let high = ram.end().min(side.end);
            free = free.max(high.saturating_sub(low));
            let start = high.checked_sub(size).map(|start| start & !(PAGE - 1));
            highest = highest.max(start.filter(|start| *start >= low));
        }
        if let Some(start) = highest {
            return Ok(start);
        }
    }
    Err(BootError::InitrdTooBig { size, free, limit })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::e820;
    use crate::synthetic::{bzimage, file, map, memory, put, request};
    use crate::{Subject, load as load_kernel};

    #[test]
    fn as_high_as_the_kernel_and_the_memory_allow() {
        let hole = e820::map(&[0..0xc000_0000, 0x1_0000_0000..0x2_0000_0000], &[]);
        assert_eq!(place(1, 0x10_0000..0x10_0000, 0xffff_ffff, &hole).unwrap(), 0xbfff_f000, "below the PCI hole");
        assert_eq!(
            place(0x1001, 0x10_0000..0x10_0000, 0x7fff_ffff, &hole).unwrap(),
            0x7fff_e000,
            "up to initrd_addr_max"
        );
        assert_eq!(place(0x1000, 0x10_0000..0x10_0000, 0x37ff_fffe, &hole).unwrap(), 0x37ff_e000, "an odd limit");
        let small = map(16);
        assert_eq!(place(0xf0_0000, 0x10_0000..0x10_0000, 0xffff_ffff, &small).unwrap(), 0x10_0000, "all there is");
        assert_eq!(
            place(1, 0x10_0000..0xff_e001, 0xffff_ffff, &small).unwrap(),
            0xff_f000,
            "the page above the kernel"
        );
        assert_eq!(place(0x1001, 0x80_0000..0xff_e001, 0xffff_ffff, &small).unwrap(), 0x7f_e000, "below the kernel");
    }

    #[test]
    fn no_place_is_an_error_with_both_sizes() {
        let error = place(11 << 20, 0x10_0000..0x60_0000, 0x7fff_ffff, &map(16)).unwrap_err();
        assert_eq!(error.subject(), Subject::Initrd);
        assert_eq!(
            error.to_string(),
            "the initrd of 11 MiB does not fit: 10 MiB are free beside the kernel (below 0x80000000); give the machine \
             more memory or make the initrd smaller"
        );
        for (size, end) in [(u64::MAX, 1 << 20), (1, u64::MAX), (1, 0xff_f001)] {
            let result = place(size, 1 << 20..end, u64::MAX, &map(16));
            assert!(matches!(result, Err(BootError::InitrdTooBig { .. })), "{result:?}");
        }
    }

    #[test]
    fn initrd_addr_max_of_the_image_counts() {
        let mut image = bzimage(&[0x90; 0x1000]);
        put(&mut image, 0x22c, &0x0077_ffffu32.to_le_bytes());
        let (kernel, initrd, e820) = (file(&image), file(&[1; 0x1000]), map(16));
        let request = crate::Request { initrd: Some(&initrd), ..request(&kernel, &e820) };
        assert_eq!(load_kernel(&memory(16), &request).unwrap().initrd, Some((0x77_f000, 0x78_0000)));
    }

    #[test]
    fn files_that_are_no_initrd() {
        let (kernel, e820) = (file(&bzimage(&[0x90; 0x1000])), map(16));
        let (empty, directory) = (file(b""), File::open("/").unwrap());
        for (initrd, expected) in [(&empty, "the file is empty"), (&directory, "not a regular file")] {
            let request = crate::Request { initrd: Some(initrd), ..request(&kernel, &e820) };
            let error = load_kernel(&memory(16), &request).unwrap_err();
            assert_eq!(error.subject(), Subject::Initrd);
            assert!(error.to_string().starts_with(expected), "{error}");
        }
    }
}
