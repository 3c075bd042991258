//! Disk images, their cache modes, and the engines that move their bytes. Knows nothing of virtio or KVM.

pub mod alternatives;
pub mod cache;
pub mod choose;
pub mod direct;
pub mod disk;
pub mod engine;
pub mod extents;
pub mod facts;
pub mod filesystem;
mod lock;
pub mod measure;
pub mod overlay;
mod ranges;
pub mod throttle;
pub mod topology;
mod witness;
mod written;

/// The unit of [`disk::Disk::size`] and of virtio-blk addresses, in bytes.
pub const SECTOR_SIZE: u64 = 512;
