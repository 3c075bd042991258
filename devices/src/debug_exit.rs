//! The exit port of test guests, compatible with QEMU's isa-debug-exit. Accessed on vCPU threads.

use crate::bus::BusDevice;
use crate::power::{PowerLine, PowerRequest};

/// Number of consecutive ports. Test guests write 1, 2 or 4 bytes (QEMU: `iosize=4`).
pub const PORTS: u64 = 4;

/// A port at which a guest ends the machine with a value of its choice.
pub struct DebugExit {
    power: PowerLine,
}

impl DebugExit {
    /// A port that delivers what is written to it through `power`.
    pub fn new(power: PowerLine) -> Self {
        Self { power }
    }
}

/// The exit status of the process for a `value` written by the guest: `(value << 1) | 1`, as in QEMU, of which the host
/// keeps the low 8 bits. So the status is always odd, never the 0 of a poweroff, and 127 values can be told apart from
/// it.
pub fn exit_status(value: u32) -> u8 {
    ((value << 1) | 1) as u8
}

impl BusDevice for DebugExit {
    /// Reads as zero, as in QEMU.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    /// The value written decides, at whichever of the ports.
    fn write(&self, _offset: u64, data: &[u8]) {
        let mut value = [0; 4];
        let len = data.len().min(value.len());
        value[..len].copy_from_slice(&data[..len]);
        (self.power)(PowerRequest::DebugExit(u32::from_le_bytes(value)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::{Arc, Mutex};

    fn written(offset: u64, data: &[u8]) -> PowerRequest {
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = requests.clone();
        DebugExit::new(Arc::new(move |request| seen.lock().unwrap().push(request))).write(offset, data);
        let requests = requests.lock().unwrap();
        assert_eq!(requests.len(), 1);
        requests[0]
    }

    #[test]
    fn delivers_the_value_in_any_width() {
        assert_eq!(written(0, &[0x10]), PowerRequest::DebugExit(0x10));
        assert_eq!(written(0, &[0x34, 0x12]), PowerRequest::DebugExit(0x1234));
        assert_eq!(written(0, &[0x78, 0x56, 0x34, 0x12]), PowerRequest::DebugExit(0x1234_5678));
    }

    /// Pairs that users of QEMU's device rely on: 0x10 is its customary "success" (33), 0 gives 1.
    #[test]
    fn exit_status_is_qemus() {
        assert_eq!([0, 1, 0x10, 0x11, 0x31, 0x7f].map(exit_status), [1, 3, 33, 35, 99, 255]);
        assert_eq!(exit_status(0x80), 1);
        assert_eq!(exit_status(u32::MAX), 255);
    }

    proptest! {
        #[test]
        fn any_access_is_survived(offset: u64, mut data in prop::collection::vec(any::<u8>(), 0..9)) {
            let device = DebugExit::new(Arc::new(|_| {}));
            device.write(offset, &data);
            device.read(offset, &mut data);
            prop_assert!(data.iter().all(|byte| *byte == 0));
        }
    }
}
