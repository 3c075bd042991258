//! Virtio 1.2: the PCI transport and the devices behind it.

pub mod blk;
pub mod device;
pub mod pci;
pub mod queue;
