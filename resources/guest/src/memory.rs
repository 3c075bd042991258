//! Memory for rings, buffers and page tables: one arena behind the guest's image. Each check gets what it asks for and
//! gives all of it back at its end.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::boot::Boot;
use crate::cpu::{self, Mmio};

unsafe extern "C" {
    static bss_end: u8;
    static level4: u64;
}

const PAGE: u64 = 4096;
/// The arena ends here at the latest: above there is device memory.
const ARENA_END: u64 = 3 << 30;
/// What is mapped from the start, by entry.s.
const MAPPED: u64 = 4 << 30;
/// Present, writable, user; a large page; not cached.
const TABLE: u64 = 7;
const LARGE_UNCACHED: u64 = 0x87 | 0x18;

/// Page tables for device memory above 4 GiB.
#[repr(align(4096))]
struct Tables([[AtomicU64; 512]; 16]);

static TABLES: Tables = Tables([const { [const { AtomicU64::new(0) }; 512] }; 16]);
static TABLES_USED: AtomicU64 = AtomicU64::new(0);
static NEXT: AtomicU64 = AtomicU64::new(0);
static END: AtomicU64 = AtomicU64::new(0);

/// Finds the arena: the RAM behind the image.
pub(crate) fn init(boot: &Boot) {
    let image_end = &raw const bss_end as u64;
    let Some((_, ram_end)) = boot.ram().find(|(start, end)| (*start..*end).contains(&image_end)) else {
        panic!("the memory map has no RAM where the guest was loaded");
    };
    NEXT.store(image_end, Ordering::Relaxed);
    END.store(ram_end.min(ARENA_END), Ordering::Relaxed);
}

/// `bytes` of zeroed memory, page-aligned.
pub(crate) fn allocate(bytes: u64) -> Mmio {
    let start = NEXT.load(Ordering::Relaxed).next_multiple_of(PAGE);
    let end = start + bytes;
    assert!(end <= END.load(Ordering::Relaxed), "out of memory: {bytes} bytes");
    NEXT.store(end, Ordering::Relaxed);
    // SAFETY: RAM that nothing else uses: `init` found it, NEXT moved past it.
    unsafe { core::ptr::write_bytes(start as *mut u8, 0, bytes as usize) };
    Mmio(start)
}

/// The state of the arena, for [`release`].
pub(crate) fn mark() -> u64 {
    NEXT.load(Ordering::Relaxed)
}

/// Gives back everything allocated since `mark`.
pub(crate) fn release(mark: u64) {
    NEXT.store(mark, Ordering::Relaxed);
}

/// Makes the device memory at `start` accessible, for good. Below 4 GiB it is already.
pub(crate) fn map(start: u64, bytes: u64) {
    let (mut page, end) = (start.max(MAPPED) & !0x1f_ffff, start + bytes);
    while page < end {
        let level3 = table(Mmio(&raw const level4 as u64), page >> 39 & 511);
        let level2 = table(level3, page >> 30 & 511);
        level2.write(8 * (page >> 21 & 511), page | LARGE_UNCACHED);
        page += 0x20_0000;
    }
    cpu::flush_tlb();
}

fn table(parent: Mmio, index: u64) -> Mmio {
    let entry = parent.read::<u64>(8 * index);
    if entry & 1 != 0 {
        return Mmio(entry & 0x000f_ffff_ffff_f000);
    }
    let used = TABLES_USED.fetch_add(1, Ordering::Relaxed) as usize;
    let Some(table) = TABLES.0.get(used) else { panic!("no page table is left to map device memory") };
    let address = table.as_ptr() as u64;
    parent.write(8 * index, address | TABLE);
    Mmio(address)
}
