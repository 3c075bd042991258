//! What a disk's image holds, as far as its bytes and debugfs(8) tell. Nothing is written to it.

use std::fmt;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{anyhow, bail};

use crate::smoke::partitions::{Layout, head, is_ext};

/// What was found on a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Image {
    /// The number of the partition with the root filesystem; `None`: it is the whole disk.
    pub(super) partition: Option<u32>,
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
    let layout = Layout::of(&file);
    let largest = layout.partitions.iter().filter(|it| it.filesystem.is_some_and(|name| name != "swap"));
    let largest = largest.max_by_key(|it| it.size).and_then(|it| Some((Some(it.number), it.begin, it.filesystem?)));
    let found = layout.whole.map(|name| (None, 0, name)).or(largest);
    let (mut inside, mut no_debugfs) = (None, false);
    if let Some((_, offset, name)) = found
        && is_ext(name)
    {
        match look_inside(path, offset) {
            Ok(seen) => inside = seen,
            Err(()) => no_debugfs = true,
        }
    }
    let (partition, filesystem) = found.map_or((None, None), |(partition, _, name)| (partition, Some(name)));
    Ok(Image { partition, filesystem, inside, no_debugfs })
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

    /// Whether e2fsck can check its root filesystem.
    pub(super) fn is_ext(&self) -> bool {
        self.filesystem.is_some_and(is_ext)
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
