//! `--net`: the network interfaces of a machine, as they are written and as they are meant. Main thread.

use std::fmt::{self, Display, Formatter};
use std::net::Ipv4Addr;
use std::num::NonZeroU64;
use std::os::fd::RawFd;
use std::path::PathBuf;

use devices::virtio::net::{Limits, MAX_PAIRS, QUEUE_SIZE, QUEUE_SIZES};

use super::file::{self, line, text};
use super::list::Settings;
use super::options::choice;
use super::place::{ConfigError, Place};
use super::value::{self, format_size};
use crate::net::mac::Mac;

/// The keys of `--net`.
pub const NET_KEYS: [&str; 16] = [
    "tap",
    "fd",
    "passt",
    "socket",
    "host-ip",
    FORWARD,
    "vhost",
    "queues",
    "mac",
    "mtu",
    "ioeventfd",
    "queue-size",
    "rx-bps",
    "tx-bps",
    "pps",
    "id",
];

const FORWARD: &str = "forward";

/// The longest name of an interface: IFNAMSIZ with its NUL (netdevice(7)).
const LONGEST_NAME: usize = 15;

/// One network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// Its name in logs and messages: given, or `net0`, `net1`, ...; unique.
    pub id: String,
    /// What its frames go to.
    pub backend: NetBackend,
    /// Its address; `None`: that of a macvtap, else one derived from the machine. Those that are given differ.
    pub mac: Option<Mac>,
    /// The largest packet, 68 to 65535 bytes, that the guest is told; `None`: nothing is said, and the guest decides.
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

/// A port of the host, or several, that lead to the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forward {
    /// UDP, else TCP.
    pub udp: bool,
    /// The host's address; `None` for all of them.
    pub address: Option<Ipv4Addr>,
    /// The host's ports, first and last.
    pub from: (u16, u16),
    /// The guest's port for the first of them; those after it follow.
    pub to: u16,
}

impl Forward {
    /// Reads `tcp:[ADDRESS:]PORT[-PORT][:GUEST-PORT]`, or the same with `udp:`.
    fn parse(text: &str) -> Result<Self, String> {
        let wrong =
            || "not a forward; write it like tcp:2222:22, udp:5353:53 or tcp:127.0.0.1:8000-8010:8000".to_owned();
        let mut words: Vec<_> = text.split(':').collect();
        let udp = match words.remove(0) {
            "tcp" => false,
            "udp" => true,
            _ => return Err(wrong()),
        };
        let address = words.first().filter(|part| part.contains('.')).map(|part| part.parse().map_err(|_| wrong()));
        let address = address.transpose()?;
        let ports = &words[usize::from(address.is_some())..];
        let port =
            |text: &str| text.parse::<u16>().ok().filter(|&port| port != 0 && !text.starts_with('+')).ok_or_else(wrong);
        let (from, to) = match *ports {
            [from] => (from, None),
            [from, to] => (from, Some(to)),
            _ => return Err(wrong()),
        };
        let (first, last) = from.split_once('-').unwrap_or((from, from));
        let from = (port(first)?, port(last)?);
        let to = to.map_or(Ok(from.0), port)?;
        if from.1 < from.0 || to.checked_add(from.1 - from.0).is_none() {
            return Err("the ports end before they begin, or past 65535".to_owned());
        }
        Ok(Self { udp, address, from, to })
    }

    /// Whether both want a port of the host.
    fn collides(&self, other: &Self) -> bool {
        let address = self.address.is_none() || other.address.is_none() || self.address == other.address;
        self.udp == other.udp && address && self.from.0 <= other.from.1 && other.from.0 <= self.from.1
    }
}

impl Display for Forward {
    /// As it is written.
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        out.write_str(if self.udp { "udp:" } else { "tcp:" })?;
        if let Some(address) = self.address {
            write!(out, "{address}:")?;
        }
        match self.from {
            (first, last) if first == last => write!(out, "{first}")?,
            (first, last) => write!(out, "{first}-{last}")?,
        }
        write!(out, ":{}", self.to)
    }
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

/// The settings of a flag, in which `passt` stands without a value.
pub(super) fn settings(place: &Place, text: &str) -> Result<Settings, ConfigError> {
    let (first, rest) = text.split_at(text.find(',').unwrap_or(text.len()));
    match first {
        "passt" => return Settings::parse(place, &format!("passt=on{rest}"), "", &NET_KEYS),
        "tap" => {
            return Err(place.error("which? write tap=NAME, or tap=,host-ip=192.0.2.1/24 for one that skiff creates"));
        }
        "socket" | "fd" => return Err(place.error(format_args!("which? write {first}={}", first.to_uppercase()))),
        _ if !first.contains('=') => {
            let guess = value::nearest(first, &["tap", "passt", "socket", "fd"]);
            let guess = guess.map(|near| format!("; did you mean \"{near}\"?")).unwrap_or_default();
            return Err(place.error(format_args!("no such network{guess} ({NETWORKS})")));
        }
        _ => (),
    }
    Settings::parse(place, text, "", &NET_KEYS)
}

const NETWORKS: &str = "tap=NAME, tap=,host-ip=192.0.2.1/24, fd=N, passt, socket=PATH";

pub(super) fn request(settings: &Settings) -> Result<NetRequest, ConfigError> {
    let config = NetConfig {
        id: String::new(),
        backend: backend(settings)?,
        mac: settings.value("mac", Mac::parse)?,
        mtu: settings.value("mtu", mtu)?,
        ioeventfd: settings.switch("ioeventfd", true)?,
        queue_size: settings.value("queue-size", queue_size)?.unwrap_or(QUEUE_SIZE),
    };
    Ok(NetRequest { config, id: settings.value("id", value::id)?, place: settings.place().clone() })
}

/// What the frames go to, and the settings that only some of these have.
fn backend(settings: &Settings) -> Result<NetBackend, ConfigError> {
    let passt = settings.switch("passt", false)?;
    let given = ["tap", "fd", "socket"].iter().filter(|key| settings.get(key).is_some()).count() + usize::from(passt);
    if given != 1 {
        let what = if given == 0 { "it has none" } else { "it has two" };
        return Err(settings
            .place()
            .error(format_args!("an interface has one network, and {what}; write one of {NETWORKS}")));
    }
    let limits = Limits {
        rx_bytes: settings.value("rx-bps", value::bps)?,
        tx_bytes: settings.value("tx-bps", value::bps)?,
        frames: settings.value("pps", pps)?,
    };
    let only = |key: &str, of: &str| match settings.get(key) {
        Some(setting) => Err(setting.error(format_args!("this goes with {of} only; leave it out"))),
        None => Ok(()),
    };
    if !passt {
        only(FORWARD, "passt")?;
    }
    if settings.get("tap").is_none() {
        only("host-ip", "tap=")?;
        only("queues", "tap=")?;
    }
    if settings.get("tap").or_else(|| settings.get("fd")).is_none() {
        only("vhost", "tap= and fd=")?;
    }
    if let Some(path) = settings.path("socket")? {
        return Ok(NetBackend::Socket { path, limits });
    }
    if passt {
        return Ok(NetBackend::Passt { forwards: forwards(settings)?, limits });
    }
    let source = tap(settings)?;
    Ok(NetBackend::Tap { source, path: data_path(settings, limits)? })
}

fn tap(settings: &Settings) -> Result<TapSource, ConfigError> {
    if let Some(fd) = settings.value("fd", descriptor)? {
        return Ok(TapSource::Descriptor(fd));
    }
    let queues = settings.value("queues", queues)?.unwrap_or(1);
    let address = settings.value("host-ip", host_ip)?;
    let name = settings.get("tap").filter(|setting| !setting.value.is_empty());
    let name = name.map(|setting| interface(&setting.value).map_err(|what| setting.error(what))).transpose()?;
    match (name, address) {
        (name, Some(address)) => Ok(TapSource::New { name, address, queues }),
        (Some(name), None) => Ok(TapSource::Named { name, queues }),
        (None, None) => Err(settings.place().error(
            "which interface? write tap=NAME, or let skiff create one: tap=,host-ip=192.0.2.1/24 (the host's address on it)",
        )),
    }
}

fn data_path(settings: &Settings, limits: Limits) -> Result<DataPath, ConfigError> {
    let vhost = choice(settings, "vhost", None, &["on", "off", "auto"], |word| word)?;
    match (vhost.unwrap_or("off"), limits == Limits::default()) {
        ("on", true) => Ok(DataPath::Kernel),
        ("on", false) => Err(settings.place().error(
            "rx-bps, tx-bps and pps do not go with vhost=on: the kernel moves the frames then, and knows no limits; \
             leave them out, or write vhost=off",
        )),
        ("auto", true) => Ok(DataPath::Either),
        _ => Ok(DataPath::Skiff(limits)),
    }
}

fn forwards(settings: &Settings) -> Result<Vec<Forward>, ConfigError> {
    let mut forwards: Vec<Forward> = Vec::new();
    for setting in settings.all(FORWARD) {
        let forward = Forward::parse(&setting.value).map_err(|what| setting.error(what))?;
        if let Some(other) = forwards.iter().find(|other| other.collides(&forward)) {
            return Err(setting.error(format_args!("{other} leads elsewhere from the same port; choose another")));
        }
        forwards.push(forward);
    }
    Ok(forwards)
}

/// A name that an interface can have: dev_valid_name() of Linux.
fn interface(text: &str) -> Result<String, String> {
    let letters = text.bytes().all(|byte| byte.is_ascii_graphic() && !b"/:%".contains(&byte));
    if !letters || text.len() > LONGEST_NAME || text == "." || text == ".." {
        return Err(format!(
            "no interface can be called so: a name has at most {LONGEST_NAME} letters, none of them /, : or %"
        ));
    }
    Ok(text.to_owned())
}

fn host_ip(text: &str) -> Result<(Ipv4Addr, u8), String> {
    let wrong = || "not an address and the bits of its network; write it like 192.0.2.1/24".to_owned();
    let (address, bits) = text.split_once('/').ok_or_else(wrong)?;
    let address: Ipv4Addr = address.parse().map_err(|_| wrong())?;
    let bits: u8 = bits.parse().map_err(|_| wrong())?;
    if address.is_unspecified() || address.is_multicast() || address.is_broadcast() || address.is_loopback() {
        return Err("no interface can have this address; write it like 192.0.2.1/24".to_owned());
    }
    if !(1..=30).contains(&bits) {
        return Err(
            "a network of 1 to 30 bits leaves room for the host and the guest; write it like 192.0.2.1/24".to_owned()
        );
    }
    Ok((address, bits))
}

/// Standard input, output and error are not it.
fn descriptor(text: &str) -> Result<RawFd, String> {
    let fd = text.parse().ok().filter(|&fd: &RawFd| fd > 2);
    fd.ok_or_else(|| {
        "not the number of an open TAP; open one in the shell, \"3<>/dev/tap5\" for a macvtap, and write fd=3"
            .to_owned()
    })
}

fn queues(text: &str) -> Result<u16, String> {
    let queues = text.parse().ok().filter(|queues| (1..=MAX_PAIRS).contains(queues));
    queues.ok_or_else(|| format!("an interface has 1 to {MAX_PAIRS} pairs of queues"))
}

fn queue_size(text: &str) -> Result<u16, String> {
    let size = text.parse::<u16>().ok().filter(|size| size.is_power_of_two() && QUEUE_SIZES.contains(size));
    let (least, most) = (QUEUE_SIZES.start(), QUEUE_SIZES.end());
    size.ok_or_else(|| format!("a queue has a power of two from {least} to {most} entries; write {QUEUE_SIZE}"))
}

/// What IPv4 needs at least (RFC 791), and the field of virtio-net holds at most (virtio 1.2, 5.1.4.1).
fn mtu(text: &str) -> Result<u16, String> {
    let mtu = text.parse::<u16>().ok().filter(|&mtu| mtu >= 68);
    mtu.ok_or_else(|| "an MTU is 68 to 65535 bytes; write it like 1500".to_owned())
}

fn pps(text: &str) -> Result<NonZeroU64, String> {
    let number = || "not a number of frames a second; write it like 10000".to_owned();
    let frames: u64 = if text.starts_with('+') { Err(number()) } else { text.parse().map_err(|_| number()) }?;
    NonZeroU64::new(frames).ok_or_else(|| "at least 1 a second; leave it out for no limit".to_owned())
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
                taken.map(|forward| format!("the host's port of {FORWARD}={forward}"))
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

/// Writes an interface as a table of a configuration file.
pub(super) fn write(out: &mut String, net: &NetConfig) -> Result<(), ConfigError> {
    match &net.backend {
        NetBackend::Tap { source, path } => {
            write_source(out, source);
            match path {
                DataPath::Kernel => line(out, "vhost", text("on")),
                DataPath::Either => line(out, "vhost", text("auto")),
                DataPath::Skiff(limits) => {
                    line(out, "vhost", text("off"));
                    write_limits(out, limits);
                }
            }
        }
        NetBackend::Passt { forwards, limits } => {
            line(out, "passt", true);
            if !forwards.is_empty() {
                line(
                    out,
                    FORWARD,
                    toml::Value::Array(forwards.iter().map(|forward| text(&forward.to_string())).collect()),
                );
            }
            write_limits(out, limits);
        }
        NetBackend::Socket { path, limits } => {
            line(out, "socket", text(file::path(path)?));
            write_limits(out, limits);
        }
    }
    line(out, "id", text(&net.id));
    if let Some(mac) = net.mac {
        line(out, "mac", text(&mac.to_string()));
    }
    if let Some(mtu) = net.mtu {
        line(out, "mtu", mtu);
    }
    line(out, "ioeventfd", net.ioeventfd);
    line(out, "queue-size", net.queue_size);
    Ok(())
}

fn write_source(out: &mut String, source: &TapSource) {
    match source {
        TapSource::Named { name, queues } => {
            line(out, "tap", text(name));
            line(out, "queues", queues);
        }
        TapSource::New { name, address: (address, bits), queues } => {
            line(out, "tap", text(name.as_deref().unwrap_or_default()));
            line(out, "host-ip", text(&format!("{address}/{bits}")));
            line(out, "queues", queues);
        }
        TapSource::Descriptor(fd) => line(out, "fd", fd),
    }
}

fn write_limits(out: &mut String, limits: &Limits) {
    for (key, rate) in [("rx-bps", limits.rx_bytes), ("tx-bps", limits.tx_bytes)] {
        if let Some(rate) = rate {
            line(out, key, text(&format_size(rate.get())));
        }
    }
    if let Some(rate) = limits.frames {
        line(out, "pps", rate);
    }
}

#[cfg(test)]
pub(super) mod tests;
