#![expect(unsafe_code, reason = "the ioctls of TAP devices")]
//! A TAP device or macvtap as the back end of an interface (linux/if_tun.h): each file is one of its queues, and each read
//! and write a frame with its header. Owned by the device or the worker of the pair.

use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;

use libc::{
    IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE, TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_UFO, TUN_F_USO4,
    TUN_F_USO6, TUNGETIFF, TUNSETOFFLOAD, TUNSETQUEUE, TUNSETVNETHDRSZ, c_int, c_short, c_uint,
};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use super::backend::{Failure, HEADER, Offloads, Port};
use super::buffers::Buffers;

/// Opens a queue of the same interface again, which may have been removed and made anew. It must not make one itself. Called
/// on the worker's thread, now and then while the interface is lost.
pub type Reopen = Box<dyn FnMut() -> io::Result<File> + Send>;

/// One queue of a TAP device.
pub struct Tap {
    file: File,
    reopen: Option<Reopen>,
    /// What it was told last. They are the interface's, and of several queues only one is told.
    offloads: Option<Offloads>,
    enabled: bool,
}

impl Tap {
    /// Takes over a queue: `file` is attached to an interface (TUNSETIFF) with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR, and with
    /// IFF_MULTI_QUEUE if there are several; it is nonblocking. Without `reopen` an interface that was removed is gone for good.
    ///
    /// # Errors
    /// If the kernel refuses headers of [`HEADER`] bytes, or frames without offloads: `file` is no such queue.
    pub fn new(file: File, reopen: Option<Reopen>) -> io::Result<Self> {
        let mut tap = Self { file, reopen, offloads: None, enabled: true };
        tap.set_up()?;
        tap.tell_offloads(Offloads::NONE)?;
        Ok(tap)
    }

    /// All that the kernel does for a TAP device, for [`super::backend::Backend::new`]. Leaves it with none.
    ///
    /// # Errors
    /// If it cannot be asked.
    pub fn offloads(&mut self) -> io::Result<Offloads> {
        let without_uso = Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6 | Offloads::ECN | Offloads::UFO;
        // UDP segmentation is the youngest (Linux 6.2); a kernel that does not know a bit refuses them all.
        let known = [Offloads::ALL, without_uso, Offloads::CSUM];
        let done = known.into_iter().find(|offloads| self.set_offloads(*offloads).is_ok());
        self.set_offloads(Offloads::NONE)?;
        Ok(done.unwrap_or(Offloads::NONE))
    }

    fn set_up(&mut self) -> io::Result<()> {
        let header = c_int::try_from(HEADER).expect("it is 12");
        // SAFETY: the kernel reads one int.
        check(unsafe { ioctl_with_ref(&self.file, TUNSETVNETHDRSZ, &header) })?;
        if let Some(offloads) = self.offloads {
            self.tell_offloads(offloads)?;
        }
        // A queue is attached when it is opened.
        let enabled = mem::replace(&mut self.enabled, true);
        self.set_enabled(enabled)
    }

    fn tell_offloads(&self, offloads: Offloads) -> io::Result<()> {
        // SAFETY: the argument is a number.
        check(unsafe { ioctl_with_val(&self.file, TUNSETOFFLOAD, flags(offloads).into()) })
    }

    /// Whether it is a TAP, and no macvtap.
    fn is_tap(&self) -> bool {
        self.file.metadata().is_ok_and(|file| file.rdev() == libc::makedev(10, 200))
    }
}

impl Drop for Tap {
    /// The offloads are the interface's: who opens it next gets whole frames unless he asks for others.
    fn drop(&mut self) {
        if self.offloads.is_some() {
            // It may be gone.
            let _ = self.tell_offloads(Offloads::NONE);
        }
    }
}

impl Port for Tap {
    fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn receive(&mut self, room: &Buffers<'_>) -> Result<usize, Failure> {
        room.read_from(self.file()).map_err(|error| match error.raw_os_error() {
            Some(libc::EAGAIN) => Failure::NotNow,
            // A frame whose header the kernel cannot make.
            Some(libc::EINVAL) => Failure::Frame(error),
            _ => Failure::Lost(error),
        })
    }

    fn send(&mut self, frame: &Buffers<'_>) -> Result<(), Failure> {
        let sent = frame.write_to(self.file()).map_err(|error| match error.raw_os_error() {
            Some(libc::EAGAIN) => Failure::NotNow,
            // Removed, or not up.
            Some(libc::EBADFD | libc::EIO | libc::ENODEV | libc::ENXIO | libc::ENETDOWN) => Failure::Lost(error),
            _ => Failure::Frame(error),
        });
        sent.map(drop)
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.offloads = Some(offloads);
        self.tell_offloads(offloads)
    }

    fn set_enabled(&mut self, enabled: bool) -> io::Result<()> {
        if enabled == self.enabled {
            return Ok(());
        }
        let flags = if enabled { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
        // SAFETY: all zero is a valid ifreq.
        let mut request: libc::ifreq = unsafe { mem::zeroed() };
        request.ifr_ifru.ifru_flags = flags as c_short;
        // SAFETY: the kernel reads an ifreq.
        let result = check(unsafe { ioctl_with_ref(&self.file, TUNSETQUEUE, &request) });
        if result.is_ok() || !is_attached(self.file()) {
            self.enabled = enabled;
        }
        result
    }

    /// Up, or made anew and up.
    fn is_up(&mut self) -> bool {
        if !is_attached(self.file()) {
            let Some(Ok(file)) = self.reopen.as_mut().map(|reopen| reopen()) else { return false };
            let gone = mem::replace(&mut self.file, file);
            if self.set_up().is_err() {
                // The next look tries again.
                self.file = gone;
                return false;
            }
        }
        self.is_still_up()
    }

    fn is_still_up(&self) -> bool {
        // A macvtap that takes nothing has only more to send than its cable; it never says that it is down.
        is_attached(self.file()) && (poll(self.file()) & libc::POLLOUT != 0 || !self.is_tap())
    }
}

/// Whether there is an interface that `file` is a queue of. (poll(2) tells that of a TAP, but not of a macvtap.)
fn is_attached(file: BorrowedFd<'_>) -> bool {
    // SAFETY: all zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    // SAFETY: the kernel fills in an ifreq.
    check(unsafe { ioctl_with_mut_ref(&file, TUNGETIFF, &mut request) }).is_ok()
}

/// TUN_F_* (linux/if_tun.h). The kernel does UDP segmentation for IPv4 and IPv6 together or not at all.
fn flags(offloads: Offloads) -> c_uint {
    let both = Offloads::USO4 | Offloads::USO6;
    let all = [
        (Offloads::CSUM, TUN_F_CSUM),
        (Offloads::TSO4, TUN_F_TSO4),
        (Offloads::TSO6, TUN_F_TSO6),
        (Offloads::ECN, TUN_F_TSO_ECN),
        (Offloads::UFO, TUN_F_UFO),
        (both, TUN_F_USO4 | TUN_F_USO6),
    ];
    all.into_iter().filter(|(these, _)| offloads.contains(*these)).fold(0, |flags, (_, flag)| flags | flag)
}

/// What poll(2) says of `file` right now.
fn poll(file: BorrowedFd<'_>) -> c_short {
    let mut entry = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one entry, which the kernel fills in.
    let found = unsafe { libc::poll(&raw mut entry, 1, 0) };
    if found < 0 { 0 } else { entry.revents }
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_as_the_kernel_numbers_them() {
        // linux/if_tun.h: TUN_F_CSUM, TSO4, TSO6, TSO_ECN, UFO, USO4, USO6.
        let table = [
            (Offloads::NONE, 0),
            (Offloads::CSUM, 0x01),
            (Offloads::TSO4, 0x02),
            (Offloads::TSO6, 0x04),
            (Offloads::ECN, 0x08),
            (Offloads::UFO, 0x10),
            (Offloads::USO, 0x60),
            (Offloads::ALL, 0x7f),
            // The kernel refuses one without the other.
            (Offloads::USO4, 0),
            (Offloads::USO6, 0),
        ];
        for (offloads, number) in table {
            assert_eq!(flags(offloads), number, "{offloads:?}");
        }
    }
}
