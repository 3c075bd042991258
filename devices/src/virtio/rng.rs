//! The entropy device (virtio 1.2, 5.4): one queue, filled from the host's random number generator by the thread `rng`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Once};

use vm_memory::{Bytes, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::device::{ActivateError, Activation, ActiveQueue, Interrupt, VirtioDevice};
use super::queue::{Chain, Virtqueue};
use crate::worker::Worker;

const DEVICE_TYPE: u32 = 4;
const QUEUE_SIZE: u16 = 256;
/// The most bytes one chain gets; a device may fill a part of its buffers (5.4.6). It bounds the time in which the
/// thread does not look at its stop eventfd.
const CHAIN_BYTES: usize = 64 << 10;

/// What the thread waits for.
const KICK: u64 = 0;
const STOP: u64 = 1;

/// A virtio-rng device.
pub struct Rng {
    source: Arc<File>,
    worker: Option<Worker<()>>,
    warned: Arc<Once>,
}

impl Rng {
    /// A device that gives out what `/dev/urandom` gives.
    ///
    /// # Errors
    /// If that cannot be opened.
    pub fn new() -> io::Result<Self> {
        Ok(Self { source: Arc::new(File::open("/dev/urandom")?), worker: None, warned: Arc::new(Once::new()) })
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    /// Virtio 1.2, 5.4.4: none.
    fn has_config(&self) -> bool {
        false
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, interrupt, .. } = activation;
        // A driver that enabled no queue asks for nothing.
        let Some(ActiveQueue { index, queue, kick }) = queues.into_iter().next() else { return Ok(()) };
        let mut source = Source { queue, index, memory, interrupt, file: self.source.clone(), chain: Chain::default() };
        let epoll = Epoll::new().map_err(|source| ActivateError { what: "epoll", source })?;
        let warned = self.warned.clone();
        let worker = Worker::spawn("rng", move |stop| {
            if let Err(error) = source.run(&epoll, &kick, &stop) {
                warned.call_once(|| tracing::warn!(%error, "virtio-rng waits for a reset by its driver"));
                source.interrupt.needs_reset();
            }
        });
        self.worker = Some(worker.map_err(|source| ActivateError { what: "thread", source })?);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.stop();
        }
    }
}

/// What the thread owns.
struct Source {
    queue: Virtqueue,
    index: u16,
    memory: Arc<GuestMemoryMmap>,
    interrupt: Arc<dyn Interrupt>,
    file: Arc<File>,
    chain: Chain,
}

impl Source {
    /// Serves the queue until `stop` is readable. Looks at `stop` at least once a chain, so that a driver which never
    /// lets the queue run empty cannot keep the thread.
    fn run(&mut self, epoll: &Epoll, kick: &EventFd, stop: &EventFd) -> io::Result<()> {
        for (event, token) in [(kick, KICK), (stop, STOP)] {
            epoll.ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(EventSet::IN, token))?;
        }
        let mut events = [EpollEvent::default(); 2];
        loop {
            let idle = !self.serve_one()? && !self.queue.enable_notification();
            let ready = match epoll.wait(if idle { -1 } else { 0 }, &mut events) {
                Ok(ready) => ready,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => return Err(error),
            };
            for event in &events[..ready] {
                if event.data() == STOP {
                    return Ok(());
                }
                // Level-triggered: take the count, whatever it is.
                let _ = kick.read();
            }
        }
    }

    /// Fills one chain and returns it to the driver; `false` if there is none.
    fn serve_one(&mut self) -> io::Result<bool> {
        self.queue.disable_notification();
        if !self.queue.pop(&mut self.chain).map_err(io::Error::other)? {
            return Ok(false);
        }
        let mut filled = 0;
        for segment in self.chain.segments.iter().filter(|segment| segment.writable) {
            let count = (segment.len as usize).min(CHAIN_BYTES - filled);
            let read = self.memory.read_exact_volatile_from(segment.address, &mut self.file.as_ref(), count);
            read.map_err(io::Error::other)?;
            filled += count;
        }
        self.queue.push(self.chain.head, filled as u32);
        if self.queue.publish() {
            self.interrupt.queue(self.index);
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
    use vm_memory::GuestAddress;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;
    use crate::virtio::driver::{Driver, readable, writable};

    const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1;

    /// Blocking eventfds: a test waits for what must come.
    struct Line {
        queue: EventFd,
        reset: EventFd,
    }

    impl Interrupt for Line {
        fn queue(&self, queue: u16) {
            assert_eq!(queue, 0);
            self.queue.write(1).unwrap();
        }
        fn config(&self) {}
        fn needs_reset(&self) {
            self.reset.write(1).unwrap();
        }
    }

    struct Guest {
        memory: Arc<GuestMemoryMmap>,
        driver: Driver,
        kick: EventFd,
        line: Arc<Line>,
    }

    impl Guest {
        fn new() -> Self {
            let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap());
            Self {
                driver: Driver::new(memory.clone(), 0x1000, 8),
                memory,
                kick: EventFd::new(EFD_NONBLOCK).unwrap(),
                line: Arc::new(Line { queue: EventFd::new(0).unwrap(), reset: EventFd::new(0).unwrap() }),
            }
        }

        fn activation(&self) -> Activation {
            let queue = Virtqueue::new(self.driver.layout(), FEATURES, self.memory.clone()).unwrap();
            Activation {
                memory: self.memory.clone(),
                features: FEATURES,
                queues: vec![ActiveQueue { index: 0, queue, kick: self.kick.try_clone().unwrap() }],
                interrupt: self.line.clone(),
            }
        }

        fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
            let mut bytes = vec![0; len];
            self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
            bytes
        }
    }

    #[test]
    fn fills_what_is_writable_and_nothing_else() {
        let mut guest = Guest::new();
        let mut rng = Rng::new().unwrap();
        let chain = [readable(0x8000, 64), writable(0x9000, 64), writable(0xa000, 32)];
        let head = guest.driver.add(&chain);
        // Added and kicked before the device runs: it is served all the same.
        guest.kick.write(1).unwrap();
        rng.activate(guest.activation()).unwrap();
        guest.line.queue.read().unwrap();
        assert_eq!(guest.driver.used(), Some((head, 96)));
        assert_eq!(guest.bytes(0x8000, 64), [0; 64]);
        assert_eq!(guest.bytes(0x9040, 64), [0; 64]);
        // 32 bytes of entropy are all zero, or twice the same, once in 2^256.
        let (first, second) = (guest.bytes(0x9000, 64), guest.bytes(0xa000, 32));
        assert_ne!(first[..32], [0; 32]);
        assert_ne!(first[32..], [0; 32]);
        assert_ne!(first[..32], second);
        rng.reset();
        rng.reset();
    }

    #[test]
    fn a_huge_request_gets_a_part() {
        let mut guest = Guest::new();
        let mut rng = Rng::new().unwrap();
        let head = guest.driver.add(&[writable(0x1_0000, 0x8_0000); 3]);
        rng.activate(guest.activation()).unwrap();
        guest.line.queue.read().unwrap();
        assert_eq!(guest.driver.used(), Some((head, CHAIN_BYTES as u32)));
    }

    #[test]
    fn serves_kicks_and_starts_again_after_a_reset() {
        let mut rng = Rng::new().unwrap();
        for _ in 0..3 {
            let mut guest = Guest::new();
            rng.activate(guest.activation()).unwrap();
            for _ in 0..20 {
                let head = guest.driver.add(&[writable(0x9000, 16)]);
                guest.kick.write(1).unwrap();
                guest.line.queue.read().unwrap();
                assert_eq!(guest.driver.used(), Some((head, 16)));
            }
            rng.reset();
        }
    }

    #[test]
    fn a_buffer_outside_memory_needs_a_reset() {
        let mut guest = Guest::new();
        let mut rng = Rng::new().unwrap();
        guest.driver.add(&[writable(0xf_fff8, 16)]);
        rng.activate(guest.activation()).unwrap();
        guest.line.reset.read().unwrap();
        assert_eq!(guest.driver.used(), None);
        rng.reset();
    }

    #[test]
    fn a_broken_ring_needs_a_reset() {
        let mut guest = Guest::new();
        let mut rng = Rng::new().unwrap();
        rng.activate(guest.activation()).unwrap();
        guest.driver.set_avail_idx(9);
        guest.kick.write(1).unwrap();
        guest.line.reset.read().unwrap();
        rng.reset();
    }
}
