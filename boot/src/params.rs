//! The zero page, `struct boot_params` (Linux: Documentation/arch/x86/zero-page.rst). Written by the main thread while
//! the machine is built.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::initrd::Initrd;
use crate::kernel::Kernel;
use crate::{BootError, Request, bzimage};

/// Where it lies.
pub(crate) const ADDRESS: u64 = 0x7000;

/// Writes the zero page of a kernel in place.
pub(crate) fn write(
    memory: &GuestMemoryMmap,
    kernel: &Kernel,
    initrd: Option<Initrd>,
    request: &Request,
) -> Result<(), BootError> {
    let mut params = boot_params {
        hdr: kernel.header,
        acpi_rsdp_addr: request.rsdp,
        e820_entries: request.e820.len() as u8,
        ..boot_params::default()
    };
    let (start, end) = initrd.map_or((0, 0), |initrd| (initrd.start, initrd.end));
    bzimage::fill_in(&mut params.hdr, start, end - start);
    for (slot, entry) in request.e820.iter().enumerate() {
        params.e820_table[slot] = boot_e820_entry { addr: entry.base, size: entry.len, r#type: entry.kind as u32 };
    }
    Ok(memory.write_obj(params, GuestAddress(ADDRESS))?)
}
