//! MSI-X (PCI Local Bus 3.0, section 6.8.2). Table and mask writes come from vCPU threads; interrupts from any thread.

use std::io;

use vmm_sys_util::eventfd::EventFd;

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
