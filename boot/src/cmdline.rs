//! The kernel command line in guest memory. Written by the main thread while the machine is built.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::BootError;

/// Where it lies.
pub(crate) const ADDRESS: u64 = 0x2_0000;
/// Bytes there are, with the NUL.
pub(crate) const ROOM: usize = 0x1_0000;

/// Writes the command line and its NUL; `max` is what the kernel takes, in bytes without the NUL.
pub(crate) fn write(memory: &GuestMemoryMmap, line: &str, max: usize) -> Result<(), BootError> {
    if let Some(position) = line.bytes().position(|byte| byte == 0) {
        return Err(BootError::CmdlineNul { position });
    }
    let max = max.min(ROOM - 1);
    if line.len() > max {
        return Err(BootError::CmdlineTooLong { len: line.len(), max });
    }
    memory.write_slice(line.as_bytes(), GuestAddress(ADDRESS))?;
    memory.write_obj(0u8, GuestAddress(ADDRESS + line.len() as u64))?;
    Ok(())
}
