//! What a disk's image holds, as far as its bytes and debugfs(8) tell. Nothing is written to it.

use std::fmt;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{anyhow, bail};

use super::read;

const SECTOR: u64 = 512;
/// Bytes of a filesystem that are looked at: that of btrfs names itself at 64 KiB.
const HEAD: usize = 0x10048;
/// Entries of a partition table that are looked at.
const PARTITIONS: usize = 128;

/// What was found on a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Image {
    /// The number of the partition with the root filesystem; `None`: it is the whole disk.
    pub(super) partition: Option<usize>,
    /// Its name, if it is known.
    pub(super) filesystem: Option<&'static str>,
    /// `None` if nobody looked.
    pub(super) inside: Option<Inside>,
    /// debugfs could look inside and is not there.
    no_debugfs: bool,
}

/// What a root filesystem holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Inside {
    /// PRETTY_NAME of os-release(5).
    pub(super) system: Option<String>,
    pub(super) systemd: bool,
    pub(super) login: Login,
}

/// How to log in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Login {
    RootWithoutPassword,
    Unknown,
}

/// Begins of files that are no raw image, and what to do about them.
const NOT_RAW: [(&[u8], &str, &str); 8] = [
    (b"QFI\xfb", "a qcow2 image", CONVERT),
    (b"KDMV", "a VMDK image", CONVERT),
    (b"vhdxfile", "a VHDX image", CONVERT),
    (b"\x1f\x8b", "compressed", "unpack it with gunzip"),
    (b"\xfd7zXZ\0", "compressed", "unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed", "unpack it with unzstd"),
    (b"0707", "a cpio archive", "give it as --initrd"),
    (b"\x7fELF", "a program", "name the root filesystem's image"),
];
const CONVERT: &str = "convert it with \"qemu-img convert -O raw\"";

/// Looks at `path`.
///
/// # Errors
/// When it cannot be read, or is no raw image of a disk; with the remedy.
pub(super) fn look(path: &Path) -> anyhow::Result<Image> {
    let shown = path.display();
    let file = File::open(path).map_err(|error| anyhow!("{shown}: {error}; name a file that can be read"))?;
    let is_disk = file.metadata().is_ok_and(|metadata| metadata.is_file() || metadata.file_type().is_block_device());
    let head = head(&file, 0);
    if !is_disk || head.is_empty() {
        bail!("{shown}: neither an image with something in it nor a block device; name one");
    }
    if let Some((_, what, remedy)) = NOT_RAW.iter().find(|(magic, ..)| head.starts_with(magic)) {
        bail!("{shown}: this is {what}; {remedy}");
    }
    let whole = filesystem(&head).map(|name| (None, 0, name));
    let found = whole.or_else(|| partitions(&file, &head));
    let (mut inside, mut no_debugfs) = (None, false);
    if let Some((_, offset, name)) = found
        && name.starts_with("ext")
    {
        match look_inside(path, offset) {
            Ok(seen) => inside = seen,
            Err(()) => no_debugfs = true,
        }
    }
    let (partition, filesystem) = found.map_or((None, None), |(partition, _, name)| (partition, Some(name)));
    Ok(Image { partition, filesystem, inside, no_debugfs })
}

fn head(file: &File, at: u64) -> Vec<u8> {
    let mut head = vec![0; HEAD];
    let length = read(file, &mut head, at).unwrap_or(0);
    head.truncate(length);
    head
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
    let others: [(usize, &[u8], &'static str); 5] = [
        (0, b"XFSB", "xfs"),
        (0x10040, b"_BHRfS_M", "btrfs"),
        (0, b"hsqs", "squashfs"),
        (1024, b"\xe2\xe1\xf5\xe0", "erofs"),
        (1024, b"\x10\x20\xf5\xf2", "f2fs"),
    ];
    others.into_iter().find(|(offset, magic, _)| at(*offset, magic)).map(|found| found.2)
}

/// The largest partition with a filesystem that is known: its number, where it begins, and the filesystem.
fn partitions(file: &File, head: &[u8]) -> Option<(Option<usize>, u64, &'static str)> {
    if head.get(510..512)? != b"\x55\xaa" {
        return None;
    }
    let all = if head.get(512..520)? == b"EFI PART" { gpt(file, head) } else { mbr(head) };
    let known = all.into_iter().filter_map(|(number, start, sectors)| {
        let offset = start.checked_mul(SECTOR)?;
        Some((sectors, (Some(number), offset, filesystem(&self::head(file, offset))?)))
    });
    known.max_by_key(|(sectors, _)| *sectors).map(|(_, found)| found)
}

/// Number, first sector and sectors of each primary partition.
fn mbr(head: &[u8]) -> Vec<(usize, u64, u64)> {
    let entries = head[446..510].chunks(16).zip(1..);
    let used = entries.filter(|(entry, _)| entry[4] != 0);
    used.map(|(entry, number)| (number, little(&entry[8..12]), little(&entry[12..16]))).collect()
}

/// The same of a GPT (UEFI 2.10, 5.3).
fn gpt(file: &File, head: &[u8]) -> Vec<(usize, u64, u64)> {
    let field = |at: usize, bytes: usize| little(&head[512 + at..512 + at + bytes]);
    let (table, count, size) = (field(72, 8), field(80, 4), field(84, 4) as usize);
    if !(128..=4096).contains(&size) {
        return Vec::new();
    }
    let mut entries = vec![0; size * PARTITIONS.min(count as usize)];
    let length = read(file, &mut entries, table.saturating_mul(SECTOR)).unwrap_or(0);
    let entries = entries[..length].chunks_exact(size).zip(1..);
    let used = entries.filter(|(entry, _)| entry[..16].iter().any(|byte| *byte != 0));
    used.map(|(entry, number)| {
        let (first, last) = (little(&entry[32..40]), little(&entry[40..48]));
        (number, first, last.saturating_sub(first))
    })
    .collect()
}

fn little(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Looks into the ext filesystem that begins at `offset`. `Err` if there is no debugfs.
fn look_inside(path: &Path, offset: u64) -> Result<Option<Inside>, ()> {
    // e2fsprogs takes what follows a question mark as options of the file.
    let Some(name) = path.to_str().filter(|name| !name.contains('?')) else { return Ok(None) };
    // Else a name could be an option.
    let name = if name.starts_with('-') { format!("./{name}") } else { name.to_owned() };
    let image = if offset == 0 { name } else { format!("{name}?offset={offset}") };
    let ask = |request: &str| -> Result<String, ()> {
        for debugfs in ["debugfs", "/usr/sbin/debugfs", "/sbin/debugfs"] {
            let mut command = Command::new(debugfs);
            command.args(["-R", request, &image]).env("LC_ALL", "C").stdin(Stdio::null()).stderr(Stdio::null());
            match command.output() {
                Ok(output) => return Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(_) => break,
            }
        }
        Err(())
    };
    let mut system = None;
    // debugfs does not follow the link that the first usually is.
    for file in ["/etc/os-release", "/usr/lib/os-release"] {
        let text = ask(&format!("cat {file}"))?;
        system = system.or_else(|| text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME=")).map(plain));
    }
    let is_there = |file: &str| Ok(ask(&format!("stat {file}"))?.contains("Inode: "));
    let systemd = is_there("/usr/lib/systemd/systemd")? || is_there("/lib/systemd/systemd")?;
    let (shadow, users) = (ask("cat /etc/shadow")?, ask("cat /etc/passwd")?);
    // shadow(5), passwd(5): an empty second field asks for no password.
    let open = shadow.lines().chain(users.lines()).any(|line| line.starts_with("root::"));
    let login = if open { Login::RootWithoutPassword } else { Login::Unknown };
    let seen = system.is_some() || systemd || !users.is_empty();
    Ok(seen.then_some(Inside { system, systemd, login }))
}

/// A name without its quotes, and fit for a comment.
fn plain(name: &str) -> String {
    name.trim_matches(['"', '\'']).chars().filter(|letter| !letter.is_control()).take(60).collect()
}

impl Image {
    /// What the kernel calls the device with the root filesystem.
    pub(super) fn root(&self) -> String {
        self.partition.map_or_else(|| "/dev/vda".to_owned(), |number| format!("/dev/vda{number}"))
    }

    /// Whether e2fsck can check the disk as it is.
    pub(super) fn is_whole_ext(&self) -> bool {
        self.partition.is_none() && self.filesystem.is_some_and(|name| name.starts_with("ext"))
    }
}

/// In one line, what it was taken for.
impl fmt::Display for Image {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(filesystem) = self.filesystem else {
            return out.write_str("no filesystem was recognised on the disk, so look at root=");
        };
        out.write_str(filesystem)?;
        if let Some(number) = self.partition {
            write!(out, " in partition {number}")?;
        }
        if self.no_debugfs {
            out.write_str(" (with debugfs of e2fsprogs installed, skiff would have looked inside)")?;
        }
        let Some(inside) = &self.inside else { return Ok(()) };
        if let Some(system) = &inside.system {
            write!(out, ", {system}")?;
        }
        if inside.systemd {
            out.write_str(", systemd")?;
        }
        match inside.login {
            Login::RootWithoutPassword => out.write_str(", root needs no password"),
            Login::Unknown => Ok(()),
        }
    }
}
