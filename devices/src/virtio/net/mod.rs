//! virtio-net (virtio 1.2, 5.1): the device as its transport sees it. Each pair of its queues runs in a worker of its own from
//! activation to reset, over a port of the back end.

use std::io;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::backend::{Backend, Offloads};
use self::config::Config;
use self::filter::Filter;
use self::gate::Limited;
pub use self::gate::Limits;
use self::header::{GUEST_FEATURES, Rules};
use self::link::Link;
use self::settings::{Settings, Shared};
use self::statistics::Statistics;
use self::worker::{Context, PairWorker};
use super::device::{ActivateError, Activation, ActiveQueue, VirtioDevice};
use super::queue::QueueError;
use crate::log_limit::LogLimit;
use crate::worker::Worker;

pub mod backend;
pub mod buffers;
mod config;
mod control;
mod filter;
mod gate;
mod header;
mod link;
mod rx;
mod schedule;
mod settings;
mod side;
pub mod statistics;
pub mod stream;
pub mod tap;
mod tx;
pub mod vhost;
mod wakeups;
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
    /// What it may do at most.
    pub limits: Limits,
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
    #[error("the command at descriptor {0} has no place for an answer")]
    NoAnswer(u16),
    #[error("the kernel found a ring broken")]
    Kernel,
    #[error("it cannot wait for events: {0}")]
    Host(#[from] io::Error),
}

/// A virtio-net device over one back end.
pub struct Net {
    backend: Arc<Backend>,
    options: NetOptions,
    /// One size a queue, all the same; the last is the control queue.
    queue_sizes: Vec<u16>,
    link: Arc<Link>,
    limited: Limited,
    /// What the driver set, while the device is active.
    shared: Option<Arc<Shared>>,
    workers: Vec<Worker<()>>,
    /// Across resets, for a guest can reset as often as it likes.
    log: Arc<Mutex<LogLimit>>,
}

impl Net {
    /// A device whose frames go to `backend`, which may be given to a later machine's again.
    pub fn new(backend: Arc<Backend>, options: NetOptions) -> Self {
        Self {
            queue_sizes: vec![options.queue_size; 2 * usize::from(backend.pairs()) + 1],
            limited: options.limits.throttle(Instant::now()),
            shared: None,
            backend,
            options,
            link: Arc::default(),
            workers: Vec::new(),
            log: Arc::default(),
        }
    }

    /// Gives each pair that the driver enabled a worker.
    fn start(&mut self, activation: Activation) -> io::Result<()> {
        let Activation { memory, features, queues, interrupt } = activation;
        let (pairs, control) = self.sort(features, queues);
        let settings = Settings {
            rules: Rules::new(features),
            filter: Filter::new(self.options.mac, features >> VIRTIO_NET_F_CTRL_VLAN & 1 == 1),
            pairs: 1,
        };
        let shared = Arc::new(Shared::new(settings, pairs.len() as u16)?);
        self.shared = Some(shared.clone());
        let context = Context {
            id: self.options.id.clone(),
            memory,
            interrupt,
            log: self.log.clone(),
            backend: self.backend.clone(),
            features,
            shared,
            link: self.link.clone(),
            limited: self.limited.clone(),
            halt: Arc::new(EventFd::new(EFD_NONBLOCK)?),
        };
        // All before one of them runs, and obeys a command that is there already: that is done when the others know of it.
        let (mut control, mut workers) = (control, Vec::new());
        for (pair, queues) in (0..).zip(pairs) {
            let counts = self.options.statistics.pair(pair.into());
            workers.push((pair, PairWorker::new(context.clone(), pair, queues, control.take(), counts)?));
        }
        for (pair, worker) in workers {
            let (name, backend) = (format!("net{}-q{pair}", self.options.number), self.backend.clone());
            let body = move |stop: EventFd| worker.run(backend.port(pair).as_mut(), &stop);
            self.workers.push(Worker::spawn(&name, body)?);
        }
        Ok(())
    }

    /// The queues of each pair, and the control queue (5.1.2), as far as the driver enabled them. The pairs before the last that
    /// it enabled a queue of are all there; the first always is.
    fn sort(&self, features: u64, queues: Vec<ActiveQueue>) -> (Vec<Pair>, Option<ActiveQueue>) {
        let agreed = |feature: u32| features >> feature & 1 == 1;
        let most = if agreed(VIRTIO_NET_F_MQ) { self.backend.pairs() } else { 1 };
        let (mut pairs, mut control) = (vec![Pair::default()], None);
        for queue in queues {
            let (pair, side) = (usize::from(queue.index / 2), usize::from(queue.index % 2));
            if queue.index == 2 * most {
                control = Some(queue).filter(|_| agreed(VIRTIO_NET_F_CTRL_VQ));
            } else if queue.index < 2 * most {
                pairs.resize_with(pairs.len().max(pair + 1), Pair::default);
                pairs[pair][side] = Some(queue);
            }
        }
        (pairs, control)
    }
}

/// The receive and the transmit queue of a pair, if the driver enabled them.
type Pair = [Option<ActiveQueue>; 2];

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
            (VIRTIO_NET_F_CTRL_VQ, true),
            (VIRTIO_NET_F_CTRL_RX, true),
            (VIRTIO_NET_F_CTRL_RX_EXTRA, true),
            (VIRTIO_NET_F_CTRL_VLAN, true),
            (VIRTIO_NET_F_CTRL_MAC_ADDR, true),
            (VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, done.contains(Offloads::CSUM)),
            (VIRTIO_NET_F_MQ, self.backend.pairs() > 1),
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
            mac: self.shared.as_ref().map_or(self.options.mac, |shared| shared.current().filter.own),
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
        self.shared = None;
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.reset();
    }
}

#[cfg(test)]
mod tests;
