//! A guest that does whatever it likes.

use proptest::prelude::*;

use super::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A hostile guest: any accesses to configuration space and BAR 0, biased to the registers that matter. It is
    /// survived, doorbells are where the BAR is, and a reset brings a device that works.
    #[test]
    fn noise_is_harmless(
        steps in prop::collection::vec(
            (0_u8..6, any::<u16>(), prop::collection::vec(any::<u8>(), 1..9), any::<bool>()),
            1..150,
        ),
    ) {
        let guest = Guest::new(true);
        for (kind, offset, mut data, write) in steps {
            let offset = match kind {
                0 => u64::from(offset) % 0x200,
                1 => u64::from(offset) % 0x48,
                2 => guest.structures[&1] + u64::from(offset) % 0x40,
                3 => guest.table() + u64::from(offset) % 0x40,
                4 => guest.structures[&2] + u64::from(offset) % 0x10,
                _ => u64::from(offset),
            };
            match (kind, write) {
                (0..2, true) => guest.config_write(offset, &data),
                (0..2, false) => guest.ecam.read(SLOT << 15 | offset, &mut data),
                _ if offset + data.len() as u64 > layout::SIZE => {}
                (_, true) => guest.device.bar_write(0, offset, &data),
                (_, false) => guest.device.bar_read(0, offset, &mut data),
            }
            let attached = guest.doorbells.attached.lock().unwrap();
            let base = guest.device.bars().base(0).map(|base| base + layout::NOTIFY);
            prop_assert_eq!(attached.keys().next().copied(), base);
        }
        guest.config_write(0x04, &[0]);
        guest.config_write(0x10, &0xc000_0000_u32.to_le_bytes());
        guest.config_write(0x14, &[0; 4]);
        guest.config_write(0x04, &[2]);
        guest.start(VERSION_1);
        prop_assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        guest.bar_write(guest.doorbell(1), &[1]);
        prop_assert!(guest.kicked());
    }
}
