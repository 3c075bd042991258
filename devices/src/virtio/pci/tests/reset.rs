//! Resets, and what ends in one.

use super::*;

#[test]
fn a_reset_ends_everything_and_the_device_starts_again() {
    let guest = Guest::new(true);
    for life in 1..=3 {
        let features = if life % 2 == 0 { VERSION_1 | EVENT_IDX } else { VERSION_1 };
        guest.start(features);
        assert_eq!(guest.seen.lock().unwrap().activations, 2 * life - 1);
        assert_eq!(guest.seen.lock().unwrap().active.as_ref().unwrap().features, features);
        guest.interrupt().queue(1);
        guest.bar_write(guest.doorbell(1), &[1, 0]);
        assert_eq!(guest.set_status(0), 0);
        assert!(guest.seen.lock().unwrap().active.is_none());
        assert_eq!(guest.isr(), 0);
        assert_eq!(guest.common::<2>(0x10), 0xffff);
        guest.set_common::<2>(0x16, 1);
        let registers = [0x18, 0x1a, 0x1c, 0x20].map(|register| guest.common::<2>(register));
        assert_eq!(registers, [16, 0xffff, 0, 0]);
        guest.set_common::<4>(0x08, 1);
        assert_eq!(guest.common::<4>(0x0c), 0, "no features");
        guest.start(VERSION_1);
        assert!(!guest.kicked(), "the old notification is gone");
        guest.set_status(0);
    }
}

#[test]
fn what_cannot_start_needs_a_reset_and_recovers() {
    let guest = Guest::new(true);
    let running = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
    guest.msix_control(true, false);
    guest.program_vector(0, false);
    // Rings outside memory.
    guest.negotiate(VERSION_1);
    guest.set_common::<2>(0x10, 0);
    guest.set_up_queue(0, QueueLayout { size: 8, desc: 1 << 40, driver: 2 << 40, device: 3 << 40 }, 1);
    assert_eq!(guest.set_status(running), running | NEEDS_RESET);
    assert_eq!(guest.msi.raised(), raised(0), "a configuration interrupt");
    assert!(guest.seen.lock().unwrap().active.is_none());
    // A device that cannot.
    guest.seen.lock().unwrap().refuse = true;
    guest.start(VERSION_1);
    assert_eq!((guest.status(), guest.msi.raised()), (running | NEEDS_RESET, raised(0)));
    assert_eq!(guest.set_status(running), running | NEEDS_RESET);
    // A driver that breaks a ring while it runs.
    guest.seen.lock().unwrap().refuse = false;
    guest.start(VERSION_1);
    assert_eq!((guest.status(), guest.msi.raised()), (running, vec![]));
    guest.interrupt().needs_reset();
    assert_eq!((guest.status(), guest.msi.raised()), (running | NEEDS_RESET, raised(0)));
    guest.start(VERSION_1);
    assert_eq!(guest.status(), running);
}

#[test]
fn a_reset_of_the_function_is_power_on() {
    let guest = Guest::new(true);
    let fresh: Vec<_> = (0..0x100).step_by(4).map(|register| guest.config32(register)).collect();
    guest.msix_control(true, false);
    guest.program_vector(2, false);
    guest.start(VERSION_1);
    guest.interrupt().queue(1);
    guest.interrupt().config();
    assert_eq!(guest.msi.raised(), raised(2));
    guest.device.reset();
    assert!(guest.seen.lock().unwrap().active.is_none());
    assert_eq!((guest.msi.attached(), guest.msi.raised()), (vec![], vec![]));
    let mut pending = [0; 8];
    let pba = u64::from(guest.config32(guest.msix_cap + 8));
    guest.device.bar_read(0, pba, &mut pending);
    assert_eq!(pending, [0; 8]);
    guest.device.reset();
    let after: Vec<_> = (0..0x100).step_by(4).map(|register| guest.config32(register)).collect();
    // But for the command register and the address, which firmware and the driver give it.
    let same = |at: usize| fresh[at] == after[at] || at == 1 || at == 4;
    assert!((0..fresh.len()).all(same), "{fresh:x?} {after:x?}");
    assert_eq!((after[1] & 0xffff, after[4]), (0, 4));
}
