#![expect(unsafe_code, reason = "linux-aio is only raw calls, and memory it shares with us")]
//! The engine `native`: Linux AIO (io_submit(2)), which is asynchronous only with O_DIRECT. Owned by the worker.

use std::fs;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use libc::{c_ulong, iocb, iovec};
use thiserror::Error;
use vmm_sys_util::aio::{
    IOCB_CMD_FDSYNC, IOCB_CMD_PREAD, IOCB_CMD_PREADV, IOCB_CMD_PWRITE, IOCB_CMD_PWRITEV, IOCB_FLAG_RESFD, IoEvent,
};
use vmm_sys_util::eventfd::EventFd;

use super::ring::{DEPTH, Ring, RingEngine};
use super::{Engine, OpKind};
use crate::disk::Disk;

/// The engine for `disk`, which announces on `event`. `name` is that of its helper threads.
///
/// # Errors
/// When the host gives no context, thread or eventfd.
pub fn start(disk: Arc<Disk>, name: &str, event: EventFd) -> io::Result<Box<dyn Engine>> {
    let ring = Native::new(disk.file().as_raw_fd(), event.as_raw_fd())?;
    Ok(Box::new(RingEngine::new(disk, ring, event, name)?))
}

/// Why there is no linux-aio.
#[derive(Debug, Error)]
pub enum Missing {
    /// ENOSYS.
    #[error("linux-aio is not in this kernel")]
    Kernel,
    /// EAGAIN: other programs have all requests there are.
    #[error("of the host's {limit} linux-aio requests too few are left ({used} are taken)")]
    Exhausted {
        /// fs.aio-nr.
        used: String,
        /// fs.aio-max-nr.
        limit: String,
    },
    /// EPERM: only a seccomp filter says so.
    #[error("linux-aio is forbidden, most likely by the seccomp filter of a container")]
    Forbidden,
    /// Anything else.
    #[error("linux-aio cannot be used: {0}")]
    Other(io::Error),
}

impl Missing {
    fn new(error: io::Error) -> Self {
        let number = |file| fs::read_to_string(file).unwrap_or_default().trim().to_owned();
        match error.raw_os_error() {
            Some(libc::ENOSYS) => Self::Kernel,
            Some(libc::EPERM) => Self::Forbidden,
            Some(libc::EAGAIN) => {
                Self::Exhausted { used: number("/proc/sys/fs/aio-nr"), limit: number("/proc/sys/fs/aio-max-nr") }
            }
            _ => Self::Other(error),
        }
    }

    /// What to do about it, in one line.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Kernel => "use a kernel with CONFIG_AIO",
            Self::Exhausted { .. } => "raise the limit with \"sudo sysctl fs.aio-max-nr=1048576\"",
            Self::Forbidden => "allow io_setup, io_submit and io_getevents in the container's seccomp profile",
            Self::Other(_) => "look for the reason with \"sudo dmesg\"",
        }
    }
}

/// Whether this engine works here, for that many `queues` at once. Nothing is set up for it: to take a context apart the
/// kernel waits for all CPUs, tens of milliseconds.
///
/// # Errors
/// Why not.
pub fn probe(queues: u16) -> Result<(), Missing> {
    let mut context: c_ulong = 0;
    // SAFETY: without room for events it only says whether there is such a call, and whether we may make it.
    let result = unsafe { libc::syscall(libc::SYS_io_setup, 0, &raw mut context) };
    let error = io::Error::last_os_error();
    if result < 0 && error.raw_os_error() != Some(libc::EINVAL) {
        return Err(Missing::new(error));
    }
    let needed = u64::from(queues) * DEPTH as u64;
    match room() {
        Some(room) if room < needed => Err(Missing::new(io::Error::from_raw_os_error(libc::EAGAIN))),
        _ => Ok(()),
    }
}

/// Requests that linux-aio has left for the whole host: fs.aio-max-nr less fs.aio-nr. `None` if it does not say.
pub fn room() -> Option<u64> {
    let number = |file| fs::read_to_string(file).ok()?.trim().parse::<u64>().ok();
    Some(number("/proc/sys/fs/aio-max-nr")?.saturating_sub(number("/proc/sys/fs/aio-nr")?))
}

/// `aio_context_t`. Dropping it waits for what is in flight.
struct Context(c_ulong);

impl Context {
    fn new() -> io::Result<Self> {
        let mut context = 0;
        // SAFETY: it fills in a number of ours.
        let result = unsafe { libc::syscall(libc::SYS_io_setup, DEPTH, &raw mut context) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(Self(context)) }
    }

    /// Submits the first of `batch`; returns how many.
    ///
    /// # Safety
    /// What they name stays until their completion.
    unsafe fn submit(&self, batch: &[*mut iocb]) -> io::Result<usize> {
        // SAFETY: an array of that length; the kernel copies the control blocks, the caller vouches for the rest.
        let count = unsafe { libc::syscall(libc::SYS_io_submit, self.0, batch.len(), batch.as_ptr()) };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    /// Takes out completions without waiting; returns how many.
    fn get_events(&self, events: &mut [IoEvent]) -> usize {
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let (most, array) = (events.len(), events.as_mut_ptr());
        // SAFETY: an array of that length, and a time that is read.
        let count = unsafe { libc::syscall(libc::SYS_io_getevents, self.0, 0_usize, most, array, &raw const now) };
        // EINTR is all it can fail with, and then the event still stands.
        usize::try_from(count).unwrap_or(0)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: nobody uses it any more.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.0) };
    }
}

/// The head of the completion ring, which is where the context's number points (`struct aio_ring` of Linux). `nr` events
/// follow at `header_length`; the kernel writes `tail`, we write `head`.
#[repr(C)]
struct RingHead {
    id: u32,
    nr: u32,
    head: AtomicU32,
    tail: AtomicU32,
    magic: u32,
    compat_features: u32,
    incompat_features: u32,
    header_length: u32,
}

impl RingHead {
    fn is_empty(&self) -> bool {
        self.head.load(Ordering::Relaxed) == self.tail.load(Ordering::Acquire)
    }
}

/// `AIO_RING_MAGIC`: the layout above.
const MAGIC: u32 = 0xa10a_10a1;

/// One context.
pub(super) struct Native {
    context: Context,
    /// The ring is as we know it: completions can be read from it.
    pub(super) mapped: bool,
    /// Indexed by number.
    blocks: Box<[iocb]>,
    /// What is queued, in order.
    batch: Vec<*mut iocb>,
    /// What the kernel refused to begin: numbers and negative errnos.
    refused: Vec<(usize, i64)>,
    events: Vec<IoEvent>,
    image: RawFd,
    event: RawFd,
}

// SAFETY: the pointers are into `blocks`, which it owns.
unsafe impl Send for Native {}

impl Native {
    pub(super) fn new(image: RawFd, event: RawFd) -> io::Result<Self> {
        let context = Context::new()?;
        // SAFETY: the number of a context is the address of its ring, mapped as long as it lives.
        let header = unsafe { &*ptr::with_exposed_provenance::<RingHead>(context.0 as usize) };
        let mapped = header.magic == MAGIC && header.incompat_features == 0;
        // SAFETY: a control block is plain numbers, for which zero is a value.
        let blocks = (0..DEPTH).map(|_| unsafe { mem::zeroed() }).collect();
        let events = vec![IoEvent::default(); DEPTH];
        Ok(Self {
            context,
            mapped,
            blocks,
            batch: Vec::with_capacity(DEPTH),
            refused: Vec::with_capacity(DEPTH),
            events,
            image,
            event,
        })
    }

    fn head(&self) -> &RingHead {
        // SAFETY: as in `new`. The fields that change are atomic.
        unsafe { &*ptr::with_exposed_provenance::<RingHead>(self.context.0 as usize) }
    }

    fn reap_mapped(&mut self, finished: &mut Vec<(usize, i64)>) {
        let header = self.head();
        let address = self.context.0 as usize + header.header_length as usize;
        let events = ptr::with_exposed_provenance::<IoEvent>(address);
        // Only we write the head. The kernel's events are there before its tail says so.
        let mut head = header.head.load(Ordering::Relaxed);
        let tail = header.tail.load(Ordering::Acquire);
        while head != tail {
            // SAFETY: below `nr`, so in the ring, and not written again until the head has passed it.
            let event = unsafe { events.add(head as usize).read_volatile() };
            finished.push((event.data as usize, event.res));
            head = (head + 1) % header.nr;
        }
        header.head.store(head, Ordering::Release);
    }
}

impl Ring for Native {
    unsafe fn queue(&mut self, number: usize, kind: OpKind, offset: u64, buffers: &[iovec]) {
        let block = &mut self.blocks[number];
        block.aio_data = number as u64;
        block.aio_fildes = self.image.cast_unsigned();
        block.aio_flags = IOCB_FLAG_RESFD;
        block.aio_resfd = self.event.cast_unsigned();
        block.aio_rw_flags = if kind == (OpKind::Write { durable: true }) { libc::RWF_DSYNC } else { 0 };
        // More than the kernel takes is more than an image has.
        block.aio_offset = i64::try_from(offset).unwrap_or(i64::MAX);
        let opcode = match (kind, buffers) {
            (OpKind::Flush, _) => IOCB_CMD_FDSYNC,
            (OpKind::Read, [_]) => IOCB_CMD_PREAD,
            (OpKind::Read, _) => IOCB_CMD_PREADV,
            (OpKind::Write { .. }, [_]) => IOCB_CMD_PWRITE,
            (OpKind::Write { .. }, _) => IOCB_CMD_PWRITEV,
            (OpKind::Discard { .. } | OpKind::WriteZeroes { .. }, _) => unreachable!("the helper does these"),
        };
        block.aio_lio_opcode = opcode as u16;
        (block.aio_buf, block.aio_nbytes) = match (kind, buffers) {
            (OpKind::Flush, _) => (0, 0),
            (_, [one]) => (one.iov_base.expose_provenance() as u64, one.iov_len as u64),
            (_, many) => (many.as_ptr().expose_provenance() as u64, many.len() as u64),
        };
        self.batch.push(block);
    }

    fn enter(&mut self) -> u64 {
        let mut calls = 0;
        while !self.batch.is_empty() {
            calls += 1;
            // SAFETY: the caller of `queue` vouched for what they name.
            match unsafe { self.context.submit(&self.batch) } {
                Ok(0) => break,
                Ok(count) => drop(self.batch.drain(..count)),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN) | None => break,
                    Some(errno) => self.refuse(errno),
                },
            }
        }
        calls
    }

    fn queued(&self) -> usize {
        self.batch.len()
    }

    fn has_finished(&mut self) -> bool {
        !self.refused.is_empty() || self.mapped && !self.head().is_empty()
    }

    /// Only of what was not handed over: the kernel gives up no transfer of a disk (io_cancel(2)).
    fn cancel(&mut self) {
        // SAFETY: the pointers are into `blocks`.
        let numbers = self.batch.drain(..).map(|block| unsafe { (*block).aio_data } as usize);
        self.refused.extend(numbers.map(|number| (number, i64::from(-libc::ECANCELED))));
    }

    fn reap(&mut self, finished: &mut Vec<(usize, i64)>) {
        finished.append(&mut self.refused);
        if self.mapped {
            return self.reap_mapped(finished);
        }
        let count = self.context.get_events(&mut self.events);
        finished.extend(self.events[..count].iter().map(|event| (event.data as usize, event.res)));
    }
}

impl Native {
    /// The kernel does not begin the first of the batch.
    fn refuse(&mut self, errno: i32) {
        let block = self.batch.remove(0);
        // SAFETY: the pointer is into `blocks`.
        let number = unsafe { (*block).aio_data } as usize;
        self.refused.push((number, i64::from(-errno)));
        // As the kernel does for the others. Only full if nobody waits for it.
        // SAFETY: eight bytes of ours, to a descriptor that the engine keeps open.
        unsafe { libc::write(self.event, ptr::from_ref(&1_u64).cast(), 8) };
    }
}
