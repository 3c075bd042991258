//! Where filesystems lie on a disk, as its partition table (MBR or GPT) and the first bytes of each filesystem say. A guest may
//! have written them: nothing is believed that does not lie on the disk. Only reads. Any thread.

use std::fmt;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

/// What guests have for a sector.
const SECTOR: u64 = 512;
/// Bytes of a filesystem that are looked at: that of btrfs names itself at 64 KiB.
const HEAD: usize = 0x10048;
/// Entries of a partition table that are looked at: as many as partitioning tools make.
pub(super) const MOST: u32 = 128;
/// Types of an MBR entry that holds further tables: CHS, LBA, Linux (UEFI 2.10, 5.2, leaves them to the systems).
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
/// Type of the MBR entry that stands before a GPT; a GPT without one is the rest of an older table (UEFI 2.10, 5.2.3).
const PROTECTIVE: u8 = 0xee;

/// What lies on a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// The filesystem that begins where the disk does. None if one is known in a partition: this is then the rest of what
    /// the disk was before its partition table.
    pub(super) whole: Option<&'static str>,
    /// Empty if there is no partition table.
    pub(super) partitions: Vec<Partition>,
}

/// A part of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Partition {
    /// As the kernel counts them, from 1: N of `/dev/vdaN`.
    pub(super) number: u32,
    /// Where it begins, and how long it is, in bytes.
    pub(super) begin: u64,
    pub(super) size: u64,
    /// Its name, if it is known.
    pub(super) filesystem: Option<&'static str>,
}

impl Layout {
    /// Looks at an image or a block device. What cannot be read counts as empty.
    pub(super) fn of(file: &File) -> Self {
        let head = head(file, 0);
        let mut partitions = if head.get(510..512) != Some(b"\x55\xaa") {
            Vec::new()
        } else if has_gpt(&head) {
            gpt(file, &head)
        } else {
            mbr(file, &head)
        };
        let mut disk = file;
        let size = disk.seek(SeekFrom::End(0)).unwrap_or(0);
        partitions.retain(|it| it.size > 0 && it.begin.checked_add(it.size).is_some_and(|end| end <= size));
        partitions.sort_by_key(|partition| partition.number);
        for partition in &mut partitions {
            partition.filesystem = filesystem(&self::head(file, partition.begin));
        }
        let whole = filesystem(&head).filter(|_| partitions.iter().all(|it| it.filesystem.is_none()));
        Self { whole, partitions }
    }

    /// Where the ext filesystem begins that is meant by `partition`: if none is named, the whole disk's, or the only one in a
    /// partition. It may be one that is not recognised.
    ///
    /// # Errors
    /// What is there instead, and what to write.
    pub(super) fn ext(&self, partition: Option<u32>) -> Result<u64, String> {
        let (begin, filesystem) = match partition {
            None if self.is_ambiguous() => {
                let number = self.ext_partitions().next().map_or(1, |it| it.number);
                return Err(format!(
                    "has an ext filesystem in several partitions ({self}); write partition = {number}"
                ));
            }
            None if self.whole.is_some() || self.partitions.is_empty() => (0, self.whole),
            None => match self.ext_partitions().next() {
                Some(only) => (only.begin, only.filesystem),
                None => return Err(format!("has no ext filesystem in its partitions ({self})")),
            },
            Some(number) => match self.partitions.iter().find(|it| it.number == number) {
                Some(named) => (named.begin, named.filesystem),
                None => return Err(format!("has no partition {number} ({self})")),
            },
        };
        match filesystem {
            Some(name) if !is_ext(name) => Err(format!("is {name}; only ext2, ext3 and ext4 can be looked into")),
            _ => Ok(begin),
        }
    }

    /// Whether it takes a number to say which ext filesystem is meant.
    pub(super) fn is_ambiguous(&self) -> bool {
        self.ext_partitions().count() > 1
    }

    fn ext_partitions(&self) -> impl Iterator<Item = &Partition> {
        self.partitions.iter().filter(|partition| partition.filesystem.is_some_and(is_ext))
    }
}

/// `1: ext4, 2: unknown`.
impl fmt::Display for Layout {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.partitions.is_empty() {
            return write!(out, "no partition table, {}", self.whole.unwrap_or("and no filesystem that is known"));
        }
        let name = |it: &Partition| format!("{}: {}", it.number, it.filesystem.unwrap_or("unknown"));
        out.write_str(&self.partitions.iter().map(name).collect::<Vec<_>>().join(", "))
    }
}

/// One that e2fsprogs knows.
pub(super) fn is_ext(filesystem: &str) -> bool {
    filesystem.starts_with("ext")
}

/// The first bytes at `at`: fewer if it ends there.
pub(super) fn head(file: &File, at: u64) -> Vec<u8> {
    let mut head = vec![0; HEAD];
    let length = read(file, &mut head, at).unwrap_or(0);
    head.truncate(length);
    head
}

/// As much as there is.
pub(super) fn read(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], at + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// The name of the filesystem that begins with `head`.
fn filesystem(head: &[u8]) -> Option<&'static str> {
    let at = |at: usize, magic: &[u8]| head.get(at..at + magic.len()) == Some(magic);
    if at(0x438, b"\x53\xef") {
        // The feature words of the superblock at 1024: compatible at 0x5c, incompatible at 0x60.
        let (journal, extents) = (head.get(0x45c)? & 4 != 0, head.get(0x460)? & 0x40 != 0);
        return Some(if extents {
            "ext4"
        } else if journal {
            "ext3"
        } else {
            "ext2"
        });
    }
    let others: [(usize, &[u8], &'static str); 6] = [
        (0, b"XFSB", "xfs"),
        (0x10040, b"_BHRfS_M", "btrfs"),
        (0, b"hsqs", "squashfs"),
        (1024, b"\xe2\xe1\xf5\xe0", "erofs"),
        (1024, b"\x10\x20\xf5\xf2", "f2fs"),
        (4086, b"SWAPSPACE2", "swap"),
    ];
    others.into_iter().find(|(offset, magic, _)| at(*offset, magic)).map(|found| found.2)
}

/// A partition of these sectors; one that cannot be is left without size.
fn partition(number: u32, first: u64, sectors: u64) -> Partition {
    let (begin, size) = (first.checked_mul(SECTOR), sectors.checked_mul(SECTOR));
    let (begin, size) = begin.zip(size).unwrap_or((0, 0));
    Partition { number, begin, size, filesystem: None }
}

/// The entry of an MBR at `at`: type, first sector, sectors.
fn mbr_entry(table: &[u8], at: usize) -> Option<(u8, u64, u64)> {
    let entry = table.get(446 + 16 * at..462 + 16 * at)?;
    Some((entry[4], little(&entry[8..12]), little(&entry[12..16])))
}

/// Primary partitions, and the logical ones in the first that is extended, from 5 on.
fn mbr(file: &File, head: &[u8]) -> Vec<Partition> {
    let (mut found, mut extended) = (Vec::new(), None);
    for (entry, number) in (0..4).filter_map(|at| mbr_entry(head, at)).zip(1..) {
        match entry {
            (0, ..) => {}
            (kind, first, _) if EXTENDED.contains(&kind) => _ = extended.get_or_insert(first),
            (_, first, sectors) => found.push(partition(number, first, sectors)),
        }
    }
    let Some(base) = extended else { return found };
    // A table for each: the partition, from that table on, and the next table, from the extended partition on. One whose
    // partition was removed has no number.
    let (mut table, mut number) = (base, 5);
    for _ in 5..MOST {
        let mut bytes = [0; SECTOR as usize];
        let is_read = table.checked_mul(SECTOR).is_some_and(|at| read(file, &mut bytes, at).is_ok());
        if !is_read || bytes[510..] != *b"\x55\xaa" {
            break;
        }
        if let Some((1.., first, sectors @ 1..)) = mbr_entry(&bytes, 0) {
            found.push(partition(number, table + first, sectors));
            number += 1;
        }
        match mbr_entry(&bytes, 1) {
            Some((kind, next @ 1.., _)) if EXTENDED.contains(&kind) => table = base + next,
            _ => break,
        }
    }
    found
}

/// Whether the first sectors say that there is a GPT.
fn has_gpt(head: &[u8]) -> bool {
    let is_protective = |at: usize| mbr_entry(head, at).is_some_and(|(kind, ..)| kind == PROTECTIVE);
    (0..4).any(is_protective) && head.get(SECTOR as usize..).is_some_and(|head| head.starts_with(b"EFI PART"))
}

/// The partitions of a GPT (UEFI 2.10, 5.3); `head` has its header in the second sector.
fn gpt(file: &File, head: &[u8]) -> Vec<Partition> {
    let field = |at: usize, bytes: usize| little(head.get(512 + at..512 + at + bytes).unwrap_or_default());
    let (table, count, size) = (field(72, 8), field(80, 4), field(84, 4) as usize);
    if !(128..=4096).contains(&size) {
        return Vec::new();
    }
    let mut entries = vec![0; size * count.min(u64::from(MOST)) as usize];
    let at = table.checked_mul(SECTOR).unwrap_or(u64::MAX / 2);
    let length = read(file, &mut entries, at).unwrap_or(0);
    let entries = entries[..length].chunks_exact(size).zip(1..);
    let used = entries.filter(|(entry, _)| entry[..16].iter().any(|byte| *byte != 0));
    used.map(|(entry, number)| {
        let (first, last) = (little(&entry[32..40]), little(&entry[40..48]));
        // The last sector belongs to it.
        partition(number, first, last.checked_sub(first).map_or(0, |rest| rest.saturating_add(1)))
    })
    .collect()
}

fn little(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests;
