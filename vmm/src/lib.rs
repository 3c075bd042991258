//! skiff: a small KVM virtual machine monitor.

pub mod config;
pub mod console;
