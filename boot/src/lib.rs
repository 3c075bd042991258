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
mod image;
mod initrd;
mod kernel;
mod params;
mod pvh;
mod regs;
pub mod reset_vector;
#[cfg(test)]
mod synthetic;

pub use error::{BootError, Subject};
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
    assert!(request.e820.len() <= e820::MAX_ENTRIES, "a memory map longer than the zero page can hold");
    check_low_memory(memory)?;
    let kernel = image::load(memory, request)?;
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;
    use crate::bytes::{u16_at, u32_at, u64_at};
    use crate::synthetic::{LOAD, NOTE, PREFERRED, Part, bzimage, elf, file, map, memory, pvh_notes, read, request};

    /// What the four-level page tables under `cr3` make of a virtual address (Intel SDM volume 3, section 4.5).
    fn translate(memory: &GuestMemoryMmap, cr3: u64, address: u64) -> Option<u64> {
        let mut table = cr3;
        for shift in [39, 30, 21, 12] {
            let entry: u64 = memory.read_obj(GuestAddress(table + ((address >> shift) & 0x1ff) * 8)).unwrap();
            if entry & 1 == 0 {
                return None;
            }
            table = entry & 0x000f_ffff_ffff_f000;
            if entry & 0x80 != 0 || shift == 12 {
                return Some(table + (address & ((1 << shift) - 1)));
            }
        }
        None
    }

    #[test]
    fn a_bzimage_enters_long_mode_as_the_boot_protocol_says() {
        let memory = memory(16);
        let kernel = file(&bzimage(&[0x90; 0x1000]));
        let initrd = file(&[0x77; 5000]);
        let e820 = map(16);
        let request = Request { initrd: Some(&initrd), cmdline: "console=ttyS0", ..request(&kernel, &e820) };
        let loaded = load(&memory, &request).unwrap();

        assert_eq!(loaded.entered, Entered::Linux);
        assert_eq!(loaded.kernel, (0x40_0000, 0x60_0000));
        assert_eq!(read(&memory, PREFERRED, 0x1000), [0x90; 0x1000]);
        let state = loaded.state;
        assert_eq!(state.rip, PREFERRED + 0x200);
        assert_eq!(state.cr0 & 0x8000_0001, 0x8000_0001, "paging and protection");
        assert_eq!(state.cr4 & 0x20, 0x20, "PAE");
        assert_eq!(state.efer & 0x500, 0x500, "LME and LMA");
        assert_eq!(state.rflags, 2, "interrupts off");
        assert_eq!((state.cs.selector, state.ds.selector, state.es.selector, state.ss.selector), (16, 24, 24, 24));
        assert!(state.cs.l && !state.cs.db);
        for address in [0, state.rsi, state.rip, 0xffff_ffff] {
            assert_eq!(translate(&memory, state.cr3, address), Some(address));
        }
        assert_eq!(translate(&memory, state.cr3, 1 << 32), None);

        // Offsets of boot_params: Linux, Documentation/arch/x86/zero-page.rst and boot.rst.
        let zero_page = read(&memory, state.rsi, 4096);
        assert_eq!(u64_at(&zero_page, 0x70), 0xe_0000, "acpi_rsdp_addr");
        assert_eq!(zero_page[0x210], 0xff, "type_of_loader");
        assert_eq!(zero_page[0x1ef], 0, "sentinel");
        assert_eq!(u32_at(&zero_page, 0x202), 0x5372_6448, "HdrS");
        assert_eq!(u32_at(&zero_page, 0x260), 0x20_0000, "init_size");
        assert_eq!(read(&memory, u64::from(u32_at(&zero_page, 0x228)), 14), b"console=ttyS0\0");
        let (ramdisk, size) = (u32_at(&zero_page, 0x218), u32_at(&zero_page, 0x21c));
        assert_eq!((ramdisk, size), (0x0100_0000 - 0x2000, 5000));
        assert_eq!(loaded.initrd, Some((0xff_e000, 0xff_e000 + 5000)));
        assert_eq!(read(&memory, u64::from(ramdisk), 5000), [0x77; 5000]);
        assert_eq!(zero_page[0x1e8], 3, "e820_entries");
        let e820: Vec<_> = (0..3)
            .map(|index| 0x2d0 + index * 20)
            .map(|at| (u64_at(&zero_page, at), u64_at(&zero_page, at + 8), u32_at(&zero_page, at + 16)))
            .collect();
        assert_eq!(e820, [(0, 0x9_fc00, 1), (0x9_fc00, 0x6_0400, 2), (0x10_0000, 0xf0_0000, 1)]);
    }

    #[test]
    fn an_elf_kernel_with_a_note_enters_protected_mode_as_pvh_says() {
        let memory = memory(8);
        let notes = pvh_notes(0x10_0010);
        let kernel = file(&elf(0x10_0000, &[Part(LOAD, &[0xf4; 64], 0x10_0000, 64), Part(NOTE, &notes, 0, 0)]));
        let initrd = file(b"module");
        let e820 = map(8);
        let loaded = load(&memory, &Request { initrd: Some(&initrd), cmdline: "a b", ..request(&kernel, &e820) });
        let Loaded { state, entered, initrd, .. } = loaded.unwrap();

        assert_eq!(entered, Entered::Pvh);
        assert_eq!(state.rip, 0x10_0010);
        assert_eq!(state.cr0 & 0x8000_0001, 1, "protection without paging");
        assert_eq!((state.cr4, state.efer, state.rflags), (0, 0, 2));
        assert!(state.cs.db && !state.cs.l && state.cs.g && state.cs.s);
        assert_eq!((state.cs.base, state.cs.limit, state.ds.base, state.ds.limit), (0, u32::MAX, 0, u32::MAX));
        assert_eq!((state.tr.base, state.tr.limit, state.tr.type_), (0, 0x67, 0xb));

        // Xen: public/arch-x86/hvm/start_info.h.
        let info = read(&memory, state.rbx, 56);
        assert_eq!((u32_at(&info, 0), u32_at(&info, 4), u32_at(&info, 8), u32_at(&info, 12)), (0x336e_c578, 1, 0, 1));
        let module = read(&memory, u64_at(&info, 16), 32);
        assert_eq!((u64_at(&module, 0), u64_at(&module, 8), u64_at(&module, 16)), (0x7f_f000, 6, 0));
        assert_eq!(initrd, Some((0x7f_f000, 0x7f_f006)));
        assert_eq!(read(&memory, u64_at(&info, 24), 4), b"a b\0");
        assert_eq!(u64_at(&info, 32), 0xe_0000, "rsdp_paddr");
        let map = read(&memory, u64_at(&info, 40), 72);
        assert_eq!(u32_at(&info, 48), 3, "memmap_entries");
        let last = (u64_at(&map, 48), u64_at(&map, 56), u32_at(&map, 64), u32_at(&map, 68));
        assert_eq!(last, (0x10_0000, 0x70_0000, 1, 0));
    }

    #[test]
    fn an_elf_kernel_without_a_note_enters_long_mode() {
        let memory = memory(8);
        let kernel = file(&elf(0x20_0004, &[Part(LOAD, &[0xf4; 64], 0x20_0000, 64)]));
        let e820 = map(8);
        let loaded = load(&memory, &request(&kernel, &e820)).unwrap();
        assert_eq!((loaded.entered, loaded.state.rip, loaded.state.efer), (Entered::Linux, 0x20_0004, 0x500));
        let zero_page = read(&memory, loaded.state.rsi, 4096);
        assert_eq!((u16_at(&zero_page, 0x1fe), u32_at(&zero_page, 0x202)), (0xaa55, 0x5372_6448));
        assert!(u16_at(&zero_page, 0x206) >= 0x020c);
        let pvh = load(&memory, &Request { protocol: Protocol::Pvh, ..request(&kernel, &e820) });
        assert!(matches!(pvh, Err(BootError::NoPvhNote)), "{pvh:?}");
    }

    #[test]
    fn a_note_does_not_force_pvh() {
        let memory = memory(8);
        let notes = pvh_notes(0x10_0010);
        let kernel = file(&elf(0x10_0000, &[Part(LOAD, &[0xf4; 64], 0x10_0000, 64), Part(NOTE, &notes, 0, 0)]));
        let e820 = map(8);
        let loaded = load(&memory, &Request { protocol: Protocol::Linux, ..request(&kernel, &e820) }).unwrap();
        assert_eq!((loaded.entered, loaded.state.rip), (Entered::Linux, 0x10_0000));
    }

    #[test]
    fn bzimages_have_no_pvh_entry() {
        let kernel = file(&bzimage(&[0x90; 0x1000]));
        let e820 = map(16);
        let result = load(&memory(16), &Request { protocol: Protocol::Pvh, ..request(&kernel, &e820) });
        assert!(matches!(result, Err(BootError::PvhNeedsElf)), "{result:?}");
    }

    #[test]
    fn too_little_memory_is_said_with_the_size_needed() {
        let kernel = file(&bzimage(&[0x90; 0x1000]));
        let error = load(&memory(4), &request(&kernel, &map(4))).unwrap_err();
        assert!(matches!(error, BootError::MemoryTooSmall { needed: 0x60_0000, available: 0x40_0000 }), "{error:?}");
        assert_eq!(error.to_string(), "the kernel needs at least 6 MiB of memory, the machine has 4; give it more");
        assert_eq!(error.subject(), Subject::Memory);
    }

    /// Images of both kinds, whole and valid, with an initrd beside them.
    fn images() -> [Vec<u8>; 2] {
        let notes = pvh_notes(0x10_0010);
        let parts = [Part(LOAD, &[0xf4; 600], 0x10_0000, 4096), Part(NOTE, &notes, 0, 0)];
        [bzimage(&[0x90; 0x1000]), elf(0x10_0000, &parts)]
    }

    /// Loads in all ways; whatever comes of it, nothing but the areas of the table in the crate's documentation and the
    /// memory from 1 MiB up may have been written.
    fn load_all_ways(image: &[u8]) {
        let memory = memory(8);
        let kernel = file(image);
        let initrd = file(&[1; 100]);
        let e820 = map(8);
        for protocol in [Protocol::Auto, Protocol::Linux, Protocol::Pvh] {
            let request = Request { initrd: Some(&initrd), protocol, ..request(&kernel, &e820) };
            if let Ok(loaded) = load(&memory, &request) {
                assert!(loaded.state.rip >= 0x10_0000 && loaded.kernel.1 <= 8 << 20);
                assert!(loaded.initrd.is_some_and(|it| it.0 >= loaded.kernel.1 || it.1 <= loaded.kernel.0));
            }
        }
        assert!(read(&memory, 0, 0x500).iter().all(|byte| *byte == 0));
        assert!(read(&memory, 0x3_0000, 0x10_0000 - 0x3_0000).iter().all(|byte| *byte == 0));
    }

    #[test]
    fn the_images_to_be_mutated_load() {
        for image in images() {
            load(&memory(8), &request(&file(&image), &map(8))).unwrap();
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2048), kind in 0..3usize) {
            let magic: &[u8] = [b"\x7fELF\x02\x01".as_slice(), b"MZ", b""][kind];
            load_all_ways(&[magic, &bytes].concat());
        }

        #[test]
        fn mutated_images_never_panic(
            which in 0..2usize,
            // Where headers are, and anywhere.
            small in proptest::collection::vec((0..0x300usize, any::<u8>()), 0..6),
            wide in proptest::collection::vec((0..0x2000usize, any::<[u8; 8]>()), 0..2),
            cut in proptest::option::of(0..0x2000usize),
        ) {
            let mut image = images()[which].clone();
            for (at, byte) in small {
                image[at] = byte;
            }
            for (at, bytes) in wide {
                let at = at % (image.len() - 8);
                synthetic::put(&mut image, at, &bytes);
            }
            image.truncate(cut.unwrap_or(image.len()));
            load_all_ways(&image);
        }

        #[test]
        fn header_fields_may_have_any_value(
            which in 0..2usize,
            field in prop_oneof![0x1f1..0x268usize, 0x10..0xb0usize],
            value in prop_oneof![Just(u64::MAX), Just(1 << 63), Just(u64::from(u32::MAX)), Just(0), any::<u64>()],
        ) {
            let mut image = images()[which].clone();
            synthetic::put(&mut image, field, &value.to_le_bytes());
            load_all_ways(&image);
        }
    }
}
