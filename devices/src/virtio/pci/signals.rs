//! What a device's workers tell the driver: interrupts and DEVICE_NEEDS_RESET. Shared by all threads, all atomics: a
//! worker may signal while a vCPU thread holds the transport and waits for that worker to end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::virtio::device::Interrupt;

/// VIRTIO_MSI_NO_VECTOR (virtio 1.2, 4.1.4.3).
pub(super) const NO_VECTOR: u16 = 0xffff;

/// Bits of the device status field (virtio 1.2, 2.1).
pub(super) mod status {
    pub(crate) const ACKNOWLEDGE: u8 = 1;
    pub(crate) const DRIVER: u8 = 2;
    pub(crate) const DRIVER_OK: u8 = 4;
    pub(crate) const FEATURES_OK: u8 = 8;
    pub(crate) const NEEDS_RESET: u8 = 64;
    pub(crate) const FAILED: u8 = 128;
}

/// Bits of the ISR status (virtio 1.2, 4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// The registers that threads other than the vCPUs change, and the eventfds behind the MSI-X vectors.
pub(super) struct Signals {
    status: AtomicU8,
    isr: AtomicU8,
    generation: AtomicU8,
    msix_enabled: AtomicBool,
    pub(super) config_vector: AtomicU16,
    pub(super) queue_vectors: Box<[AtomicU16]>,
    events: Arc<[EventFd]>,
}

impl Signals {
    pub(super) fn new(queues: usize, events: Arc<[EventFd]>) -> Self {
        Self {
            status: AtomicU8::new(0),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            msix_enabled: AtomicBool::new(false),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            events,
        }
    }

    pub(super) fn status(&self) -> u8 {
        self.status.load(Ordering::Acquire)
    }

    pub(super) fn add_status(&self, bits: u8) {
        self.status.fetch_or(bits, Ordering::AcqRel);
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn set_msix_enabled(&self, enabled: bool) {
        self.msix_enabled.store(enabled, Ordering::Release);
    }

    /// Reads and clears the ISR status.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    /// `vector` as the registers keep it: one that does not exist is refused by reading back as none (4.1.5.1.2).
    pub(super) fn checked_vector(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.events.len() { vector } else { NO_VECTOR }
    }

    /// Back to the state before the driver came; the device no longer signals. The status last: it says that all is
    /// done.
    pub(super) fn reset(&self) {
        for vector in self.queue_vectors.iter().chain([&self.config_vector]) {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        self.isr.store(0, Ordering::Release);
        self.status.store(0, Ordering::Release);
    }

    /// Through the vector if there is one and MSI-X is on, else into the ISR status, which a driver without MSI-X
    /// polls.
    fn raise(&self, vector: &AtomicU16, isr: u8) {
        let event = self.events.get(usize::from(vector.load(Ordering::Acquire)));
        match event.filter(|_| self.msix_enabled.load(Ordering::Acquire)) {
            // A nonblocking eventfd refuses only a full counter, and that one is readable already.
            Some(event) => drop(event.write(1)),
            None => drop(self.isr.fetch_or(isr, Ordering::AcqRel)),
        }
    }
}

impl Interrupt for Signals {
    fn queue(&self, queue: u16) {
        if let Some(vector) = self.queue_vectors.get(usize::from(queue)) {
            self.raise(vector, ISR_QUEUE);
        }
    }

    fn queue_event(&self, queue: u16) -> Option<EventFd> {
        let vector = self.queue_vectors.get(usize::from(queue))?.load(Ordering::Acquire);
        let event = self.events.get(usize::from(vector)).filter(|_| self.msix_enabled.load(Ordering::Acquire));
        event?.try_clone().ok()
    }

    fn config(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.raise(&self.config_vector, ISR_CONFIG);
    }

    fn needs_reset(&self) {
        self.add_status(status::NEEDS_RESET);
        self.raise(&self.config_vector, ISR_CONFIG);
    }
}
