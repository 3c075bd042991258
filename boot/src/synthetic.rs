//! Small images made byte by byte from the specifications, for the tests of this crate. The offsets are written here
//! again on purpose: the code under test takes them from elsewhere.

use std::fs::File;
use std::io::Write;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::{Protocol, Request, e820};

/// A file with these bytes.
pub(crate) fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// RAM from 0 up.
pub(crate) fn memory(mib: u64) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), (mib << 20) as usize)]).unwrap()
}

/// RAM from 0 up, filled: as it is when another kernel ran in it before.
pub(crate) fn dirty_memory(mib: u64) -> GuestMemoryMmap {
    let memory = memory(mib);
    memory.write_slice(&vec![0xa5; (mib << 20) as usize], GuestAddress(0)).unwrap();
    memory
}

/// The map of [`memory`] with the firmware area taken out.
pub(crate) fn map(mib: u64) -> Vec<e820::Entry> {
    e820::map(std::slice::from_ref(&(0..mib << 20)), std::slice::from_ref(&(0x9_fc00..0x10_0000)))
}

/// A request without initrd and command line.
pub(crate) fn request<'a>(kernel: &'a File, e820: &'a [e820::Entry]) -> Request<'a> {
    Request { kernel, initrd: None, cmdline: "", protocol: Protocol::Auto, e820, rsdp: 0xe_0000 }
}

/// `len` bytes of guest memory.
pub(crate) fn read(memory: &GuestMemoryMmap, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

/// Overwrites bytes of an image.
pub(crate) fn put(image: &mut [u8], offset: usize, bytes: &[u8]) {
    image[offset..offset + bytes.len()].copy_from_slice(bytes);
}

/// Bytes in front of the protected-mode kernel of [`bzimage`].
pub(crate) const SETUP_LEN: usize = 1024;
/// `pref_address` of [`bzimage`].
pub(crate) const PREFERRED: u64 = 0x40_0000;
/// `init_size` of [`bzimage`].
pub(crate) const INIT_SIZE: u64 = 0x20_0000;

/// A bzImage of protocol 2.15 around a protected-mode kernel, padded to 16 bytes (Linux: Documentation/arch/x86/boot.rst).
pub(crate) fn bzimage(kernel: &[u8]) -> Vec<u8> {
    let mut image = vec![0; SETUP_LEN];
    image.extend(kernel);
    image.resize(SETUP_LEN + kernel.len().next_multiple_of(16), 0);
    put(&mut image, 0x1f1, &[(SETUP_LEN / 512 - 1) as u8]);
    put(&mut image, 0x1f4, &(kernel.len().div_ceil(16) as u32).to_le_bytes());
    put(&mut image, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(&mut image, 0x202, b"HdrS\x0f\x02");
    put(&mut image, 0x211, &[1]);
    put(&mut image, 0x214, &0x10_0000u32.to_le_bytes());
    put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut image, 0x230, &0x20_0000u32.to_le_bytes());
    put(&mut image, 0x234, &[1, 21]);
    put(&mut image, 0x236, &0x7fu16.to_le_bytes());
    put(&mut image, 0x238, &2047u32.to_le_bytes());
    put(&mut image, 0x258, &PREFERRED.to_le_bytes());
    put(&mut image, 0x260, &(INIT_SIZE as u32).to_le_bytes());
    image
}

/// A program header: type, bytes in the file, guest-physical address, bytes in memory.
pub(crate) struct Part<'a>(pub(crate) u32, pub(crate) &'a [u8], pub(crate) u64, pub(crate) u64);

/// PT_LOAD.
pub(crate) const LOAD: u32 = 1;
/// PT_NOTE.
pub(crate) const NOTE: u32 = 4;
/// File offset of the bytes of the first part of [`elf`]; those of each next part follow.
pub(crate) const ELF_DATA: usize = 0x1000;

/// An x86-64 executable (System V ABI, ELF-64).
pub(crate) fn elf(entry: u64, parts: &[Part]) -> Vec<u8> {
    let mut image = vec![0; ELF_DATA];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 16, &[2, 0, 62, 0, 1]);
    put(&mut image, 24, &entry.to_le_bytes());
    put(&mut image, 32, &64u64.to_le_bytes());
    put(&mut image, 52, &[64, 0, 56, 0, parts.len() as u8, 0]);
    for (index, Part(kind, bytes, address, memory_len)) in parts.iter().enumerate() {
        let at = 64 + index * 56;
        let offset = image.len() as u64;
        put(&mut image, at, &kind.to_le_bytes());
        for (field, value) in [(8, offset), (16, *address), (24, *address), (32, bytes.len() as u64), (40, *memory_len)]
        {
            put(&mut image, at + field, &value.to_le_bytes());
        }
        image.extend(*bytes);
    }
    image
}

/// One ELF note, padded.
pub(crate) fn note(name: &[u8], kind: u32, descriptor: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [name.len() as u32, descriptor.len() as u32, kind] {
        note.extend(word.to_le_bytes());
    }
    for field in [name, descriptor] {
        note.extend(field);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

/// The notes of a kernel with this PVH entry, others around it.
pub(crate) fn pvh_notes(entry: u64) -> Vec<u8> {
    let gnu = note(b"GNU\0", 3, &[7; 20]);
    let xen_version = note(b"Xen\0", 5, b"xen-3.0\0");
    let not_xen = note(b"Linux\0", 18, &[1; 8]);
    [gnu, xen_version, not_xen, note(b"Xen\0", 18, &entry.to_le_bytes()), note(b"Linux\0", 257, &[0; 4])].concat()
}
