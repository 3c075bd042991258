//! The compressed vmlinux inside a bzImage, unpacked on the host: what the guest would otherwise spend its first
//! moments on. Called by the main thread while the machine is built; a few threads help it and are gone when it returns.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::bytes::u32_at;
use crate::bzimage::{self, BzImage};
use crate::{BootError, kernel};

/// How a payload is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// LZ4, legacy frame: blocks of 8 MiB, independent of each other.
    Lz4,
}

/// Magic numbers of payloads; those without a compression of ours are left to the guest.
const MAGICS: &[(&[u8], &str, Option<Compression>)] = &[
    (b"\x02\x21\x4c\x18", "LZ4", Some(Compression::Lz4)),
    (b"\x1f\x8b", "gzip", None),
    (b"\x28\xb5\x2f\xfd", "zstd", None),
    (b"\xfd7zXZ\0", "xz", None),
    (b"BZh", "bzip2", None),
    (b"\x5d\0\0", "LZMA", None),
    (b"\x89LZO", "LZO", None),
];

/// Bytes a block unpacks to, the last one excepted.
const LZ4_BLOCK: usize = 8 << 20;
/// Bytes a block can take packed: incompressible data grows by 1/255.
const LZ4_PACKED_MAX: usize = LZ4_BLOCK + LZ4_BLOCK / 255 + 16;

/// Decoding threads: a kernel has about seven blocks, and each thread takes up to 16 MiB while it works.
const THREADS_MAX: usize = 4;

/// The payload of a bzImage: where it is and what it is.
#[derive(Debug)]
pub struct Payload<'a> {
    file: &'a File,
    /// File offset behind the magic number.
    start: u64,
    /// File offset of the trailing length.
    end: u64,
    /// How it is compressed.
    pub compression: Compression,
    /// Bytes it unpacks to.
    pub unpacked_len: u64,
}

impl<'a> Payload<'a> {
    /// Finds the payload of a bzImage file.
    ///
    /// # Errors
    /// What [`crate::load`] says of a file that is not a whole bzImage of x86-64; [`BootError::Unpack`] if the
    /// compression is not one of [`Compression`].
    pub fn open(file: &'a File) -> Result<Self, BootError> {
        let (head, len) = kernel::open(file)?;
        kernel::check_bzimage(&head)?;
        Self::of(file, &bzimage::parse(&head, len)?)
    }

    /// Finds the payload of a bzImage whose header was read.
    pub(crate) fn of(file: &'a File, image: &BzImage) -> Result<Self, BootError> {
        let (offset, len) = (u64::from(image.header.payload_offset), u64::from(image.header.payload_length));
        // A magic number in front, the unpacked length (32 bits) behind.
        if len < 12 || offset + len > image.kernel_len {
            return Err(BootError::Damaged { kind: "bzImage", what: "its payload is not inside it" });
        }
        let start = image.setup_len + offset;
        let end = start + len - 4;
        let (mut magic, mut length) = ([0; 6], [0; 4]);
        file.read_exact_at(&mut magic, start).map_err(BootError::ReadKernel)?;
        file.read_exact_at(&mut length, end).map_err(BootError::ReadKernel)?;
        let found = MAGICS.iter().find(|(bytes, ..)| magic.starts_with(bytes));
        let (name, compression) = found.map_or(("unknown", None), |(_, name, compression)| (*name, *compression));
        let compression = compression.ok_or(BootError::Unpack { payload: name })?;
        let unpacked_len = u64::from(u32::from_le_bytes(length));
        // The guest unpacks in place, inside init_size.
        if unpacked_len > u64::from(image.header.init_size) {
            return Err(compression.corrupt("it would not fit init_size"));
        }
        Ok(Self { file, start: start + 4, end, compression, unpacked_len })
    }

    /// Unpacks the payload, an ELF image. Its first piece goes to `first`; what that returns goes to `rest` with every
    /// further piece and its offset in the image, from several threads at once and in no particular order. Pieces are
    /// 8 MiB long, but for the last one; together they are [`Payload::unpacked_len`] bytes without a gap.
    ///
    /// # Errors
    /// [`BootError::CorruptPayload`], [`BootError::ReadKernel`], and the first error of `first` or `rest`.
    pub fn unpack<T: Sync>(
        &self,
        first: impl FnOnce(&[u8]) -> Result<T, BootError>,
        rest: impl Fn(&T, u64, &[u8]) -> Result<(), BootError> + Sync,
    ) -> Result<T, BootError> {
        match self.compression {
            Compression::Lz4 => self.unpack_lz4(first, rest),
        }
    }

    fn unpack_lz4<T: Sync>(
        &self,
        first: impl FnOnce(&[u8]) -> Result<T, BootError>,
        rest: impl Fn(&T, u64, &[u8]) -> Result<(), BootError> + Sync,
    ) -> Result<T, BootError> {
        let blocks = self.lz4_blocks()?;
        let mut decoder = Lz4::default();
        let start = first(decoder.block(self, &blocks, 0)?)?;
        let next = AtomicUsize::new(1);
        let work = |mut decoder: Lz4| -> Result<(), BootError> {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= blocks.len() {
                    return Ok(());
                }
                rest(&start, (index * LZ4_BLOCK) as u64, decoder.block(self, &blocks, index)?)?;
            }
        };
        thread::scope(|scope| {
            let threads = thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX).min(blocks.len());
            // A thread that cannot be had leaves its share to the others, in the end to this one.
            let spawn =
                |_| thread::Builder::new().name("unpack".into()).spawn_scoped(scope, || work(Lz4::default())).ok();
            let others: Vec<_> = (1..threads).filter_map(spawn).collect();
            let own = work(decoder);
            others.into_iter().map(|it| it.join().expect("a decoder does not panic")).fold(own, Result::and)
        })?;
        Ok(start)
    }

    /// Where the blocks are in the file. As many as the unpacked length makes, which bounds them.
    fn lz4_blocks(&self) -> Result<Vec<Range<u64>>, BootError> {
        let mut blocks = Vec::new();
        let mut at = self.start;
        while at < self.end {
            let mut header = [0; 4];
            let size = u64::from(u32_at(self.read(&mut header, at)?, 0));
            at += 4;
            if size > LZ4_PACKED_MAX as u64 {
                return Err(self.compression.corrupt("a block is too large"));
            }
            blocks.push(at..at + size);
            at += size;
            if blocks.len() as u64 > self.unpacked_len.div_ceil(LZ4_BLOCK as u64) {
                return Err(self.compression.corrupt("it is longer than its trailing length says"));
            }
        }
        if blocks.len() as u64 != self.unpacked_len.div_ceil(LZ4_BLOCK as u64) || blocks.is_empty() {
            return Err(self.compression.corrupt("it is shorter than its trailing length says"));
        }
        Ok(blocks)
    }

    /// Fills `buffer` from file offset `at`; all of it has to lie in the payload.
    fn read<'b>(&self, buffer: &'b mut [u8], at: u64) -> Result<&'b [u8], BootError> {
        if at + buffer.len() as u64 > self.end {
            return Err(self.compression.corrupt("a block reaches past the end"));
        }
        self.file.read_exact_at(buffer, at).map_err(BootError::ReadKernel)?;
        Ok(buffer)
    }
}

/// The buffers of one decoding thread.
#[derive(Default)]
struct Lz4 {
    packed: Vec<u8>,
    unpacked: Vec<u8>,
}

impl Lz4 {
    /// Unpacks one of the blocks, which has to have the length its place asks for.
    fn block(&mut self, payload: &Payload, blocks: &[Range<u64>], index: usize) -> Result<&[u8], BootError> {
        let Range { start, end } = blocks[index];
        self.packed.resize((end - start) as usize, 0);
        let expected = (payload.unpacked_len - (index * LZ4_BLOCK) as u64).min(LZ4_BLOCK as u64);
        self.unpacked.resize(expected as usize, 0);
        let packed = payload.read(&mut self.packed, start)?;
        let len = lz4_flex::block::decompress_into(packed, &mut self.unpacked)
            .map_err(|error| payload.compression.corrupt(&error.to_string()))?;
        if len < self.unpacked.len() {
            return Err(payload.compression.corrupt("it is shorter than its trailing length says"));
        }
        Ok(&self.unpacked)
    }
}

impl Compression {
    fn name(self) -> &'static str {
        match self {
            Self::Lz4 => "LZ4",
        }
    }

    pub(crate) fn corrupt(self, what: &str) -> BootError {
        BootError::CorruptPayload { payload: self.name(), what: what.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::synthetic::{
        LOAD, Part, bzimage_with_payload, dirty_memory, elf, file, lz4_frame, lz4_literals, map, pvh_notes, read,
        request,
    };
    use crate::{Entered, Protocol, Request, Unpack, load};

    fn unpacked(image: &[u8]) -> Result<Vec<u8>, BootError> {
        let file = file(image);
        let payload = Payload::open(&file)?;
        let content = Mutex::new(vec![0; payload.unpacked_len as usize]);
        let put = |at: u64, piece: &[u8]| content.lock().unwrap()[at as usize..][..piece.len()].copy_from_slice(piece);
        payload.unpack(
            |piece| {
                put(0, piece);
                Ok(())
            },
            |(), at, piece| {
                put(at, piece);
                Ok(())
            },
        )?;
        Ok(content.into_inner().unwrap())
    }

    /// A kernel longer than a block of LZ4, with its notes behind the first one.
    fn vmlinux() -> (Vec<u8>, Vec<u8>) {
        let text: Vec<u8> = (0..LZ4_BLOCK + 0x5000).map(|at| (at / 7) as u8).collect();
        let data = pvh_notes(0x10_0020);
        let mut image = elf(
            0x10_0000,
            &[
                Part(LOAD, &text, 0x10_0000, text.len() as u64),
                Part(LOAD, &data, 0x100_0000, data.len() as u64 + 0x1000),
                Part(4, &[], 0x100_0000, 0),
            ],
        );
        // The notes are part of the data, as a linker puts them.
        let at = 64 + 56;
        let (offset, len) = (image[at + 8..at + 16].to_vec(), image[at + 32..at + 40].to_vec());
        image[at + 56 + 8..at + 56 + 16].copy_from_slice(&offset);
        image[at + 56 + 32..at + 56 + 40].copy_from_slice(&len);
        (image, text)
    }

    fn packed(vmlinux: &[u8]) -> Vec<u8> {
        let mut image = bzimage_with_payload(&lz4_frame(vmlinux), vmlinux.len() as u32);
        image[0x260..0x264].copy_from_slice(&(16u32 << 20).to_le_bytes());
        image
    }

    #[test]
    fn a_vmlinux_of_several_blocks_boots_by_either_entry() {
        let (vmlinux, text) = vmlinux();
        let (image, e820) = (file(&packed(&vmlinux)), map(32));
        for (protocol, entered, rip) in [
            (Protocol::Auto, Entered::Linux, 0x10_0000),
            (Protocol::Linux, Entered::Linux, 0x10_0000),
            (Protocol::Pvh, Entered::Pvh, 0x10_0020),
        ] {
            let memory = dirty_memory(32);
            let loaded = load(&memory, &Request { protocol, unpack: Unpack::Host, ..request(&image, &e820) }).unwrap();
            assert_eq!((loaded.entered, loaded.state.rip, loaded.unpacked), (entered, rip, Some(Compression::Lz4)));
            assert!(read(&memory, 0x10_0000, text.len()) == text);
            assert_eq!(loaded.kernel.1, 0x100_1000 + pvh_notes(0).len() as u64);
            assert_eq!(read(&memory, loaded.kernel.1 - 0x1000, 0x1000), [0; 0x1000], "BSS");
            if entered == Entered::Linux {
                let alignment = read(&memory, loaded.state.rsi + 0x235, 1);
                assert_eq!(alignment, [21], "the header of the bzImage is passed on");
            }
        }
    }

    #[test]
    fn an_elf_ignores_who_unpacks() {
        let image = elf(0x10_0000, &[Part(LOAD, &[0xf4; 64], 0x10_0000, 64)]);
        let (image, e820) = (file(&image), map(16));
        let loaded = load(&dirty_memory(16), &Request { unpack: Unpack::Host, ..request(&image, &e820) }).unwrap();
        assert_eq!(loaded.unpacked, None);
    }

    #[test]
    fn other_compressions_are_left_to_the_guest() {
        for (magic, name) in
            [(b"\x1f\x8b\x08\0".as_slice(), "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"what", "unknown")]
        {
            let error = unpacked(&bzimage_with_payload(&[magic, &[0; 64]].concat(), 64)).unwrap_err();
            assert!(matches!(error, BootError::Unpack { .. }), "{error:?}");
            let expected = format!("cannot unpack the {name} payload of the bzImage on the host");
            assert!(error.to_string().starts_with(&expected), "{error}");
        }
    }

    #[test]
    fn corrupt_frames() {
        let content = [9; 100];
        let block = lz4_literals(&content);
        let frame =
            |size: u32, block: &[u8]| [0x184c_2102u32.to_le_bytes().as_slice(), &size.to_le_bytes(), block].concat();
        let size = block.len() as u32;
        assert_eq!(unpacked(&bzimage_with_payload(&frame(size, &block), 100)).unwrap(), content);
        let short = lz4_frame(&content)[4..].to_vec();
        for (payload, len, what) in [
            (frame(size, &block), 99, "small"),
            (frame(size, &block), 101, "shorter than"),
            (frame(size + 1, &block), 100, "past the end"),
            (frame(u32::MAX, &block), 100, "too large"),
            (frame(size, &block)[..9].to_vec(), 100, "past the end"),
            ([frame(size, &block), short.clone()].concat(), 200, "longer than"),
            ([frame(size, &block), short].concat(), (8 << 20) + 100, "shorter than"),
            (frame(size, &vec![0xff; block.len()]), 100, ""),
            (frame(size, &block), 1 << 30, "init_size"),
        ] {
            let mut image = bzimage_with_payload(&payload, len);
            image[0x260..0x264].copy_from_slice(&(16u32 << 20).to_le_bytes());
            let error = unpacked(&image).unwrap_err();
            let BootError::CorruptPayload { payload: "LZ4", .. } = &error else { panic!("{error:?}") };
            assert!(error.to_string().contains(what), "{error}");
        }
    }

    #[test]
    fn a_payload_that_is_no_elf() {
        let (image, e820) = (file(&bzimage_with_payload(&lz4_frame(&[9; 100]), 100)), map(16));
        let error = load(&dirty_memory(16), &Request { unpack: Unpack::Host, ..request(&image, &e820) }).unwrap_err();
        assert!(error.to_string().contains("it is not an ELF image"), "{error}");
    }

    #[test]
    fn a_payload_outside_the_image() {
        let mut image = bzimage_with_payload(&lz4_frame(&[9; 100]), 100);
        image[0x24c..0x250].copy_from_slice(&u32::MAX.to_le_bytes());
        let error = unpacked(&image).unwrap_err();
        assert!(matches!(error, BootError::Damaged { what: "its payload is not inside it", .. }), "{error:?}");
    }
}
