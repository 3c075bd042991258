//! What the PVH entry finds through EBX: `hvm_start_info` version 1, its module list and memory map (Xen:
//! xen/include/public/arch-x86/hvm/start_info.h). Written by the main thread while the machine is built.

use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::initrd::Initrd;
use crate::{BootError, Request, cmdline};

/// Where the start info lies.
pub(crate) const ADDRESS: u64 = 0x6000;
const MODULES: u64 = 0x6040;
const MEMMAP: u64 = 0x6100;
/// "xEn3" with the top bit of the E set.
const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;

/// Writes the start info and what it points to; the initrd is module 0.
pub(crate) fn write(memory: &GuestMemoryMmap, initrd: Option<Initrd>, request: &Request) -> Result<(), BootError> {
    if let Some(Initrd { start, end }) = initrd {
        let module = hvm_modlist_entry { paddr: start, size: end - start, ..hvm_modlist_entry::default() };
        memory.write_obj(module, GuestAddress(MODULES))?;
    }
    for (at, entry) in (MEMMAP..).step_by(size_of::<hvm_memmap_table_entry>()).zip(request.e820) {
        let entry = hvm_memmap_table_entry { addr: entry.base, size: entry.len, type_: entry.kind as u32, reserved: 0 };
        memory.write_obj(entry, GuestAddress(at))?;
    }
    let info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        flags: 0,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: if initrd.is_some() { MODULES } else { 0 },
        cmdline_paddr: cmdline::ADDRESS,
        rsdp_paddr: request.rsdp,
        memmap_paddr: MEMMAP,
        memmap_entries: request.e820.len() as u32,
        reserved: 0,
    };
    Ok(memory.write_obj(info, GuestAddress(ADDRESS))?)
}
