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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::{dirty_memory, read};

    #[test]
    fn the_line_ends_with_a_nul() {
        let memory = dirty_memory(1);
        write(&memory, "quiet", 5).unwrap();
        assert_eq!(read(&memory, ADDRESS, 6), b"quiet\0");
        write(&memory, "", 5).unwrap();
        assert_eq!(read(&memory, ADDRESS, 1), b"\0");
    }

    #[test]
    fn what_the_kernel_cannot_take_is_an_error() {
        let memory = dirty_memory(1);
        let error = write(&memory, "quiet!", 5).unwrap_err();
        assert_eq!(error.to_string(), "the command line has 6 bytes, this kernel takes at most 5; shorten it");
        let error = write(&memory, "qu\0iet", 2047).unwrap_err();
        assert_eq!(error.to_string(), "the command line contains a NUL byte at position 2; remove it");
        // A kernel may promise more than the place we have.
        let error = write(&memory, &"x".repeat(ROOM), usize::MAX).unwrap_err();
        assert!(matches!(error, BootError::CmdlineTooLong { len: 0x1_0000, max: 0xffff }), "{error:?}");
        assert_eq!(read(&memory, ADDRESS, 1), [0xa5], "nothing was written");
    }
}
