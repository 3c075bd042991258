//! The registers a protocol asks for at the first instruction, as plain data, and the GDT and page tables they point to.
//! Called by the main thread while the machine is built.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::BootError;

const GDT: u64 = 0x500;
const STACK_TOP: u64 = 0x8ff0;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const DIRECTORIES: u64 = 0xb000;
/// Page directories, each mapping 1 GiB with 2 MiB pages: everything below 4 GiB.
const DIRECTORY_COUNT: u64 = 4;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 always reads as one; interrupts are off.
const RFLAGS: u64 = 1 << 1;

const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_2M: u64 = 1 << 7;

/// A segment register with its hidden part. The fields are those of the descriptor (Intel SDM volume 3, section 3.4.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "they are the bits of a descriptor")]
pub struct Segment {
    /// Base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u32,
    /// Selector into the GDT.
    pub selector: u16,
    /// Type, 4 bits.
    pub type_: u8,
    /// Present.
    pub present: bool,
    /// Privilege level, 2 bits.
    pub dpl: u8,
    /// Default operation size is 32 bits.
    pub db: bool,
    /// Code or data, not a system segment.
    pub s: bool,
    /// 64-bit code.
    pub l: bool,
    /// Limit counts 4 KiB units.
    pub g: bool,
    /// The register holds the null selector.
    pub unusable: bool,
}

/// A descriptor table register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Guest-physical address.
    pub base: u64,
    /// Last valid byte offset.
    pub limit: u16,
}

/// The registers of the first vCPU. What is not here has its value after reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InitialState {
    /// First instruction.
    pub rip: u64,
    /// Top of a page of stack.
    pub rsp: u64,
    /// Linux: address of the zero page.
    pub rsi: u64,
    /// PVH: address of the start info.
    pub rbx: u64,
    /// Interrupts disabled.
    pub rflags: u64,
    /// Control register 0.
    pub cr0: u64,
    /// Page table root, or 0.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// Code segment.
    pub cs: Segment,
    /// Data segment; also ES, FS, GS and SS.
    pub ds: Segment,
    /// Extra segment.
    pub es: Segment,
    /// FS.
    pub fs: Segment,
    /// GS.
    pub gs: Segment,
    /// Stack segment.
    pub ss: Segment,
    /// Task register.
    pub tr: Segment,
    /// Local descriptor table register.
    pub ldt: Segment,
    /// Global descriptor table.
    pub gdt: Table,
    /// Interrupt descriptor table: empty, so an exception before the kernel has its own is a triple fault.
    pub idt: Table,
}

/// Type of a code segment: execute, read, accessed.
const CODE: u8 = 0xb;
/// Type of a data segment: read, write, accessed.
const DATA: u8 = 0x3;
/// Type of a busy task state segment, 32- or 64-bit.
const BUSY_TSS: u8 = 0xb;

/// `__BOOT_CS`, `__BOOT_DS` (Linux/x86 boot protocol, section 64-bit boot protocol), and the task state segment after
/// them. PVH leaves the selectors open.
const CS: u16 = 0x10;
const DS: u16 = 0x18;
const TR: u16 = 0x20;

/// A flat 4 GiB segment.
fn flat(selector: u16, type_: u8, long: bool) -> Segment {
    Segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: true,
        dpl: 0,
        db: !long,
        s: true,
        l: long,
        g: true,
        unusable: false,
    }
}

/// The 8-byte descriptor that loads `segment` (Intel SDM volume 3, figure 3-8).
fn descriptor(segment: &Segment) -> u64 {
    let limit = u64::from(if segment.g { segment.limit >> 12 } else { segment.limit });
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    limit & 0xffff
        | (segment.base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (segment.base >> 24 & 0xff) << 56
}

/// What both protocols share; writes the GDT.
fn protected_mode(memory: &GuestMemoryMmap, rip: u64, long: bool) -> Result<InitialState, BootError> {
    let cs = flat(CS, CODE, long);
    let ds = Segment { db: true, l: false, ..flat(DS, DATA, long) };
    let tr = Segment { limit: 0x67, selector: TR, type_: BUSY_TSS, present: true, ..Segment::default() };
    // The last zero is the upper half of the 16-byte task state segment descriptor of long mode.
    let gdt = [0, 0, descriptor(&cs), descriptor(&ds), descriptor(&tr), 0];
    for (at, entry) in (GDT..).step_by(8).zip(gdt) {
        memory.write_obj(entry, GuestAddress(at))?;
    }
    Ok(InitialState {
        rip,
        rsp: STACK_TOP,
        rsi: 0,
        rbx: 0,
        rflags: RFLAGS,
        cr0: CR0_PE | CR0_ET,
        cr3: 0,
        cr4: 0,
        efer: 0,
        cs,
        ds,
        es: ds,
        fs: ds,
        gs: ds,
        ss: ds,
        tr,
        ldt: Segment { type_: 2, unusable: true, ..Segment::default() },
        gdt: Table { base: GDT, limit: (gdt.len() * 8 - 1) as u16 },
        idt: Table { base: 0, limit: 0 },
    })
}

/// Registers of the 64-bit boot protocol: long mode, everything below 4 GiB mapped to itself, zero page in RSI.
pub(crate) fn linux(memory: &GuestMemoryMmap, entry: u64) -> Result<InitialState, BootError> {
    write_page_tables(memory)?;
    let state = protected_mode(memory, entry, true)?;
    Ok(InitialState {
        rsi: crate::params::ADDRESS,
        cr0: state.cr0 | CR0_PG,
        cr3: PML4,
        cr4: CR4_PAE,
        efer: EFER_LME | EFER_LMA,
        ..state
    })
}

/// Registers of the PVH protocol (Xen: docs/misc/pvh.pandoc): 32-bit flat protected mode, paging off, start info in EBX.
pub(crate) fn pvh(memory: &GuestMemoryMmap, entry: u64) -> Result<InitialState, BootError> {
    let state = protected_mode(memory, entry, false)?;
    Ok(InitialState { rbx: crate::pvh::ADDRESS, ..state })
}

fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    crate::bytes::zero(memory, PML4, DIRECTORIES)?;
    memory.write_obj(PDPT | PAGE_PRESENT_WRITABLE, GuestAddress(PML4))?;
    for index in 0..DIRECTORY_COUNT {
        let directory = DIRECTORIES + index * 0x1000;
        memory.write_obj(directory | PAGE_PRESENT_WRITABLE, GuestAddress(PDPT + index * 8))?;
        let mut page = [0; 0x1000];
        for (slot, number) in page.chunks_exact_mut(8).zip(index * 512..) {
            slot.copy_from_slice(&(number << 21 | PAGE_2M | PAGE_PRESENT_WRITABLE).to_le_bytes());
        }
        memory.write_slice(&page, GuestAddress(directory))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic;

    #[test]
    fn the_gdt_holds_what_the_segment_registers_hide() {
        // Flat segments as every text on the x86 writes them, and a TSS of 0x68 bytes at 0.
        for (enter, code) in [(linux as fn(&_, _) -> _, 0x00af_9b00_0000_ffff_u64), (pvh, 0x00cf_9b00_0000_ffff)] {
            let memory = synthetic::memory(1);
            let state: InitialState = enter(&memory, 0).unwrap();
            let at = |selector: u16| memory.read_obj::<u64>(GuestAddress(GDT + u64::from(selector))).unwrap();
            assert_eq!(state.gdt.base, GDT);
            assert_eq!(at(0), 0);
            assert_eq!(at(state.cs.selector), code);
            assert_eq!(at(state.ds.selector), 0x00cf_9300_0000_ffff);
            assert_eq!(at(state.tr.selector), 0x0000_8b00_0000_0067);
            assert!(state.gdt.limit >= state.tr.selector + 15, "a descriptor of 16 bytes in long mode");
            assert!(state.ldt.unusable);
        }
    }

    #[test]
    fn page_tables_replace_what_was_there() {
        let memory = synthetic::dirty_memory(1);
        linux(&memory, 0).unwrap();
        let entry = |at: u64| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
        assert_eq!((entry(PML4), entry(PML4 + 8), entry(PDPT + 24), entry(PDPT + 32)), (0xa003, 0, 0xe003, 0));
        assert_eq!(entry(0xe000 + 511 * 8), 0xffe0_0083, "the last 2 MiB below 4 GiB");
    }
}
