//! How a device stops the whole machine because of its host, and learns that it goes on. Paused by any worker, resumed by
//! the main thread.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The line between the devices and whoever owns the CPUs. A pause holds the CPUs outside the guest; what a device keeps
/// for later it starts again when it finds the line released.
#[derive(Debug)]
pub struct PauseLine {
    paused: AtomicBool,
    /// Why, as the first said it, until it is taken.
    reason: Mutex<Option<String>>,
    raised: EventFd,
    released: EventFd,
}

impl PauseLine {
    /// A line of a machine that runs.
    ///
    /// # Errors
    /// If the host gives no eventfds.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            paused: AtomicBool::new(false),
            reason: Mutex::default(),
            raised: EventFd::new(EFD_NONBLOCK)?,
            released: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// Pauses the machine. Returns at once; if it is paused already only the first reason counts.
    pub fn pause(&self, reason: String) {
        let mut first = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.paused.swap(true, Ordering::AcqRel) {
            *first = Some(reason);
            // Fails only if the counter is full, and then it is readable.
            let _ = self.raised.write(1);
        }
    }

    /// Whether the machine is paused. One load: asked before every entry into the guest.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    /// Why the machine is paused, once.
    pub fn take_reason(&self) -> Option<String> {
        let _ = self.raised.read();
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The machine goes on: devices that kept something start it again.
    pub fn release(&self) {
        self.paused.store(false, Ordering::Release);
        // As above.
        let _ = self.released.write(1);
    }

    /// Readable when there is a reason to be taken.
    pub fn raised(&self) -> &EventFd {
        &self.raised
    }

    /// Written at every release. Nobody reads it, so wait for it edge-triggered, and look at [`PauseLine::is_paused`].
    pub fn released(&self) -> &EventFd {
        &self.released
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_is_told_once() {
        let line = PauseLine::new().unwrap();
        assert!(!line.is_paused() && line.take_reason().is_none());
        line.pause("first".to_owned());
        line.pause("second".to_owned());
        assert!(line.is_paused());
        assert_eq!(line.raised().read().unwrap(), 1, "one wake-up");
        assert_eq!((line.take_reason().as_deref(), line.take_reason()), (Some("first"), None));
        line.release();
        assert!(!line.is_paused());
        assert_eq!(line.released().read().unwrap(), 1);
        line.pause("third".to_owned());
        assert_eq!(line.take_reason().as_deref(), Some("third"));
    }
}
