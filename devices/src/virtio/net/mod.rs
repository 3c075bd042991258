//! virtio-net (virtio 1.2, 5.1): the device as its transport sees it. Each pair of its queues runs in a worker of its own from
//! activation to reset, over a port of the back end.

use std::io;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex};

use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::backend::{Backend, Offloads};
use self::config::Config;
use self::header::{GUEST_FEATURES, Rules};
use self::link::Link;
use self::statistics::Statistics;
use self::worker::{Context, PairWorker};
use super::device::{ActivateError, Activation, ActiveQueue, VirtioDevice};
use super::queue::QueueError;
use crate::log_limit::LogLimit;
use crate::worker::Worker;

pub mod backend;
pub mod buffers;
mod config;
mod header;
mod link;
mod rx;
pub mod statistics;
pub mod tap;
mod tx;
mod worker;

/// The most pairs of queues of an interface. Each that the driver enables has a thread.
pub const MAX_PAIRS: u16 = 64;

/// Entries a queue may have, powers of two. A driver refills its receive queue when half of it is used, so half of the shortest
/// must hold the largest frame.
pub const QUEUE_SIZES: RangeInclusive<u16> = 256..=1024;

/// Entries of a queue if nothing is said.
pub const QUEUE_SIZE: u16 = 256;

/// The features with which a device does something for the driver, with the offloads that takes.
const HOST_FEATURES: [(u32, Offloads); 6] = [
    (VIRTIO_NET_F_CSUM, Offloads::CSUM),
    (VIRTIO_NET_F_HOST_TSO4, Offloads::TSO4),
    (VIRTIO_NET_F_HOST_TSO6, Offloads::TSO6),
    (VIRTIO_NET_F_HOST_ECN, Offloads::ECN),
    (VIRTIO_NET_F_HOST_UFO, Offloads::UFO),
    (VIRTIO_NET_F_HOST_USO, Offloads::USO),
];

/// How an interface shows itself.
#[derive(Clone, Debug)]
pub struct NetOptions {
    /// The number in its threads' names, `net<number>-q<pair>`.
    pub number: usize,
    /// Its name in logs.
    pub id: String,
    /// Its address.
    pub mac: [u8; 6],
    /// The largest packet, if the driver is told one.
    pub mtu: Option<u16>,
    /// Entries of each queue, at most: one of [`QUEUE_SIZES`].
    pub queue_size: u16,
    /// Where its frames are counted.
    pub statistics: Arc<Statistics>,
}

/// How the driver broke a queue of this device, or the host its worker.
#[derive(Debug, Error)]
enum Broken {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("the chain at descriptor {0} has a buffer of the wrong direction or outside of memory")]
    Buffer(u16),
    #[error("the chain at descriptor {0} is shorter than a header")]
    Short(u16),
    #[error("it cannot wait for events: {0}")]
    Host(#[from] io::Error),
}

/// A virtio-net device over one back end.
pub struct Net {
    backend: Arc<Backend>,
    options: NetOptions,
    /// One size a queue, all the same.
    queue_sizes: Vec<u16>,
    link: Arc<Link>,
    workers: Vec<Worker<()>>,
    /// Across resets, for a guest can reset as often as it likes.
    log: Arc<Mutex<LogLimit>>,
}

impl Net {
    /// A device whose frames go to `backend`, which may be given to a later machine's again.
    pub fn new(backend: Arc<Backend>, options: NetOptions) -> Self {
        Self {
            queue_sizes: vec![options.queue_size; 2 * usize::from(backend.pairs())],
            backend,
            options,
            link: Arc::default(),
            workers: Vec::new(),
            log: Arc::default(),
        }
    }

    /// Gives each pair that the driver enabled a worker.
    fn start(&mut self, activation: Activation) -> io::Result<()> {
        let rules = Rules::new(activation.features);
        if let Err(error) = self.backend.port(0).set_offloads(rules.offloads) {
            // What the driver did not agree to is dropped before it gets there.
            tracing::warn!("net {}: the host does not change its offloads: {error}", self.options.id);
        }
        let context = Context {
            id: self.options.id.clone(),
            memory: activation.memory,
            interrupt: activation.interrupt,
            log: self.log.clone(),
            rules,
            link: self.link.clone(),
            halt: Arc::new(EventFd::new(EFD_NONBLOCK)?),
        };
        let mut queues = activation.queues.into_iter().peekable();
        for pair in 0..self.backend.pairs() {
            let mut take = |index| queues.next_if(|queue: &ActiveQueue| queue.index == index);
            let both = [take(2 * pair), take(2 * pair + 1)];
            if both.iter().any(Option::is_some) {
                self.start_pair(pair, both, context.clone())?;
            }
        }
        Ok(())
    }

    fn start_pair(&mut self, pair: u16, queues: [Option<ActiveQueue>; 2], context: Context) -> io::Result<()> {
        let counts = self.options.statistics.pair(pair.into());
        let worker = PairWorker::new(context, pair, queues, counts)?;
        let (name, backend) = (format!("net{}-q{pair}", self.options.number), self.backend.clone());
        let body = move |stop: EventFd| worker.run(backend.port(pair).as_mut(), &stop);
        self.workers.push(Worker::spawn(&name, body)?);
        Ok(())
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        let done = self.backend.offloads();
        let own = [
            (VIRTIO_NET_F_MAC, true),
            (VIRTIO_NET_F_MTU, self.options.mtu.is_some()),
            (VIRTIO_NET_F_MRG_RXBUF, true),
            (VIRTIO_NET_F_STATUS, true),
        ];
        let offloads = HOST_FEATURES.iter().chain(&GUEST_FEATURES);
        let offloads = offloads.map(|(feature, offload)| (*feature, done.contains(*offload | Offloads::CSUM)));
        own.into_iter().chain(offloads).fold(0, |bits, (feature, offered)| bits | u64::from(offered) << feature)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = Config {
            mac: self.options.mac,
            link_up: self.link.is_up(),
            pairs: self.backend.pairs(),
            mtu: self.options.mtu,
        };
        let config = config.bytes();
        let from = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
        data.fill(0);
        for (to, from) in data.iter_mut().zip(from) {
            *to = *from;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.start(activation).map_err(|source| {
            self.reset();
            ActivateError { what: "starting a pair of network queues", source }
        })
    }

    fn reset(&mut self) {
        self.workers.iter().for_each(Worker::ask);
        self.workers.drain(..).for_each(Worker::stop);
        self.link.reset();
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.reset();
    }
}

#[cfg(test)]
mod tests;
