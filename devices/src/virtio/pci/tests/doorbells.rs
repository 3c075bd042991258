//! Notifications: doorbells, and the window of the configuration space.

use super::*;

#[test]
fn a_notification_before_driver_ok_is_kept() {
    for ioeventfd in [true, false] {
        let guest = Guest::new(ioeventfd);
        guest.negotiate(VERSION_1);
        let driver = Driver::new(guest.memory.clone(), 0x1000, 16);
        guest.set_up_queue(1, driver.layout(), 2);
        guest.bar_write(guest.doorbell(1), &1_u16.to_le_bytes());
        guest.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        assert!(guest.kicked());
    }
}

#[test]
fn the_configuration_window_reaches_the_structures() {
    let guest = Guest::new(true);
    let cap = guest.window_cap;
    let aim = |structure: u8, offset: u64, len: u32| {
        guest.config_write(cap + 4, &[0]);
        guest.config_write(cap + 8, &((guest.structures[&structure] + offset) as u32).to_le_bytes());
        guest.config_write(cap + 12, &len.to_le_bytes());
    };
    // As a firmware does, with memory decoding off.
    guest.config_write(0x04, &[0]);
    aim(1, 0x00, 4);
    guest.config_write(cap + 16, &1_u32.to_le_bytes());
    aim(1, 0x04, 4);
    assert_eq!(guest.config32(cap + 16), 1, "VERSION_1 in the second word");
    aim(1, 0x14, 1);
    guest.config_write(cap + 16, &[ACKNOWLEDGE, 0xff, 0xff, 0xff]);
    assert_eq!(guest.config32(cap + 16) as u8, ACKNOWLEDGE);
    aim(1, 0x12, 2);
    assert_eq!(guest.config32(cap + 16) as u16, 2);
    // The MSI-X table, which is behind the same lock as configuration space.
    guest.config_write(cap + 8, &(guest.table() as u32 + 8).to_le_bytes());
    guest.config_write(cap + 12, &[4]);
    guest.config_write(cap + 16, &0x4021_u32.to_le_bytes());
    assert_eq!(guest.config32(cap + 16), 0x4021);
    // What aims at nothing does nothing.
    let tries =
        [(0, 0x1_0000, 4), (0, 0xfffe, 4), (0, 0x14, 3), (0, 0x14, 0), (0, 0x14, 8), (1, 0x14, 1), (0, u32::MAX, 4)];
    for (bar, offset, len) in tries {
        guest.config_write(cap + 4, &[bar]);
        guest.config_write(cap + 8, &u32::to_le_bytes(offset));
        guest.config_write(cap + 12, &u32::to_le_bytes(len));
        guest.config_write(cap + 16, &[0x50; 4]);
        assert_eq!(guest.config32(cap + 16), 0x5050_5050, "what was written, not what is there");
    }
    guest.config_write(0x04, &[2]);
    assert_eq!(guest.status(), ACKNOWLEDGE);
}

#[test]
fn a_notification_through_the_configuration_window_arrives() {
    let guest = Guest::new(true);
    guest.start(VERSION_1);
    let doorbell = guest.doorbell(1);
    guest.config_write(guest.window_cap + 8, &(doorbell as u32).to_le_bytes());
    guest.config_write(guest.window_cap + 12, &2_u32.to_le_bytes());
    assert!(!guest.kicked());
    guest.config_write(guest.window_cap + 16, &[1, 0]);
    assert!(guest.kicked());
}

#[test]
fn doorbells_follow_the_bar() {
    let guest = Guest::new(true);
    let offsets = [guest.doorbell(0), guest.doorbell(1)];
    let attached = || guest.doorbells.attached.lock().unwrap().keys().copied().collect::<Vec<_>>();
    assert_eq!(attached(), offsets.map(|offset| guest.base() + offset));
    guest.config_write(0x04, &[0]);
    assert!(attached().is_empty());
    guest.config_write(0x10, &0xd000_0000_u32.to_le_bytes());
    assert!(attached().is_empty());
    guest.config_write(0x04, &[2]);
    assert_eq!(attached(), offsets.map(|offset| 0xd000_0000 + offset));
    // Moved while it is decoded, one half after the other.
    guest.config_write(0x14, &1_u32.to_le_bytes());
    guest.config_write(0x10, &[0; 4]);
    assert_eq!(attached(), offsets.map(|offset| 0x1_0000_0000 + offset));
    let calls = *guest.doorbells.calls.lock().unwrap();
    guest.config_write(0x04, &[6]);
    guest.config_write(0x3c, &[9]);
    assert_eq!(*guest.doorbells.calls.lock().unwrap(), calls, "nothing moved");
    guest.device.reset();
    assert!(attached().is_empty());
}

#[test]
fn doorbells_that_cannot_be_attached_exit() {
    let guest = Guest::new(true);
    *guest.doorbells.failing.lock().unwrap() = true;
    guest.config_write(0x10, &0xd000_0000_u32.to_le_bytes());
    assert!(guest.doorbells.attached.lock().unwrap().is_empty());
    guest.start(VERSION_1);
    guest.bar_write(guest.doorbell(1), &1_u32.to_le_bytes());
    assert!(guest.kicked());
    *guest.doorbells.failing.lock().unwrap() = false;
    guest.config_write(0x10, &0xd800_0000_u32.to_le_bytes());
    assert_eq!(guest.doorbells.attached.lock().unwrap().len(), 2);
}

#[test]
fn without_ioeventfd_doorbells_exit() {
    let guest = Guest::new(false);
    assert!(guest.doorbells.attached.lock().unwrap().is_empty());
    guest.start(VERSION_1);
    for data in [&[1][..], &[1, 0], &[1, 0, 0, 0], &[1, 0, 0, 0, 0, 0, 0, 0]] {
        guest.bar_write(guest.doorbell(1), data);
        assert!(guest.kicked(), "any width");
    }
    guest.bar_write(guest.doorbell(0), &[0, 0]);
    assert!(!guest.kicked(), "the other queue");
    // Past the last queue.
    guest.bar_write(guest.doorbell(1) + guest.multiplier, &[2, 0]);
}

#[test]
fn doorbells_take_no_lock() {
    let guest = Guest::new(false);
    guest.start(VERSION_1);
    let doorbell = guest.base() - WINDOW + guest.doorbell(1);
    let (_transport, _function) = (guest.device.transport(), guest.device.function());
    guest.window.write(doorbell, &[1, 0]);
    assert!(guest.kicked());
}
