#![expect(unsafe_code, reason = "fstatfs is only a raw call")]
//! The filesystem a file is on: its name, and what is known of its transfers. Plain values; looked at once, on the thread
//! that opens a disk.

use std::fs::File;
use std::mem;
use std::os::fd::AsRawFd;

/// What a filesystem is for transfers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nature {
    /// Blocks on a device of this host, each with its place: a transfer of allocated blocks is one of the device.
    Blocks,
    /// As `Blocks`, but a write goes to a new place.
    CopyOnWrite,
    /// In memory.
    Memory,
    /// Another machine, filesystem or program does the work, or it is not in our table.
    Other,
}

/// A filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filesystem {
    /// As mount(8) calls it.
    pub name: &'static str,
    /// What it is for transfers.
    pub nature: Nature,
}

/// `f_type` of statfs(2), the numbers of `linux/magic.h` and of filesystems outside of it.
const KNOWN: [(u32, &str, Nature); 22] = [
    (0xef53, "ext4", Nature::Blocks),
    (0x5846_5342, "xfs", Nature::Blocks),
    (0xf2f5_2010, "f2fs", Nature::Blocks),
    (0x3153_464a, "jfs", Nature::Blocks),
    (0x4d44, "vfat", Nature::Blocks),
    (0x2011_bab0, "exfat", Nature::Blocks),
    (0x7366_746e, "ntfs3", Nature::Blocks),
    (0x9123_683e, "btrfs", Nature::CopyOnWrite),
    (0xca45_1a4e, "bcachefs", Nature::CopyOnWrite),
    (0x2fc1_2fc1, "zfs", Nature::CopyOnWrite),
    (0x0102_1994, "tmpfs", Nature::Memory),
    (0x8584_58f6, "ramfs", Nature::Memory),
    (0x9584_58f6, "hugetlbfs", Nature::Memory),
    (0x6969, "nfs", Nature::Other),
    (0xff53_4d42, "cifs", Nature::Other),
    (0xfe53_4d42, "smb3", Nature::Other),
    (0x00c3_6400, "ceph", Nature::Other),
    (0x0102_1997, "9p", Nature::Other),
    (0x0116_1970, "gfs2", Nature::Other),
    (0x794c_7630, "overlayfs", Nature::Other),
    (0x6573_5546, "fuse", Nature::Other),
    (0xf15f, "ecryptfs", Nature::Other),
];

impl Filesystem {
    /// The usual one.
    pub const EXT4: Self = Self { name: "ext4", nature: Nature::Blocks };

    /// That of `file`.
    pub fn of(file: &File) -> Self {
        // SAFETY: the structure is plain numbers, for which zero is a value.
        let mut stat: libc::statfs = unsafe { mem::zeroed() };
        // SAFETY: the descriptor is open, and the structure is ours to be filled.
        let result = unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut stat) };
        if result == 0 { Self::numbered(stat.f_type.cast_unsigned() as u32) } else { Self::numbered(0) }
    }

    /// The one with this `f_type`.
    fn numbered(magic: u32) -> Self {
        let known = KNOWN.iter().find(|known| known.0 == magic);
        let (name, nature) = known.map_or(("an unknown filesystem", Nature::Other), |known| (known.1, known.2));
        Self { name, nature }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    use crate::lock::tests::FORKING;

    /// stat(1) knows the names too.
    #[test]
    fn named_as_others_name_it() {
        let _alone = FORKING.lock();
        for path in [".", "/dev/shm", "/proc", "/sys"] {
            let stat = Command::new("stat").args(["--file-system", "--format=%T", path]).output().unwrap();
            let theirs = String::from_utf8(stat.stdout).unwrap();
            let ours = Filesystem::of(&File::open(path).unwrap()).name;
            match theirs.trim() {
                "ext2/ext3" => assert_eq!(ours, "ext4"),
                "fuseblk" => assert_eq!(ours, "fuse"),
                "proc" | "sysfs" => assert_eq!(ours, "an unknown filesystem"),
                theirs => assert_eq!(ours, theirs, "{path}"),
            }
        }
    }

    #[test]
    fn no_number_twice() {
        for (at, known) in KNOWN.iter().enumerate() {
            assert!(KNOWN[..at].iter().all(|other| other.0 != known.0 && other.1 != known.1), "{known:?}");
        }
    }
}
