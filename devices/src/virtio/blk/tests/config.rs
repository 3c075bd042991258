//! What the driver is told of the device.

use std::process::Command;

use super::*;

#[test]
fn configuration_as_the_specification_lays_it_out() {
    let image = Image::new();
    let blk = image.open(false, None);
    assert_eq!(blk.device_type(), 2);
    assert_eq!(blk.features(), 1 << 2 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 13 | 1 << 14);
    let stat = Command::new("stat").args(["-c", "%o"]).arg(&image.path).output().unwrap();
    let block: u32 = String::from_utf8(stat.stdout).unwrap().trim().parse().unwrap();
    let mut config = [0xff; 64];
    blk.read_config(0, &mut config);
    let mut expected = [0; 64];
    expected[0..8].copy_from_slice(&SECTORS.to_le_bytes());
    expected[12..16].copy_from_slice(&254_u32.to_le_bytes());
    expected[20..24].copy_from_slice(&512_u32.to_le_bytes());
    // Logical blocks in a physical one, as an exponent; the smallest transfer that is not slow.
    expected[24] = block.ilog2() as u8 - 9;
    expected[26..28].copy_from_slice(&(block as u16 / 512).to_le_bytes());
    expected[32] = 1;
    // Sectors of a range and ranges of one discard, and its alignment; the same of zeroes, which may be unmapped.
    expected[36..40].copy_from_slice(&(1_u32 << 21).to_le_bytes());
    expected[40..44].copy_from_slice(&64_u32.to_le_bytes());
    expected[44..48].copy_from_slice(&(block / 512).to_le_bytes());
    expected[48..52].copy_from_slice(&(1_u32 << 21).to_le_bytes());
    expected[52..56].copy_from_slice(&1_u32.to_le_bytes());
    expected[56] = 1;
    assert_eq!(config, expected);
    for (offset, width) in (0..64).flat_map(|offset| [1, 2, 4, 8].map(|width| (offset, width))) {
        let mut part = [0xff; 8];
        blk.read_config(offset as u64, &mut part[..width]);
        let whole = [expected, [0; 64]].concat();
        assert_eq!(part[..width], whole[offset..offset + width]);
    }
    let mut beyond = [0xff; 8];
    blk.read_config(u64::MAX, &mut beyond);
    assert_eq!(beyond, [0; 8]);
}
