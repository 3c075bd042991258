//! PCI: one root bus, its configuration space, and message-signalled interrupts.

pub mod config;
pub mod msix;
pub mod root;
#[cfg(test)]
pub(crate) mod table;
