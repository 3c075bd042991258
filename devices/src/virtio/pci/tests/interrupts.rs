//! Interrupts: MSI-X, the ISR status, changes of the configuration.

use super::*;

#[test]
fn a_request_travels_by_eventfds() {
    let guest = Guest::new(true);
    guest.msix_control(true, false);
    (0..3).for_each(|vector| guest.program_vector(vector, false));
    let features = VERSION_1 | EVENT_IDX | 1;
    let mut driver = guest.start(features);
    assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    let head = driver.add(&[writable(0x8000, 4)]);
    let address = guest.base() + guest.doorbell(1);
    guest.doorbells.attached.lock().unwrap()[&address].write(1).unwrap();
    assert!(guest.kicked());
    {
        let mut seen = guest.seen.lock().unwrap();
        let active = seen.active.as_mut().unwrap();
        assert_eq!((active.features, active.queues.len(), active.queues[0].index), (features, 1, 1));
        let mut chain = Chain::default();
        assert!(active.queues[0].queue.pop(&mut chain).unwrap());
        active.queues[0].queue.push(chain.head, 4);
        let _ = active.queues[0].queue.publish();
        active.interrupt.queue(1);
    }
    assert_eq!(guest.msi.raised(), raised(2));
    assert_eq!(driver.used(), Some((head, 4)));
    assert_eq!(guest.isr(), 0, "MSI-X is on");
    guest.interrupt().config();
    assert_eq!(guest.msi.raised(), raised(0));
    guest.interrupt().queue(7);
    assert_eq!(guest.msi.raised(), []);
}

#[test]
fn without_msix_the_isr_tells() {
    let guest = Guest::new(true);
    guest.start(VERSION_1);
    assert_eq!(guest.isr(), 0);
    guest.interrupt().queue(1);
    assert_eq!((guest.isr(), guest.isr()), (1, 0), "reading clears");
    guest.interrupt().config();
    guest.interrupt().queue(1);
    assert_eq!((guest.isr(), guest.isr()), (3, 0));
    assert_eq!(guest.msi.calls(), 0);
}

#[test]
fn a_change_of_the_configuration_changes_its_generation() {
    let guest = Guest::new(true);
    guest.start(VERSION_1);
    let device = guest.structures[&4];
    guest.bar_write(device + 1, &[7, 8]);
    assert_eq!(guest.bar_read::<8>(device), [0, 7, 8, 0, 0, 0, 0, 0]);
    let before = guest.common::<1>(0x15);
    assert_eq!(guest.common::<1>(0x15), before);
    guest.interrupt().config();
    assert_ne!(guest.common::<1>(0x15), before);
}

#[test]
fn an_interrupt_raised_while_masked_is_delivered_at_unmask() {
    let guest = Guest::new(true);
    guest.msix_control(true, true);
    guest.program_vector(2, false);
    guest.start(VERSION_1);
    guest.interrupt().queue(1);
    let pba = u64::from(guest.config32(guest.msix_cap + 8));
    assert_eq!(guest.bar_read::<8>(pba), [0b100, 0, 0, 0, 0, 0, 0, 0]);
    guest.msix_control(true, false);
    assert_eq!((guest.msi.raised(), guest.bar_read::<8>(pba)), (raised(2), [0; 8]));
    guest.program_vector(2, true);
    guest.interrupt().queue(1);
    assert_eq!((guest.msi.raised(), guest.bar_read::<1>(pba)), (vec![], [0b100]));
    guest.program_vector(2, false);
    assert_eq!(guest.msi.raised(), raised(2));
}
