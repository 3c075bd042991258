//! The network interfaces of a machine, as they are meant. Main thread.

mod forward;
mod keys;
mod table;

use std::net::Ipv4Addr;
use std::os::fd::RawFd;
use std::path::PathBuf;

use devices::virtio::net::Limits;

pub use self::forward::Forward;
pub use self::keys::NET_KEYS;
pub(super) use self::keys::{request, settings};
pub(super) use self::table::write;
use super::place::{ConfigError, Place};
use crate::net::mac::Mac;

/// One network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// Its name in logs and messages: given, or `net0`, `net1`, ...; unique.
    pub id: String,
    /// What its frames go to.
    pub backend: NetBackend,
    /// Its address; `None`: that of a macvtap, else one derived from the machine. Those that are given differ.
    pub mac: Option<Mac>,
    /// The largest packet, 68 to 65535 bytes, that the guest is told; `None`: that of the TAP or macvtap of the host that is
    /// named, unless that is Ethernet's 1500; else nothing is said, and the guest decides.
    pub mtu: Option<u16>,
    /// Doorbells arrive through ioeventfds; off: they exit to the vCPU thread first.
    pub ioeventfd: bool,
    /// Entries of each queue: a power of two, one of [`QUEUE_SIZES`](devices::virtio::net::QUEUE_SIZES).
    pub queue_size: u16,
}

/// What the frames of an interface go to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetBackend {
    /// An Ethernet interface of the host.
    Tap {
        /// Where it comes from.
        source: TapSource,
        /// Who moves its frames.
        path: DataPath,
    },
    /// passt, which skiff starts: the host's network without root.
    Passt {
        /// What the host's ports lead to.
        forwards: Vec<Forward>,
        /// What the interface may do at most.
        limits: Limits,
    },
    /// A Unix socket that passt or something else with its protocol listens on.
    Socket {
        /// Where.
        path: PathBuf,
        /// What the interface may do at most.
        limits: Limits,
    },
}

/// Where a TAP comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TapSource {
    /// It exists: a TAP or a macvtap.
    Named {
        /// Its name.
        name: String,
        /// How many pairs of queues of it: 1 to [`MAX_PAIRS`](devices::virtio::net::MAX_PAIRS).
        queues: u16,
    },
    /// skiff creates it, and it ends with skiff.
    New {
        /// Its name; `None` for the first of `skiff0`, `skiff1`, ... that is free.
        name: Option<String>,
        /// The host's address on it, and how many bits of it are the network's.
        address: (Ipv4Addr, u8),
        /// As above.
        queues: u16,
    },
    /// An open TAP or macvtap, which whoever started skiff left at this number: one pair of queues.
    Descriptor(RawFd),
}

/// Who moves the frames of a TAP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataPath {
    /// The kernel, or it is an error (`vhost=on`). It knows no limits.
    Kernel,
    /// The kernel where it can, else skiff (`vhost=auto`).
    Either,
    /// skiff (`vhost=off`, which is meant if nothing is said, and whenever there are limits).
    Skiff(Limits),
}

/// One interface as it was written: it may still lack an id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetRequest {
    /// All but the id, which is empty here.
    config: NetConfig,
    id: Option<String>,
    /// Where it was written, for complaints.
    place: Place,
}

/// Names the interfaces that have no id by their position, and checks that names, addresses and TAPs differ.
pub(super) fn interfaces(requests: Vec<NetRequest>) -> Result<Vec<NetConfig>, ConfigError> {
    let mut interfaces: Vec<NetConfig> = Vec::with_capacity(requests.len());
    for (at, NetRequest { mut config, id, place }) in requests.into_iter().enumerate() {
        config.id = id.unwrap_or_else(|| format!("net{at}"));
        for other in &interfaces {
            let id = &other.id;
            if *id == config.id {
                return Err(
                    place.error(format_args!("the id \"{id}\" belongs to another interface; choose another with id="))
                );
            }
            if let Some(mac) = config.mac.filter(|_| config.mac == other.mac) {
                return Err(place
                    .error(format_args!("mac={mac} belongs to {id}; two interfaces with one address hear nothing")));
            }
            if let Some(what) = config.backend.same(&other.backend) {
                return Err(place.error(format_args!("{what} belongs to {id}; give each interface its own")));
            }
        }
        interfaces.push(config);
    }
    Ok(interfaces)
}

impl NetConfig {
    /// What it may do at most.
    pub fn limits(&self) -> Limits {
        match self.backend {
            NetBackend::Tap { path: DataPath::Skiff(limits), .. }
            | NetBackend::Passt { limits, .. }
            | NetBackend::Socket { limits, .. } => limits,
            NetBackend::Tap { path: DataPath::Kernel | DataPath::Either, .. } => Limits::default(),
        }
    }
}

impl NetBackend {
    /// What both would use, if it can be used once only.
    fn same(&self, other: &Self) -> Option<String> {
        match (self, other) {
            (Self::Tap { source: one, .. }, Self::Tap { source: two, .. }) => match (one, two) {
                (TapSource::Descriptor(one), TapSource::Descriptor(two)) => (one == two).then(|| format!("fd={one}")),
                _ => one.name().filter(|_| one.name() == two.name()).map(|name| format!("tap={name}")),
            },
            (Self::Socket { path: one, .. }, Self::Socket { path: two, .. }) => {
                (one == two).then(|| format!("socket={}", one.display()))
            }
            (Self::Passt { forwards: one, .. }, Self::Passt { forwards: two, .. }) => {
                let taken = two.iter().find(|two| one.iter().any(|one| one.collides(two)));
                taken.map(|forward| format!("the host's port of forward={forward}"))
            }
            _ => None,
        }
    }
}

impl TapSource {
    /// The name, if it is known before it is opened.
    fn name(&self) -> Option<&str> {
        match self {
            Self::Named { name, .. } => Some(name),
            Self::New { name, .. } => name.as_deref(),
            Self::Descriptor(_) => None,
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
