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

/// Connects eventfds to interrupts, one GSI each. Implemented over KVM's routing table and irqfds, and over a table in
/// tests.
pub trait MsiRouter: Send + Sync {
    /// From now on a write to `event` raises `message` through `gsi`; one already counted in `event` raises it at once.
    /// Calling it again for a GSI that is set replaces the message.
    ///
    /// # Errors
    /// What the host says; then everything is as before the call.
    fn set(&self, gsi: u32, message: MsiMessage, event: &EventFd) -> io::Result<()>;

    /// From now on writes to `event` stay counted in it; those before were raised, and are not counted any more.
    /// Idempotent.
    ///
    /// # Errors
    /// As for [`MsiRouter::set`].
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
/// A function raises a vector by writing its eventfd, whatever the masks say. While the vector may interrupt (MSI-X
/// enabled, neither the function nor the vector masked) the eventfd is attached to its GSI; while it may not, it is
/// detached, and its counter is the pending bit. Attaching delivers what was counted.
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
            Some(message) => self.router.set(gsi, message, event),
            None => self.router.clear(gsi, event),
        };
        match result {
            Ok(()) => entry.attached = wanted,
            // Then `attached` stays what it was, and the next change tries again.
            Err(error) => {
                if !std::mem::replace(&mut self.warned, true) {
                    tracing::warn!(gsi, %error, "an MSI-X vector could not be switched; its interrupts may be missing");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pci::table::MsiTable;

    const GSI: u32 = 24;

    fn msix(vectors: u16) -> (Msix, Arc<MsiTable>) {
        let table = Arc::new(MsiTable::default());
        (Msix::new(vectors, GSI, table.clone()).unwrap(), table)
    }

    fn message(vector: u32) -> MsiMessage {
        MsiMessage { address: 0xfee0_0000, data: 0x4020 + vector }
    }

    /// As a driver programs an entry: dword by dword, the mask last.
    fn program(msix: &mut Msix, vector: u32, masked: bool) {
        let at = u64::from(vector) * 16;
        msix.table_write(at, &(message(vector).address as u32).to_le_bytes());
        msix.table_write(at + 4, &0_u32.to_le_bytes());
        msix.table_write(at + 8, &message(vector).data.to_le_bytes());
        mask(msix, vector, masked);
    }

    fn mask(msix: &mut Msix, vector: u32, masked: bool) {
        msix.table_write(u64::from(vector) * 16 + 12, &u32::from(masked).to_le_bytes());
    }

    fn raise(msix: &Msix, vector: usize) {
        msix.events()[vector].write(1).unwrap();
    }

    fn pending(msix: &Msix) -> u64 {
        let mut bits = [0; 8];
        msix.pba_read(0, &mut bits);
        u64::from_le_bytes(bits)
    }

    #[test]
    fn starts_masked_and_disabled() {
        let (msix, table) = msix(2);
        let mut entry = [0xaa; 16];
        msix.table_read(16, &mut entry);
        let masked = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];
        assert_eq!(entry, masked);
        msix.table_read(32, &mut entry);
        assert_eq!(entry, [0; 16], "past the end");
        assert_eq!((pending(&msix), table.calls()), (0, 0));
    }

    #[test]
    fn one_vector_costs_one_call() {
        let (mut msix, table) = msix(3);
        msix.set_control(true, true);
        program(&mut msix, 1, true);
        mask(&mut msix, 1, false);
        msix.set_control(true, true);
        assert_eq!(table.calls(), 0);
        msix.set_control(true, false);
        mask(&mut msix, 1, false);
        program(&mut msix, 1, false);
        assert_eq!((table.calls(), table.attached()), (1, vec![(GSI + 1, message(1))]));
        raise(&msix, 1);
        assert_eq!(table.raised(), [(GSI + 1, message(1))]);
        assert_eq!(pending(&msix), 0);
    }

    #[test]
    fn what_is_raised_while_masked_is_pending_and_delivered() {
        type Switch = fn(&mut Msix, bool);
        let switches: [Switch; 3] = [
            |msix, off| mask(msix, 1, off),
            |msix, off| msix.set_control(true, off),
            |msix, off| msix.set_control(!off, false),
        ];
        for switch in switches {
            let (mut msix, table) = msix(2);
            msix.set_control(true, false);
            program(&mut msix, 1, false);
            for raised in [1, 3, 0] {
                switch(&mut msix, true);
                (0..raised).for_each(|_| raise(&msix, 1));
                let bits = if raised > 0 { 0b10 } else { 0 };
                assert_eq!(pending(&msix), bits);
                assert_eq!(pending(&msix), bits, "looking changes nothing");
                assert_eq!(table.raised(), []);
                switch(&mut msix, false);
                assert_eq!(pending(&msix), 0);
                assert_eq!(table.raised(), if raised > 0 { vec![(GSI + 1, message(1))] } else { vec![] });
            }
        }
    }

    #[test]
    fn a_new_message_replaces_the_old_one() {
        let (mut msix, table) = msix(1);
        msix.set_control(true, false);
        program(&mut msix, 0, false);
        mask(&mut msix, 0, true);
        msix.table_write(8, &0x4099_u32.to_le_bytes());
        raise(&msix, 0);
        mask(&mut msix, 0, false);
        let new = MsiMessage { data: 0x4099, ..message(0) };
        assert_eq!(table.raised(), [(GSI, new)]);
        table.calls();
        // While it is not masked, which drivers avoid.
        msix.table_write(4, &1_u32.to_le_bytes());
        assert_eq!(table.attached(), [(GSI, MsiMessage { address: 0x1_fee0_0000, ..new })]);
        assert_eq!(table.calls(), 1);
    }

    #[test]
    fn a_whole_entry_may_be_written_at_once() {
        let (mut msix, table) = msix(2);
        msix.set_control(true, false);
        msix.table_write(16, &0xfee0_0003_u64.to_le_bytes());
        msix.table_write(24, &0xffff_fffe_0000_4021_u64.to_le_bytes());
        assert_eq!(table.attached(), [(GSI + 1, message(1))]);
        let mut entry = [0; 8];
        msix.table_read(24, &mut entry);
        assert_eq!(u64::from_le_bytes(entry), 0x4021, "reserved bits stay zero");
    }

    #[test]
    fn reset_detaches_and_forgets() {
        let (mut msix, table) = msix(2);
        msix.set_control(true, false);
        program(&mut msix, 0, false);
        raise(&msix, 1);
        msix.reset();
        assert_eq!((table.attached(), pending(&msix)), (vec![], 0));
        let mut entry = [0; 16];
        msix.table_read(0, &mut entry);
        assert_eq!(entry, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
        msix.set_control(true, false);
        program(&mut msix, 1, false);
        assert_eq!(table.raised(), []);
    }

    #[test]
    fn a_router_that_fails_loses_no_interrupt() {
        let (mut msix, table) = msix(1);
        msix.set_control(true, false);
        table.fail(true);
        raise(&msix, 0);
        program(&mut msix, 0, false);
        assert_eq!((table.attached(), pending(&msix)), (vec![], 1));
        table.fail(false);
        mask(&mut msix, 0, true);
        mask(&mut msix, 0, false);
        assert_eq!(table.raised(), [(GSI, message(0))]);
    }

    /// What the router refuses has not happened: the old message is still in force, and is ended at the next mask.
    #[test]
    fn a_router_that_fails_leaves_what_was() {
        let (mut msix, table) = msix(1);
        msix.set_control(true, false);
        program(&mut msix, 0, false);
        table.fail(true);
        msix.table_write(8, &0x4099_u32.to_le_bytes());
        table.fail(false);
        mask(&mut msix, 0, true);
        assert_eq!(table.attached(), []);
        mask(&mut msix, 0, false);
        table.fail(true);
        mask(&mut msix, 0, true);
        table.fail(false);
        msix.set_control(false, false);
        assert_eq!(table.attached(), []);
    }

    #[test]
    fn what_is_raised_before_a_mask_is_not_pending_after_it() {
        let (mut msix, table) = msix(1);
        msix.set_control(true, false);
        raise(&msix, 0);
        program(&mut msix, 0, false);
        mask(&mut msix, 0, true);
        assert_eq!((table.raised(), pending(&msix)), (vec![(GSI, message(0))], 0), "raised when attached");
        mask(&mut msix, 0, false);
        raise(&msix, 0);
        mask(&mut msix, 0, true);
        mask(&mut msix, 0, false);
        assert_eq!(table.raised(), [(GSI, message(0))], "once");
    }

    #[test]
    fn the_number_of_vectors_is_checked() {
        let table = Arc::new(MsiTable::default());
        assert!(Msix::new(0, GSI, table.clone()).is_err());
        assert!(Msix::new(MAX_VECTORS + 1, GSI, table).is_err());
    }

    proptest! {
        /// Any accesses: what is attached is always what the registers say, and no interrupt is lost.
        #[test]
        fn attached_is_what_may_interrupt(
            steps in prop::collection::vec((0_u8..4, 0_u64..0x60, prop::collection::vec(any::<u8>(), 1..9)), 1..60),
        ) {
            let (mut msix, table) = msix(4);
            let (mut enabled, mut function_masked) = (false, false);
            let mut unseen = [false; 4];
            for (kind, offset, data) in steps {
                match kind {
                    0 => {
                        (enabled, function_masked) = (data[0] & 1 != 0, data[0] & 2 != 0);
                        msix.set_control(enabled, function_masked);
                    }
                    1 => {
                        raise(&msix, offset as usize % 4);
                        unseen[offset as usize % 4] = true;
                    }
                    _ => msix.table_write(offset, &data),
                }
                let mut expected = vec![];
                for vector in 0..4_u32 {
                    let mut entry = [0; 16];
                    msix.table_read(u64::from(vector) * 16, &mut entry);
                    if enabled && !function_masked && entry[12] & 1 == 0 {
                        let address = u64::from_le_bytes(entry[..8].try_into().unwrap());
                        let data = u32::from_le_bytes(entry[8..12].try_into().unwrap());
                        expected.push((GSI + vector, MsiMessage { address, data }));
                    }
                }
                prop_assert_eq!(&table.attached(), &expected);
                expected.retain(|&(gsi, _)| std::mem::take(&mut unseen[(gsi - GSI) as usize]));
                prop_assert_eq!(table.raised(), expected);
                let bits = (0..4).fold(0, |bits, vector| bits | u64::from(unseen[vector]) << vector);
                prop_assert_eq!(pending(&msix), bits);
            }
        }
    }
}
