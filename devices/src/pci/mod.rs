//! PCI: one root bus, its configuration space, and message-signalled interrupts.

pub mod msix;
