//! What the driver is told of the device.

use super::*;

#[test]
fn configuration_as_the_specification_lays_it_out() {
    let blk = Image::new().open(false, None);
    assert_eq!(blk.device_type(), 2);
    assert_eq!(blk.features(), 1 << 2 | 1 << 6 | 1 << 9);
    let mut config = [0xff; 64];
    blk.read_config(0, &mut config);
    let mut expected = [0; 64];
    expected[0..8].copy_from_slice(&SECTORS.to_le_bytes());
    expected[12..16].copy_from_slice(&254_u32.to_le_bytes());
    expected[20..24].copy_from_slice(&512_u32.to_le_bytes());
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
