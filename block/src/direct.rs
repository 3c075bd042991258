#![expect(unsafe_code, reason = "statx and preadv2 are only raw calls")]
//! What O_DIRECT demands of a transfer: where it may begin, how long its pieces may be, and how memory lies. Found out
//! once, when a disk is opened.

use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use libc::iovec;

use crate::SECTOR_SIZE;

/// What transfers must be multiples of, in bytes. Powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Addresses of memory.
    pub memory: usize,
    /// Offsets in the image, and the length of every piece of memory: one block.
    pub block: u64,
}

impl Alignment {
    /// Through the page cache everything goes.
    pub const NONE: Self = Self { memory: 1, block: 1 };

    /// Whether `buffers` at `offset` can be handed to the host as they are.
    pub(crate) fn fits(self, buffers: &[iovec], offset: u64) -> bool {
        offset.is_multiple_of(self.block)
            && buffers.iter().all(|buffer| {
                buffer.iov_base.addr().is_multiple_of(self.memory) && (buffer.iov_len as u64).is_multiple_of(self.block)
            })
    }

    /// Whether a guest, which writes whole sectors, can write a part of a block.
    pub(crate) fn cuts_blocks(self) -> bool {
        self.block > SECTOR_SIZE
    }
}

/// The demands of `file`, which is open with O_DIRECT; `None` if it does not do direct transfers after all.
///
/// # Errors
/// What the host says to reading.
pub(crate) fn alignment(file: &File) -> io::Result<Option<Alignment>> {
    match told(file) {
        Some((0, _) | (_, 0)) => Ok(None),
        Some((memory, block)) => Ok(Some(Alignment { memory: memory as usize, block: block.into() })),
        None => tried(file),
    }
}

/// STATX_DIOALIGN (Linux 6.1, and not every filesystem): the demands on memory and on offsets, both 0 if there is no
/// direct transfer.
fn told(file: &File) -> Option<(u32, u32)> {
    // SAFETY: the structure is plain numbers, for which zero is a value.
    let mut stat: libc::statx = unsafe { mem::zeroed() };
    // SAFETY: the descriptor is open, the path ends with its NUL, and the structure is ours to be filled.
    let result = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &raw mut stat)
    };
    let known = result == 0 && stat.stx_mask & libc::STATX_DIOALIGN != 0;
    known.then_some((stat.stx_dio_mem_align, stat.stx_dio_offset_align))
}

/// Reads with ever coarser alignment until the host accepts. Memory is taken to need what offsets need.
fn tried(file: &File) -> io::Result<Option<Alignment>> {
    let mut buffer = AlignedBuffer::default();
    for block in [512, 4096] {
        // Aligned to this and to nothing more.
        let memory = &mut buffer.get(3 * block, 2 * block)[block..2 * block];
        match file.read_at(memory, block as u64) {
            Ok(_) => return Ok(Some(Alignment { memory: block, block: block as u64 })),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// Whether reads of `file` can be asked not to wait (RWF_NOWAIT). Where they cannot, io_uring gives every transfer to a
/// thread of the kernel. Reads at most one page.
pub(crate) fn can_refuse_to_wait(file: &File) -> bool {
    let mut buffer = AlignedBuffer::default();
    let memory = buffer.get(4096, 4096);
    let target = iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: memory.len() };
    // SAFETY: one buffer, of that length and ours, which outlives the call.
    let result = unsafe { libc::preadv2(file.as_raw_fd(), &raw const target, 1, 0, libc::RWF_NOWAIT) };
    result >= 0 || io::Error::last_os_error().raw_os_error() == Some(libc::EAGAIN)
}

/// Memory at an aligned address. Grows to the largest that was asked for, and stays.
#[derive(Default)]
pub(crate) struct AlignedBuffer(Vec<u8>);

impl AlignedBuffer {
    /// `len` bytes at a multiple of `alignment`, a power of two. What they hold is not said.
    pub(crate) fn get(&mut self, len: usize, alignment: usize) -> &mut [u8] {
        let needed = len + alignment - 1;
        if self.0.len() < needed {
            self.0.resize(needed, 0);
        }
        let start = self.0.as_ptr().align_offset(alignment);
        &mut self.0[start..start + len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::OpenOptionsExt;

    #[test]
    fn what_fits() {
        let alignment = Alignment { memory: 4, block: 512 };
        let buffer = |base: usize, len| iovec { iov_base: std::ptr::without_provenance_mut(base), iov_len: len };
        assert!(alignment.fits(&[buffer(4, 512), buffer(4096, 1024)], 1536));
        assert!(!alignment.fits(&[buffer(4, 512)], 1537));
        assert!(!alignment.fits(&[buffer(4, 512), buffer(6, 512)], 0));
        assert!(!alignment.fits(&[buffer(4, 256), buffer(512, 256)], 0));
        assert!(Alignment::NONE.fits(&[buffer(3, 7)], 5));
    }

    #[test]
    fn buffers_are_aligned() {
        let mut buffer = AlignedBuffer::default();
        for (len, alignment) in [(512, 512), (1 << 20, 4096), (1, 65536), (4096, 1)] {
            let memory = buffer.get(len, alignment);
            assert_eq!((memory.len(), memory.as_ptr().addr() % alignment), (len, 0));
        }
    }

    #[test]
    fn not_every_filesystem_can_refuse_to_wait() {
        // Files that a program makes up cannot, on every Linux.
        assert!(!can_refuse_to_wait(&File::open("/proc/self/comm").unwrap()));
        assert!(!can_refuse_to_wait(&File::open("/").unwrap()));
    }

    /// What is told and what is tried agree so far that a transfer which keeps to either is accepted.
    #[test]
    fn transfers_that_keep_to_it_are_accepted() {
        let path = tempfile::NamedTempFile::new_in(".").unwrap().into_temp_path();
        std::fs::write(&path, vec![1; 1 << 17]).unwrap();
        let file = File::options().read(true).custom_flags(libc::O_DIRECT).open(&path).unwrap();
        for found in [alignment(&file).unwrap(), tried(&file).unwrap()] {
            let Alignment { memory, block } = found.unwrap();
            let mut buffer = AlignedBuffer::default();
            let target = &mut buffer.get(block as usize + memory, 2 * memory)[memory..];
            assert_eq!(file.read_at(target, block).unwrap() as u64, block);
        }
    }
}
