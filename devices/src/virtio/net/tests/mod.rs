//! The device as a driver sees it: through eventfds and guest memory, over a pair of sockets as its back end.

use std::collections::VecDeque;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU64, Ordering, fence};
use std::thread;
use std::time::Duration;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::backend::{Failure, HEADER, Port};
use super::buffers::Buffers;
use super::statistics::{DROPS, DropReason, PairSnapshot};
use super::*;
use crate::virtio::device::Interrupt;
use crate::virtio::driver::{Driver, readable, writable};
use crate::virtio::queue::{Segment, Virtqueue};

mod control;
mod hostile;
mod limits;
mod link;
mod receive;
mod sizes;
mod tap;

// virtio 1.2, 5.1.3.
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const MRG_RXBUF: u64 = 1 << 15;
const MQ: u64 = 1 << 22;

const PLAIN: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const SEGMENTED: u64 = GUEST_CSUM | GUEST_TSO4;

const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

/// Guest memory: the rings of each queue, and buffers above.
const MEMORY: usize = 0x100_0000;
const RINGS: u64 = 0x1_0000;
const DATA: u64 = 0x10_0000;

/// What memory is before the device writes.
const UNTOUCHED: u8 = 0xaa;

/// What a test tells the port, and learns from it.
#[derive(Debug, Default)]
struct Ends {
    down: AtomicBool,
    offloads: AtomicU8,
    /// How often a frame was asked for.
    receives: AtomicU64,
    /// How often the file was asked for, as the worker does before it sleeps, and its number.
    files: AtomicU64,
    file: AtomicI32,
    /// A bit a port that takes part.
    enabled: AtomicU8,
    /// How often a port was looked for, and by which thread: where proc(5) tells of it.
    looks: AtomicU64,
    thread: Mutex<PathBuf>,
}

/// The device's end of a pair of sockets that keep frames apart.
struct SocketPort {
    socket: UnixDatagram,
    number: u8,
    ends: Arc<Ends>,
}

impl SocketPort {
    fn check(&self) -> Result<(), Failure> {
        let down = self.ends.down.load(Ordering::SeqCst);
        if down { Err(Failure::Lost(io::ErrorKind::NotConnected.into())) } else { Ok(()) }
    }
}

/// As a TAP device does.
fn failure(error: io::Error) -> Failure {
    if error.kind() == io::ErrorKind::WouldBlock { Failure::NotNow } else { Failure::Frame(error) }
}

impl Port for SocketPort {
    fn file(&self) -> BorrowedFd<'_> {
        self.ends.files.fetch_add(1, Ordering::SeqCst);
        self.ends.file.store(self.socket.as_raw_fd(), Ordering::SeqCst);
        self.socket.as_fd()
    }
    fn receive(&mut self, room: &Buffers<'_>) -> Result<usize, Failure> {
        self.check()?;
        self.ends.receives.fetch_add(1, Ordering::SeqCst);
        room.read_from(self.file()).map_err(failure)
    }
    fn send(&mut self, frame: &Buffers<'_>) -> Result<(), Failure> {
        self.check()?;
        frame.write_to(self.file()).map(drop).map_err(failure)
    }
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.ends.offloads.store(offloads.bits(), Ordering::SeqCst);
        Ok(())
    }
    fn set_enabled(&mut self, enabled: bool) -> io::Result<()> {
        let bit = 1 << self.number;
        if enabled {
            self.ends.enabled.fetch_or(bit, Ordering::SeqCst);
        } else {
            self.ends.enabled.fetch_and(!bit, Ordering::SeqCst);
        }
        Ok(())
    }
    fn is_up(&mut self) -> bool {
        *self.ends.thread.lock().unwrap() = fs::read_link("/proc/thread-self").unwrap();
        self.ends.looks.fetch_add(1, Ordering::SeqCst);
        self.check().is_ok()
    }
}

/// What the device raised.
struct Lines {
    queues: Vec<EventFd>,
    config: EventFd,
    reset: EventFd,
}

impl Interrupt for Lines {
    fn queue(&self, queue: u16) {
        self.queues[usize::from(queue)].write(1).unwrap();
    }
    fn config(&self) {
        self.config.write(1).unwrap();
    }
    fn needs_reset(&self) {
        self.reset.write(1).unwrap();
    }
}

/// Waits until `event` was written, and clears it. Only a lost event takes a minute.
fn wait(event: &EventFd) {
    let epoll = Epoll::new().unwrap();
    epoll.ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(EventSet::IN, 0)).unwrap();
    assert_eq!(epoll.wait(60_000, &mut [EpollEvent::default()]).unwrap(), 1, "the event was lost");
    event.read().unwrap();
}

/// A queue as its driver has it.
struct Queue {
    driver: Driver,
    kick: EventFd,
    features: u64,
    /// Chains used so far.
    used: u16,
}

impl Queue {
    /// The next used chain; if there is none, the device is asked for an interrupt when there is.
    fn used(&mut self) -> Option<(u16, u32)> {
        let used = self.driver.used().or_else(|| {
            self.driver.set_used_event(self.used);
            fence(Ordering::SeqCst);
            self.driver.used()
        });
        self.used = self.used.wrapping_add(used.is_some().into());
        used
    }

    fn add(&mut self, segments: &[Segment]) -> u16 {
        self.driver.add(segments)
    }

    /// Notifies, if the device wants it.
    fn kick(&self, added: u16) {
        if self.driver.must_notify(self.features & EVENT_IDX != 0, added) {
            self.kick.write(1).unwrap();
        }
    }
}

/// A device, its driver, and the host's ends of its ports.
struct Bench {
    net: Net,
    memory: Arc<GuestMemoryMmap>,
    queues: Vec<Queue>,
    lines: Arc<Lines>,
    hosts: Vec<UnixDatagram>,
    ends: Arc<Ends>,
    /// Which queue is for commands.
    control: usize,
    features: u64,
    statistics: Arc<Statistics>,
}

impl Bench {
    /// With one pair of queues of `size`, not active yet.
    fn new(features: u64, size: u16) -> Self {
        Self::with(1, features, size)
    }

    fn with(pairs: u16, features: u64, size: u16) -> Self {
        let ends = Arc::new(Ends::default());
        let mut hosts = Vec::new();
        let mut ports: Vec<Box<dyn Port>> = Vec::new();
        ends.enabled.store(0xff >> (8 - pairs), Ordering::SeqCst);
        for number in 0..pairs {
            let (host, socket) = UnixDatagram::pair().unwrap();
            socket.set_nonblocking(true).unwrap();
            hosts.push(host);
            ports.push(Box::new(SocketPort { socket, number: number as u8, ends: ends.clone() }));
        }
        Self { hosts, ends, ..Self::over(Backend::new(ports, Offloads::ALL), features, size) }
    }

    /// Over another back end.
    fn over(backend: Backend, features: u64, size: u16) -> Self {
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap());
        memory.write_slice(&vec![UNTOUCHED; MEMORY - DATA as usize], GuestAddress(DATA)).unwrap();
        let (pairs, statistics) = (backend.pairs(), Arc::new(Statistics::default()));
        let options = NetOptions {
            number: 0,
            id: "net0".to_owned(),
            mac: MAC,
            mtu: None,
            queue_size: QUEUE_SIZE,
            limits: Limits::default(),
            statistics: statistics.clone(),
        };
        let net = Net::new(Arc::new(backend), options);
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let count = net.queue_sizes().len() as u64;
        let queues = (0..count).map(|index| Queue {
            driver: Driver::new(memory.clone(), RINGS + index * 0x8000, size),
            kick: event(),
            features,
            used: 0,
        });
        let lines = Lines { queues: (0..count).map(|_| event()).collect(), config: event(), reset: event() };
        let (queues, lines) = (queues.collect(), Arc::new(lines));
        let control = if features & MQ == 0 { 2 } else { 2 * usize::from(pairs) };
        let (hosts, ends) = (Vec::new(), Arc::default());
        Self { net, memory, queues, lines, hosts, ends, control, features, statistics }
    }

    fn activate(&mut self) {
        self.activate_only(|_| true);
    }

    fn activate_only(&mut self, enabled: impl Fn(u16) -> bool) {
        let queues = (0..).zip(&self.queues[..=self.control]).filter(|(index, _)| enabled(*index));
        let queues = queues.map(|(index, queue)| ActiveQueue {
            index,
            queue: Virtqueue::new(queue.driver.layout(), self.features, self.memory.clone()).unwrap(),
            kick: queue.kick.try_clone().unwrap(),
        });
        let activation = Activation {
            memory: self.memory.clone(),
            features: self.features,
            queues: queues.collect(),
            interrupt: self.lines.clone(),
        };
        self.net.activate(activation).unwrap();
    }

    fn active(features: u64, size: u16) -> Self {
        let mut bench = Self::new(features, size);
        bench.activate();
        bench
    }

    fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn fill(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// Waits for `count` used chains of `queue`.
    fn used(&mut self, queue: usize, count: usize) -> Vec<(u16, u32)> {
        let mut used = Vec::new();
        while used.len() < count {
            match self.queues[queue].used() {
                Some(one) => used.push(one),
                None => wait(&self.lines.queues[queue]),
            }
        }
        used
    }

    /// Sees that the worker has nothing to do: one that never sleeps asks for its file thousands of times meanwhile, one that
    /// looks for a lost port four times a second does for that.
    fn rests(&self) {
        let files = || self.ends.files.load(Ordering::SeqCst);
        let before = files();
        thread::sleep(Duration::from_millis(300));
        let asked = files() - before;
        assert!(asked < 100, "looked {asked} times, with nothing to do");
    }

    fn counted(&self) -> PairSnapshot {
        self.statistics.snapshot().remove(0)
    }
}

/// The field `status` of the configuration.
fn status(bench: &Bench) -> u16 {
    let mut status = [0xff; 2];
    bench.net.read_config(6, &mut status);
    u16::from_le_bytes(status)
}

/// A frame of `len` bytes behind a header with these `flags` and `gso_type`.
fn frame_with(flags: u8, gso_type: u8, len: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER];
    (frame[0], frame[1]) = (flags, gso_type);
    frame.extend((0..len).map(|at| (at * 7 + len) as u8));
    frame
}

fn frame(len: usize) -> Vec<u8> {
    frame_with(0, 0, len)
}

#[test]
fn what_the_back_end_does_not_do_is_not_offered() {
    // virtio 1.2, 5.1.3: the features of each offload, for the device to do and for the guest; none without checksums (5.1.3.1).
    let table: &[(Offloads, &[u32])] = &[
        (Offloads::CSUM, &[0, 1, 2]),
        (Offloads::TSO4, &[7, 11]),
        (Offloads::TSO6, &[8, 12]),
        (Offloads::ECN, &[9, 13]),
        (Offloads::UFO, &[10, 14]),
        (Offloads::USO4, &[54]),
        (Offloads::USO6, &[55]),
        (Offloads::USO, &[54, 55, 56]),
    ];
    let bits = |numbers: &[u32]| numbers.iter().fold(0_u64, |bits, number| bits | 1 << number);
    let all = table.iter().fold(0, |all, (_, numbers)| all | bits(numbers));
    let offered = |offloads| {
        let (socket, _) = UnixDatagram::pair().unwrap();
        let port = SocketPort { socket, number: 0, ends: Arc::default() };
        Bench::over(Backend::new(vec![Box::new(port)], offloads), PLAIN, 256).net.features() & all
    };
    assert_eq!((offered(Offloads::NONE), offered(Offloads::ALL)), (0, all));
    for (offloads, numbers) in table {
        assert_eq!(offered(*offloads | Offloads::CSUM), bits(numbers) | bits(&[0, 1, 2]), "{offloads:?}");
        assert!(offloads.contains(Offloads::CSUM) || offered(*offloads) == 0, "{offloads:?}");
    }
}

#[test]
fn frames_go_out_whole_and_in_order() {
    for features in [PLAIN, PLAIN | EVENT_IDX] {
        let mut bench = Bench::active(features, 256);
        for round in 0..3 {
            let mut expected = VecDeque::new();
            for at in 0..20 {
                let frame = frame(60 + 70 * at);
                let address = DATA + 0x1_0000 * at as u64;
                bench.fill(address, &frame);
                // The header apart, an empty buffer, and the frame cut in two.
                let chain = [
                    readable(address, 12),
                    readable(address, 0),
                    readable(address + 12, 1),
                    readable(address + 13, frame.len() as u32 - 13),
                ];
                let head = bench.queues[1].add(&chain);
                bench.queues[1].kick(1);
                expected.push_back((head, frame));
            }
            for (head, len) in bench.used(1, 20) {
                let (expected, frame) = expected.pop_front().unwrap();
                let mut received = vec![0; 1 << 16];
                let count = bench.hosts[0].recv(&mut received).unwrap();
                assert_eq!((head, len, &received[..count]), (expected, 0, &frame[..]), "round {round}");
            }
        }
        let counted = bench.counted();
        assert_eq!((counted.tx.frames, counted.tx.bytes), (60, 3 * (0..20).map(|at| 60 + 70 * at).sum::<u64>()));
        assert_eq!(counted.tx.drops, [0; DROPS]);
    }
}
