//! The configuration structure of virtio-blk (virtio 1.2, 5.2.4), as the driver reads it.

use block::SECTOR_SIZE;
use block::disk::Disk;

/// Bytes of `struct virtio_blk_config` up to `write_zeroes_may_unmap` and its padding; no feature that is offered defines
/// more.
pub(super) const BYTES: usize = 60;

/// Where the field `writeback` is, the only one that a driver writes.
pub(super) const WRITEBACK: u64 = 32;

/// The most ranges of one request to discard.
pub(super) const MAX_DISCARD_RANGES: u32 = 64;

/// The most ranges of one request to zero: a limit of sectors is one of the whole request then.
pub(super) const MAX_ZERO_RANGES: u32 = 1;

/// The most sectors of one range: 1 GiB. More in one piece gains nothing, and where the host can only write the zeroes a
/// request must still end before a driver loses its patience.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 21;

/// What the structure tells that is not known of the disk.
pub(super) struct Config<'a> {
    pub(super) disk: &'a Disk,
    pub(super) seg_max: u32,
    pub(super) queues: u16,
    pub(super) writeback: bool,
    pub(super) unmap: bool,
}

impl Config<'_> {
    /// The structure. There is no `size_max`: a buffer may be as long as a descriptor can say. A limit would only cut what
    /// a driver has in one piece into more buffers, for the engines to put together again.
    pub(super) fn bytes(&self) -> [u8; BYTES] {
        let topology = self.disk.topology();
        let in_sectors = |bytes: u64| u32::try_from(bytes / SECTOR_SIZE).unwrap_or(u32::MAX);
        let alignment = in_sectors(topology.discard).clamp(1, MAX_RANGE_SECTORS);
        let mut bytes = [0; BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &(self.disk.size() / SECTOR_SIZE).to_le_bytes());
        put(12, &self.seg_max.to_le_bytes());
        put(20, &(SECTOR_SIZE as u32).to_le_bytes());
        put(24, &[in_sectors(topology.physical_block).ilog2() as u8]);
        put(25, &[in_sectors(topology.alignment_offset).try_into().unwrap_or(0)]);
        put(26, &u16::try_from(in_sectors(topology.min_io)).unwrap_or(0).to_le_bytes());
        put(28, &in_sectors(topology.opt_io).to_le_bytes());
        put(WRITEBACK as usize, &[self.writeback.into()]);
        if self.queues > 1 {
            put(34, &self.queues.to_le_bytes());
        }
        if !self.disk.readonly() {
            // A multiple of the alignment, for drivers that split what is longer.
            let most = MAX_RANGE_SECTORS - MAX_RANGE_SECTORS % alignment;
            if self.unmap {
                put(36, &most.to_le_bytes());
                put(40, &MAX_DISCARD_RANGES.to_le_bytes());
                put(44, &alignment.to_le_bytes());
            }
            put(48, &most.to_le_bytes());
            put(52, &MAX_ZERO_RANGES.to_le_bytes());
            put(56, &[self.unmap.into()]);
        }
        bytes
    }
}
