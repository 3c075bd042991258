//! Virtio 1.2: the PCI transport and the devices behind it.

mod area;
pub mod blk;
pub mod device;
#[cfg(any(test, feature = "test-utils"))]
pub mod driver;
pub mod net;
pub mod pci;
pub mod queue;
pub mod rng;
