//! A virtio block driver (virtio 1.2, 5.2): one queue, several requests in flight, polled or by interrupt.

use crate::cpu::{self, Mmio};
use crate::memory;
use crate::pci::Function;
use crate::report::{Failure, Outcome, equal, holds};
use crate::virtio::{Device, Options};
use crate::virtqueue::{Buffer, MAX_BUFFERS, Virtqueue};

pub(crate) const SECTOR: u64 = 512;

pub(crate) const F_READ_ONLY: u64 = 1 << 5;
pub(crate) const F_FLUSH: u64 = 1 << 9;

/// Status bytes.
pub(crate) const OK: u8 = 0;
pub(crate) const IO_ERROR: u8 = 1;
pub(crate) const UNSUPPORTED: u8 = 2;

/// What a status byte is before the device wrote it.
const NOT_WRITTEN: u8 = 0xee;

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Read = 0,
    Write = 1,
    Flush = 4,
    Identify = 8,
    /// A type that no device knows.
    Unknown = 0x7fff_ff00,
}

/// A completed request.
pub(crate) struct Completion {
    pub(crate) head: u16,
    /// The device's status byte.
    pub(crate) status: u8,
    /// Bytes the device says it wrote, the status byte among them.
    pub(crate) written: u32,
}

/// A disk that runs.
pub(crate) struct Disk {
    pub(crate) device: Device,
    pub(crate) queue: Virtqueue,
    pub(crate) features: u64,
    options: Options,
    /// A header of 16 bytes and a status byte for each head.
    headers: Mmio,
    statuses: Mmio,
}

impl Disk {
    /// Resets and starts the disk behind `function`.
    pub(crate) fn open(function: Function, options: Options) -> Outcome<Self> {
        let device = Device::find(function)?;
        let wanted = Options { features: options.features | F_READ_ONLY | F_FLUSH, ..options };
        let features = device.begin(&wanted)?;
        let queue = device.queue(0, features, &wanted)?;
        let entries = u64::from(queue.size);
        let disk = Self {
            device,
            features,
            options: wanted,
            headers: memory::allocate(entries * 16),
            statuses: memory::allocate(entries),
            queue,
        };
        disk.device.start()?;
        Ok(disk)
    }

    /// Resets the device and starts it again with the same rings.
    pub(crate) fn reopen(&mut self) -> Outcome {
        self.device = self.device.again()?;
        self.device.begin(&self.options)?;
        self.queue.clear();
        self.device.enable(&self.queue, self.options.vectors.map(|(_, vector)| vector))?;
        self.queue.doorbell = self.device.doorbell();
        self.device.start()
    }

    /// Finds the device where its BARs are now; it goes on running.
    pub(crate) fn follow(&mut self) -> Outcome {
        self.device = self.device.again()?;
        self.queue.doorbell = self.device.doorbell();
        Ok(())
    }

    /// Capacity in sectors.
    pub(crate) fn sectors(&self) -> u64 {
        u64::from(self.device.config.read::<u32>(0)) | u64::from(self.device.config.read::<u32>(4)) << 32
    }

    /// Makes a request available; its head, or nothing while the queue is full. The device may not know before `kick`.
    pub(crate) fn submit(&mut self, kind: Kind, sector: u64, data: &[(Mmio, u32)]) -> Option<u16> {
        assert!(data.len() + 2 <= MAX_BUFFERS, "a request of {} buffers", data.len());
        let head = self.queue.next_head()?;
        let header = Mmio(self.headers.0 + u64::from(head) * 16);
        header.write(0, kind as u32);
        header.write(4, 0_u32);
        header.write(8, sector);
        self.statuses.write(head.into(), NOT_WRITTEN);
        let mut buffers = [Buffer { address: header.0, bytes: 16, writable: false }; MAX_BUFFERS];
        for (buffer, (address, bytes)) in buffers[1..].iter_mut().zip(data) {
            let writable = matches!(kind, Kind::Read | Kind::Identify);
            *buffer = Buffer { address: address.0, bytes: *bytes, writable };
        }
        let status = Mmio(self.statuses.0 + u64::from(head));
        buffers[data.len() + 1] = Buffer { address: status.0, bytes: 1, writable: true };
        self.queue.add(&buffers[..data.len() + 2])
    }

    /// Takes a completed request.
    pub(crate) fn poll(&mut self) -> Option<Completion> {
        let (head, written) = self.queue.pop()?;
        Some(Completion { head, status: self.statuses.read(head.into()), written })
    }

    /// Waits for a request to complete: halted if there are interrupts, else polling.
    pub(crate) fn wait(&mut self) -> Outcome<Completion> {
        let mut completion = None;
        cpu::wait_until(|| {
            let seen = cpu::interrupts_seen();
            if self.options.vectors.is_some() {
                self.queue.arm();
            }
            completion = self.poll();
            if completion.is_none() && self.options.vectors.is_some() {
                cpu::sleep(seen);
            }
            completion.is_some()
        });
        completion.ok_or(Failure::Wrong("a request completes"))
    }

    fn complete(&mut self, kind: Kind, sector: u64, data: &[(Mmio, u32)]) -> Outcome<Completion> {
        let head = self.submit(kind, sector, data);
        holds("there is room in an idle queue", head.is_some())?;
        self.queue.kick();
        let completion = self.wait()?;
        equal("the completed head", completion.head, head.unwrap_or_default())?;
        Ok(completion)
    }

    /// One request from beginning to end; its status byte.
    pub(crate) fn request(&mut self, kind: Kind, sector: u64, data: &[(Mmio, u32)]) -> Outcome<u8> {
        Ok(self.complete(kind, sector, data)?.status)
    }

    /// Like [`Self::request`], and the request must succeed.
    pub(crate) fn succeed(&mut self, kind: Kind, sector: u64, data: &[(Mmio, u32)]) -> Outcome {
        let completion = self.complete(kind, sector, data)?;
        equal("the status of a request", completion.status, OK)?;
        let read = if kind == Kind::Read { data.iter().map(|(_, bytes)| bytes).sum() } else { 0 };
        holds("the used length covers what was read", kind != Kind::Read || completion.written > read)
    }

    /// Reads one sector into fresh memory: does the disk still work?
    pub(crate) fn works(&mut self) -> Outcome {
        let before = memory::mark();
        let buffer = memory::allocate(SECTOR);
        let outcome = self.succeed(Kind::Read, 0, &[(buffer, SECTOR as u32)]);
        if outcome.is_ok() {
            memory::release(before);
        }
        outcome
    }
}
