#![expect(unsafe_code, reason = "the ioctls of block devices")]
//! How the host keeps the blocks of an image: what is worth writing at once, and what can be given back. Found out once,
//! when a disk is opened.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};

use crate::SECTOR_SIZE;

/// `_IO(0x12, 119)` and `_IO(0x12, 122)` of Linux's `uapi/linux/fs.h`.
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKALIGNOFF: libc::c_ulong = 0x127a;

/// The largest block of a file that a guest is told of, in bytes. Network filesystems say how much they like to transfer.
const LARGEST_BLOCK: u64 = 4096;

/// The blocks below an image. All in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// What the host writes at once: a smaller write reads first. A power of two, at least 512.
    pub physical_block: u64,
    /// Where the first such block of the image begins: below `physical_block`.
    pub alignment_offset: u64,
    /// Transfers smaller than this are slow; a multiple of `physical_block`.
    pub min_io: u64,
    /// Transfers of this are fast; 0 if the host has no wish.
    pub opt_io: u64,
    /// What can be given back is a piece of this size at a multiple of it. A multiple of 512.
    pub discard: u64,
    /// The pieces that can be discarded or zeroed without transferring zeroes are multiples of this.
    pub(crate) unit: u64,
    /// It is a block device, not a file.
    pub(crate) device: bool,
}

impl Topology {
    /// Of the image `file`, in which transfers are multiples of `block`: more than 1 past the page cache.
    ///
    /// # Errors
    /// What the host says to the questions.
    pub(crate) fn of(file: &File, block: u64) -> io::Result<Self> {
        let metadata = file.metadata()?;
        if metadata.file_type().is_block_device() {
            return Ok(Self::of_device(file, &metadata));
        }
        // Parts of blocks are zeroed in the page cache, which is not for us then: what is there, and is not written in the end,
        // nobody would be told of.
        let unit = if block > 1 { whole_sectors(metadata.blksize()).max(block) } else { 1 };
        let block = whole_sectors(metadata.blksize()).clamp(block.max(SECTOR_SIZE), LARGEST_BLOCK.max(block));
        Ok(Self {
            physical_block: block,
            alignment_offset: 0,
            min_io: block,
            opt_io: 0,
            discard: block,
            unit,
            device: false,
        })
    }

    fn of_device(file: &File, metadata: &Metadata) -> Self {
        let ask = |request: libc::c_ulong| {
            let mut answer: u32 = 0;
            // SAFETY: each of these requests fills in 32 bits, and changes nothing else.
            let result = unsafe { ioctl_with_mut_ref(file, request, &mut answer) };
            // BLKALIGNOFF answers -1 where a device is on others that do not agree.
            (result == 0 && answer != 0 && answer != u32::MAX).then_some(u64::from(answer))
        };
        let logical = whole_sectors(ask(libc::BLKSSZGET as libc::c_ulong).unwrap_or(SECTOR_SIZE));
        let physical = whole_sectors(ask(libc::BLKPBSZGET as libc::c_ulong).unwrap_or(logical)).max(logical);
        let min_io = ask(libc::BLKIOMIN as libc::c_ulong).unwrap_or(physical).next_multiple_of(physical);
        let granularity = discard_granularity(metadata.rdev()).filter(|bytes| bytes.is_multiple_of(logical));
        Self {
            physical_block: physical,
            alignment_offset: ask(BLKALIGNOFF).unwrap_or(0) % physical,
            min_io,
            opt_io: ask(libc::BLKIOOPT as libc::c_ulong).unwrap_or(0),
            discard: granularity.unwrap_or(logical),
            unit: logical,
            device: true,
        }
    }
}

/// The power of two at least `bytes` and one sector.
fn whole_sectors(bytes: u64) -> u64 {
    bytes.clamp(SECTOR_SIZE, 1 << 30).next_power_of_two()
}

/// What sysfs says of a block device, or of the disk that a partition is on.
fn discard_granularity(device: u64) -> Option<u64> {
    let folder = format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device));
    let files = ["queue", "../queue"].map(|queue| format!("{folder}/{queue}/discard_granularity"));
    let text = files.iter().find_map(|file| fs::read_to_string(file).ok())?;
    text.trim().parse().ok().filter(|&bytes| bytes > 0)
}

/// Tells the block device `file` that nobody needs these bytes.
///
/// # Errors
/// What the host says.
pub(crate) fn discard_device(file: &File, start: u64, len: u64) -> io::Result<()> {
    // SAFETY: the request reads two numbers, start and length in bytes.
    let result = unsafe { ioctl_with_ref(file, BLKDISCARD, &[start, len]) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    use crate::engine::conformance::attach;
    use crate::lock::tests::FORKING;

    #[test]
    fn a_file_has_the_blocks_of_its_filesystem() {
        let file = tempfile::tempfile_in(".").unwrap();
        // st_blksize, by stat(1) rather than by us.
        let path = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&file));
        let stat = Command::new("stat").args(["-L", "-c", "%o", &path]).output().unwrap();
        let block: u64 = String::from_utf8(stat.stdout).unwrap().trim().parse().unwrap();
        assert!(block.is_power_of_two() && (512..=4096).contains(&block), "an unusual filesystem: {block}");
        let expected = Topology {
            physical_block: block,
            alignment_offset: 0,
            min_io: block,
            opt_io: 0,
            discard: block,
            unit: 1,
            device: false,
        };
        assert_eq!(Topology::of(&file, 1).unwrap(), expected);
        assert_eq!(Topology::of(&file, 16384).unwrap().physical_block, 16384, "O_DIRECT demands more");
    }

    /// The host's own tools are asked the same.
    #[test]
    fn a_block_device_says_what_it_likes() {
        let _alone = FORKING.lock();
        let image = tempfile::NamedTempFile::new_in(".").unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        for sector in [512, 4096] {
            let device = match attach(image.path(), sector) {
                Ok(device) => device,
                Err(why) => {
                    skip::because(why);
                    return;
                }
            };
            let topology = Topology::of(&File::open(&device).unwrap(), 1);
            let ask = |tool: &str, words: &[&str]| -> u64 {
                let output = Command::new(tool).args(words).arg(&device).output().unwrap();
                String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
            };
            let expected = Topology {
                physical_block: ask("blockdev", &["--getpbsz"]),
                alignment_offset: ask("blockdev", &["--getalignoff"]),
                min_io: ask("blockdev", &["--getiomin"]),
                opt_io: ask("blockdev", &["--getioopt"]),
                discard: ask("lsblk", &["--nodeps", "-bno", "DISC-GRAN"]),
                unit: ask("blockdev", &["--getss"]),
                device: true,
            };
            assert!(Command::new("losetup").arg("-d").arg(&device).status().unwrap().success());
            assert_eq!(topology.unwrap(), expected);
            assert_eq!(expected.unit, sector as u64);
        }
    }

    #[test]
    fn sizes_are_powers_of_two_and_whole_sectors() {
        for (bytes, size) in [(0, 512), (1, 512), (512, 512), (513, 1024), (4096, 4096), (u64::MAX, 1 << 30)] {
            assert_eq!(whole_sectors(bytes), size);
        }
    }
}
