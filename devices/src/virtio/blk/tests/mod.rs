//! The device as a driver sees it: through eventfds and guest memory.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use block::cache::CacheMode;
use block::disk::DiskError;
use block::engine::Aio;
use tempfile::TempDir;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::virtio::device::Interrupt;
use crate::virtio::driver::{Driver, readable, writable};
use crate::virtio::queue::{Segment, Virtqueue};

// virtio 1.2, 5.2.6.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const PLAIN: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_BLK_F_FLUSH;
const WITHOUT_FLUSH: u64 = PLAIN & !(1 << VIRTIO_BLK_F_FLUSH);
const EVENT_IDX: u64 = PLAIN | 1 << VIRTIO_RING_F_EVENT_IDX;

// Guest memory: rings, then a header and a status byte for each request, then data.
const MEMORY: usize = 0x20_0000;
const RINGS: u64 = 0x1000;
const HEADERS: u64 = 0x1_0000;
const STATUS: u64 = 0x2_0000;
const DATA: u64 = 0x4_0000;

/// What a status byte and its neighbours are before the device writes.
const UNTOUCHED: u8 = 0xaa;
const SECTORS: u64 = 2048;

struct Line {
    queue: EventFd,
    reset: EventFd,
}

impl Interrupt for Line {
    fn queue(&self, queue: u16) {
        assert_eq!(queue, 0);
        self.queue.write(1).unwrap();
    }
    fn config(&self) {
        panic!("the configuration never changes");
    }
    fn needs_reset(&self) {
        self.reset.write(1).unwrap();
    }
}

/// The lines of a device with several queues, by queue.
struct Lines(Vec<Arc<Line>>);

impl Interrupt for Lines {
    fn queue(&self, queue: u16) {
        self.0[usize::from(queue)].queue(0);
    }
    fn config(&self) {
        self.0[0].config();
    }
    fn needs_reset(&self) {
        self.0[0].needs_reset();
    }
}

/// Waits until `event` was written, and clears it. Only a lost event takes a minute.
fn wait(event: &EventFd) {
    let epoll = Epoll::new().unwrap();
    epoll.ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(EventSet::IN, 0)).unwrap();
    // The kernel takes rings apart with the help of the thread that made them, and interrupts it for that.
    let ready = loop {
        match epoll.wait(60_000, &mut [EpollEvent::default()]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            ready => break ready.unwrap(),
        }
    };
    assert_eq!(ready, 1, "the event was lost");
    event.read().unwrap();
}

/// The driver of one queue.
struct Guest {
    memory: Arc<GuestMemoryMmap>,
    /// Where its part of the memory begins: the constants above count from here.
    base: u64,
    index: u16,
    size: u16,
    driver: Driver,
    kick: EventFd,
    line: Arc<Line>,
    features: u64,
    requests: u64,
}

impl Guest {
    fn new(features: u64) -> Self {
        Self::many(features, 1, QUEUE_SIZE).remove(0)
    }

    /// One for each of `count` queues of `size` entries.
    fn many(features: u64, count: u16, size: u16) -> Vec<Self> {
        let ranges = [(GuestAddress(0), MEMORY * usize::from(count))];
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        (0..count).map(|index| Self::one(memory.clone(), features, index, size)).collect()
    }

    fn one(memory: Arc<GuestMemoryMmap>, features: u64, index: u16, size: u16) -> Self {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let base = u64::from(index) * MEMORY as u64;
        let mut guest = Self {
            driver: Driver::new(memory.clone(), base + RINGS, size),
            memory,
            base,
            index,
            size,
            kick: event(),
            line: Arc::new(Line { queue: event(), reset: event() }),
            features,
            requests: 0,
        };
        guest.restart();
        guest
    }

    /// New rings, as after a reset.
    fn restart(&mut self) {
        self.driver = Driver::new(self.memory.clone(), self.base + RINGS, self.size);
        self.fill(self.base + HEADERS, &[UNTOUCHED; (DATA - HEADERS) as usize / 64].repeat(64));
        self.requests = 0;
    }

    fn queue(&self) -> ActiveQueue {
        let queue = Virtqueue::new(self.driver.layout(), self.features, self.memory.clone()).unwrap();
        ActiveQueue { index: self.index, queue, kick: self.kick.try_clone().unwrap() }
    }

    fn activate(&self, blk: &mut Blk) {
        blk.activate(Activation {
            memory: self.memory.clone(),
            features: self.features,
            queues: vec![self.queue()],
            interrupt: self.line.clone(),
        })
        .unwrap();
    }

    fn fill(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Writes the header of the next request; returns it, and the place of its status.
    fn header(&mut self, kind: u32, sector: u64) -> (Segment, Segment) {
        let (header, status) = (HEADERS + self.requests * 16, STATUS + self.requests * 3 + 1);
        let (header, status) = (self.base + header, self.base + status);
        self.requests += 1;
        self.fill(header, &kind.to_le_bytes());
        self.fill(header + 4, &[0; 4]);
        self.fill(header + 8, &sector.to_le_bytes());
        (readable(header, 16), writable(status, 1))
    }

    /// Makes a request available without a notification; returns its head and the place of its status.
    fn offer(&mut self, kind: u32, sector: u64, data: &[Segment]) -> (u16, u64) {
        let (header, status) = self.header(kind, sector);
        let chain: Vec<_> = [header].into_iter().chain(data.iter().copied()).chain([status]).collect();
        (self.driver.add(&chain), status.address.0)
    }

    /// Notifies and waits until one request is used; returns what the used ring says.
    fn turn(&mut self) -> (u16, u32) {
        self.kick.write(1).unwrap();
        loop {
            if let Some(used) = self.driver.used() {
                return used;
            }
            wait(&self.line.queue);
        }
    }

    /// One request from beginning to end: its status and the length in the used ring.
    fn request(&mut self, kind: u32, sector: u64, data: &[Segment]) -> (u8, u32) {
        let (head, status) = self.offer(kind, sector, data);
        let used = self.turn();
        assert_eq!(used.0, head);
        let around = self.bytes(status - 1, 3);
        assert_eq!((around[0], around[2]), (UNTOUCHED, UNTOUCHED), "the status is one byte");
        (around[1], used.1)
    }
}

struct Image {
    _dir: TempDir,
    path: PathBuf,
}

impl Image {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("disk.img");
        File::create(&path).unwrap().set_len(SECTORS * 512).unwrap();
        Self { _dir: dir, path }
    }

    fn open(&self, readonly: bool, serial: Option<&str>) -> Blk {
        self.open_as(readonly, serial, CacheMode::Writeback, Aio::Threads)
    }

    fn open_as(&self, readonly: bool, serial: Option<&str>, cache: CacheMode, aio: Aio) -> Blk {
        Blk::new(
            self.disk_as(readonly, cache),
            &BlkOptions { serial: serial.map(str::to_owned), engines: Engines::only(aio), ..BlkOptions::default() },
        )
    }

    /// With this many queues of this size.
    fn open_with(&self, queues: u16, queue_size: u16, aio: Aio) -> Blk {
        self.open_for(&BlkOptions { engines: Engines::only(aio), queues, queue_size, ..BlkOptions::default() })
    }

    fn open_for(&self, options: &BlkOptions) -> Blk {
        Blk::new(self.disk(), options)
    }

    fn disk(&self) -> Arc<Disk> {
        self.disk_as(false, CacheMode::Writeback)
    }

    /// A test that starts a program has every lock of every other, from fork to exec: one that was just given up may
    /// still be there for a moment.
    fn disk_as(&self, readonly: bool, cache: CacheMode) -> Arc<Disk> {
        let open = || Disk::open(&self.path, readonly, cache, "disk0");
        for _ in 0..10_000 {
            match open() {
                Err(DiskError::Locked { .. }) => std::thread::sleep(Duration::from_millis(1)),
                disk => return Arc::new(disk.unwrap()),
            }
        }
        Arc::new(open().unwrap())
    }
}

/// A writable disk of [`SECTORS`], running.
fn running(features: u64) -> (Image, Blk, Guest) {
    let (image, guest) = (Image::new(), Guest::new(features));
    let mut blk = image.open(false, Some("serial-1"));
    guest.activate(&mut blk);
    (image, blk, guest)
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|n| ((n + seed) % 251) as u8).collect()
}

/// An image in whole 4 KiB blocks where the build is: on a disk, so that it can be opened with O_DIRECT.
fn image_on_disk() -> Image {
    let dir = TempDir::new_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
    let path = dir.path().join("disk.img");
    fs::write(&path, vec![0; SECTORS as usize * 512]).unwrap();
    Image { _dir: dir, path }
}

mod allocations;
mod changes;
mod config;
mod crash;
mod errors;
mod host;
mod hostile;
mod limits;
mod queues;
mod requests;
mod rings;
mod statistics;
mod workers;
mod write_cache;
