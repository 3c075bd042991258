//! The code a PC starts at, and restarts at. A kernel that finds hardware-reduced ACPI and no EFI, as Linux does here,
//! reboots by a jump to it in real mode. Written by the main thread while the machine is built.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::BootError;

/// Guest-physical address: `FFFF:0000`, 16 bytes below 1 MiB.
pub const ADDRESS: u64 = 0xf_fff0;

/// Writes code for real mode that resets the machine by writing `value` to `port`, and waits.
///
/// # Errors
/// [`BootError::Memory`] if there is no guest memory.
pub fn write(memory: &GuestMemoryMmap, port: u8, value: u8) -> Result<(), BootError> {
    // mov al, value; out port, al; hlt; jmp to the hlt
    let code = [0xb0, value, 0xe6, port, 0xf4, 0xeb, 0xfd];
    Ok(memory.write_slice(&code, GuestAddress(ADDRESS))?)
}
