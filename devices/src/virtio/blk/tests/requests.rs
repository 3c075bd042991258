//! What a request does, and what is refused.

use std::fs;

use super::*;

#[test]
fn writes_reads_and_flushes() {
    let (image, _blk, mut guest) = running(PLAIN);
    let content = pattern(3072, 5);
    guest.fill(DATA, &content);
    let scattered = [readable(DATA, 1), readable(DATA + 1, 2559), readable(DATA + 2560, 512)];
    assert_eq!(guest.request(OUT, 7, &scattered), (OK, 1));
    assert_eq!(guest.request(FLUSH, 0, &[]), (OK, 1));
    let file = fs::read(&image.path).unwrap();
    assert!(file[7 * 512..7 * 512 + 3072] == content);
    assert!(file[..7 * 512].iter().chain(&file[7 * 512 + 3072..]).all(|byte| *byte == 0));
    assert_eq!(guest.request(IN, 7, &[writable(DATA + 0x1000, 3000), writable(DATA + 0x2000, 72)]), (OK, 3073));
    assert!(guest.bytes(DATA + 0x1000, 3000) == content[..3000]);
    assert!(guest.bytes(DATA + 0x2000, 73) == [&content[3000..], &[0]].concat());
    assert_eq!(guest.request(IN, 0, &[]), (OK, 1), "no sectors are whole sectors");
}

#[test]
fn tells_its_serial_number() {
    for (serial, expected) in [
        (None, *b"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
        (Some("root"), *b"root\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
        (Some("exactly-twenty-bytes-and-more"), *b"exactly-twenty-bytes"),
    ] {
        let (image, mut guest) = (Image::new(), Guest::new(PLAIN));
        let mut blk = image.open(false, serial);
        guest.activate(&mut blk);
        guest.fill(DATA, &[UNTOUCHED; 64]);
        assert_eq!(guest.request(GET_ID, 0, &[writable(DATA, 9), writable(DATA + 9, 30)]), (OK, 21));
        assert_eq!(guest.bytes(DATA, 22), [&expected[..], &[UNTOUCHED; 2]].concat());
        assert_eq!(guest.request(GET_ID, 0, &[writable(DATA + 32, 4)]), (OK, 5));
        assert_eq!(guest.bytes(DATA + 32, 5), [&expected[..4], &[UNTOUCHED]].concat());
    }
}

#[test]
fn descriptors_may_be_cut_anywhere() {
    let (image, _blk, mut guest) = running(PLAIN);
    let content = pattern(1024, 9);
    // Header and data in one piece, cut into 1, 0, 7, 500 and the rest.
    let (header, status) = guest.header(OUT, 3);
    guest.fill(DATA, &guest.bytes(header.address.0, 16));
    guest.fill(DATA + 16, &content);
    let cut = [readable(DATA, 1), readable(DATA, 0), readable(DATA + 1, 7), readable(DATA + 8, 500)];
    let chain = [&cut[..], &[readable(DATA + 508, 532), status, writable(DATA, 0)]].concat();
    let head = guest.driver.add_indirect(DATA + 0x8000, &chain);
    assert_eq!(guest.turn(), (head, 1));
    assert_eq!(guest.bytes(status.address.0, 1), [OK]);
    assert!(fs::read(&image.path).unwrap()[3 * 512..5 * 512] == content);
    // Data and status in one piece.
    let (header, _) = guest.header(IN, 3);
    guest.fill(DATA + 0x1000, &[UNTOUCHED; 1026]);
    let head = guest.driver.add(&[header, writable(DATA + 0x1000, 100), writable(DATA + 0x1064, 925)]);
    assert_eq!(guest.turn(), (head, 1025));
    assert!(guest.bytes(DATA + 0x1000, 1026) == [&content[..], &[OK, UNTOUCHED]].concat());
}

#[test]
fn refuses_what_is_not_on_the_disk() {
    let (image, _blk, mut guest) = running(PLAIN);
    guest.fill(DATA, &[1; 1024]);
    let before = fs::read(&image.path).unwrap();
    for (sector, len) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (SECTORS + 1, 0),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (u64::MAX / 512, 1024),
        (1 << 55, 512),
        ((1 << 55) + 1, 512),
        (0, 511),
        (0, 513),
    ] {
        assert_eq!(guest.request(IN, sector, &[writable(DATA + 0x1000, len)]), (IOERR, 1), "{sector} {len}");
        assert_eq!(guest.request(OUT, sector, &[readable(DATA, len)]), (IOERR, 1), "{sector} {len}");
    }
    assert_eq!(guest.request(IN, 0, &[writable(DATA, u32::MAX); 3]), (IOERR, 1));
    assert_eq!(guest.bytes(DATA + 0x1000, 1024), [0; 1024]);
    assert!(fs::read(&image.path).unwrap() == before);
    assert_eq!(guest.request(OUT, SECTORS - 1, &[readable(DATA, 512)]), (OK, 1));
    assert_eq!(fs::metadata(&image.path).unwrap().len(), SECTORS * 512);
}

#[test]
fn refuses_what_it_does_not_know() {
    let (_image, _blk, mut guest) = running(PLAIN);
    for kind in [2, 3, 5, 11, 13, 14, 0x8000_0000, u32::MAX] {
        assert_eq!(guest.request(kind, 0, &[writable(DATA, 512)]), (UNSUPP, 1), "type {kind}");
    }
    let (header, status) = guest.header(IN, 0);
    for short in [vec![readable(header.address.0, 15)], vec![], vec![readable(MEMORY as u64 - 8, 16)]] {
        let head = guest.driver.add(&[&short[..], &[writable(DATA, 512), status]].concat());
        assert_eq!(guest.turn(), (head, 1));
        assert_eq!(guest.bytes(status.address.0, 1), [IOERR]);
        guest.fill(status.address.0, &[UNTOUCHED]);
    }
}

#[test]
fn a_buffer_outside_memory_fails_its_request_only() {
    let (_image, _blk, mut guest) = running(PLAIN);
    for address in [MEMORY as u64 - 256, 1 << 40, u64::MAX - 100] {
        assert_eq!(guest.request(IN, 0, &[writable(address, 512)]), (IOERR, 1));
        assert_eq!(guest.request(OUT, 0, &[readable(address, 512)]), (IOERR, 1));
        assert_eq!(guest.request(IN, 0, &[writable(DATA, 512)]), (OK, 513));
    }
    assert_eq!(guest.request(GET_ID, 0, &[writable(1 << 40, 20)]), (IOERR, 1));
}

#[test]
fn a_readonly_disk_is_not_written() {
    let (image, mut guest) = (Image::new(), Guest::new(PLAIN));
    let mut blk = image.open(true, None);
    assert_ne!(blk.features() & 1 << 5, 0, "VIRTIO_BLK_F_RO");
    guest.activate(&mut blk);
    guest.fill(DATA, &[1; 512]);
    assert_eq!(guest.request(OUT, 0, &[readable(DATA, 512)]), (IOERR, 1));
    assert_eq!(guest.request(IN, 0, &[writable(DATA, 512)]), (OK, 513));
    assert_eq!(guest.request(FLUSH, 0, &[]), (OK, 1));
    assert_eq!(guest.bytes(DATA, 512), [0; 512]);
}
