//! The devices of the machine. A notification arrives as an eventfd, an interrupt leaves as one; nothing here knows KVM.

pub mod bus;
pub mod log_limit;
pub mod pci;
pub mod power;
pub mod virtio;
pub mod worker;
