//! The device as a driver sees it: through eventfds and guest memory.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::Ordering;

use block::engine::{Completion, Engine, Op, OpKind};
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

struct Guest {
    memory: Arc<GuestMemoryMmap>,
    driver: Driver,
    kick: EventFd,
    line: Arc<Line>,
    features: u64,
    requests: u64,
}

impl Guest {
    fn new(features: u64) -> Self {
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap());
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let mut guest = Self {
            driver: Driver::new(memory.clone(), RINGS, QUEUE_SIZE),
            memory,
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
        self.driver = Driver::new(self.memory.clone(), RINGS, QUEUE_SIZE);
        self.fill(HEADERS, &[UNTOUCHED; (DATA - HEADERS) as usize / 64].repeat(64));
        self.requests = 0;
    }

    fn queue(&self) -> ActiveQueue {
        let queue = Virtqueue::new(self.driver.layout(), self.features, self.memory.clone()).unwrap();
        ActiveQueue { index: 0, queue, kick: self.kick.try_clone().unwrap() }
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
        let disk = Disk::open(&self.path, readonly, cache, "disk0").unwrap();
        Blk::new(Arc::new(disk), &BlkOptions { number: 0, serial: serial.map(str::to_owned), aio })
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

#[test]
fn writes_reads_and_flushes() {
    let (image, _blk, mut guest) = running(PLAIN);
    let content = pattern(3072, 5);
    guest.fill(DATA, &content);
    let scattered = [readable(DATA, 1), readable(DATA + 1, 2559), readable(DATA + 2560, 512)];
    assert_eq!(guest.request(OUT, 7, &scattered), (OK, 1));
    assert_eq!(guest.request(FLUSH, 0, &[]), (OK, 1));
    let file = fs::read(&image.path).unwrap();
    assert!(file[7 * 512..7 * 512 + 3072] == content);
    assert!(file[..7 * 512].iter().chain(&file[7 * 512 + 3072..]).all(|byte| *byte == 0));
    assert_eq!(guest.request(IN, 7, &[writable(DATA + 0x1000, 3000), writable(DATA + 0x2000, 72)]), (OK, 3073));
    assert!(guest.bytes(DATA + 0x1000, 3000) == content[..3000]);
    assert!(guest.bytes(DATA + 0x2000, 73) == [&content[3000..], &[0]].concat());
    assert_eq!(guest.request(IN, 0, &[]), (OK, 1), "no sectors are whole sectors");
}

#[test]
fn tells_its_serial_number() {
    for (serial, expected) in [
        (None, *b"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
        (Some("root"), *b"root\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
        (Some("exactly-twenty-bytes-and-more"), *b"exactly-twenty-bytes"),
    ] {
        let (image, mut guest) = (Image::new(), Guest::new(PLAIN));
        let mut blk = image.open(false, serial);
        guest.activate(&mut blk);
        guest.fill(DATA, &[UNTOUCHED; 64]);
        assert_eq!(guest.request(GET_ID, 0, &[writable(DATA, 9), writable(DATA + 9, 30)]), (OK, 21));
        assert_eq!(guest.bytes(DATA, 22), [&expected[..], &[UNTOUCHED; 2]].concat());
        assert_eq!(guest.request(GET_ID, 0, &[writable(DATA + 32, 4)]), (OK, 5));
        assert_eq!(guest.bytes(DATA + 32, 5), [&expected[..4], &[UNTOUCHED]].concat());
    }
}

#[test]
fn descriptors_may_be_cut_anywhere() {
    let (image, _blk, mut guest) = running(PLAIN);
    let content = pattern(1024, 9);
    // Header and data in one piece, cut into 1, 0, 7, 500 and the rest.
    let (header, status) = guest.header(OUT, 3);
    guest.fill(DATA, &guest.bytes(header.address.0, 16));
    guest.fill(DATA + 16, &content);
    let cut = [readable(DATA, 1), readable(DATA, 0), readable(DATA + 1, 7), readable(DATA + 8, 500)];
    let chain = [&cut[..], &[readable(DATA + 508, 532), status, writable(DATA, 0)]].concat();
    let head = guest.driver.add_indirect(DATA + 0x8000, &chain);
    assert_eq!(guest.turn(), (head, 1));
    assert_eq!(guest.bytes(status.address.0, 1), [OK]);
    assert!(fs::read(&image.path).unwrap()[3 * 512..5 * 512] == content);
    // Data and status in one piece.
    let (header, _) = guest.header(IN, 3);
    guest.fill(DATA + 0x1000, &[UNTOUCHED; 1026]);
    let head = guest.driver.add(&[header, writable(DATA + 0x1000, 100), writable(DATA + 0x1064, 925)]);
    assert_eq!(guest.turn(), (head, 1025));
    assert!(guest.bytes(DATA + 0x1000, 1026) == [&content[..], &[OK, UNTOUCHED]].concat());
}

#[test]
fn refuses_what_is_not_on_the_disk() {
    let (image, _blk, mut guest) = running(PLAIN);
    guest.fill(DATA, &[1; 1024]);
    let before = fs::read(&image.path).unwrap();
    for (sector, len) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (SECTORS + 1, 0),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (u64::MAX / 512, 1024),
        (1 << 55, 512),
        ((1 << 55) + 1, 512),
        (0, 511),
        (0, 513),
    ] {
        assert_eq!(guest.request(IN, sector, &[writable(DATA + 0x1000, len)]), (IOERR, 1), "{sector} {len}");
        assert_eq!(guest.request(OUT, sector, &[readable(DATA, len)]), (IOERR, 1), "{sector} {len}");
    }
    assert_eq!(guest.request(IN, 0, &[writable(DATA, u32::MAX); 3]), (IOERR, 1));
    assert_eq!(guest.bytes(DATA + 0x1000, 1024), [0; 1024]);
    assert!(fs::read(&image.path).unwrap() == before);
    assert_eq!(guest.request(OUT, SECTORS - 1, &[readable(DATA, 512)]), (OK, 1));
    assert_eq!(fs::metadata(&image.path).unwrap().len(), SECTORS * 512);
}

#[test]
fn refuses_what_it_does_not_know() {
    let (_image, _blk, mut guest) = running(PLAIN);
    for kind in [2, 3, 5, 11, 13, 14, 0x8000_0000, u32::MAX] {
        assert_eq!(guest.request(kind, 0, &[writable(DATA, 512)]), (UNSUPP, 1), "type {kind}");
    }
    let (header, status) = guest.header(IN, 0);
    for short in [vec![readable(header.address.0, 15)], vec![], vec![readable(MEMORY as u64 - 8, 16)]] {
        let head = guest.driver.add(&[&short[..], &[writable(DATA, 512), status]].concat());
        assert_eq!(guest.turn(), (head, 1));
        assert_eq!(guest.bytes(status.address.0, 1), [IOERR]);
        guest.fill(status.address.0, &[UNTOUCHED]);
    }
}

#[test]
fn a_buffer_outside_memory_fails_its_request_only() {
    let (_image, _blk, mut guest) = running(PLAIN);
    for address in [MEMORY as u64 - 256, 1 << 40, u64::MAX - 100] {
        assert_eq!(guest.request(IN, 0, &[writable(address, 512)]), (IOERR, 1));
        assert_eq!(guest.request(OUT, 0, &[readable(address, 512)]), (IOERR, 1));
        assert_eq!(guest.request(IN, 0, &[writable(DATA, 512)]), (OK, 513));
    }
    assert_eq!(guest.request(GET_ID, 0, &[writable(1 << 40, 20)]), (IOERR, 1));
}

#[test]
fn a_readonly_disk_is_not_written() {
    let (image, mut guest) = (Image::new(), Guest::new(PLAIN));
    let mut blk = image.open(true, None);
    assert_ne!(blk.features() & 1 << 5, 0, "VIRTIO_BLK_F_RO");
    guest.activate(&mut blk);
    guest.fill(DATA, &[1; 512]);
    assert_eq!(guest.request(OUT, 0, &[readable(DATA, 512)]), (IOERR, 1));
    assert_eq!(guest.request(IN, 0, &[writable(DATA, 512)]), (OK, 513));
    assert_eq!(guest.request(FLUSH, 0, &[]), (OK, 1));
    assert_eq!(guest.bytes(DATA, 512), [0; 512]);
}

#[test]
fn configuration_as_the_specification_lays_it_out() {
    let blk = Image::new().open(false, None);
    assert_eq!(blk.device_type(), 2);
    assert_eq!(blk.features(), 1 << 2 | 1 << 6 | 1 << 9);
    let mut config = [0xff; 64];
    blk.read_config(0, &mut config);
    let mut expected = [0; 64];
    expected[0..8].copy_from_slice(&SECTORS.to_le_bytes());
    expected[12..16].copy_from_slice(&254_u32.to_le_bytes());
    expected[20..24].copy_from_slice(&512_u32.to_le_bytes());
    assert_eq!(config, expected);
    for (offset, width) in (0..64).flat_map(|offset| [1, 2, 4, 8].map(|width| (offset, width))) {
        let mut part = [0xff; 8];
        blk.read_config(offset as u64, &mut part[..width]);
        let whole = [expected, [0; 64]].concat();
        assert_eq!(part[..width], whole[offset..offset + width]);
    }
    let mut beyond = [0xff; 8];
    blk.read_config(u64::MAX, &mut beyond);
    assert_eq!(beyond, [0; 8]);
}

#[test]
fn what_cannot_be_answered_needs_a_reset_which_repairs_it() {
    let (_image, mut blk, mut guest) = running(PLAIN);
    let status = writable(STATUS + 1, 1);
    let chains = [
        vec![readable(HEADERS, 16)],
        vec![readable(HEADERS, 16), readable(DATA, 512)],
        vec![readable(HEADERS, 16), writable(DATA, 0)],
        vec![readable(HEADERS, 16), writable(1 << 40, 1)],
        vec![readable(HEADERS, 16), writable(MEMORY as u64 - 4, 5)],
        vec![readable(HEADERS, 16), writable(u64::MAX, 2)],
        vec![status, readable(HEADERS, 16)],
        vec![readable(HEADERS, 16), status, readable(DATA, 512)],
    ];
    for chain in chains {
        guest.header(GET_ID, 0);
        guest.driver.add(&chain);
        guest.kick.write(1).unwrap();
        wait(&guest.line.reset);
        // It no longer listens.
        guest.offer(FLUSH, 0, &[]);
        guest.kick.write(1).unwrap();
        blk.reset();
        assert_eq!(guest.driver.used(), None, "{chain:x?}");
        guest.restart();
        guest.activate(&mut blk);
        assert_eq!(guest.request(IN, 0, &[writable(DATA, 512)]), (OK, 513));
        blk.reset();
        guest.restart();
        guest.activate(&mut blk);
    }
}

#[test]
fn a_broken_ring_or_a_repeated_head_needs_a_reset() {
    let (_image, mut blk, mut guest) = running(PLAIN);
    guest.driver.set_avail_idx(QUEUE_SIZE + 1);
    guest.kick.write(1).unwrap();
    wait(&guest.line.reset);
    blk.reset();
    guest.restart();
    // Both are there before the device looks: the first is still in flight when it takes the second.
    let (head, _) = guest.offer(FLUSH, 0, &[]);
    guest.driver.publish(head);
    guest.activate(&mut blk);
    wait(&guest.line.reset);
    blk.reset();
    guest.restart();
    guest.activate(&mut blk);
    assert_eq!(guest.request(FLUSH, 0, &[]), (OK, 1));
}

#[test]
fn a_full_ring_is_answered_with_few_interrupts() {
    let (_image, mut blk, mut guest) = running(PLAIN);
    blk.reset();
    for _ in 0..QUEUE_SIZE / 4 {
        guest.offer(0xffff, 0, &[writable(DATA, 512), writable(DATA, 512)]);
    }
    assert_eq!(guest.driver.free(), 0);
    guest.activate(&mut blk);
    wait(&guest.line.queue);
    blk.reset();
    let used = std::iter::from_fn(|| guest.driver.used()).count();
    assert_eq!(used, usize::from(QUEUE_SIZE / 4));
    assert!(guest.line.queue.read().is_err(), "one batch, one interrupt");
}

#[test]
fn no_interrupt_is_raised_that_the_driver_does_not_want() {
    let (_image, mut blk, mut guest) = running(PLAIN);
    guest.driver.want_interrupts(false);
    guest.offer(FLUSH, 0, &[]);
    guest.kick.write(1).unwrap();
    while guest.driver.used().is_none() {
        std::thread::yield_now();
    }
    blk.reset();
    assert!(guest.line.queue.read().is_err());
}

#[test]
fn with_event_idx_the_driver_chooses_the_interrupt() {
    let (_image, mut blk, mut guest) = running(EVENT_IDX);
    // 2.7.7.2: an interrupt when the entry with index 2, the third, is used.
    guest.driver.set_used_event(2);
    for expected in [false, false, true, false, false] {
        guest.offer(FLUSH, 0, &[]);
        guest.kick.write(1).unwrap();
        while guest.driver.used().is_none() {
            std::thread::yield_now();
        }
        if expected {
            wait(&guest.line.queue);
        }
    }
    blk.reset();
    assert!(guest.line.queue.read().is_err(), "no other interrupt");
}

/// A driver that notifies only when it is asked to, and sleeps whenever it waits: nothing may be left lying.
#[test]
fn no_request_and_no_interrupt_is_lost() {
    for features in [PLAIN, EVENT_IDX] {
        let event_idx = features == EVENT_IDX;
        let (_image, _blk, mut guest) = running(features);
        let (mut offered, mut used) = (0_u16, 0_u16);
        while used < 5000 {
            // Between one and five in flight, so that the device falls asleep again and again.
            while offered < 5000 && offered - used <= offered % 5 {
                guest.requests = 0;
                let kind = if offered.is_multiple_of(3) { GET_ID } else { IN };
                guest.offer(kind, 0, &[writable(DATA, 512)]);
                offered += 1;
                if guest.driver.must_notify(event_idx, 1) {
                    guest.kick.write(1).unwrap();
                }
            }
            let before = used;
            while guest.driver.used().is_some() {
                used += 1;
            }
            if used == before {
                guest.driver.set_used_event(used);
                std::sync::atomic::fence(Ordering::SeqCst);
                match guest.driver.used() {
                    Some(_) => used += 1,
                    None => wait(&guest.line.queue),
                }
            }
        }
        assert_eq!(offered, used);
    }
}

#[test]
fn reset_leaves_nothing_in_flight() {
    let (_image, mut blk, mut guest) = running(PLAIN);
    for _ in 0..30 {
        for n in 0..64 {
            let data = DATA + n * 4096;
            match n % 3 {
                0 => guest.offer(OUT, n * 8, &[readable(data, 4096)]),
                1 => guest.offer(FLUSH, 0, &[]),
                _ => guest.offer(IN, n * 8, &[writable(data, 4096)]),
            };
        }
        guest.kick.write(1).unwrap();
        std::thread::yield_now();
        blk.reset();
        // The memory is the driver's again; what it writes there stays.
        let everything = pattern(MEMORY, 3);
        guest.fill(0, &everything);
        blk.reset();
        assert!(guest.bytes(0, MEMORY) == everything);
        guest.restart();
        guest.activate(&mut blk);
        assert_eq!(guest.request(IN, 0, &[writable(DATA, 512)]), (OK, 513));
    }
    drop(blk);
    assert_eq!(Arc::strong_count(&guest.memory), 2, "only the guest and its driver still hold the memory");
}

/// An engine that does nothing until it is drained, and tells what it did at each drain.
struct Stuck {
    ops: Vec<(Op, u16)>,
    submitted: EventFd,
    drained: Arc<Mutex<Vec<Vec<OpKind>>>>,
    completed: EventFd,
}

impl Engine for Stuck {
    fn push(&mut self, op: Op, tag: u16) {
        self.ops.push((op, tag));
    }
    fn submit(&mut self) {
        if !self.ops.is_empty() {
            self.submitted.write(1).unwrap();
        }
    }
    fn reap(&mut self, _: &mut Vec<Completion>) {}
    fn completion_event(&self) -> &EventFd {
        &self.completed
    }
    fn drain(&mut self, completions: &mut Vec<Completion>) {
        self.drained.lock().unwrap().push(self.ops.iter().map(|(op, _)| op.kind).collect());
        completions.extend(self.ops.drain(..).map(|(op, tag)| Completion { tag, op, result: Ok(()) }));
    }
}

/// Completes everything at once, inside `submit`, with an error.
struct Failing {
    ops: Vec<(Op, u16)>,
    done: Vec<Completion>,
    completed: EventFd,
}

impl Engine for Failing {
    fn push(&mut self, op: Op, tag: u16) {
        self.ops.push((op, tag));
    }
    fn submit(&mut self) {
        let fail = |(op, tag)| Completion { tag, op, result: Err(io::Error::from_raw_os_error(5)) };
        self.done.extend(self.ops.drain(..).map(fail));
    }
    fn reap(&mut self, completions: &mut Vec<Completion>) {
        completions.append(&mut self.done);
    }
    fn completion_event(&self) -> &EventFd {
        &self.completed
    }
    fn drain(&mut self, completions: &mut Vec<Completion>) {
        self.submit();
        self.reap(completions);
    }
}

/// Stands for a driver that makes a request available at the worst moment: after the worker found nothing in the ring,
/// before it asks to be notified.
struct Late {
    driver: Arc<Mutex<Driver>>,
    chain: Vec<Segment>,
    completed: EventFd,
}

impl Engine for Late {
    fn push(&mut self, _: Op, _: u16) {}
    fn submit(&mut self) {
        if !self.chain.is_empty() {
            self.driver.lock().unwrap().add(&self.chain);
            self.chain.clear();
        }
    }
    fn reap(&mut self, _: &mut Vec<Completion>) {}
    fn completion_event(&self) -> &EventFd {
        &self.completed
    }
    fn drain(&mut self, _: &mut Vec<Completion>) {}
}

fn spawn(guest: &Guest, image: &Image, engine: Box<dyn Engine>) -> Worker<()> {
    let disk = Arc::new(Disk::open(&image.path, false, CacheMode::Writeback, "disk0").unwrap());
    let context = Context {
        rules: Rules { size: disk.size(), readonly: false, durable: false, flush: true },
        disk,
        serial: [0; 20],
        memory: guest.memory.clone(),
        interrupt: guest.line.clone(),
        log: Arc::default(),
    };
    let worker = QueueWorker::new(context, guest.queue(), engine).unwrap();
    Worker::spawn("blk0-q0", move |stop| worker.run(&stop)).unwrap()
}

/// What is in flight ends first, for a flush covers only what completed before it (virtio 1.2, 5.2.6.2).
#[test]
fn a_stop_drains_then_flushes_what_was_written_and_answers_nothing() {
    let write = OpKind::Write { durable: false };
    for (kind, expected) in [
        (IN, vec![vec![OpKind::Read]]),
        (OUT, vec![vec![write], vec![OpKind::Flush]]),
        (FLUSH, vec![vec![OpKind::Flush]]),
    ] {
        let (image, mut guest) = (Image::new(), Guest::new(PLAIN));
        let (submitted, drained) = (EventFd::new(EFD_NONBLOCK).unwrap(), Arc::default());
        let engine = Stuck {
            ops: Vec::new(),
            submitted: submitted.try_clone().unwrap(),
            drained: Arc::clone(&drained),
            completed: EventFd::new(EFD_NONBLOCK).unwrap(),
        };
        let data = if kind == OUT { readable(DATA, 512) } else { writable(DATA, 512) };
        let (_, status) = guest.offer(kind, 0, &[data]);
        let worker = spawn(&guest, &image, Box::new(engine));
        wait(&submitted);
        worker.stop();
        assert_eq!(*drained.lock().unwrap(), expected);
        assert_eq!(guest.driver.used(), None);
        assert_eq!(guest.bytes(status, 1), [UNTOUCHED]);
        assert!(guest.line.queue.read().is_err());
        assert_eq!(Arc::strong_count(&guest.memory), 2);
    }
}

#[test]
fn a_request_that_came_before_notifications_were_on_is_seen() {
    for features in [PLAIN, EVENT_IDX] {
        let (image, mut guest) = (Image::new(), Guest::new(features));
        let (header, status) = guest.header(GET_ID, 0);
        let driver = Arc::new(Mutex::new(Driver::new(guest.memory.clone(), RINGS, QUEUE_SIZE)));
        let chain = vec![header, writable(DATA, 20), status];
        let completed = EventFd::new(EFD_NONBLOCK).unwrap();
        let worker = spawn(&guest, &image, Box::new(Late { driver: driver.clone(), chain, completed }));
        wait(&guest.line.queue);
        assert_eq!(driver.lock().unwrap().used().map(|used| used.1), Some(21));
        worker.stop();
    }
}

/// Stands for a driver that makes a request available whenever one is answered, so that the ring never runs empty.
struct Endless {
    driver: Driver,
    chain: Vec<Segment>,
    completed: EventFd,
}

impl Engine for Endless {
    fn push(&mut self, _: Op, _: u16) {}
    fn submit(&mut self) {
        while self.driver.used().is_some() {}
        while self.driver.free() >= self.chain.len() {
            self.driver.add(&self.chain);
        }
    }
    fn reap(&mut self, _: &mut Vec<Completion>) {}
    fn completion_event(&self) -> &EventFd {
        &self.completed
    }
    fn drain(&mut self, _: &mut Vec<Completion>) {}
}

#[test]
fn a_driver_that_never_rests_cannot_keep_the_worker() {
    let (image, mut guest) = (Image::new(), Guest::new(PLAIN));
    let (header, status) = guest.header(0xffff, 0);
    let driver = Driver::new(guest.memory.clone(), RINGS, QUEUE_SIZE);
    let (chain, completed) = (vec![header, status], EventFd::new(EFD_NONBLOCK).unwrap());
    let worker = spawn(&guest, &image, Box::new(Endless { driver, chain, completed }));
    wait(&guest.line.queue);
    let stopped = EventFd::new(EFD_NONBLOCK).unwrap();
    let told = stopped.try_clone().unwrap();
    let thread = std::thread::spawn(move || {
        worker.stop();
        told.write(1).unwrap();
    });
    wait(&stopped);
    thread.join().unwrap();
}

#[test]
fn a_failing_disk_fails_requests_and_completions_inline_are_seen() {
    let (image, mut guest) = (Image::new(), Guest::new(PLAIN));
    let completed = EventFd::new(EFD_NONBLOCK).unwrap();
    let worker = spawn(&guest, &image, Box::new(Failing { ops: Vec::new(), done: Vec::new(), completed }));
    for kind in [IN, FLUSH, IN] {
        assert_eq!(guest.request(kind, 0, &[writable(DATA, 512)]), (IOERR, 1));
    }
    assert_eq!(guest.request(GET_ID, 0, &[writable(DATA, 20)]), (OK, 21));
    worker.stop();
}

/// The table of cache modes: what is offered, what a write and a flush become. The columns of a driver that does not
/// negotiate the flush it is offered come last.
#[test]
fn cache_modes_decide_what_is_offered_and_what_is_stable() {
    use request::{Action, Request, Status};
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
    let chain =
        crate::virtio::queue::Chain { head: 0, segments: vec![readable(0, 16), readable(512, 512), writable(2048, 1)] };
    let (flushes, nothing) = (Action::Transfer(OpKind::Flush, 0), Action::Answer(Status::Ok));
    for (cache, offered, durable, flush, durable_without) in [
        (CacheMode::Writeback, true, false, flushes, true),
        (CacheMode::None, true, false, flushes, true),
        (CacheMode::Writethrough, false, true, nothing, true),
        (CacheMode::Directsync, false, true, nothing, true),
        (CacheMode::Unsafe, true, false, nothing, false),
    ] {
        let blk = Image::new().open_as(false, None, cache, Aio::Threads);
        assert_eq!(blk.features() & 1 << VIRTIO_BLK_F_FLUSH != 0, offered, "{cache:?}");
        let action = |kind: u32, features| {
            memory.write_obj(kind, GuestAddress(0)).unwrap();
            let mut buffers = Vec::new();
            Request::parse(&chain, &memory, &blk.rules(features), &mut buffers).unwrap().1
        };
        let write = |durable| Action::Transfer(OpKind::Write { durable }, 0);
        let negotiated = if offered { PLAIN } else { WITHOUT_FLUSH };
        assert_eq!(action(OUT, negotiated), write(durable), "{cache:?}");
        assert_eq!(action(FLUSH, negotiated), flush, "{cache:?}");
        assert_eq!(action(OUT, WITHOUT_FLUSH), write(durable_without), "{cache:?}");
    }
}

/// An image in whole 4 KiB blocks where the build is: on a disk, so that it can be opened with O_DIRECT.
fn image_on_disk() -> Image {
    let dir = TempDir::new_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
    let path = dir.path().join("disk.img");
    fs::write(&path, vec![0; SECTORS as usize * 512]).unwrap();
    Image { _dir: dir, path }
}

fn choices() -> impl Iterator<Item = (Aio, CacheMode)> {
    let all = Aio::ALL.into_iter().flat_map(|aio| CacheMode::ALL.map(|cache| (aio, cache)));
    all.filter(|(aio, cache)| aio.goes_with(*cache))
}

/// Requests of one batch.
const BATCH: u64 = 8;

/// What a driver does at every choice of engine and cache mode, with buffers that lie anywhere.
fn exercise(image: &Image, aio: Aio, cache: CacheMode) {
    let mut blk = image.open_as(false, None, cache, aio);
    let mut guest = Guest::new(PLAIN & (blk.features() | !(1 << VIRTIO_BLK_F_FLUSH)));
    // All there before the worker looks: one batch.
    for n in 0..BATCH {
        guest.offer(IN, n, &[writable(DATA + 4096 * n, 4096)]);
    }
    guest.activate(&mut blk);
    for _ in 0..BATCH {
        guest.turn();
    }
    let content = pattern(3072, 5);
    for address in [DATA, DATA + 0x1001] {
        guest.fill(address, &content);
        let scattered = [readable(address, 1), readable(address + 1, 2559), readable(address + 2560, 512)];
        assert_eq!(guest.request(OUT, 7, &scattered), (OK, 1), "{aio:?} {cache:?}");
        assert_eq!(guest.request(OUT, 16, &[readable(address, 2048)]), (OK, 1), "{aio:?} {cache:?}");
        assert_eq!(guest.request(FLUSH, 0, &[]), (OK, 1), "{aio:?} {cache:?}");
        let back = [writable(DATA + 0x4000, 3000), writable(DATA + 0x5003, 72)];
        assert_eq!(guest.request(IN, 7, &back), (OK, 3073), "{aio:?} {cache:?}");
        assert!(guest.bytes(DATA + 0x4000, 3000) == content[..3000]);
        assert!(guest.bytes(DATA + 0x5003, 72) == content[3000..]);
    }
    blk.reset();
    let file = fs::read(&image.path).unwrap();
    assert!(file[7 * 512..13 * 512] == content && file[16 * 512..20 * 512] == content[..2048]);
}

#[test]
fn every_engine_in_every_cache_mode() {
    for (aio, cache) in choices() {
        exercise(&image_on_disk(), aio, cache);
    }
}

/// The system calls to look at.
const CALLS: &str = "trace=openat,pwritev2,fdatasync,io_submit,io_getevents,io_uring_enter";

/// What the host is asked for, seen from outside: this test runs again under strace, once for each choice.
#[test]
fn the_host_is_asked_for_what_the_cache_mode_says() {
    if let Ok(choice) = std::env::var("SKIFF_TEST_CHOICE") {
        let (aio, cache) = choices().find(|found| format!("{found:?}") == choice).unwrap();
        let path = PathBuf::from(std::env::var_os("SKIFF_TEST_IMAGE").unwrap());
        return exercise(&Image { _dir: TempDir::new().unwrap(), path }, aio, cache);
    }
    if Command::new("strace").arg("-V").output().is_err() {
        // Past the capture of the test harness.
        let name = "blk::the_host_is_asked_for_what_the_cache_mode_says";
        let _ = writeln!(std::io::stderr(), "SKIPPED {name}: strace is not installed");
        return;
    }
    for (aio, cache) in choices() {
        let image = image_on_disk();
        let trace = image.path.with_extension("trace");
        let name = "virtio::blk::tests::the_host_is_asked_for_what_the_cache_mode_says";
        let run = Command::new("strace")
            .args(["-f", "-qq", "-e", CALLS, "-o"])
            .arg(&trace)
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", name])
            .env("SKIFF_TEST_CHOICE", format!("{:?}", (aio, cache)))
            .env("SKIFF_TEST_IMAGE", &image.path)
            .output()
            .unwrap();
        assert!(run.status.success(), "{aio:?} {cache:?}: {run:?}");
        let trace = fs::read_to_string(trace).unwrap();
        let seen = |words: &[&str]| trace.lines().any(|line| words.iter().all(|word| line.contains(word)));
        let case = format!("{aio:?} {cache:?}\n{trace}");
        assert!(seen(&["openat(", "disk.img", "O_RDWR"]), "{case}");
        assert_eq!(
            seen(&["openat(", "disk.img", "O_DIRECT"]),
            [CacheMode::None, CacheMode::Directsync].contains(&cache),
            "{case}"
        );
        // One call for the batch, and none for its completions.
        match aio {
            Aio::Threads => {}
            Aio::Native => assert!(seen(&["io_submit(", ", 8, ["]) && !seen(&["io_getevents("]), "{case}"),
            Aio::IoUring => assert!(seen(&["io_uring_enter(", ", 8, 0, 0, "]), "{case}"),
        }
        let (dsync, sync) = match aio {
            // Buffers that are not aligned are written by helpers, and those are seen with every engine.
            Aio::Threads | Aio::IoUring => (seen(&["pwritev2(", "RWF_DSYNC"]), seen(&["fdatasync("])),
            Aio::Native => (seen(&["io_submit(", "RWF_DSYNC"]), seen(&["io_submit(", "IOCB_CMD_FDSYNC"])),
        };
        let (dsync_expected, sync_expected) = match cache {
            CacheMode::Writeback | CacheMode::None => (false, true),
            CacheMode::Writethrough | CacheMode::Directsync => (true, false),
            CacheMode::Unsafe => (false, false),
        };
        if aio == Aio::IoUring {
            // Its own transfers are no system calls; only the helper's are.
            assert!(!sync, "{case}");
            assert!(!dsync || dsync_expected, "{case}");
        } else {
            assert_eq!((dsync, sync), (dsync_expected, sync_expected), "{case}");
        }
    }
}
