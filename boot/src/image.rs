//! Tells kernel images apart by their first bytes and loads what they are. Called by the main thread while the machine
//! is built.

use std::fs::File;

use vm_memory::GuestMemoryMmap;

use crate::bytes::{read_head, u32_at};
use crate::elf::{self, Elf};
use crate::kernel::Kernel;
use crate::{BootError, Entered, Protocol, Request, bzimage};

/// Bytes looked at before the kind of an image is known. An ELF image keeps its program headers in them.
const HEAD: usize = 0x10000;

/// Loads the image by the protocol asked for.
pub(crate) fn load(memory: &GuestMemoryMmap, request: &Request) -> Result<Kernel, BootError> {
    let file = request.kernel;
    let (head, len) = open(file)?;
    if head.starts_with(&elf::MAGIC) {
        return load_elf(memory, file, &head, len, request.protocol);
    }
    if !bzimage::is_one(&head) {
        return Err(BootError::NotAKernel { looks_like: looks_like(&head) });
    }
    let image = bzimage::parse(&head, len)?;
    match request.protocol {
        Protocol::Pvh => Err(BootError::PvhNeedsElf),
        Protocol::Auto | Protocol::Linux => image.load(memory, file),
    }
}

/// The first bytes of a kernel file and its length.
fn open(file: &File) -> Result<(Vec<u8>, u64), BootError> {
    let metadata = file.metadata().map_err(BootError::ReadKernel)?;
    if !metadata.is_file() {
        return Err(BootError::KernelNotAFile);
    }
    if metadata.len() == 0 {
        return Err(BootError::EmptyKernel);
    }
    Ok((read_head(file, HEAD).map_err(BootError::ReadKernel)?, metadata.len()))
}

fn load_elf(
    memory: &GuestMemoryMmap,
    file: &File,
    head: &[u8],
    len: u64,
    protocol: Protocol,
) -> Result<Kernel, BootError> {
    let mut elf = Elf::parse(head, len)?;
    elf.find_pvh_entry(file)?;
    let entered = match protocol {
        Protocol::Pvh => Entered::Pvh,
        Protocol::Auto if elf.pvh_entry.is_some() => Entered::Pvh,
        Protocol::Linux | Protocol::Auto => Entered::Linux,
    };
    let entry = match entered {
        Entered::Linux => elf.entry,
        Entered::Pvh => u64::from(elf.pvh_entry.ok_or(BootError::NoPvhNote)?),
    };
    if !elf.contains(entry) {
        return Err(BootError::Damaged { kind: "ELF kernel", what: "its entry address is in no segment" });
    }
    elf.load(memory, file)?;
    let header = bzimage::header_for_elf();
    Ok(Kernel {
        entered,
        entry,
        start: elf.start(),
        end: elf.end(),
        header,
        cmdline_max: header.cmdline_size as usize,
        initrd_max: u64::from(header.initrd_addr_max),
    })
}

/// Signatures at the start of files that people give by mistake, most specific first.
const SIGNATURES: &[(usize, &[u8], &str)] = &[
    (0x38, b"ARM\x64", "a Linux kernel for arm64"),
    (0x30, b"RISCV", "a Linux kernel for RISC-V"),
    (0, b"\x1f\x8b", "a gzip file (an initrd or a compressed kernel)"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file (an initrd or a compressed kernel)"),
    (0, b"\xfd7zXZ\0", "an xz file (an initrd or a compressed kernel)"),
    (0, b"\x02\x21\x4c\x18", "an LZ4 file (an initrd or a compressed kernel)"),
    (0, b"\x04\x22\x4d\x18", "an LZ4 file (an initrd or a compressed kernel)"),
    (0, b"BZh", "a bzip2 file"),
    (0, b"070701", "a cpio archive (an initrd)"),
    (0, b"070702", "a cpio archive (an initrd)"),
    (0, b"!<arch>\n", "a package or static library"),
    (0, b"PK\x03\x04", "a zip file"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (0, b"KDMV", "a VMDK disk image"),
    (0, b"hsqs", "a squashfs image"),
    (0, b"\x27\x05\x19\x56", "a U-Boot image"),
    (0, b"\xd0\x0d\xfe\xed", "a device tree or FIT image"),
    (0x8001, b"CD001", "a CD image"),
    (0x438, b"\x53\xef", "an ext4 file system"),
    (0x200, b"EFI PART", "a disk image with a partition table"),
    (0, b"MZ", "an EFI or Windows program"),
    (0x1fe, b"\x55\xaa", "a boot sector or disk image"),
    (0, b"#!", "a script"),
];

/// What a file that is no kernel could be, with an article.
fn looks_like(head: &[u8]) -> &'static str {
    for (offset, signature, name) in SIGNATURES {
        if head.get(*offset..).is_some_and(|rest| rest.starts_with(signature)) {
            return name;
        }
    }
    let sample = &head[..head.len().min(512)];
    if sample.iter().all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace() || *byte >= 0x80) {
        "a text file"
    } else if u32_at(head, 0) == 0 && sample.iter().all(|byte| *byte == 0) {
        "a file of zeros (an empty disk image)"
    } else {
        "data of an unknown kind"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Subject;
    use crate::synthetic::{self, bzimage, elf, map, memory, put, request};

    fn error_of(kernel: &File) -> String {
        let error = crate::load(&memory(16), &request(kernel, &map(16))).unwrap_err();
        assert_eq!(error.subject(), Subject::Kernel);
        let message = error.to_string();
        assert!(!message.contains('\n'), "{message}");
        message
    }

    #[test]
    fn files_that_are_no_kernel_are_named() {
        assert!(error_of(&synthetic::file(b"")).starts_with("the file is empty"));
        assert!(error_of(&File::open("/").unwrap()).starts_with("not a regular file"));
        let mut disk = vec![0; 1024];
        put(&mut disk, 510, &[0x55, 0xaa]);
        let samples: [(&[u8], &str); 8] = [
            (b"Dear kernel,\nplease boot.\n", "a text file"),
            ("gr\u{fc}\u{df}e".as_bytes(), "a text file"),
            (b"#!/bin/sh\n", "a script"),
            (b"070701000", "a cpio archive"),
            (b"\x1f\x8b\x08\0", "a gzip file"),
            (&disk, "a boot sector or disk image"),
            (&[0; 4096], "a file of zeros"),
            (b"\x01\x02\x03", "data of an unknown kind"),
        ];
        for (bytes, name) in samples {
            let message = error_of(&synthetic::file(bytes));
            assert!(message.starts_with(&format!("not a kernel: it looks like {name}")), "{message}");
        }
        let mut arm = b"MZ".to_vec();
        arm.resize(0x40, 0);
        put(&mut arm, 0x38, b"ARM\x64");
        assert!(error_of(&synthetic::file(&arm)).contains("a Linux kernel for arm64"));
    }

    #[test]
    fn an_entry_outside_the_kernel_is_an_error() {
        let image = elf(0x30_0000, &[synthetic::Part(synthetic::LOAD, &[0; 16], 0x10_0000, 16)]);
        assert!(error_of(&synthetic::file(&image)).contains("its entry address is in no segment"));
    }

    #[test]
    fn signatures_are_not_taken_for_kernels() {
        let mut image = bzimage(&[0x90; 0x1000]);
        put(&mut image, 0x202, b"hdrs");
        put(&mut image, 0, b"MZ");
        assert!(error_of(&synthetic::file(&image)).contains("an EFI or Windows program"));
    }
}
