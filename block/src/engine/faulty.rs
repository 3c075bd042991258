#![expect(unsafe_code, reason = "stands in for the system calls that take raw guest memory")]
//! For tests: a host that misbehaves as hosts do, and that can be held.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex};

use libc::iovec;

use super::transfer::{Image, retry};
use crate::direct::Alignment;
use crate::disk::Disk;
use crate::ranges::Ranges;
use crate::topology::Topology;

/// What becomes of one system call.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    /// At most this many bytes are transferred.
    Short(usize),
    /// It fails with this errno.
    Fail(i32),
}

/// One system call as it was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Read { offset: u64, buffers: usize },
    Write { offset: u64, buffers: usize, durable: bool },
    Flush,
    Zero { range: Range<u64>, unmap: bool },
    Discard { range: Range<u64> },
}

/// A disk whose system calls follow a script; when that is used up, they are the real ones.
pub(super) struct Faulty {
    disk: Arc<Disk>,
    script: Mutex<VecDeque<Fault>>,
    calls: Mutex<Vec<Call>>,
    held: Mutex<bool>,
    released: Condvar,
}

impl Faulty {
    pub(super) fn new(disk: Arc<Disk>, script: &[Fault]) -> Arc<Self> {
        Arc::new(Self {
            disk,
            script: Mutex::new(script.iter().copied().collect()),
            calls: Mutex::default(),
            held: Mutex::new(false),
            released: Condvar::new(),
        })
    }

    /// From now on every call waits, until `hold(false)`.
    pub(super) fn hold(&self, held: bool) {
        *self.held.lock().unwrap() = held;
        self.released.notify_all();
    }

    /// The calls so far, in the order they were begun.
    pub(super) fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    fn begin(&self, call: Call) -> io::Result<usize> {
        self.calls.lock().unwrap().push(call);
        drop(self.released.wait_while(self.held.lock().unwrap(), |held| *held).unwrap());
        match self.script.lock().unwrap().pop_front() {
            None => Ok(usize::MAX),
            Some(Fault::Short(count)) => Ok(count),
            Some(Fault::Fail(errno)) => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

fn shorten(buffers: &[iovec], mut count: usize) -> Vec<iovec> {
    let mut short = buffers.to_vec();
    for buffer in &mut short {
        buffer.iov_len = buffer.iov_len.min(count);
        count -= buffer.iov_len;
    }
    short
}

impl Image for Faulty {
    unsafe fn read_at(&self, buffers: &[iovec], offset: u64) -> io::Result<usize> {
        assert!(self.alignment().fits(buffers, offset));
        let count = self.begin(Call::Read { offset, buffers: buffers.len() })?;
        // SAFETY: these are parts of the caller's buffers.
        unsafe { self.disk.read_at(&shorten(buffers, count), offset) }
    }

    unsafe fn write_at(&self, buffers: &[iovec], offset: u64, durable: bool) -> io::Result<usize> {
        assert!(self.alignment().fits(buffers, offset));
        let count = self.begin(Call::Write { offset, buffers: buffers.len(), durable })?;
        // SAFETY: as for reading.
        unsafe { self.disk.write_at(&shorten(buffers, count), offset, durable) }
    }

    fn flush(&self) -> io::Result<()> {
        match self.begin(Call::Flush) {
            // Nothing has been tried.
            Err(error) if error.kind() == ErrorKind::Interrupted => Err(error),
            begun => self.flushed(begun.and_then(|_| Disk::flush(&self.disk))),
        }
    }

    fn durably(&self, change: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        self.disk.durably(&mut || {
            change()?;
            retry(|| self.begin(Call::Flush)).map(drop)
        })
    }

    fn flushed(&self, result: io::Result<()>) -> io::Result<()> {
        self.disk.flushed(result)
    }

    fn tells_apart(&self) -> bool {
        self.disk.tells_apart()
    }

    fn zero(&self, range: &Range<u64>, unmap: bool) -> io::Result<()> {
        self.begin(Call::Zero { range: range.clone(), unmap })?;
        self.disk.zero(range, unmap)
    }

    fn discard(&self, range: &Range<u64>) -> io::Result<()> {
        self.begin(Call::Discard { range: range.clone() })?;
        Image::discard(&*self.disk, range)
    }

    fn topology(&self) -> Topology {
        self.disk.topology()
    }

    fn alignment(&self) -> Alignment {
        self.disk.alignment()
    }

    fn ranges(&self) -> &Ranges {
        self.disk.ranges()
    }
}
