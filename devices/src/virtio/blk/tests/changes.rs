//! Discarding and zeroing (virtio 1.2, 5.2.6).

use std::fs;

use super::*;

const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const UNMAP: u32 = 1;

const FEATURES: u64 = PLAIN | 1 << 13 | 1 << 14;

/// `struct virtio_blk_discard_write_zeroes`.
fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

impl Guest {
    /// A request with these ranges: its status.
    fn change(&mut self, kind: u32, ranges: &[Vec<u8>]) -> u8 {
        let bytes = ranges.concat();
        self.fill(DATA, &bytes);
        let (status, written) = self.request(kind, 0, &[readable(DATA, bytes.len() as u32)]);
        assert_eq!(written, 1);
        status
    }
}

/// A disk full of other bytes than zero, running, and those.
fn full(features: u64) -> (Image, Blk, Guest, Vec<u8>) {
    let (image, blk, guest) = running(features);
    let content: Vec<u8> = pattern(SECTORS as usize * 512, 0).into_iter().map(|byte| byte | 1).collect();
    fs::write(&image.path, &content).unwrap();
    (image, blk, guest, content)
}

#[test]
fn discards_and_zeroes_what_it_is_told() {
    for flags in [0, UNMAP] {
        let (image, _blk, mut guest, mut content) = full(FEATURES);
        assert_eq!(guest.change(WRITE_ZEROES, &[range(3, 70, flags)]), OK);
        content[3 * 512..73 * 512].fill(0);
        assert!(fs::read(&image.path).unwrap() == content);
        for (sector, sectors) in [(100, 1), (SECTORS - 1, 1), (5, 0), (200, 300)] {
            assert_eq!(guest.change(WRITE_ZEROES, &[range(sector, sectors, flags)]), OK);
            content[sector as usize * 512..][..sectors as usize * 512].fill(0);
        }
        assert!(fs::read(&image.path).unwrap() == content);
        // Whole blocks of the filesystem, 4096 bytes; the rest of what is discarded stays.
        assert_eq!(guest.change(DISCARD, &[range(600, 16, 0), range(801, 17, 0)]), OK);
        content[600 * 512..616 * 512].fill(0);
        content[808 * 512..816 * 512].fill(0);
        assert!(fs::read(&image.path).unwrap() == content);
    }
}

#[test]
fn ranges_may_be_cut_anywhere() {
    let (image, _blk, mut guest, mut content) = full(FEATURES);
    let (header, status) = guest.header(DISCARD, 0);
    guest.fill(DATA, &[guest.bytes(header.address.0, 16), range(8, 16, 0), range(80, 40, 0)].concat());
    let chain = [readable(DATA, 15), readable(DATA + 15, 2), readable(DATA, 0), readable(DATA + 17, 20)];
    let chain = [&chain[..], &[readable(DATA + 37, 11), status]].concat();
    let head = guest.driver.add(&chain);
    assert_eq!(guest.turn(), (head, 1));
    assert_eq!(guest.bytes(status.address.0, 1), [OK]);
    content[8 * 512..24 * 512].fill(0);
    content[80 * 512..120 * 512].fill(0);
    assert!(fs::read(&image.path).unwrap() == content);
}

#[test]
fn refuses_ranges_and_flags_that_are_not_valid() {
    let (image, _blk, mut guest, content) = full(FEATURES);
    for kind in [DISCARD, WRITE_ZEROES] {
        for (sector, sectors) in [
            (SECTORS, 1),
            (SECTORS - 1, 2),
            (SECTORS + 1, 0),
            (u64::MAX, 1),
            (u64::MAX, u32::MAX),
            (1 << 55, 8),
            ((1 << 55) - 1, 8),
            (u64::MAX / 512, 8),
            (0, u32::MAX),
            (0, (1 << 21) + 1),
        ] {
            assert_eq!(guest.change(kind, &[range(sector, sectors, 0)]), IOERR, "{kind} {sector} {sectors}");
            // One that is not valid spoils all.
            let both = [range(0, 64, 0), range(sector, sectors, 0)];
            assert!(kind != DISCARD || guest.change(kind, &both) == IOERR);
        }
        for flags in [2, 3, 1 << 31, u32::MAX] {
            assert_eq!(guest.change(kind, &[range(0, 64, flags)]), UNSUPP, "{kind} {flags}");
            let both = [range(0, 64, 0), range(0, 64, flags)];
            assert!(kind != DISCARD || guest.change(kind, &both) == UNSUPP);
        }
        // No range, a part of one, more than there may be.
        assert_eq!(guest.request(kind, 0, &[]), (IOERR, 1));
        let most = if kind == DISCARD { 64 } else { 1 };
        for len in [1, 15, 17, 31, (most + 1) * 16] {
            guest.fill(DATA, &[0; 65 * 16]);
            assert_eq!(guest.request(kind, 0, &[readable(DATA, len)]), (IOERR, 1), "{kind} {len}");
        }
        assert_eq!(guest.request(kind, 0, &[readable(DATA, u32::MAX); 3]), (IOERR, 1));
        for address in [MEMORY as u64 - 8, 1 << 40, u64::MAX - 7] {
            assert_eq!(guest.request(kind, 0, &[readable(address, 16)]), (IOERR, 1));
        }
        // The ranges are for the device to read.
        assert_eq!(guest.request(kind, 0, &[writable(DATA, 16)]), (IOERR, 1));
    }
    assert_eq!(guest.change(DISCARD, &[range(0, 64, UNMAP)]), UNSUPP, "a discard has no flags");
    assert!(fs::read(&image.path).unwrap() == content);
    assert_eq!(guest.change(DISCARD, &vec![range(7, 1, 0); 64]), OK, "as many as there may be");
}

#[test]
fn what_was_not_negotiated_is_not_done() {
    let (image, _blk, mut guest, content) = full(PLAIN);
    for kind in [DISCARD, WRITE_ZEROES] {
        assert_eq!(guest.change(kind, &[range(0, 64, 0)]), UNSUPP);
    }
    assert!(fs::read(&image.path).unwrap() == content);
}

#[test]
fn a_readonly_disk_offers_neither() {
    let (image, mut guest) = (Image::new(), Guest::new(FEATURES));
    let mut blk = image.open(true, None);
    assert_eq!(blk.features() & (1 << 13 | 1 << 14), 0);
    let mut limits = [0xff; 24];
    blk.read_config(36, &mut limits);
    assert_eq!(limits, [0; 24]);
    guest.activate(&mut blk);
    for kind in [DISCARD, WRITE_ZEROES] {
        assert_eq!(guest.change(kind, &[range(0, 64, 0)]), IOERR);
    }
}

/// Without discarding, what is zeroed stays allocated too, whatever the driver allows.
#[test]
fn blocks_that_are_to_stay_stay() {
    use std::os::unix::fs::MetadataExt;
    for (unmap, flags, freed) in [(true, UNMAP, true), (true, 0, false), (false, UNMAP, false)] {
        let image = image_on_disk();
        let disk = Disk::open(&image.path, false, CacheMode::Writeback, "disk0").unwrap();
        let mut blk = Blk::new(Arc::new(disk), &BlkOptions { unmap, ..BlkOptions::default() });
        assert_eq!(blk.features() & (1 << 13 | 1 << 14), if unmap { 1 << 13 | 1 << 14 } else { 1 << 14 });
        let mut may_unmap = [0];
        blk.read_config(56, &mut may_unmap);
        assert_eq!(may_unmap, [unmap.into()]);
        let mut guest = Guest::new(FEATURES & (blk.features() | PLAIN));
        guest.activate(&mut blk);
        fs::File::open(&image.path).unwrap().sync_all().unwrap();
        let blocks = || fs::metadata(&image.path).unwrap().blocks();
        let before = blocks();
        assert_eq!(guest.change(WRITE_ZEROES, &[range(512, 1024, flags)]), OK);
        assert_eq!(before - blocks(), if freed { 1024 } else { 0 }, "{unmap} {flags}");
        if !unmap {
            assert_eq!(guest.change(DISCARD, &[range(0, 512, 0)]), UNSUPP);
        }
    }
}
