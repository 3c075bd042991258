//! Disk images and the engines that move their bytes. Knows nothing of virtio or KVM.

pub mod disk;
pub mod engine;
mod lock;
