#![expect(unsafe_code, reason = "SEEK_HOLE and FIEMAP are only raw calls")]
//! Which parts of a regular file have blocks of their own: what a write must still allocate. Looked at once, on the thread
//! that opens a disk; nothing is written, not even by having the filesystem write back.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_mut_ref};

/// The blocks of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocks {
    /// Every byte has its block, and was written.
    Written,
    /// Every byte has its block, but not all were written (fallocate(2)).
    Reserved,
    /// Blocks are shared with a copy of the file (a reflink): the first write to each needs a new one.
    Shared,
    /// There are holes, or compression: `allocated` bytes have blocks.
    Sparse {
        /// In bytes, less than the size.
        allocated: u64,
    },
}

impl Blocks {
    /// Those of `file`, of `size` bytes.
    pub(crate) fn of(file: &File, size: u64) -> Self {
        // st_blocks counts units of 512 bytes, whatever the filesystem's blocks are (stat(3type)).
        let allocated = file.metadata().map_or(0, |stat| stat.blocks() * 512);
        if allocated < size {
            Self::Sparse { allocated }
        } else if has_shared_extent(file) {
            Self::Shared
        } else if first_hole(file).is_some_and(|hole| hole < size) {
            // Blocks without data read as a hole.
            Self::Reserved
        } else {
            Self::Written
        }
    }

    /// Whether a write finds a block that is there and is its own.
    pub fn are_complete(self) -> bool {
        matches!(self, Self::Written | Self::Reserved)
    }
}

/// Where the first hole begins; the end of the file if there is none.
fn first_hole(file: &File) -> Option<u64> {
    // SAFETY: it moves the position of the descriptor, which nobody uses.
    let hole = unsafe { libc::lseek(file.as_raw_fd(), 0, libc::SEEK_HOLE) };
    u64::try_from(hole).ok()
}

/// Extents that are looked at: a copy shares all or nothing, so the first ones tell.
const EXTENTS: usize = 64;

/// `struct fiemap` of `linux/fiemap.h`, with room for extents.
#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [Extent; EXTENTS],
}

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

/// FIEMAP_EXTENT_SHARED.
const SHARED: u32 = 0x2000;

/// FS_IOC_FIEMAP. The size in the number is that of the structure without extents.
const FS_IOC_FIEMAP: libc::c_ulong = ioctl_expr(_IOC_READ | _IOC_WRITE, b'f' as u32, 11, 32);

fn has_shared_extent(file: &File) -> bool {
    let mut map = Fiemap {
        start: 0,
        length: u64::MAX,
        flags: 0,
        mapped_extents: 0,
        extent_count: EXTENTS as u32,
        reserved: 0,
        extents: [Extent::default(); EXTENTS],
    };
    // SAFETY: the kernel fills in at most `extent_count` extents, for which there is room.
    let result = unsafe { ioctl_with_mut_ref(file, FS_IOC_FIEMAP, &mut map) };
    let found = if result == 0 { (map.mapped_extents as usize).min(EXTENTS) } else { 0 };
    map.extents[..found].iter().any(|extent| extent.flags & SHARED != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    use vmm_sys_util::fallocate::{FallocateMode, fallocate};

    const SIZE: u64 = 1 << 20;

    fn file() -> File {
        // Where the build is; a temporary directory may be in memory.
        tempfile::tempfile_in(".").unwrap()
    }

    #[test]
    fn written_reserved_and_sparse() {
        let (written, reserved, sparse) = (file(), file(), file());
        written.write_all_at(&vec![1; SIZE as usize], 0).unwrap();
        assert_eq!(Blocks::of(&written, SIZE), Blocks::Written);
        fallocate(&reserved, FallocateMode::ZeroRange, false, 0, SIZE).unwrap();
        assert_eq!(Blocks::of(&reserved, SIZE), Blocks::Reserved);
        sparse.set_len(SIZE).unwrap();
        assert_eq!(Blocks::of(&sparse, SIZE), Blocks::Sparse { allocated: 0 });
        sparse.write_all_at(&[1; 4096], 0).unwrap();
        assert_eq!(Blocks::of(&sparse, SIZE), Blocks::Sparse { allocated: 4096 });
    }

    /// What was written and not yet written back counts; what grows has holes as soon as it has grown.
    #[test]
    fn a_file_that_grows() {
        let growing = file();
        growing.write_all_at(&vec![1; 65536], 0).unwrap();
        assert!(Blocks::of(&growing, 65536).are_complete());
        growing.set_len(SIZE).unwrap();
        assert_eq!(Blocks::of(&growing, SIZE), Blocks::Sparse { allocated: 65536 });
    }

    #[test]
    fn the_number_of_the_call_is_that_of_the_headers() {
        assert_eq!((FS_IOC_FIEMAP, size_of::<Extent>()), (0xc020_660b, 56));
        assert_eq!(std::mem::offset_of!(Fiemap, extents), 32);
    }
}
