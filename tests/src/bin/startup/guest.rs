//! The two guests: a few instructions in an ELF image with a PVH note, and the stock kernel with an initrd whose init
//! does nothing but print. Both images are written here, byte by byte, so that nothing but the kernel is needed.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

/// Which guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// A byte to COM1, then HLT.
    Bare,
    /// A stock kernel and an init that prints.
    Linux,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Bare => "bare",
            Self::Linux => "linux",
        })
    }
}

/// A guest on disk.
pub(crate) struct Guest {
    pub(crate) kind: Kind,
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: Option<PathBuf>,
    pub(crate) cmdline: &'static str,
    /// What it writes to COM1 when it has come as far as we measure.
    pub(crate) marker: &'static [u8],
}

impl Guest {
    pub(crate) fn bare(folder: &Path) -> anyhow::Result<Self> {
        let kernel = folder.join("bare.elf");
        fs::write(&kernel, bare_kernel()).context("the bare guest")?;
        Ok(Self { kind: Kind::Bare, kernel, initrd: None, cmdline: "", marker: b"!" })
    }

    pub(crate) fn linux(folder: &Path, kernel: &Path) -> anyhow::Result<Self> {
        // A copy: the file cache of a shared file system is not what we measure.
        let copy = folder.join("vmlinuz");
        fs::copy(kernel, &copy)
            .with_context(|| format!("{}: run resources/rootfs/build, or name one with --kernel", kernel.display()))?;
        let initrd = folder.join("initrd.img");
        fs::write(&initrd, archive(&[Entry { name: "init", mode: 0o100_755, data: &init() }])).context("the initrd")?;
        Ok(Self {
            kind: Kind::Linux,
            kernel: copy,
            initrd: Some(initrd),
            cmdline: "console=ttyS0 quiet panic=-1",
            marker: INIT_MARKER,
        })
    }
}

const INIT_MARKER: &[u8] = b"@init";

/// An ELF header, its program headers and `code`, all in one segment at `base` with the file's bytes as they are.
/// `note` is the offset and length of a PT_NOTE segment.
fn elf(base: u64, entry: u64, len: u64, note: Option<(u64, u64)>) -> Vec<u8> {
    const EXECUTABLE: u16 = 2;
    const X86_64: u16 = 62;
    const LOAD: u32 = 1;
    const NOTE: u32 = 4;
    const READ_EXECUTE: u32 = 5;
    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let headers = 1 + u16::from(note.is_some());
    image.extend([EXECUTABLE, X86_64].iter().flat_map(|field| field.to_le_bytes()));
    image.extend(1u32.to_le_bytes());
    image.extend([entry, 64, 0].iter().flat_map(|field| field.to_le_bytes()));
    image.extend(0u32.to_le_bytes());
    image.extend([64, 56, headers, 0, 0, 0].iter().flat_map(|field| field.to_le_bytes()));
    let mut segment = |kind: u32, offset: u64, len: u64, align: u64| {
        image.extend([kind, READ_EXECUTE].iter().flat_map(|field| field.to_le_bytes()));
        let fields = [offset, base + offset, base + offset, len, len, align];
        image.extend(fields.iter().flat_map(|field| field.to_le_bytes()));
    };
    segment(LOAD, 0, len, 4096);
    if let Some((offset, len)) = note {
        segment(NOTE, offset, len, 4);
    }
    image
}

/// Writes '!' to COM1 with its first instructions, then halts for good.
fn bare_kernel() -> Vec<u8> {
    const BASE: u64 = 0x10_0000;
    const NOTE_AT: u64 = 64 + 2 * 56;
    const NOTE_LEN: u64 = 24;
    const CODE: [u8; 11] = [
        0xba, 0xf8, 0x03, 0x00, 0x00, // mov $0x3f8, %edx
        0xb0, b'!', // mov $'!', %al
        0xee, // out %al, %dx
        0xf4, // hlt
        0xeb, 0xfd, // jmp to the hlt
    ];
    let entry = BASE + NOTE_AT + NOTE_LEN;
    let mut image = elf(BASE, entry, NOTE_AT + NOTE_LEN + CODE.len() as u64, Some((NOTE_AT, NOTE_LEN)));
    // XEN_ELFNOTE_PHYS32_ENTRY: lengths of name and value, type 18, name, value.
    image.extend([4u32, 8, 18].iter().flat_map(|field| field.to_le_bytes()));
    image.extend(b"Xen\0");
    image.extend(entry.to_le_bytes());
    image.extend(CODE);
    image
}

/// A static program: write(1, marker), then pause() for ever.
fn init() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const CODE_AT: u64 = 64 + 56;
    let mut code = vec![
        0xb8, 0x01, 0x00, 0x00, 0x00, // mov $1 (write), %eax
        0xbf, 0x01, 0x00, 0x00, 0x00, // mov $1, %edi
        0x48, 0x8d, 0x35, 0x10, 0x00, 0x00, 0x00, // lea 16(%rip), %rsi: behind the last instruction
        0xba, 0x06, 0x00, 0x00, 0x00, // mov $6, %edx
        0x0f, 0x05, // syscall
        0xb8, 0x22, 0x00, 0x00, 0x00, // mov $34 (pause), %eax
        0x0f, 0x05, // syscall
        0xeb, 0xf7, // jmp to the mov of pause
    ];
    code.extend(INIT_MARKER);
    code.push(b'\n');
    let mut image = elf(BASE, BASE + CODE_AT, CODE_AT + code.len() as u64, None);
    image.extend(code);
    image
}

struct Entry<'a> {
    name: &'a str,
    mode: u32,
    data: &'a [u8],
}

/// A cpio archive in the "newc" format of the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
fn archive(entries: &[Entry]) -> Vec<u8> {
    let trailer = Entry { name: "TRAILER!!!", mode: 0, data: &[] };
    let mut archive = Vec::new();
    for (number, entry) in entries.iter().chain([&trailer]).enumerate() {
        let (size, name_size) = (entry.data.len() as u32, entry.name.len() as u32 + 1);
        let fields = [number as u32 + 1, entry.mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        archive.extend(b"070701");
        archive.extend(fields.iter().flat_map(|field| format!("{field:08x}").into_bytes()));
        archive.extend(entry.name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(entry.data);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}
