//! A piece of guest memory that stays where it is: looked up once, so that each access costs a bounds check and no
//! search. The rings of a queue are such pieces.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestMemoryResult, MmapRegion,
    VolatileMemory, VolatileSlice,
};

/// `len` bytes of guest memory. Numbers in it are little-endian. An access outside of it is a bug of ours, and panics.
#[derive(Debug)]
pub(super) struct Area {
    region: Arc<MmapRegion>,
    start: usize,
    len: usize,
}

const INSIDE: &str = "an access inside the area, aligned";

impl Area {
    /// The `len` bytes at `address`; `None` if they are not all in one region of `memory`.
    pub(super) fn new(memory: &GuestMemoryMmap, address: GuestAddress, len: usize) -> Option<Self> {
        let (region, start) = memory.to_region_addr(address)?;
        region.get_slice(start, len).ok()?;
        Some(Self { region: region.get_mmap(), start: start.0 as usize, len })
    }

    /// The 16 bits at `offset`, which is even.
    pub(super) fn load(&self, offset: usize, order: Ordering) -> u16 {
        u16::from_le(self.region.get_atomic_ref::<AtomicU16>(self.at(offset, 2)).expect(INSIDE).load(order))
    }

    /// Stores 16 bits at `offset`, which is even.
    pub(super) fn store(&self, offset: usize, value: u16, order: Ordering) {
        self.region.get_atomic_ref::<AtomicU16>(self.at(offset, 2)).expect(INSIDE).store(value.to_le(), order);
    }

    /// Stores 32 bits at `offset`, a multiple of 4.
    pub(super) fn store_long(&self, offset: usize, value: u32) {
        let place = self.region.get_atomic_ref::<AtomicU32>(self.at(offset, 4)).expect(INSIDE);
        place.store(value.to_le(), Ordering::Relaxed);
    }

    /// All of it.
    pub(super) fn slice(&self) -> VolatileSlice<'_> {
        self.region.get_slice(self.start, self.len).expect(INSIDE)
    }

    fn at(&self, offset: usize, len: usize) -> usize {
        assert!(offset + len <= self.len, "{INSIDE}");
        self.start + offset
    }
}

/// Fills `bytes` from `address`. As [`Bytes::read_slice`], and several times faster in the usual case: all in one region.
pub(super) fn read(memory: &GuestMemoryMmap, address: GuestAddress, bytes: &mut [u8]) -> GuestMemoryResult<()> {
    match memory.get_slice(address, bytes.len()) {
        Ok(slice) => Ok(slice.read_slice(bytes, 0)?),
        Err(_) => memory.read_slice(bytes, address),
    }
}

/// Writes one byte.
pub(super) fn write_byte(memory: &GuestMemoryMmap, address: GuestAddress, byte: u8) -> GuestMemoryResult<()> {
    Ok(memory.get_slice(address, 1)?.write_obj(byte, 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lies_in_one_region() {
        let ranges = [(GuestAddress(0x1000), 0x1000), (GuestAddress(0x2000), 0x1000), (GuestAddress(0x8000), 0x1000)];
        let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        let is = |address, len| Area::new(&memory, GuestAddress(address), len).is_some();
        assert!(is(0x1000, 0x1000) && is(0x2ff0, 16) && is(0x8000, 2));
        assert!(!is(0xfff, 2) && !is(0x1ff0, 17) && !is(0x2ff0, 17) && !is(0x3000, 1) && !is(u64::MAX, 2));
    }

    #[test]
    fn bytes_may_cross_regions() {
        let ranges = [(GuestAddress(0x1000), 0x1000), (GuestAddress(0x2000), 0x1000)];
        let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        write_byte(&memory, GuestAddress(0x1fff), 1).unwrap();
        write_byte(&memory, GuestAddress(0x2000), 2).unwrap();
        for (address, expected) in [(0x1ffe, [0, 1]), (0x1fff, [1, 2]), (0x2000, [2, 0])] {
            let mut bytes = [9; 2];
            read(&memory, GuestAddress(address), &mut bytes).unwrap();
            assert_eq!(bytes, expected);
        }
        assert!(read(&memory, GuestAddress(0x2fff), &mut [0; 2]).is_err());
        assert!(write_byte(&memory, GuestAddress(0x3000), 0).is_err());
    }

    #[test]
    fn numbers_are_little_endian() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0x1000), 0x1000)]).unwrap();
        let area = Area::new(&memory, GuestAddress(0x1800), 12).unwrap();
        area.store(2, 0x0102, Ordering::Release);
        area.store_long(4, 0x0304_0506);
        let mut bytes = [0; 16];
        memory.read_slice(&mut bytes, GuestAddress(0x17fe)).unwrap();
        assert_eq!(bytes, [0, 0, 0, 0, 2, 1, 6, 5, 4, 3, 0, 0, 0, 0, 0, 0]);
        memory.write_slice(&[0x12, 0x34, 0x56, 0x78], GuestAddress(0x1808)).unwrap();
        assert_eq!(area.load(8, Ordering::Acquire), 0x3412);
        assert_eq!(area.slice().len(), 12);
    }

    #[test]
    #[should_panic(expected = "inside the area")]
    fn ends_where_it_was_told_to() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        Area::new(&memory, GuestAddress(0x800), 12).unwrap().load(12, Ordering::Acquire);
    }
}
