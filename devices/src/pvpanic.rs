//! pvpanic: the port at which a guest kernel says that it crashed (QEMU `docs/specs/pvpanic.rst`). Accessed on vCPU
//! threads.

use std::sync::Once;

use crate::bus::BusDevice;
use crate::power::{PowerLine, PowerRequest};

/// Number of ports.
pub const PORTS: u64 = 1;

/// The guest panicked and does nothing more.
const PANICKED: u8 = 1 << 0;
/// The guest panicked and its own crash kernel takes over.
const CRASH_LOADED: u8 = 1 << 1;

/// The pvpanic device. ACPI declares it as `QEMU0001`.
pub struct Pvpanic {
    power: PowerLine,
    crash_loaded: Once,
}

impl Pvpanic {
    /// A device that delivers [`PowerRequest::Panic`] through `power`.
    pub fn new(power: PowerLine) -> Self {
        Self { power, crash_loaded: Once::new() }
    }
}

impl BusDevice for Pvpanic {
    /// The events that the device understands.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(events) = data.first_mut() {
            *events = PANICKED | CRASH_LOADED;
        }
    }

    /// One or more events. A loaded crash kernel goes on, and so does the machine.
    fn write(&self, _offset: u64, data: &[u8]) {
        let events = data.first().copied().unwrap_or(0);
        if events & PANICKED != 0 {
            (self.power)(PowerRequest::Panic);
        } else if events & CRASH_LOADED != 0 {
            self.crash_loaded.call_once(|| tracing::warn!("the guest panicked; its crash kernel takes over"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::{Arc, Mutex};

    fn after(events: &[u8]) -> Vec<PowerRequest> {
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = requests.clone();
        let device = Pvpanic::new(Arc::new(move |request| seen.lock().unwrap().push(request)));
        for event in events {
            device.write(0, &[*event]);
        }
        drop(device);
        Arc::into_inner(requests).unwrap().into_inner().unwrap()
    }

    #[test]
    fn offers_both_events() {
        let mut data = [0xee];
        Pvpanic::new(Arc::new(|_| {})).read(0, &mut data);
        assert_eq!(data, [3]);
    }

    #[test]
    fn only_a_panic_ends_the_machine() {
        assert_eq!(after(&[0, 2, 2, 4, 0x80]), []);
        assert_eq!(after(&[1]), [PowerRequest::Panic]);
        assert_eq!(after(&[3]), [PowerRequest::Panic]);
    }

    proptest! {
        #[test]
        fn any_access_is_survived(offset: u64, mut data in prop::collection::vec(any::<u8>(), 0..9)) {
            let device = Pvpanic::new(Arc::new(|_| {}));
            device.write(offset, &data);
            device.read(offset, &mut data);
        }
    }
}
