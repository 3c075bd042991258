//! What a transport asks of a virtio device (virtio 1.2, chapter 2). The transport calls it on vCPU threads, one call at a
//! time; the device moves its queues into workers of its own.

use std::sync::Arc;

use thiserror::Error;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::queue::Virtqueue;

/// Interrupts of one device, as its workers raise them. Cheap, callable from any thread, never blocks.
pub trait Interrupt: Send + Sync {
    /// Tells the driver that `queue` has used buffers (virtio 1.2, 2.3). The caller has asked
    /// [`Virtqueue::publish`] first.
    fn queue(&self, queue: u16);

    /// What to write to tell the driver that `queue` has used buffers, for whoever does it in our place; `None` if the driver
    /// takes no interrupts for it, and [`Interrupt::queue`] must be called. Holds until the device is reset.
    fn queue_event(&self, _queue: u16) -> Option<EventFd> {
        None
    }

    /// Tells the driver that the configuration changed (virtio 1.2, 2.4).
    fn config(&self);

    /// Sets DEVICE_NEEDS_RESET and raises a configuration interrupt: the driver broke the rings (virtio 1.2, 2.1.2).
    fn needs_reset(&self);
}

/// One enabled queue, handed to the device at DRIVER_OK.
pub struct ActiveQueue {
    /// Its number (virtio 1.2, the device's "Virtqueues" section).
    pub index: u16,
    /// The rings, validated.
    pub queue: Virtqueue,
    /// Becomes readable when the driver notifies. Nonblocking.
    pub kick: EventFd,
}

/// All that a device needs to run, handed over at DRIVER_OK.
pub struct Activation {
    /// Guest memory, for buffers.
    pub memory: Arc<GuestMemoryMmap>,
    /// The features the driver accepted, transport bits included.
    pub features: u64,
    /// The queues the driver enabled, in ascending order of index; possibly not all, possibly none.
    pub queues: Vec<ActiveQueue>,
    /// How to reach the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

/// Why a device could not start. The transport then sets DEVICE_NEEDS_RESET and logs this.
#[derive(Debug, Error)]
#[error("{what}: {source}")]
pub struct ActivateError {
    /// What was attempted.
    pub what: &'static str,
    /// What the host said.
    #[source]
    pub source: std::io::Error,
}

/// A virtio device without its transport.
pub trait VirtioDevice: Send {
    /// The virtio device type (virtio 1.2, chapter 5).
    fn device_type(&self) -> u32;

    /// The feature bits the device offers; the transport adds VERSION_1, EVENT_IDX and INDIRECT_DESC.
    fn features(&self) -> u64;

    /// The largest size of each queue, a power of two up to 32768; its length is the number of queues. Constant.
    fn queue_sizes(&self) -> &[u16];

    /// Whether its section of chapter 5 gives the device a configuration of its own. Without one the transport shows no
    /// structure for it (virtio 1.2, 4.1.4.6), and a driver that walks the list has less to read.
    fn has_config(&self) -> bool {
        true
    }

    /// Fills `data` from the device-specific configuration at `offset`; zero past its end. Any `offset` and length.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Takes a write to the device-specific configuration. What is not writable is ignored. Any `offset` and length.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// Starts the device at DRIVER_OK. Called only between creation or [`VirtioDevice::reset`] and the next reset.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops the device: on return no thread of it runs, nothing is in flight in the guest's memory, and what it needs
    /// for the next activation is back in its hands. Idempotent, and also called at the end of the machine.
    fn reset(&mut self);
}
