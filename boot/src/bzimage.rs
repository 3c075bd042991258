//! The bzImage: its setup header and how the 64-bit entry wants to be loaded (Linux/x86 boot protocol, 2.12 and later).
//! Called by the main thread while the machine is built.

use std::fs::File;

use linux_loader::loader::bootparam::setup_header;
use vm_memory::{ByteValued, GuestMemoryMmap};

use crate::bytes::{align_up, read_into_guest, u32_at};
use crate::cmdline;
use crate::kernel::{self, Kernel};
use crate::{BootError, Entered};

/// `setup_header` in the file and in the zero page.
const HEADER: usize = 0x1f1;
/// `header`, in the file.
const MAGIC_AT: usize = 0x202;
/// "HdrS".
const MAGIC: u32 = 0x5372_6448;
/// The version that brought `xloadflags`.
const VERSION_MIN: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1;
const LOADED_HIGH: u8 = 1;
/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// The 64-bit entry, from the load address.
const ENTRY_64: u64 = 0x200;
/// `COMMAND_LINE_SIZE` of x86, without the NUL.
const ELF_CMDLINE: u32 = 2047;
/// As far as every Linux that has this field allows an initrd.
const ELF_INITRD_MAX: u32 = 0x7fff_ffff;
const KIND: &str = "bzImage";

/// Is this the start of a Linux x86 image of any age?
pub(crate) fn is_one(head: &[u8]) -> bool {
    u32_at(head, MAGIC_AT) == MAGIC
}

/// A checked setup header.
pub(crate) struct BzImage {
    /// The header; fields past its own end are zero.
    pub(crate) header: setup_header,
    /// Bytes of real-mode code in front of the protected-mode kernel.
    pub(crate) setup_len: u64,
    /// Bytes of the protected-mode kernel.
    pub(crate) kernel_len: u64,
}

/// Reads the setup header of a file of `len` bytes that starts with `head` and [`is_one`].
pub(crate) fn parse(head: &[u8], len: u64) -> Result<BzImage, BootError> {
    // The header ends where the jump over it lands; what older protocols did not have stays zero.
    let end = MAGIC_AT + usize::from(head.get(HEADER + 0x10).copied().unwrap_or(0));
    let mut header = setup_header::default();
    let room = header.as_mut_slice();
    let present = &head[HEADER..end.clamp(HEADER, HEADER + room.len()).min(head.len())];
    room[..present.len()].copy_from_slice(present);

    let version = header.version;
    if version < VERSION_MIN {
        return Err(BootError::BzImageTooOld { version });
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::BzImageNot64Bit);
    }
    let sectors = if header.setup_sects == 0 { 4 } else { header.setup_sects };
    let setup_len = (u64::from(sectors) + 1) * 512;
    // `syssize` counts 16-byte units and rounds up.
    let syssize = u64::from(header.syssize) * 16;
    if len.saturating_add(15) < setup_len + syssize {
        return Err(BootError::Truncated { kind: KIND, expected: setup_len + syssize, found: len });
    }
    let image = BzImage { header, setup_len, kernel_len: syssize.min(len.saturating_sub(setup_len)) };
    image.check()?;
    Ok(image)
}

impl BzImage {
    fn check(&self) -> Result<(), BootError> {
        let damaged = |what| Err(BootError::Damaged { kind: KIND, what });
        if self.kernel_len <= ENTRY_64 {
            return damaged("it has no kernel behind its header");
        }
        if u64::from(self.header.init_size) < self.kernel_len {
            return damaged("init_size is smaller than the image");
        }
        if !{ self.header.kernel_alignment }.is_power_of_two() {
            return damaged("kernel_alignment is not a power of two");
        }
        if self.header.loadflags & LOADED_HIGH == 0 {
            return damaged("it is not to be loaded at 1 MiB or above");
        }
        Ok(())
    }

    /// Loads the protected-mode kernel where it prefers to run, so that its decompressor has the least to move.
    pub(crate) fn load(&self, memory: &GuestMemoryMmap, file: &File) -> Result<Kernel, BootError> {
        let start = self.load_address();
        let end = start
            .checked_add(u64::from(self.header.init_size))
            .ok_or(BootError::Damaged { kind: KIND, what: "pref_address is past the end of all memory" })?;
        kernel::check_place(memory, start, end)?;
        read_into_guest(memory, start, file, self.setup_len, self.kernel_len)
            .map_err(|error| BootError::ReadKernel(error.into()))?;
        Ok(Kernel {
            entered: Entered::Linux,
            entry: start + ENTRY_64,
            start,
            end,
            header: setup_header { code32_start: start as u32, ..self.header },
            cmdline_max: self.header.cmdline_size as usize,
            initrd_max: u64::from(self.header.initrd_addr_max),
        })
    }

    /// `pref_address`. A relocatable kernel may be put elsewhere, but one of x86-64 moves itself up to `pref_address`
    /// when it is below, so a lower place would not need less memory, only another copy.
    fn load_address(&self) -> u64 {
        let align = u64::from(self.header.kernel_alignment);
        if self.header.relocatable_kernel == 0 {
            return self.header.pref_address;
        }
        align_up(self.header.pref_address, align).unwrap_or(u64::MAX)
    }
}

/// The setup header given to an ELF kernel, which carries none: what a boot loader has to fill in, in the terms of the
/// protocol version whose fields we set (2.15).
pub(crate) fn header_for_elf() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: MAGIC,
        version: 0x020f,
        loadflags: LOADED_HIGH,
        kernel_alignment: 0x20_0000,
        initrd_addr_max: ELF_INITRD_MAX,
        cmdline_size: ELF_CMDLINE,
        ..setup_header::default()
    }
}

/// Fills the fields a boot loader has to write. Addresses and sizes are of the initrd, zero for none.
pub(crate) fn fill_in(header: &mut setup_header, initrd_start: u64, initrd_len: u64) {
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = cmdline::ADDRESS as u32;
    header.ramdisk_image = initrd_start as u32;
    header.ramdisk_size = initrd_len as u32;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load;
    use crate::synthetic::{INIT_SIZE, SETUP_LEN, bzimage, dirty_memory, file, map, put, read, request};

    fn error_of(offset: usize, bytes: &[u8]) -> BootError {
        let mut image = bzimage(&[0x90; 0x1000]);
        put(&mut image, offset, bytes);
        parse(&image, image.len() as u64).map(|_| ()).unwrap_err()
    }

    #[test]
    fn images_without_a_64_bit_entry() {
        let error = error_of(0x206, &[0x0a, 0x02]);
        assert!(matches!(error, BootError::BzImageTooOld { version: 0x020a }), "{error:?}");
        assert!(error.to_string().starts_with("bzImage of boot protocol 2.10, older than 2.12"), "{error}");
        assert!(matches!(error_of(0x236, &[0x7e]), BootError::BzImageNot64Bit));
    }

    #[test]
    fn headers_that_contradict_themselves() {
        let damages: [(usize, &[u8], &str); 4] = [
            (0x1f4, &[0, 0], "no kernel behind its header"),
            (0x260, &[0, 4, 0, 0], "init_size"),
            (0x230, &[3, 0, 0, 0], "kernel_alignment"),
            (0x211, &[0], "1 MiB or above"),
        ];
        for (offset, bytes, what) in damages {
            let message = error_of(offset, bytes).to_string();
            assert!(message.starts_with("damaged bzImage") && message.contains(what), "{message}");
        }
    }

    #[test]
    fn an_image_cut_short() {
        let image = bzimage(&[0x90; 0x1000]);
        for len in [SETUP_LEN, SETUP_LEN + 0x1000 - 16] {
            let error = parse(&image[..len], len as u64).map(|_| ()).unwrap_err();
            let BootError::Truncated { expected, found, .. } = error else { panic!("{error:?}") };
            assert_eq!((expected, found), ((SETUP_LEN + 0x1000) as u64, len as u64));
        }
    }

    #[test]
    fn what_follows_the_image_is_not_loaded() {
        let mut image = bzimage(&[0x90; 0x1000]);
        image.extend([0xee; 64]);
        let (memory, kernel) = (dirty_memory(16), file(&image));
        let loaded = load(&memory, &request(&kernel, &map(16))).unwrap();
        assert_eq!(read(&memory, loaded.kernel.0 + 0xfff, 2), [0x90, 0xa5]);
    }

    #[test]
    fn a_preferred_address_is_aligned_if_the_kernel_is_relocatable() {
        let mut image = bzimage(&[0x90; 0x1000]);
        put(&mut image, 0x258, &0x30_0000u64.to_le_bytes());
        let kernel_range = |image: &[u8]| load(&dirty_memory(16), &request(&file(image), &map(16))).unwrap().kernel;
        assert_eq!(kernel_range(&image), (0x40_0000, 0x40_0000 + INIT_SIZE));
        put(&mut image, 0x234, &[0]);
        assert_eq!(kernel_range(&image), (0x30_0000, 0x30_0000 + INIT_SIZE));
    }

    #[test]
    fn fields_the_header_does_not_have_are_zero() {
        // A header that ends behind xloadflags, cmdline_size and pref_address missing: code follows in their place.
        let mut image = bzimage(&[0x90; 0x1000]);
        put(&mut image, 0x201, &[0x36]);
        put(&mut image, 0x238, &[0xff; 0x34]);
        let error = parse(&image, image.len() as u64).map(|_| ()).unwrap_err();
        assert!(matches!(error, BootError::Damaged { what: "init_size is smaller than the image", .. }), "{error:?}");
    }
}
