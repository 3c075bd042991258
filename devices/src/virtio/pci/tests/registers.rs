//! The registers of the common configuration.

use super::*;

#[test]
fn identity_is_modern() {
    let guest = Guest::new(true);
    assert_eq!(guest.config32(0x00), 0x1042_1af4);
    assert!(guest.config32(0x08) as u8 >= 1, "revision");
    assert!(guest.config32(0x2c) >> 16 >= 0x40, "subsystem");
    assert_eq!(guest.config32(0x3c) & 0xff00, 0, "no interrupt pin");
    assert_eq!(guest.config32(guest.msix_cap) >> 16, 3 - 1, "table size: two queues and the configuration");
    assert_eq!(guest.device.vectors(), 3);
    assert_eq!(guest.common::<2>(0x12), 2, "num_queues");
}

#[test]
fn a_device_without_configuration_shows_no_structure_for_it() {
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap());
    let doorbells: Arc<DoorbellTable> = Arc::default();
    let rng = Box::new(Rng::new().unwrap());
    let device = VirtioPci::new(rng, memory, GSI, Arc::new(MsiTable::default()), doorbells, true).unwrap();
    let byte = |offset: u8| {
        let mut byte = [0];
        device.config_read(offset.into(), &mut byte);
        byte[0]
    };
    let (mut at, mut types) = (byte(0x34), Vec::new());
    while at != 0 {
        if byte(at) == 0x09 {
            types.push(byte(at + 3));
        }
        at = byte(at + 1);
    }
    assert_eq!(types, [1, 2, 3, 5], "cfg_type of 4.1.4: no DEVICE_CFG");
}

#[test]
fn features_are_offered_in_words() {
    let guest = Guest::new(true);
    let words = [0, 1, 2, 4, u32::MAX].map(|select| {
        guest.set_common::<4>(0x00, u64::from(select));
        guest.common::<4>(0x04)
    });
    assert_eq!(words, [OFFERED | EVENT_IDX | INDIRECT_DESC, VERSION_1 >> 32, 0, 0, 0]);
}

#[test]
fn features_ok_needs_version_1_and_nothing_that_was_not_offered() {
    let guest = Guest::new(true);
    let before = ACKNOWLEDGE | DRIVER;
    for bad in [0, OFFERED, VERSION_1 | 0b10, VERSION_1 | 1 << 33, VERSION_1 | 1 << 40] {
        assert_eq!(guest.negotiate(bad), before, "{bad:#x}");
        assert_eq!(guest.set_status(before | FEATURES_OK | DRIVER_OK), before);
    }
    for good in [VERSION_1, VERSION_1 | 0b100, VERSION_1 | OFFERED | EVENT_IDX | INDIRECT_DESC] {
        assert_eq!(guest.negotiate(good), before | FEATURES_OK, "{good:#x}");
        guest.accept(0);
        guest.set_common::<4>(0x08, 1);
        assert_eq!(guest.common::<4>(0x0c), 1, "settled");
    }
    // A bit in the third word.
    guest.set_status(0);
    guest.set_status(before);
    guest.accept(VERSION_1);
    guest.set_common::<4>(0x08, 2);
    guest.set_common::<4>(0x0c, 1);
    assert_eq!(guest.set_status(before | FEATURES_OK), before);
    assert_eq!(guest.seen.lock().unwrap().activations, 0);
}

#[test]
fn status_bits_come_in_order_and_stay() {
    let guest = Guest::new(true);
    assert_eq!(guest.status(), 0);
    for jump in [DRIVER, FEATURES_OK, DRIVER_OK, DRIVER | DRIVER_OK, NEEDS_RESET, 0x30] {
        assert_eq!(guest.set_status(jump), 0, "{jump:#x}");
    }
    assert_eq!(guest.set_status(ACKNOWLEDGE), ACKNOWLEDGE);
    assert_eq!(guest.set_status(ACKNOWLEDGE | DRIVER_OK), ACKNOWLEDGE);
    assert_eq!(guest.set_status(DRIVER), ACKNOWLEDGE | DRIVER, "what is set stays set");
    assert_eq!(guest.set_status(ACKNOWLEDGE | DRIVER | DRIVER_OK), ACKNOWLEDGE | DRIVER);
    assert_eq!(guest.set_status(ACKNOWLEDGE | DRIVER | FAILED), ACKNOWLEDGE | DRIVER | FAILED);
    assert_eq!(guest.set_status(0), 0);
}

#[test]
fn queue_registers_answer_for_the_selected_queue() {
    let guest = Guest::new(true);
    guest.negotiate(VERSION_1);
    for (index, size) in [(0, 64), (1, 16)] {
        guest.set_common::<2>(0x16, index);
        assert_eq!(guest.common::<2>(0x18), size);
        assert_eq!(guest.common::<2>(0x1a), 0xffff);
        for bad in [0, 3, size * 2, 0xffff] {
            guest.set_common::<2>(0x18, bad);
            assert_eq!(guest.common::<2>(0x18), size, "{bad}");
        }
        guest.set_common::<2>(0x18, 8);
        assert_eq!(guest.common::<2>(0x18), 8);
    }
    for absent in [2, 0x8000, 0xffff] {
        guest.set_common::<2>(0x16, absent);
        let layout = QueueLayout { size: 8, desc: 0x1000, driver: 0x2000, device: 0x3000 };
        guest.set_up_queue(absent, layout, 0);
        for register in [0x18, 0x1c, 0x1e, 0x20, 0x28, 0x30] {
            assert_eq!(guest.common::<2>(register), 0, "queue {absent} register {register:#x}");
        }
        assert_eq!(guest.common::<2>(0x1a), 0xffff);
    }
}

#[test]
fn an_enabled_queue_is_frozen() {
    let guest = Guest::new(true);
    guest.negotiate(VERSION_1);
    guest.set_common::<2>(0x16, 1);
    guest.set_common::<8>(0x20, 0x1234_5678_9abc_def0);
    assert_eq!((guest.common::<4>(0x20), guest.common::<4>(0x24)), (0x9abc_def0, 0x1234_5678));
    guest.set_common::<2>(0x1c, 2);
    assert_eq!(guest.common::<2>(0x1c), 0, "only 1 enables");
    guest.set_common::<2>(0x1c, 1);
    guest.set_common::<2>(0x1c, 0);
    guest.set_common::<2>(0x18, 8);
    guest.set_common::<4>(0x20, 0);
    assert_eq!((guest.common::<2>(0x1c), guest.common::<2>(0x18)), (1, 16));
    assert_eq!(guest.common::<8>(0x20), 0x1234_5678_9abc_def0);
}

/// A queue that is enabled too late is never handed to the device, so it must not look enabled (virtio 1.2, 3.1.1).
#[test]
fn a_queue_cannot_be_set_up_after_driver_ok() {
    let guest = Guest::new(true);
    guest.start(VERSION_1);
    guest.set_up_queue(0, QueueLayout { size: 8, desc: 0x4000, driver: 0x5000, device: 0x6000 }, 1);
    assert_eq!([0x18, 0x1a, 0x1c, 0x20].map(|register| guest.common::<2>(register)), [64, 1, 0, 0]);
}

#[test]
fn vectors_that_do_not_exist_read_back_as_none() {
    let guest = Guest::new(true);
    guest.set_common::<2>(0x16, 1);
    for register in [0x10, 0x1a] {
        assert_eq!(guest.common::<2>(register), 0xffff);
        for (given, kept) in [(2, 2), (3, 0xffff), (0, 0), (0xfffe, 0xffff), (1, 1), (0xffff, 0xffff)] {
            guest.set_common::<2>(register, given);
            assert_eq!(guest.common::<2>(register), kept);
        }
    }
}

#[test]
fn odd_widths_touch_only_their_bytes() {
    let guest = Guest::new(true);
    guest.set_common::<4>(0x08, 0);
    guest.set_common::<4>(0x0c, 0x1122_3344);
    guest.set_common::<1>(0x0e, 0xaa);
    assert_eq!(guest.common::<4>(0x0c), 0x11aa_3344);
    // Eight bytes over four registers: msix_config, num_queues (read-only), status, generation, queue_select.
    guest.set_common::<8>(0x10, 0x0001_0001_ffff_0002);
    assert_eq!(guest.common::<2>(0x10), 2);
    assert_eq!(guest.common::<2>(0x12), 2);
    assert_eq!(guest.status(), ACKNOWLEDGE);
    assert_eq!(guest.common::<2>(0x16), 1);
    assert_eq!(guest.common::<8>(0x10), 0x0001_0001_0002_0002);
    assert_eq!(guest.common::<8>(0x38), 0, "queue_notify_data, queue_reset and past the end");
    assert_eq!(guest.common::<8>(0xff0), 0);
}
