//! A kernel in guest memory, and where one may be. Called by the main thread while the machine is built.

use linux_loader::loader::bootparam::setup_header;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::{BootError, Entered};

/// Everything below belongs to the boot structures and the firmware.
const LOWEST: u64 = 0x10_0000;
/// The page tables of the 64-bit entry, and a 32-bit entry, reach this far.
const HIGHEST: u64 = 1 << 32;
/// RAM reaches this far without a hole on every machine that has as much.
const UNBROKEN: u64 = 2 << 30;

/// A kernel in guest memory.
pub(crate) struct Kernel {
    /// How it is entered.
    pub(crate) entered: Entered,
    /// The address of its first instruction.
    pub(crate) entry: u64,
    /// First address it occupies.
    pub(crate) start: u64,
    /// First address after it and the space it asked for: an initrd may start here.
    pub(crate) end: u64,
    /// The setup header for the zero page: the image's own, or one made for an ELF image.
    pub(crate) header: setup_header,
    /// Bytes of command line, without the NUL.
    pub(crate) cmdline_max: usize,
    /// The last address an initrd may occupy.
    pub(crate) initrd_max: u64,
}

/// Checks that a kernel may occupy `start..end`: RAM from 1 MiB up, below 4 GiB.
pub(crate) fn check_place(memory: &GuestMemoryMmap, start: u64, end: u64) -> Result<(), BootError> {
    let outside = BootError::OutsideRam { start, end };
    if start < LOWEST || end > HIGHEST || start > end {
        return Err(outside);
    }
    if memory.check_range(GuestAddress(start), (end - start) as usize) {
        return Ok(());
    }
    let available = ram_below_hole(memory);
    if end <= UNBROKEN { Err(BootError::MemoryTooSmall { needed: end, available }) } else { Err(outside) }
}

/// Bytes of RAM from address 0 up to the first hole.
pub(crate) fn ram_below_hole(memory: &GuestMemoryMmap) -> u64 {
    let mut end = 0;
    for region in memory.iter() {
        if region.start_addr().raw_value() == end {
            end += region.len();
        }
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_without_ram() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 8 << 20), (GuestAddress(1 << 32), 8 << 20)]);
        let memory = memory.unwrap();
        assert!(check_place(&memory, 0x10_0000, 0x80_0000).is_ok());
        assert_eq!(ram_below_hole(&memory), 8 << 20);
        let check = |start, end| check_place(&memory, start, end).unwrap_err();
        assert!(matches!(check(0x70_0000, 0x80_0001), BootError::MemoryTooSmall { needed: 0x80_0001, .. }));
        for (start, end) in [(0xf_f000, 0x20_0000), (0xfee0_0000, 0xfee0_1000), (1 << 32, (1 << 32) + 1), (3, 2)] {
            assert!(matches!(check(start, end), BootError::OutsideRam { .. }));
        }
    }
}
