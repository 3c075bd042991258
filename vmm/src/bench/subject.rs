//! Who does the work of a cell. A comparison is one of the same work: what a program cannot do, or does in another way, it
//! is not asked for.

use block::cache::CacheMode;
use block::engine::Aio;
use serde::Serialize;

use super::cell::Cell;

/// One who can do the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Subject {
    /// A guest of skiff.
    Skiff,
    /// The same engine on the host, without a machine around it.
    Host,
    /// The same guest under QEMU, with an I/O thread.
    Qemu,
    /// The same guest under Cloud Hypervisor.
    CloudHypervisor,
    /// The same guest under Firecracker.
    Firecracker,
}

/// The queues of Firecracker's disks have 256 entries; a request takes three, for it has no indirect descriptors.
const FIRECRACKER_DEPTH: u16 = 256 / 3;

impl Subject {
    /// All that skiff is compared with, in the order of the tables.
    pub const OTHERS: [Self; 4] = [Self::Host, Self::Qemu, Self::CloudHypervisor, Self::Firecracker];

    /// The name that users write.
    pub fn name(self) -> &'static str {
        match self {
            Self::Skiff => "skiff",
            Self::Host => "host",
            Self::Qemu => "qemu",
            Self::CloudHypervisor => "cloud-hypervisor",
            Self::Firecracker => "firecracker",
        }
    }

    /// The program that has to be on PATH, of machines that are not ours.
    pub fn program(self) -> Option<&'static str> {
        match self {
            Self::Skiff | Self::Host => None,
            Self::Qemu => Some("qemu-system-x86_64"),
            Self::CloudHypervisor | Self::Firecracker => Some(self.name()),
        }
    }

    /// Whether it ends when its guest writes to the port of isa-debug-exit.
    pub(super) fn has_exit_port(self) -> bool {
        matches!(self, Self::Skiff | Self::Qemu)
    }

    /// What it lacks to do the work of `cell`, whose engine is `aio`, in the same way; nothing where it can.
    ///
    /// Cloud Hypervisor has no thread pool behind its blocking engine; it keeps a write cache for a driver that accepts
    /// FLUSH, as the guest does. Firecracker reads and writes through the page cache only, and its blocking engine does one
    /// request at a time.
    pub(super) fn lacks(self, cell: &Cell, aio: Aio) -> Option<&'static str> {
        let (work, way) = (&cell.work, &cell.way);
        let lacks: &[(bool, &'static str)] = match self {
            Self::Skiff | Self::Host | Self::Qemu => &[],
            Self::CloudHypervisor => &[
                (aio == Aio::Threads, "it has no pool of threads"),
                (
                    !matches!(way.cache, CacheMode::None | CacheMode::Writeback),
                    "its cache modes are none and writeback",
                ),
                (!way.ioeventfd, "its doorbells are ioeventfds"),
            ],
            Self::Firecracker => &[
                (way.cache.is_direct(), "it has no O_DIRECT"),
                (aio != Aio::IoUring, "its only engine for more than one request at a time is io_uring"),
                (
                    !matches!(way.cache, CacheMode::Writeback | CacheMode::Unsafe),
                    "its cache modes are writeback and unsafe",
                ),
                (!way.ioeventfd, "its doorbells are ioeventfds"),
                (work.queues > 1, "its disks have one queue"),
                (work.depth > FIRECRACKER_DEPTH, "its queues have room for 85 requests"),
            ],
        };
        lacks.iter().find_map(|(so, why)| so.then_some(*why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{Content, Way, Work};
    use guest::workload::Mix;

    fn cell(cache: CacheMode, depth: u16, queues: u16, ioeventfd: bool) -> Cell {
        let work = Work { content: Content::Written, rw: Mix::RandRead, bs: 4096, depth, queues, busy: 0 };
        Cell { work, way: Way { cache, ioeventfd, ..Way::default() } }
    }

    /// What the programs' own documents say of their options and limits.
    #[test]
    fn only_the_same_work_is_compared() {
        use CacheMode::{Directsync, None as Direct, Unsafe, Writeback, Writethrough};
        for (cell, aio, cloud_hypervisor, firecracker) in [
            (cell(Direct, 32, 1, true), Aio::IoUring, true, false),
            (cell(Direct, 32, 4, true), Aio::Native, true, false),
            (cell(Direct, 32, 1, true), Aio::Threads, false, false),
            (cell(Writeback, 32, 1, true), Aio::IoUring, true, true),
            (cell(Writeback, 85, 1, true), Aio::IoUring, true, true),
            (cell(Writeback, 86, 1, true), Aio::IoUring, true, false),
            (cell(Writeback, 32, 2, true), Aio::IoUring, true, false),
            (cell(Writeback, 32, 1, false), Aio::IoUring, false, false),
            (cell(Writeback, 32, 1, true), Aio::Threads, false, false),
            (cell(Unsafe, 32, 1, true), Aio::IoUring, false, true),
            (cell(Writethrough, 32, 1, true), Aio::IoUring, false, false),
            (cell(Directsync, 32, 1, true), Aio::IoUring, false, false),
        ] {
            let does = |subject: Subject| subject.lacks(&cell, aio).is_none();
            assert_eq!(does(Subject::CloudHypervisor), cloud_hypervisor, "{cell:?} {aio:?}");
            assert_eq!(does(Subject::Firecracker), firecracker, "{cell:?} {aio:?}");
            assert!(does(Subject::Skiff) && does(Subject::Host) && does(Subject::Qemu));
        }
    }
}
