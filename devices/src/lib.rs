//! The devices of the machine. A notification arrives as an eventfd, an interrupt leaves as one; nothing knows KVM.

pub mod acpi;
pub mod bus;
pub mod cmos;
pub mod debug_exit;
pub mod i8042;
pub mod log_limit;
pub mod pause;
pub mod pci;
pub mod power;
pub mod pvpanic;
pub mod serial;
pub mod statistics;
pub mod virtio;
pub mod worker;
