#![expect(unsafe_code, reason = "the entries of the submission queue name guest memory")]
//! The engine `io_uring`: one ring a queue. Owned by the worker.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::register::Restriction;
use io_uring::types::{CancelBuilder, Fixed, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};
use libc::iovec;
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ring::{DEPTH, Ring, RingEngine};
use super::{Engine, OpKind};
use crate::disk::Disk;

/// The engine for `disk`, which announces on `event`. `name` is that of its helper threads.
///
/// # Errors
/// When the host gives no ring, thread or eventfd.
pub fn start(disk: Arc<Disk>, name: &str, event: EventFd) -> io::Result<Box<dyn Engine>> {
    let ring = Uring::new(disk.file().as_raw_fd(), event.as_raw_fd())?;
    Ok(Box::new(RingEngine::new(disk, ring, event, name)?))
}

/// Why there is no io_uring.
#[derive(Debug, Error)]
pub enum Missing {
    /// ENOSYS, or EINVAL of a kernel whose rings cannot be restricted.
    #[error("io_uring is not in this kernel, or an early form of it")]
    Kernel,
    /// EPERM by the sysctl.
    #[error("io_uring is forbidden by kernel.io_uring_disabled = {0}")]
    Sysctl(u8),
    /// EPERM or EACCES, and not by the sysctl.
    #[error("io_uring is forbidden, most likely by the seccomp filter of a container")]
    Forbidden,
    /// ENOMEM: the rings count as locked memory before Linux 5.12.
    #[error("the memory lock limit leaves no room for the rings of io_uring")]
    Memory,
    /// Anything else.
    #[error("io_uring cannot be used: {0}")]
    Other(io::Error),
}

impl Missing {
    /// `sysctl` is the text of kernel.io_uring_disabled, empty before Linux 6.6.
    fn new(error: io::Error, sysctl: &str) -> Self {
        match (error.raw_os_error(), sysctl.trim().parse()) {
            (Some(libc::ENOSYS | libc::EINVAL), _) => Self::Kernel,
            (Some(libc::EPERM), Ok(level @ 1..)) => Self::Sysctl(level),
            (Some(libc::EPERM | libc::EACCES), _) => Self::Forbidden,
            (Some(libc::ENOMEM), _) => Self::Memory,
            _ => Self::Other(error),
        }
    }

    /// What to do about it, in one line.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Kernel => "use Linux 5.10 or newer with CONFIG_IO_URING",
            Self::Sysctl(_) => "allow it with \"sudo sysctl kernel.io_uring_disabled=0\"",
            Self::Forbidden => {
                "allow io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp profile"
            }
            Self::Memory => "raise it with \"ulimit -l unlimited\", for good in /etc/security/limits.conf",
            Self::Other(_) => "look for the reason with \"sudo dmesg\"",
        }
    }
}

/// Whether this engine works here, for that many `queues` at once: sets up rings as it does.
///
/// # Errors
/// Why not.
pub fn probe(queues: u16) -> Result<(), Missing> {
    let set_up = || {
        let (image, event) = (fs::File::open("/dev/null")?, EventFd::new(EFD_NONBLOCK)?);
        (0..queues).map(|_| Uring::new(image.as_raw_fd(), event.as_raw_fd())).collect::<io::Result<Vec<_>>>()
    };
    set_up().map(drop).map_err(|error: io::Error| {
        Missing::new(error, &fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default())
    })
}

/// The image is file 0 of the ring, and the only one it can touch.
const IMAGE: Fixed = Fixed(0);

/// `IORING_UNREGISTER_FILES` of io_uring_register(2).
const UNREGISTER_FILES: u8 = 3;

/// What the entry that cancels all others is known by; no number of a transfer.
const CANCEL: u64 = u64::MAX;

pub(super) struct Uring(IoUring);

impl Uring {
    pub(super) fn new(image: RawFd, event: RawFd) -> io::Result<Self> {
        // Twice as many completions as entries have room, and no more than DEPTH are ever under way: none is dropped.
        let ring = IoUring::builder().dontfork().setup_r_disabled().build(DEPTH as u32)?;
        let submitter = ring.submitter();
        submitter.register_files(&[image])?;
        submitter.register_eventfd(event)?;
        let fixed = squeue::Flags::FIXED_FILE.bits();
        submitter.register_restrictions(&mut [
            Restriction::sqe_op(opcode::Read::CODE),
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Write::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_op(opcode::AsyncCancel2::CODE),
            Restriction::sqe_flags_required(fixed),
            Restriction::register_op(UNREGISTER_FILES),
        ])?;
        submitter.register_enable_rings()?;
        Ok(Self(ring))
    }
}

impl Drop for Uring {
    /// The kernel takes a ring apart some time after it is closed; until then it would hold the image, and its lock.
    fn drop(&mut self) {
        let _ = self.0.submitter().unregister_files();
    }
}

impl Ring for Uring {
    unsafe fn queue(&mut self, number: usize, kind: OpKind, offset: u64, buffers: &[iovec]) {
        let flags = if kind == (OpKind::Write { durable: true }) { libc::RWF_DSYNC } else { 0 };
        let (array, count) = (buffers.as_ptr(), buffers.len() as u32);
        let entry = match (kind, buffers) {
            (OpKind::Flush, _) => opcode::Fsync::new(IMAGE).flags(FsyncFlags::DATASYNC).build(),
            (OpKind::Read, [one]) => {
                opcode::Read::new(IMAGE, one.iov_base.cast(), one.iov_len as u32).offset(offset).build()
            }
            (OpKind::Read, _) => opcode::Readv::new(IMAGE, array, count).offset(offset).build(),
            (OpKind::Write { .. }, [one]) => opcode::Write::new(IMAGE, one.iov_base.cast(), one.iov_len as u32)
                .offset(offset)
                .rw_flags(flags)
                .build(),
            (OpKind::Write { .. }, _) => {
                opcode::Writev::new(IMAGE, array, count).offset(offset).rw_flags(flags).build()
            }
            // IORING_OP_FALLOCATE would go to a thread of the kernel each time; ours can do more.
            (OpKind::Discard { .. } | OpKind::WriteZeroes { .. }, _) => unreachable!("the helper does these"),
        };
        // SAFETY: the caller vouches for the memory.
        let pushed = unsafe { self.0.submission().push(&entry.user_data(number as u64)) };
        pushed.expect("the queue has an entry for each number");
    }

    fn enter(&mut self) -> u64 {
        let mut calls = 0;
        while self.queued() > 0 {
            calls += 1;
            match self.0.submit() {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM) => break,
                    _ => panic!("io_uring_enter: {error}"),
                },
            }
        }
        calls
    }

    fn queued(&self) -> usize {
        // SAFETY: nobody else looks at the queue while this does.
        unsafe { self.0.submission_shared() }.len()
    }

    fn has_finished(&mut self) -> bool {
        !self.0.completion().is_empty()
    }

    /// What waits for a thread of the kernel, as transfers through the page cache do. Linux before 5.19 refuses, and does all.
    fn cancel(&mut self) {
        let cancel = opcode::AsyncCancel2::new(CancelBuilder::any()).build();
        let cancel = cancel.user_data(CANCEL).flags(squeue::Flags::FIXED_FILE);
        // SAFETY: it names no memory. A queue that is full is one the kernel takes nothing from: there is nothing to cancel.
        let _ = unsafe { self.0.submission().push(&cancel) };
        self.enter();
    }

    fn reap(&mut self, finished: &mut Vec<(usize, i64)>) {
        let completions = self.0.completion();
        debug_assert_eq!(completions.overflow(), 0, "there is room for as many as are under way");
        let transfers = completions.filter(|entry| entry.user_data() != CANCEL);
        finished.extend(transfers.map(|entry| (entry.user_data() as usize, entry.result().into())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    /// Whether this kernel cancels all that a file has, by its release.
    fn cancels_all() -> bool {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
        (numbers.next(), numbers.next()) >= (Some(5), Some(19))
    }

    /// A pipe nobody writes to is a disk that never answers, and lets go of what it was asked.
    #[test]
    fn what_the_kernel_has_not_begun_is_cancelled() {
        if !cancels_all() {
            return skip::because("Linux before 5.19 cannot");
        }
        let (reader, writer) = io::pipe().unwrap();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut ring = Uring::new(reader.as_raw_fd(), event.as_raw_fd()).unwrap();
        let mut byte = 0_u8;
        let buffer = iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        for number in 0..3 {
            // SAFETY: the buffer is there until all three came back.
            unsafe { ring.queue(number, OpKind::Read, 0, &[buffer]) };
        }
        ring.enter();
        let mut finished = Vec::new();
        ring.reap(&mut finished);
        assert_eq!(finished, []);
        ring.cancel();
        // What was not cancelled ends here, at the end of the pipe.
        drop(writer);
        while finished.len() < 3 {
            ring.reap(&mut finished);
        }
        finished.sort_unstable();
        let canceled = i64::from(-libc::ECANCELED);
        assert_eq!(finished, [(0, canceled), (1, canceled), (2, canceled)]);
        ring.cancel();
        ring.reap(&mut finished);
        assert_eq!(finished.len(), 3, "nothing to cancel, and nothing comes of it");
    }

    /// What one entry comes to: its bytes or its negative errno.
    fn result_of(ring: &mut IoUring, entry: &squeue::Entry) -> i32 {
        // SAFETY: it names no memory.
        unsafe { ring.submission().push(entry) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        ring.completion().next().unwrap().result()
    }

    /// The kernel refuses what the engine never asks for, and any file but the image. A ring that may do everything does both.
    #[test]
    fn a_ring_can_do_nothing_else() {
        let image = tempfile::tempfile().unwrap();
        let (fd, event) = (image.as_raw_fd(), EventFd::new(EFD_NONBLOCK).unwrap());
        let grow = opcode::Fallocate::new(IMAGE, 4096).build();
        let other_file = opcode::Fsync::new(io_uring::types::Fd(fd)).build();
        let flush = opcode::Fsync::new(IMAGE).build();

        let mut restricted = Uring::new(fd, event.as_raw_fd()).unwrap();
        assert_eq!(result_of(&mut restricted.0, &grow), -libc::EACCES);
        assert_eq!(result_of(&mut restricted.0, &other_file), -libc::EACCES);
        assert_eq!(result_of(&mut restricted.0, &flush), 0);
        assert_eq!(image.metadata().unwrap().len(), 0);
        let refused = restricted.0.submitter().register_files(&[fd]).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EACCES));

        let mut free = IoUring::new(4).unwrap();
        free.submitter().register_files(&[fd]).unwrap();
        for entry in [grow, other_file, flush] {
            assert_eq!(result_of(&mut free, &entry), 0);
        }
        assert_eq!(image.metadata().unwrap().len(), 4096);
    }

    #[test]
    fn reasons_why_there_is_no_io_uring() {
        for (errno, sysctl, message, remedy) in [
            (libc::ENOSYS, "0\n", "not in this kernel", "Linux 5.10"),
            (libc::EINVAL, "", "not in this kernel", "Linux 5.10"),
            (libc::EPERM, "2\n", "forbidden by kernel.io_uring_disabled = 2", "io_uring_disabled=0"),
            (libc::EPERM, "1\n", "forbidden by kernel.io_uring_disabled = 1", "io_uring_disabled=0"),
            (libc::EPERM, "0\n", "seccomp filter", "seccomp profile"),
            (libc::EPERM, "", "seccomp filter", "seccomp profile"),
            (libc::ENOMEM, "0\n", "memory lock limit", "ulimit -l"),
            (libc::EMFILE, "0\n", "Too many open files", "dmesg"),
        ] {
            let missing = Missing::new(io::Error::from_raw_os_error(errno), sysctl);
            assert!(missing.to_string().contains(message), "{missing}");
            assert!(missing.remedy().contains(remedy), "{missing}");
        }
    }
}
