//! skiff: a small KVM virtual machine monitor.

pub mod config;
pub mod doctor;
pub mod exit;
pub mod kvm;
