//! skiff: a small KVM virtual machine monitor.

pub mod bench;
pub mod builder;
mod child;
pub mod config;
pub mod console;
pub mod cpuid;
pub mod doctor;
pub mod exit;
pub mod explain;
mod failure;
pub mod irq;
pub mod kvm;
pub mod layout;
pub mod memory;
pub mod net;
mod regs;
pub mod smoke;
pub mod statistics;
mod stopping;
mod text;
mod tsc;
pub mod vcpu;
pub mod vm;
