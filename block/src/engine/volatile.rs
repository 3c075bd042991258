#![expect(unsafe_code, reason = "stands in for system calls that take raw guest memory")]
//! For tests: an image whose writes stay in a cache that loses power. The engines' own code runs over it; only the system
//! calls are played, on whatever thread makes them.

use std::io;
use std::mem;
use std::ops::Range;
use std::slice;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use libc::iovec;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ring::{Ring, RingEngine};
use super::threads::ThreadPool;
use super::transfer::Image;
use super::{Engine, OpKind};
use crate::SECTOR_SIZE;
use crate::direct::Alignment;
use crate::ranges::Ranges;
use crate::topology::Topology;

const SECTOR: usize = SECTOR_SIZE as usize;

/// Threads that play the kernel of one ring.
const KERNEL_THREADS: usize = 3;

/// What the host breaks on purpose, for a test to show that it would notice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lie {
    /// Nothing.
    #[default]
    None,
    /// `fdatasync` succeeds and does nothing.
    Flush,
    /// RWF_DSYNC is ignored.
    Durable,
}

/// An image of zeroes with a volatile cache. A written sector gets another version in the cache; only `fdatasync`, for
/// writes that had returned before, and RWF_DSYNC, for those of its own, are sure to make it stable. Transfers take their
/// time, and now and then are short.
pub struct Volatile {
    alignment: Alignment,
    lie: Lie,
    ranges: Ranges,
    state: Mutex<State>,
}

struct State {
    sectors: Vec<Sector>,
    /// Versions so far, of all sectors.
    versions: u64,
    /// Of xorshift64*.
    random: u64,
    /// The power failed: nothing changes any more.
    off: bool,
}

struct Sector {
    stable: Version,
    /// Newer than `stable`, in order.
    cached: Vec<Version>,
}

#[derive(Clone)]
struct Version {
    number: u64,
    bytes: [u8; SECTOR],
}

impl Volatile {
    /// `sectors` of zeroes, whose host demands `alignment`. `seed` decides what is slow, short, and lost.
    pub fn new(sectors: usize, alignment: Alignment, lie: Lie, seed: u64) -> Arc<Self> {
        let sector = || Sector { stable: Version { number: 0, bytes: [0; SECTOR] }, cached: Vec::new() };
        let sectors = (0..sectors).map(|_| sector()).collect();
        let state = State { sectors, versions: 0, random: seed | 1, off: false };
        Arc::new(Self { alignment, lie, ranges: Ranges::default(), state: Mutex::new(state) })
    }

    /// The engine `threads` over it.
    ///
    /// # Errors
    /// When the host gives no thread.
    pub fn pool(self: &Arc<Self>) -> io::Result<Box<dyn Engine>> {
        Ok(Box::new(ThreadPool::helper(self.clone(), "test-io", EventFd::new(EFD_NONBLOCK)?)?))
    }

    /// An engine over a queue in the kernel, as `native` and `io_uring` are.
    ///
    /// # Errors
    /// When the host gives no thread.
    pub fn ring(self: &Arc<Self>) -> io::Result<Box<dyn Engine>> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        let ring = PlayedRing::new(self, &event)?;
        Ok(Box::new(RingEngine::new(self.clone(), ring, event, "test-io")?))
    }

    /// `fdatasync`, by someone beside the engines.
    ///
    /// # Errors
    /// None.
    pub fn flush(&self) -> io::Result<()> {
        Image::flush(self)
    }

    /// Cuts the power, in the middle of whatever goes on. Returns what is on the disk afterwards: of each sector its
    /// stable version or one from the cache, for those are written back at any time and in any order.
    pub fn lose_power(&self) -> Vec<u8> {
        let mut state = self.lock();
        state.off = true;
        let mut image = Vec::new();
        for at in 0..state.sectors.len() {
            let choice = state.random();
            let sector = &state.sectors[at];
            let chosen = choice as usize % (sector.cached.len() + 1);
            image.extend(sector.cached.get(chosen).unwrap_or(&sector.stable).bytes);
        }
        image
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics while holding this lock")
    }

    /// Others come first, for a while.
    fn pause(&self) {
        let mut state = self.lock();
        let (choice, off) = (state.random(), state.off);
        drop(state);
        if off {
            return;
        }
        match choice % 8 {
            0 => thread::sleep(Duration::from_micros(100)),
            often => (0..often).for_each(|_| thread::yield_now()),
        }
    }

    /// How many of `len` bytes from `offset` on one call transfers.
    fn allowed(&self, len: usize, offset: u64) -> usize {
        let mut state = self.lock();
        let len = len.min((state.sectors.len() * SECTOR).saturating_sub(offset as usize));
        // The page cache stops short at the end of a page, and O_DIRECT at that of a block.
        let (choice, block) = (state.random() as usize, SECTOR.max(self.alignment.block as usize));
        if choice.is_multiple_of(8) && len > block { (1 + choice / 8 % (len / block)) * block } else { len }
    }
}

impl State {
    fn random(&mut self) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
    }

    /// Puts `bytes` over the newest version of a sector, from byte `from` on. Returns the number of the one it makes.
    fn write(&mut self, sector: usize, from: usize, bytes: &[u8]) -> u64 {
        if !self.off {
            self.versions += 1;
            let sector = &mut self.sectors[sector];
            let mut new = Version { number: self.versions, ..sector.newest().clone() };
            new.bytes[from..from + bytes.len()].copy_from_slice(bytes);
            sector.cached.push(new);
        }
        self.versions
    }
}

impl Sector {
    fn newest(&self) -> &Version {
        self.cached.last().unwrap_or(&self.stable)
    }

    /// Makes the newest version up to `number` stable.
    fn harden(&mut self, number: u64) {
        if let Some(version) = self.cached.iter().rfind(|version| version.number <= number) {
            self.stable = version.clone();
            self.cached.retain(|version| version.number > self.stable.number);
        }
    }
}

/// Cuts `len` bytes from byte `offset` of the image on into pieces of one sector each: which, from which of its bytes on,
/// and which bytes of the `len`.
fn sectors(offset: usize, len: usize) -> impl Iterator<Item = (usize, usize, Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let (sector, from) = ((offset + done) / SECTOR, (offset + done) % SECTOR);
        let count = (SECTOR - from).min(len - done);
        done += count;
        (count > 0).then(|| (sector, from, done - count..done))
    })
}

fn length(buffers: &[iovec]) -> usize {
    buffers.iter().map(|buffer| buffer.iov_len).sum()
}

impl Image for Volatile {
    unsafe fn read_at(&self, buffers: &[iovec], offset: u64) -> io::Result<usize> {
        assert!(self.alignment.fits(buffers, offset));
        let len = self.allowed(length(buffers), offset);
        let mut bytes: Vec<u8> = Vec::with_capacity(len);
        for (sector, from, piece) in sectors(offset as usize, len) {
            bytes.extend(&self.lock().sectors[sector].newest().bytes[from..from + piece.len()]);
        }
        self.pause();
        let mut rest = &bytes[..];
        for buffer in buffers {
            let (now, later) = rest.split_at(rest.len().min(buffer.iov_len));
            // SAFETY: the caller vouches for the buffer, and this is no longer.
            unsafe { now.as_ptr().copy_to_nonoverlapping(buffer.iov_base.cast(), now.len()) };
            rest = later;
        }
        Ok(len)
    }

    unsafe fn write_at(&self, buffers: &[iovec], offset: u64, durable: bool) -> io::Result<usize> {
        assert!(self.alignment.fits(buffers, offset));
        let len = self.allowed(length(buffers), offset);
        let mut bytes = Vec::new();
        for buffer in buffers {
            // SAFETY: the caller vouches for the buffer.
            bytes.extend(unsafe { slice::from_raw_parts(buffer.iov_base.cast::<u8>(), buffer.iov_len) });
        }
        let mut written = Vec::new();
        for (sector, from, piece) in sectors(offset as usize, len) {
            written.push((sector, self.lock().write(sector, from, &bytes[piece])));
            self.pause();
        }
        if durable && self.lie != Lie::Durable {
            let mut state = self.lock();
            for (sector, number) in written {
                state.sectors[sector].harden(number);
            }
        }
        Ok(len)
    }

    fn flush(&self) -> io::Result<()> {
        let number = self.lock().versions;
        self.pause();
        let mut state = self.lock();
        if self.lie != Lie::Flush && !state.off {
            state.sectors.iter_mut().for_each(|sector| sector.harden(number));
        }
        Ok(())
    }

    fn durably(&self, change: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        change()?;
        self.flush()
    }

    fn flushed(&self, result: io::Result<()>) -> io::Result<()> {
        result
    }

    fn tells_apart(&self) -> bool {
        true
    }

    fn zero(&self, range: &Range<u64>, _unmap: bool) -> io::Result<()> {
        // Some hosts cannot, and it is written by hand.
        if self.lock().random().is_multiple_of(4) {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        self.discard(range)
    }

    fn discard(&self, range: &Range<u64>) -> io::Result<()> {
        for (sector, from, piece) in sectors(range.start as usize, (range.end - range.start) as usize) {
            self.lock().write(sector, from, &[0; SECTOR][..piece.len()]);
            self.pause();
        }
        Ok(())
    }

    fn topology(&self) -> Topology {
        let block = self.alignment.block.max(SECTOR_SIZE);
        Topology {
            physical_block: block,
            alignment_offset: 0,
            min_io: block,
            opt_io: 0,
            discard: block,
            unit: block,
            device: false,
        }
    }

    fn alignment(&self) -> Alignment {
        self.alignment
    }

    fn ranges(&self) -> &Ranges {
        &self.ranges
    }
}

/// A queue in a kernel that a few threads play.
struct PlayedRing {
    queued: Vec<Call>,
    calls: Option<Sender<Call>>,
    finished: Arc<Mutex<Vec<(usize, i64)>>>,
    threads: Vec<JoinHandle<()>>,
}

struct Call {
    number: usize,
    kind: OpKind,
    offset: u64,
    buffers: *const iovec,
    count: usize,
}

// SAFETY: the engine keeps what they point to until the number is reaped.
unsafe impl Send for Call {}

impl PlayedRing {
    fn new(image: &Arc<Volatile>, event: &EventFd) -> io::Result<Self> {
        let (sender, receiver) = channel();
        let (receiver, finished) = (Arc::new(Mutex::new(receiver)), Arc::default());
        let mut threads = Vec::new();
        for _ in 0..KERNEL_THREADS {
            let (image, receiver, finished) = (image.clone(), Arc::clone(&receiver), Arc::clone(&finished));
            let event = event.try_clone()?;
            threads.push(thread::Builder::new().spawn(move || play(&image, &receiver, &finished, &event))?);
        }
        Ok(Self { queued: Vec::new(), calls: Some(sender), finished, threads })
    }
}

/// The life of a thread of the played kernel.
fn play(image: &Volatile, calls: &Mutex<Receiver<Call>>, finished: &Mutex<Vec<(usize, i64)>>, event: &EventFd) {
    loop {
        let Ok(call) = calls.lock().expect("nobody panics here").recv() else { return };
        let buffers = if call.count == 0 {
            &[]
        } else {
            // SAFETY: the engine keeps the array until the number is reaped.
            unsafe { slice::from_raw_parts(call.buffers, call.count) }
        };
        let result = match call.kind {
            // SAFETY: the engine keeps their targets, too.
            OpKind::Read => unsafe { image.read_at(buffers, call.offset) },
            // SAFETY: as above.
            OpKind::Write { durable } => unsafe { image.write_at(buffers, call.offset, durable) },
            OpKind::Flush => image.flush().map(|()| 0),
            OpKind::Discard { .. } | OpKind::WriteZeroes { .. } => unreachable!("no ring is given these"),
        };
        let result = match result {
            Ok(len) => len.try_into().expect("transfers are short"),
            Err(error) => -i64::from(error.raw_os_error().unwrap_or(libc::EIO)),
        };
        finished.lock().expect("nobody panics here").push((call.number, result));
        // Only full if nobody waits for it.
        let _ = event.write(1);
    }
}

impl Ring for PlayedRing {
    unsafe fn queue(&mut self, number: usize, kind: OpKind, offset: u64, buffers: &[iovec]) {
        self.queued.push(Call { number, kind, offset, buffers: buffers.as_ptr(), count: buffers.len() });
    }

    fn enter(&mut self) -> u64 {
        for call in self.queued.drain(..) {
            self.calls.as_ref().expect("open until dropped").send(call).expect("the threads live until then");
        }
        0
    }

    fn queued(&self) -> usize {
        self.queued.len()
    }

    fn has_finished(&mut self) -> bool {
        !self.finished.lock().expect("nobody panics here").is_empty()
    }

    fn cancel(&mut self) {
        let dropped = self.queued.drain(..).map(|call| (call.number, i64::from(-libc::ECANCELED)));
        self.finished.lock().expect("nobody panics here").extend(dropped);
    }

    fn reap(&mut self, finished: &mut Vec<(usize, i64)>) {
        finished.append(&mut self.finished.lock().expect("nobody panics here"));
    }
}

impl Drop for PlayedRing {
    fn drop(&mut self) {
        self.calls = None;
        for thread in mem::take(&mut self.threads) {
            // A thread that panicked has said so itself.
            let _ = thread.join();
        }
    }
}
