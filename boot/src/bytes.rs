//! Little-endian fields of file headers and checked accesses to guest memory. Pure functions, called by any thread.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::BootError;

/// The `N` bytes at `offset`, or `None` past the end.
fn array<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

/// The 16-bit field at `offset`; zero past the end.
pub(crate) fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(array(bytes, offset).unwrap_or_default())
}

/// The 32-bit field at `offset`; zero past the end.
pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(array(bytes, offset).unwrap_or_default())
}

/// The 64-bit field at `offset`; zero past the end.
pub(crate) fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(array(bytes, offset).unwrap_or_default())
}

/// Rounds up to a power of two; `None` on overflow.
pub(crate) fn align_up(value: u64, align: u64) -> Option<u64> {
    Some(value.checked_add(align - 1)? & !(align - 1))
}

/// The first bytes of a file, as many as there are up to `max`.
pub(crate) fn read_head(file: &File, max: usize) -> io::Result<Vec<u8>> {
    let mut head = vec![0; max];
    let mut filled = 0;
    while filled < max {
        match file.read_at(&mut head[filled..], filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    head.truncate(filled);
    Ok(head)
}

/// Reads `len` bytes of a file at `offset` straight into guest memory, without a copy in between.
pub(crate) fn read_into_guest(
    memory: &GuestMemoryMmap,
    address: u64,
    mut file: &File,
    offset: u64,
    len: u64,
) -> Result<(), ReadError> {
    file.seek(SeekFrom::Start(offset)).map_err(ReadError::File)?;
    memory.read_exact_volatile_from(GuestAddress(address), &mut file, len as usize).map_err(ReadError::Guest)
}

/// Why [`read_into_guest`] failed.
#[derive(Debug)]
pub(crate) enum ReadError {
    /// The file could not be positioned.
    File(io::Error),
    /// The file ended or could not be read, or the range is not in guest memory.
    Guest(GuestMemoryError),
}

impl From<ReadError> for io::Error {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::File(error) | ReadError::Guest(GuestMemoryError::IOError(error)) => error,
            ReadError::Guest(error) => io::Error::other(error),
        }
    }
}

/// Zeroes `start..end` of guest memory.
pub(crate) fn zero(memory: &GuestMemoryMmap, start: u64, end: u64) -> Result<(), BootError> {
    static ZEROS: [u8; 0x1000] = [0; 0x1000];
    let mut at = start;
    while at < end {
        let len = (end - at).min(ZEROS.len() as u64);
        memory.write_slice(&ZEROS[..len as usize], GuestAddress(at))?;
        at += len;
    }
    Ok(())
}
