//! The registers that hardware-reduced ACPI leaves: sleep control and status (ACPI 6.5, 4.8.3.7), accessed on vCPU
//! threads, and the power button, pressed by the main thread.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::power::{PowerLine, PowerRequest};

/// Number of consecutive ports: the sleep control register, then the sleep status register, one byte each.
pub const SLEEP_PORTS: u64 = 2;

/// The value of `SLP_TYP` that means S5, soft off. The DSDT's `\_S5` package holds it.
pub const SLP_TYP_S5: u8 = 5;

const SLEEP_CONTROL: u64 = 0;
const SLP_TYP_SHIFT: u8 = 2;
const SLP_TYP_MASK: u8 = 0b111 << SLP_TYP_SHIFT;
const SLP_EN: u8 = 1 << 5;

/// The sleep registers. S5 is the only sleep state of the machine, so it never wakes: `WAK_STS` reads as 0.
pub struct SleepRegisters {
    power: PowerLine,
    /// The sleep control register without the write-only `SLP_EN`.
    control: AtomicU8,
}

impl SleepRegisters {
    /// Registers that deliver [`PowerRequest::Poweroff`] through `power`.
    pub fn new(power: PowerLine) -> Self {
        Self { power, control: AtomicU8::new(0) }
    }

    fn write_control(&self, value: u8) {
        self.control.store(value & SLP_TYP_MASK, Ordering::Relaxed);
        if value & SLP_EN != 0 && (value & SLP_TYP_MASK) >> SLP_TYP_SHIFT == SLP_TYP_S5 {
            (self.power)(PowerRequest::Poweroff);
        }
    }
}

impl BusDevice for SleepRegisters {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (SLEEP_CONTROL, Some(control)) = (offset, data.first_mut()) {
            *control = self.control.load(Ordering::Relaxed);
        }
    }

    /// A write to the status register would clear `WAK_STS`, which is never set.
    fn write(&self, offset: u64, data: &[u8]) {
        if let (SLEEP_CONTROL, Some(value)) = (offset, data.first()) {
            self.write_control(*value);
        }
    }
}

/// Whether the guest has enabled an interrupt, as the interrupt controllers know it.
pub type Listens = Box<dyn Fn() -> io::Result<bool> + Send + Sync>;

/// The power button: an interrupt of the Generic Event Device (ACPI 6.5, 5.6.9), whose `_EVT` notifies the button.
pub struct PowerButton {
    event: EventFd,
    listens: Listens,
}

impl PowerButton {
    /// A button whose interrupt (edge-triggered) is a write to `event`, and reaches a guest that `listens`.
    pub fn new(event: EventFd, listens: Listens) -> Self {
        Self { event, listens }
    }

    /// Presses the button if the guest listens to it, and says whether it does: an edge before that would be lost. What
    /// happens then is up to the guest.
    ///
    /// # Errors
    /// When the eventfd cannot be written, or the interrupt controllers do not tell.
    pub fn press(&self) -> io::Result<bool> {
        let listens = (self.listens)()?;
        if listens {
            self.event.write(1)?;
        }
        Ok(listens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::{Arc, Mutex};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn registers() -> (SleepRegisters, Arc<Mutex<Vec<PowerRequest>>>) {
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = requests.clone();
        (SleepRegisters::new(Arc::new(move |request| seen.lock().unwrap().push(request))), requests)
    }

    fn get(device: &SleepRegisters, offset: u64) -> u8 {
        let mut data = [0xee];
        device.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn only_s5_with_slp_en_powers_off() {
        let (device, requests) = registers();
        // Every value but 0bxx1_101xx: SLP_EN is bit 5, SLP_TYP bits 4:2, the rest is ignored.
        for value in (0..=255_u8).filter(|value| value & 0b0011_1100 != 0b0011_0100) {
            device.write(0, &[value]);
        }
        device.write(1, &[0b0011_0100]);
        assert!(requests.lock().unwrap().is_empty());
        device.write(0, &[0b0011_0100]);
        assert_eq!(*requests.lock().unwrap(), [PowerRequest::Poweroff]);
    }

    #[test]
    fn slp_en_and_wak_sts_read_as_zero() {
        let (device, _) = registers();
        device.write(0, &[0xff]);
        device.write(1, &[0xff]);
        assert_eq!(get(&device, 0), 0b0001_1100);
        assert_eq!(get(&device, 1), 0);
    }

    #[test]
    fn the_button_is_an_eventfd() {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let button = PowerButton::new(event.try_clone().unwrap(), Box::new(|| Ok(true)));
        assert!(event.read().is_err());
        assert!(button.press().unwrap());
        assert_eq!(event.read().unwrap(), 1);
    }

    /// What is pressed before the guest enabled the interrupt must not come back as a second press later.
    #[test]
    fn the_button_is_not_pressed_for_a_guest_that_does_not_listen() {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let enabled = Arc::new(Mutex::new(Ok(false)));
        let listens = enabled.clone();
        let listens = move || listens.lock().unwrap().map_err(io::Error::from_raw_os_error);
        let button = PowerButton::new(event.try_clone().unwrap(), Box::new(listens));
        assert!(!button.press().unwrap());
        assert!(event.read().is_err());
        *enabled.lock().unwrap() = Ok(true);
        assert!(button.press().unwrap());
        assert_eq!(event.read().unwrap(), 1);
        *enabled.lock().unwrap() = Err(libc::EIO);
        assert_eq!(button.press().unwrap_err().raw_os_error(), Some(libc::EIO));
        assert!(event.read().is_err());
    }

    proptest! {
        #[test]
        fn any_access_is_survived(offset: u64, mut data in prop::collection::vec(any::<u8>(), 0..9)) {
            let (device, _) = registers();
            device.write(offset, &data);
            device.read(offset, &mut data);
        }
    }
}
