//! virtio-blk (virtio 1.2, 5.2): the device as its transport sees it. Its queues run in workers of their own from
//! activation to reset.

use std::io;
use std::ops::RangeInclusive;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use block::disk::Disk;
use block::engine::Engines;
use block::engine::merge::Merge;
use block::throttle::{Limits, Throttle};
use thiserror::Error;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::config::Config;
use self::errors::Errors;
use self::gate::Limited;
use self::request::{Rules, Serial};
use self::statistics::Statistics;
use self::worker::{Context, QueueWorker};
use self::write_cache::WriteCache;
use super::device::{ActivateError, Activation, ActiveQueue, VirtioDevice};
use super::queue::QueueError;
use crate::log_limit::LogLimit;
use crate::worker::Worker;

mod config;
pub mod errors;
mod gate;
mod polling;
mod request;
pub mod statistics;
mod worker;
mod write_cache;

/// The most queues of a disk. Each that the driver enables has a thread and an engine.
pub const MAX_QUEUES: u16 = 64;

/// Entries a queue may have, powers of two. With fewer there is no room for data beside the header and the status of a
/// request; with more a chain would be longer than one system call of the host takes.
pub const QUEUE_SIZES: RangeInclusive<u16> = 4..=1024;

/// Entries of a queue if nothing is said.
pub const QUEUE_SIZE: u16 = 256;

/// The longest a worker may look for work: it does not see that it is to stop meanwhile.
pub const LONGEST_POLL: Duration = Duration::from_millis(10);

/// How a disk shows itself.
#[derive(Clone, Debug)]
pub struct BlkOptions {
    /// The number in its threads' names, `blk<number>-q<queue>`.
    pub number: usize,
    /// What the guest reads as serial number, its first 20 bytes. None reads as empty.
    pub serial: Option<String>,
    /// What moves the bytes: for each queue the first of them that starts.
    pub engines: Engines,
    /// How many queues it has: 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Entries of each queue, at most: one of [`QUEUE_SIZES`].
    pub queue_size: u16,
    /// The guest may give blocks back to the host: discard, and unmap what it zeroes.
    pub unmap: bool,
    /// Where its requests are counted.
    pub statistics: Arc<Statistics>,
    /// How long a worker without work looks for some before it sleeps, up to [`LONGEST_POLL`]; it looks
    /// shorter, or not at all, as long as that has not paid.
    pub poll: Duration,
    /// What its host's errors do; without, all are reported to the guest.
    pub errors: Option<Errors>,
    /// Neighbours that are available at once go to the host as one transfer.
    pub merge: bool,
    /// What it may do at most.
    pub limits: Option<Limits>,
    /// Set when the machine is stopped by force, before its last [`VirtioDevice::reset`]: that waits for what the host has
    /// begun, and for the flush, and does nothing else that the guest asked for.
    pub abandon: Arc<AtomicBool>,
}

impl Default for BlkOptions {
    fn default() -> Self {
        Self {
            number: 0,
            serial: None,
            engines: Engines::default(),
            queues: 1,
            queue_size: QUEUE_SIZE,
            unmap: true,
            statistics: Arc::default(),
            poll: Duration::ZERO,
            errors: None,
            merge: true,
            limits: None,
            abandon: Arc::default(),
        }
    }
}

/// How the driver broke a queue of this device, or the host its worker.
#[derive(Debug, Error)]
enum Broken {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("the request at descriptor {0} has no status byte that can be written")]
    NoStatus(u16),
    #[error("the request at descriptor {0} has readable buffers after writable ones")]
    Order(u16),
    #[error("descriptor {0} was made available again while its request is in flight")]
    Repeated(u16),
    #[error("its queue cannot wait for events: {0}")]
    Host(#[from] io::Error),
}

/// A virtio-blk device over one disk.
pub struct Blk {
    disk: Arc<Disk>,
    number: usize,
    serial: Serial,
    engines: Engines,
    /// One size a queue, all the same.
    queue_sizes: Vec<u16>,
    unmap: bool,
    write_cache: Arc<WriteCache>,
    statistics: Arc<Statistics>,
    poll: Duration,
    errors: Option<Errors>,
    merge: bool,
    limited: Limited,
    abandon: Arc<AtomicBool>,
    workers: Vec<Worker<()>>,
    /// Across resets, for a guest can reset as often as it likes.
    log: Arc<Mutex<LogLimit>>,
}

impl Blk {
    /// A device that shows `disk` to the guest. The disk may be shown again by a later machine.
    pub fn new(disk: Arc<Disk>, options: &BlkOptions) -> Self {
        let mut serial = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (to, from) in serial.iter_mut().zip(options.serial.iter().flat_map(|serial| serial.bytes())) {
            *to = from;
        }
        Self {
            write_cache: Arc::new(WriteCache::new(disk.cache())),
            unmap: options.unmap && !disk.readonly(),
            disk,
            number: options.number,
            serial,
            engines: options.engines.clone(),
            queue_sizes: vec![options.queue_size; options.queues.into()],
            statistics: options.statistics.clone(),
            poll: options.poll,
            errors: options.errors.clone(),
            merge: options.merge,
            limited: options.limits.map(|limits| Arc::new(Mutex::new(Throttle::new(&limits, Instant::now())))),
            abandon: options.abandon.clone(),
            workers: Vec::new(),
            log: Arc::default(),
        }
    }

    /// For a driver with these features, before its workers start.
    fn rules(&self, features: u64) -> Rules {
        self.write_cache.begin(features);
        Rules {
            size: self.disk.size(),
            readonly: self.disk.readonly(),
            cache: self.write_cache.clone(),
            features,
            may_unmap: self.unmap,
        }
    }

    fn switch_write_cache(&self, on: bool) {
        let flush = || if self.disk.readonly() { Ok(()) } else { self.disk.flush() };
        if let Err(error) = self.write_cache.switch(on, flush) {
            let mut limit = self.log.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(suppressed) = limit.allow(Instant::now()) {
                let disk = self.disk.id();
                tracing::warn!("disk {disk}: flushing failed: {error}{suppressed}");
            }
        }
    }

    /// Data segments of one request: a chain is no longer than the queue, and the header and the status are in it too.
    fn seg_max(&self) -> u32 {
        u32::from(self.queue_sizes[0]) - 2
    }

    fn start(&self, queue: ActiveQueue, context: Context) -> io::Result<Worker<()>> {
        let name = format!("blk{}-q{}", self.number, queue.index);
        let (mut engine, fallback) = self.engines.start(&self.disk, &format!("{name}-io"))?;
        if self.merge {
            engine = Box::new(Merge::new(engine));
        }
        let worker = QueueWorker::new(context, queue, engine)?;
        if let Some(why) = fallback {
            worker.log(format_args!("{name}: {why}"));
        }
        Worker::spawn(&name, move |stop| worker.run(&stop))
    }
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let features = [
            (VIRTIO_BLK_F_SEG_MAX, true),
            (VIRTIO_BLK_F_RO, self.disk.readonly()),
            (VIRTIO_BLK_F_BLK_SIZE, true),
            // In every cache mode, for a write cache that is off may be switched on (5.2.5.2).
            (VIRTIO_BLK_F_FLUSH, true),
            (VIRTIO_BLK_F_TOPOLOGY, true),
            (VIRTIO_BLK_F_CONFIG_WCE, true),
            (VIRTIO_BLK_F_MQ, self.queue_sizes.len() > 1),
            (VIRTIO_BLK_F_DISCARD, self.unmap),
            (VIRTIO_BLK_F_WRITE_ZEROES, !self.disk.readonly()),
        ];
        features.into_iter().fold(0, |bits, (feature, offered)| bits | u64::from(offered) << feature)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = Config {
            disk: &self.disk,
            seg_max: self.seg_max(),
            queues: self.queue_sizes.len() as u16,
            writeback: self.write_cache.is_on(),
            unmap: self.unmap,
        };
        let config = config.bytes();
        let from = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
        data.fill(0);
        for (to, from) in data.iter_mut().zip(from) {
            *to = *from;
        }
    }

    /// Only `writeback` can be written. Switching the write cache off waits for the flush that belongs to it.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let at = config::WRITEBACK.checked_sub(offset).and_then(|at| usize::try_from(at).ok());
        if let Some(writeback) = at.and_then(|at| data.get(at)) {
            self.switch_write_cache(*writeback != 0);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let failed = |source| ActivateError { what: "starting a disk queue", source };
        let context = Context {
            disk: self.disk.clone(),
            rules: self.rules(activation.features),
            serial: self.serial,
            memory: activation.memory,
            interrupt: activation.interrupt,
            log: self.log.clone(),
            poll: self.poll,
            halt: Arc::new(EventFd::new(EFD_NONBLOCK).map_err(failed)?),
            statistics: self.statistics.clone(),
            errors: self.errors.clone(),
            limited: self.limited.clone(),
            abandon: self.abandon.clone(),
        };
        for queue in activation.queues {
            match self.start(queue, context.clone()) {
                Ok(worker) => self.workers.push(worker),
                Err(source) => {
                    self.reset();
                    return Err(failed(source));
                }
            }
        }
        Ok(())
    }

    /// Also flushes the disk if the guest wrote to it and the cache mode flushes: each worker does when it stops.
    fn reset(&mut self) {
        self.workers.iter().for_each(Worker::ask);
        self.workers.drain(..).for_each(Worker::stop);
        self.write_cache.end();
    }
}

impl Drop for Blk {
    fn drop(&mut self) {
        self.reset();
    }
}

#[cfg(test)]
mod tests;
