//! MSI-X (PCI Local Bus 3.0, section 6.8.2). Table and mask writes come from vCPU threads; interrupts from any thread.

use std::sync::Arc;
use std::{array, io};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The address and data a function writes to raise one interrupt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Message address: on x86 the local APIC window, with the destination in it.
    pub address: u64,
    /// Message data: on x86 the vector and the delivery mode.
    pub data: u32,
}

/// Connects eventfds to interrupts, one GSI each. Implemented over KVM's routing table and irqfds, and over a table in tests.
pub trait MsiRouter: Send + Sync {
    /// From now on a write to `event` raises `message` through `gsi`; one already counted in `event` raises it at once.
    /// Calling it again for a GSI that is set replaces the message.
    fn set(&self, gsi: u32, message: MsiMessage, event: &EventFd) -> io::Result<()>;

    /// From now on writes to `event` stay counted in it. Idempotent.
    fn clear(&self, gsi: u32, event: &EventFd) -> io::Result<()>;
}

/// Bytes of one table entry.
pub const ENTRY_SIZE: usize = 16;
/// The most vectors a function can have.
pub const MAX_VECTORS: u16 = 2048;
const VECTOR_MASKED: u32 = 1;

/// One table entry, and what the router last heard of it.
struct Entry {
    message: MsiMessage,
    masked: bool,
    attached: Option<MsiMessage>,
}

impl Entry {
    fn new() -> Self {
        Self { message: MsiMessage::default(), masked: true, attached: None }
    }

    fn bytes(&self) -> [u8; ENTRY_SIZE] {
        let mut bytes = [0; ENTRY_SIZE];
        bytes[..8].copy_from_slice(&self.message.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.message.data.to_le_bytes());
        bytes[12] = u8::from(self.masked);
        bytes
    }

    fn set_bytes(&mut self, bytes: [u8; ENTRY_SIZE]) {
        let [dword0, dword1, dword2, dword3] =
            array::from_fn(|dword| u32::from_le_bytes(array::from_fn(|byte| bytes[4 * dword + byte])));
        self.message = MsiMessage { address: u64::from(dword1) << 32 | u64::from(dword0 & !3), data: dword2 };
        self.masked = dword3 & VECTOR_MASKED != 0;
    }
}

/// The vectors of one function.
///
/// A function raises a vector by writing its eventfd, whatever the masks say. While the vector may interrupt (MSI-X enabled,
/// neither the function nor the vector masked) the eventfd is attached to its GSI; while it may not, it is detached, and
/// its counter is the pending bit. Attaching delivers what was counted.
pub struct Msix {
    entries: Vec<Entry>,
    events: Arc<[EventFd]>,
    first_gsi: u32,
    router: Arc<dyn MsiRouter>,
    enabled: bool,
    function_masked: bool,
    warned: bool,
}

impl Msix {
    /// `vectors` vectors, at most [`MAX_VECTORS`], on the GSIs from `first_gsi` up: disabled and masked.
    ///
    /// # Errors
    /// If the host gives no eventfds, or the number is zero or too large.
    pub fn new(vectors: u16, first_gsi: u32, router: Arc<dyn MsiRouter>) -> io::Result<Self> {
        if vectors == 0 || vectors > MAX_VECTORS {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{vectors} MSI-X vectors")));
        }
        let events = (0..vectors).map(|_| EventFd::new(EFD_NONBLOCK)).collect::<io::Result<_>>()?;
        Ok(Self {
            entries: (0..vectors).map(|_| Entry::new()).collect(),
            events,
            first_gsi,
            router,
            enabled: false,
            function_masked: false,
            warned: false,
        })
    }

    /// The eventfds that raise the vectors. Nonblocking; writable from any thread without a lock.
    pub fn events(&self) -> Arc<[EventFd]> {
        self.events.clone()
    }

    /// Follows the two writable bits of the Message Control register (6.8.2.3).
    pub fn set_control(&mut self, enabled: bool, function_masked: bool) {
        if (enabled, function_masked) != (self.enabled, self.function_masked) {
            self.enabled = enabled;
            self.function_masked = function_masked;
            (0..self.entries.len()).for_each(|vector| self.settle(vector));
        }
    }

    /// Reads the table; zeroes past its end.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = self.entries.get(at / ENTRY_SIZE).map_or(0, |entry| entry.bytes()[at % ENTRY_SIZE]);
        }
    }

    /// Writes the table: any bytes; what is reserved stays zero.
    pub fn table_write(&mut self, offset: u64, data: &[u8]) {
        let (start, end) = (offset as usize, (offset as usize).saturating_add(data.len()));
        for vector in start / ENTRY_SIZE..end.div_ceil(ENTRY_SIZE).min(self.entries.len()) {
            let entry = &mut self.entries[vector];
            let mut bytes = entry.bytes();
            for (at, byte) in (vector * ENTRY_SIZE..).zip(&mut bytes) {
                if (start..end).contains(&at) {
                    *byte = data[at - start];
                }
            }
            entry.set_bytes(bytes);
            self.settle(vector);
        }
    }

    /// Reads the pending bits (6.8.2.9); zeroes past their end.
    pub fn pba_read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = (0..8).fold(0, |bits, bit| bits | u8::from(self.is_pending(at.saturating_mul(8) + bit)) << bit);
        }
    }

    /// Back to the state after power-on: everything detached, nothing pending.
    pub fn reset(&mut self) {
        self.set_control(false, false);
        for (entry, event) in self.entries.iter_mut().zip(self.events.iter()) {
            *entry = Entry::new();
            // Nothing counted is fine too.
            let _ = event.read();
        }
    }

    fn is_pending(&self, vector: usize) -> bool {
        let (Some(entry), Some(event)) = (self.entries.get(vector), self.events.get(vector)) else { return false };
        // Nobody else takes the count of a detached eventfd, so it can be looked at by taking it and putting it back.
        entry.attached.is_none() && event.read().is_ok_and(|count| event.write(count).is_ok())
    }

    /// Attaches or detaches the eventfd of `vector` if that changed.
    fn settle(&mut self, vector: usize) {
        let entry = &mut self.entries[vector];
        let wanted = (self.enabled && !self.function_masked && !entry.masked).then_some(entry.message);
        if wanted == entry.attached {
            return;
        }
        let (gsi, event) = (self.first_gsi + vector as u32, &self.events[vector]);
        let result = match wanted {
            Some(message) if entry.attached.is_some() => self.router.set(gsi, message, event),
            Some(message) => {
                // KVM raises what an eventfd has counted when it is attached, but leaves the count there, and the vector
                // would look pending at its next mask. Take the count, and raise it again through the attached eventfd.
                let pending = event.read().is_ok();
                let result = self.router.set(gsi, message, event);
                if pending {
                    let _ = event.write(1);
                }
                result
            }
            None => self.router.clear(gsi, event),
        };
        match result {
            Ok(()) => entry.attached = wanted,
            Err(error) => {
                entry.attached = None;
                if !std::mem::replace(&mut self.warned, true) {
                    tracing::warn!(gsi, %error, "an MSI-X vector could not be switched; its interrupts may be missing");
                }
            }
        }
    }
}
