//! The bare-metal guest: a small program without an operating system that tests skiff's machine from inside. It is
//! compiled by `build.rs`; this is how the rest of the workspace gets hold of it. README.md lists its command line.

#[path = "src/workload.rs"]
pub mod workload;

/// Where the ELF image lies on the machine that built it.
pub const PATH: &str = concat!(env!("OUT_DIR"), "/guest.elf");

/// The ELF image, for who wants to carry it along.
pub const ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"));

/// What the guest writes to the exit port when every check passed; isa-debug-exit makes `33` of it.
pub const PASSED: u8 = 0x10;

/// What the guest writes to the exit port when a check failed, the command line was bad or it crashed; `35` outside.
pub const FAILED: u8 = 0x11;

#[cfg(test)]
mod tests {
    use super::*;

    fn number(at: usize, bytes: usize) -> usize {
        ELF[at..at + bytes].iter().rev().fold(0, |value, byte| value << 8 | usize::from(*byte))
    }

    /// Program headers (System V ABI, "Program Header"): type, offset, physical address, bytes in the file.
    fn segments() -> impl Iterator<Item = [usize; 4]> {
        let (table, size, count) = (number(32, 8), number(54, 2), number(56, 2));
        (0..count)
            .map(move |index| table + index * size)
            .map(|header| [number(header, 4), number(header + 8, 8), number(header + 24, 8), number(header + 32, 8)])
    }

    #[test]
    fn is_a_static_x86_64_executable() {
        assert_eq!(ELF[..6], *b"\x7fELF\x02\x01", "64-bit, little endian");
        assert_eq!((number(16, 2), number(18, 2)), (2, 62), "ET_EXEC, EM_X86_64");
        assert!(segments().all(|[kind, ..]| kind == 1 || kind == 4), "only PT_LOAD and PT_NOTE: nothing to relocate");
    }

    /// XEN_ELFNOTE_PHYS32_ENTRY: name "Xen", type 18 (Xen, public/elfnote.h).
    #[test]
    fn names_its_pvh_entry() {
        let [_, note, ..] = segments().find(|[kind, ..]| *kind == 4).expect("a PT_NOTE segment");
        assert_eq!((number(note, 4), number(note + 4, 4), number(note + 8, 4)), (4, 8, 18));
        assert_eq!(ELF[note + 12..note + 16], *b"Xen\0");
        let entry = number(note + 16, 8);
        assert_eq!(entry, number(24, 8), "the entry point of the ELF header");
        let loaded = |[kind, _, address, bytes]: [usize; 4]| kind == 1 && (address..address + bytes).contains(&entry);
        assert!(segments().any(loaded), "the entry is loaded");
    }
}
