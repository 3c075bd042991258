//! ELF kernels: program headers, the PVH note, and loading. Called by the main thread while the machine is built.
//!
//! The loader is our own because BSS has to be zeroed, and because each way in which a file is not a kernel has its own
//! message.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use vm_memory::GuestMemoryMmap;

use crate::BootError;
use crate::bytes::{align_up, read_into_guest, u16_at, u32_at, u64_at, zero};
use crate::kernel;

pub(crate) const MAGIC: [u8; 4] = *b"\x7fELF";
const KIND: &str = "ELF kernel";
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const ET_REL: u16 = 1;
const ET_CORE: u16 = 4;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
/// Size of the file header and of one program header (System V ABI, ELF-64).
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
/// A kernel has about five.
const PROGRAM_HEADERS_MAX: u16 = 128;
/// A kernel's notes take less than a page.
const NOTES_MAX: u64 = 0x1_0000;
/// The note with the 32-bit entry address (Xen: xen/include/public/elfnote.h).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// A PT_LOAD program header.
#[derive(Clone, Debug)]
struct Segment {
    /// Where its bytes are in the file.
    file: Range<u64>,
    /// Guest-physical address.
    address: u64,
    /// Bytes in memory; those the file does not have are zero.
    len: u64,
}

impl Segment {
    fn end(&self) -> u64 {
        self.address + self.len
    }
}

/// A checked ELF kernel.
#[derive(Debug)]
pub(crate) struct Elf {
    /// `e_entry`.
    pub(crate) entry: u64,
    /// The address in the PVH note, once it was read.
    pub(crate) pvh_entry: Option<u32>,
    /// Sorted by address, not overlapping, at least one.
    segments: Vec<Segment>,
    /// Where PT_NOTE segments are in the file.
    notes: Vec<Range<u64>>,
}

impl Elf {
    /// Reads the headers of an image of `len` bytes that starts with `head` and with [`MAGIC`].
    pub(crate) fn parse(head: &[u8], len: u64) -> Result<Self, BootError> {
        check_header(head, len)?;
        let mut elf = Self { entry: u64_at(head, 24), pvh_entry: None, segments: Vec::new(), notes: Vec::new() };
        for header in program_headers(head, len)?.chunks_exact(PROGRAM_HEADER) {
            elf.add(header, len)?;
        }
        if elf.segments.is_empty() {
            return Err(BootError::NotAKernelElf { what: "one without anything to load" });
        }
        elf.segments.sort_unstable_by_key(|segment| segment.address);
        if elf.segments.windows(2).any(|pair| pair[0].end() > pair[1].address) {
            return Err(damaged("its segments overlap in memory"));
        }
        Ok(elf)
    }

    fn add(&mut self, header: &[u8], len: u64) -> Result<(), BootError> {
        let offset = u64_at(header, 8);
        let (address, file_len, memory_len) = (u64_at(header, 24), u64_at(header, 32), u64_at(header, 40));
        let end = offset.checked_add(file_len).ok_or(damaged("a segment ends past the largest offset"))?;
        let kind = u32_at(header, 0);
        if matches!(kind, PT_LOAD | PT_NOTE) && end > len {
            return Err(BootError::Truncated { kind: KIND, expected: end, found: len });
        }
        match kind {
            PT_INTERP => return Err(BootError::NotAKernelElf { what: "a program for an operating system" }),
            PT_NOTE if file_len <= NOTES_MAX => self.notes.push(offset..end),
            PT_LOAD if memory_len == 0 => {}
            PT_LOAD if file_len > memory_len => return Err(damaged("a segment is larger in the file than in memory")),
            PT_LOAD => {
                address.checked_add(memory_len).ok_or(damaged("a segment ends past the largest address"))?;
                self.segments.push(Segment { file: offset..end, address, len: memory_len });
            }
            _ => {}
        }
        Ok(())
    }

    /// Looks for the PVH note in the file.
    pub(crate) fn find_pvh_entry(&mut self, file: &File) -> Result<(), BootError> {
        for note in &self.notes {
            let mut bytes = vec![0; (note.end - note.start) as usize];
            file.read_exact_at(&mut bytes, note.start).map_err(BootError::ReadKernel)?;
            self.pvh_entry = self.pvh_entry.or(pvh_entry(&bytes));
        }
        Ok(())
    }

    /// Copies the segments from the file into guest memory, each in one read, and zeroes what the file does not fill.
    pub(crate) fn load(&self, memory: &GuestMemoryMmap, file: &File) -> Result<(), BootError> {
        for segment in self.segments.iter().rev() {
            kernel::check_place(memory, segment.address, segment.end())?;
        }
        for segment in &self.segments {
            let len = segment.file.end - segment.file.start;
            read_into_guest(memory, segment.address, file, segment.file.start, len)
                .map_err(|error| BootError::ReadKernel(error.into()))?;
            zero(memory, segment.address + len, segment.end())?;
        }
        Ok(())
    }

    /// The lowest address it occupies.
    pub(crate) fn start(&self) -> u64 {
        self.segments.first().map_or(0, |segment| segment.address)
    }

    /// The first address after it.
    pub(crate) fn end(&self) -> u64 {
        self.segments.last().map_or(0, Segment::end)
    }

    /// Is there something of the kernel at this address?
    pub(crate) fn contains(&self, address: u64) -> bool {
        self.segments.iter().any(|segment| (segment.address..segment.end()).contains(&address))
    }
}

fn damaged(what: &'static str) -> BootError {
    BootError::Damaged { kind: KIND, what }
}

fn check_header(head: &[u8], len: u64) -> Result<(), BootError> {
    if head.len() < HEADER {
        return Err(BootError::Truncated { kind: KIND, expected: HEADER as u64, found: len });
    }
    if head[4] != CLASS_64 {
        return Err(BootError::Elf32);
    }
    let machine = u16_at(head, 18);
    if head[5] != LITTLE_ENDIAN || machine != EM_X86_64 {
        let machine = match machine {
            183 => "aarch64",
            243 => "RISC-V",
            258 => "LoongArch",
            _ => "another architecture",
        };
        return Err(BootError::WrongMachine { machine });
    }
    match u16_at(head, 16) {
        ET_REL => Err(BootError::NotAKernelElf { what: "an object file or kernel module" }),
        ET_CORE => Err(BootError::NotAKernelElf { what: "a core dump" }),
        _ => Ok(()),
    }
}

/// The program headers, which lie in the first bytes of a kernel.
fn program_headers(head: &[u8], len: u64) -> Result<&[u8], BootError> {
    let (offset, size, count) = (u64_at(head, 32), u16_at(head, 54), u16_at(head, 56));
    if count == 0 {
        return Err(BootError::NotAKernelElf { what: "one without anything to load" });
    }
    if usize::from(size) != PROGRAM_HEADER || count > PROGRAM_HEADERS_MAX {
        return Err(damaged("its program headers have the wrong size or number"));
    }
    let end = offset.saturating_add(u64::from(size) * u64::from(count));
    if end > len {
        return Err(BootError::Truncated { kind: KIND, expected: end, found: len });
    }
    head.get(offset as usize..end as usize).ok_or(damaged("its program headers are not at its start"))
}

/// The address in the PVH note among these notes, each a header of three words, a name and a descriptor, the latter two
/// padded to 4 bytes.
fn pvh_entry(mut notes: &[u8]) -> Option<u32> {
    while notes.len() >= 12 {
        let (name_len, descriptor_len, kind) = (u32_at(notes, 0), u32_at(notes, 4), u32_at(notes, 8));
        let name_end = 12 + name_len as usize;
        let descriptor = 12 + align_up(u64::from(name_len), 4)? as usize;
        let next = descriptor + align_up(u64::from(descriptor_len), 4)? as usize;
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && notes.get(12..name_end)? == b"Xen\0" && descriptor_len >= 4 {
            return notes.get(descriptor..descriptor + 4).map(|address| u32_at(address, 0));
        }
        notes = notes.get(next..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::{
        ELF_DATA, LOAD, NOTE, Part, dirty_memory, elf, file, map, note, put, pvh_notes, read, request,
    };
    use crate::{Loaded, load};

    fn error_of(image: &[u8]) -> BootError {
        Elf::parse(image, image.len() as u64).unwrap_err()
    }

    fn plain() -> Vec<u8> {
        elf(0x10_0000, &[Part(LOAD, &[0xf4; 64], 0x10_0000, 64)])
    }

    #[test]
    fn other_architectures_and_kinds_are_named() {
        let changes: [(usize, &[u8], &str); 6] = [
            (4, &[1], "32-bit ELF file"),
            (18, &[183, 0], "ELF file for aarch64"),
            (18, &[243, 0], "ELF file for RISC-V"),
            (16, &[1, 0], "ELF file, but an object file or kernel module"),
            (64, &[3], "ELF file, but a program for an operating system"),
            (64, &[6], "ELF file, but one without anything to load"),
        ];
        for (offset, bytes, expected) in changes {
            let mut image = plain();
            put(&mut image, offset, bytes);
            let message = error_of(&image).to_string();
            assert!(message.starts_with(expected), "{message}");
        }
    }

    #[test]
    fn images_cut_short() {
        let image = plain();
        for (len, expected) in [(40, 64), (100, 120), (ELF_DATA + 63, ELF_DATA + 64)] {
            let error = error_of(&image[..len]);
            let BootError::Truncated { expected: found, .. } = error else { panic!("{error:?}") };
            assert_eq!(found, expected as u64);
        }
    }

    #[test]
    fn headers_that_contradict_themselves() {
        let overlap = elf(0x10_0000, &[Part(LOAD, &[0; 8], 0x10_0000, 64), Part(LOAD, &[0; 8], 0x10_003f, 64)]);
        let shrunk = elf(0x10_0000, &[Part(LOAD, &[0; 64], 0x10_0000, 63)]);
        let wrapping = elf(0x10_0000, &[Part(LOAD, &[0; 64], u64::MAX - 10, 64)]);
        let mut far = plain();
        put(&mut far, 64 + 8, &u64::MAX.to_le_bytes());
        for (image, what) in [
            (overlap, "overlap"),
            (shrunk, "larger in the file"),
            (wrapping, "largest address"),
            (far, "largest offset"),
        ] {
            let message = error_of(&image).to_string();
            assert!(message.starts_with("damaged ELF kernel") && message.contains(what), "{message}");
        }
    }

    #[test]
    fn segments_go_to_their_physical_addresses_and_bss_is_zero() {
        let parts = [Part(LOAD, &[2; 100], 0x20_0000, 0x3000), Part(LOAD, &[1; 100], 0x10_0000, 100)];
        let (memory, kernel) = (dirty_memory(16), file(&elf(0x10_0000, &parts)));
        let Loaded { kernel, .. } = load(&memory, &request(&kernel, &map(16))).unwrap();
        assert_eq!(kernel, (0x10_0000, 0x20_3000));
        assert_eq!(read(&memory, 0x10_0000, 101), [[1; 100].as_slice(), &[0xa5]].concat());
        assert_eq!(read(&memory, 0x20_0000, 0x3001), [[2; 100].as_slice(), &[0; 0x3000 - 100], &[0xa5]].concat());
    }

    #[test]
    fn a_segment_without_ram_under_it() {
        let low = file(&elf(0x1000, &[Part(LOAD, &[0; 8], 0x1000, 8)]));
        let error = load(&dirty_memory(16), &request(&low, &map(16))).unwrap_err();
        assert!(error.to_string().starts_with("the kernel wants to be at 0x1000..0x1008, which is not RAM"), "{error}");
        let high = file(&elf(0x1000_0000, &[Part(LOAD, &[0; 8], 0x1000_0000, 0x10_0000)]));
        let error = load(&dirty_memory(16), &request(&high, &map(16))).unwrap_err();
        assert!(error.to_string().starts_with("the kernel needs at least 257 MiB of memory"), "{error}");
    }

    #[test]
    fn only_the_xen_note_of_the_right_type_is_the_entry() {
        assert_eq!(pvh_entry(&pvh_notes(0x1234)), Some(0x1234));
        assert_eq!(pvh_entry(&note(b"Xen\0", 17, &[1; 8])), None);
        assert_eq!(pvh_entry(&note(b"Xen", 18, &[1; 8])), None);
        assert_eq!(pvh_entry(&note(b"Xen\0", 18, &[1; 2])), None);
        let whole = note(b"Xen\0", 18, &[1; 4]);
        assert_eq!(pvh_entry(&whole), Some(0x0101_0101));
        for len in 0..whole.len() {
            assert_eq!(pvh_entry(&whole[..len]), None);
        }
        let mut endless = note(b"Xen\0", 17, &[]);
        put(&mut endless, 0, &[0xff; 8]);
        assert_eq!(pvh_entry(&endless), None);
    }

    #[test]
    fn a_note_of_no_size_a_kernel_has_is_passed_over() {
        let huge = vec![0; NOTES_MAX as usize + 4];
        let image = elf(0x10_0000, &[Part(LOAD, &[0xf4; 64], 0x10_0000, 64), Part(NOTE, &huge, 0, 0)]);
        let mut elf = Elf::parse(&image, image.len() as u64).unwrap();
        elf.find_pvh_entry(&file(&image)).unwrap();
        assert_eq!(elf.pvh_entry, None);
    }
}
