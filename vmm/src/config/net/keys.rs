//! `--net` and `[[net]]` as they are written: keys and values. Main thread.

use std::net::Ipv4Addr;
use std::num::NonZeroU64;
use std::os::fd::RawFd;

use devices::virtio::net::{Limits, MAX_PAIRS, QUEUE_SIZE, QUEUE_SIZES};

use super::{DataPath, Forward, NetBackend, NetConfig, NetRequest, TapSource};
use crate::config::list::Settings;
use crate::config::options::choice;
use crate::config::place::{ConfigError, Place};
use crate::config::value;
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

/// The settings of a flag, in which `passt` stands without a value.
pub(in crate::config) fn settings(place: &Place, text: &str) -> Result<Settings, ConfigError> {
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

pub(in crate::config) fn request(settings: &Settings) -> Result<NetRequest, ConfigError> {
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
    if !(1..=31).contains(&bits) {
        return Err(
            "a network of 1 to 31 bits leaves room for the host and the guest; write it like 192.0.2.1/24".to_owned()
        );
    }
    // The first and the last address of a network are nobody's (RFC 1122, 3.2.1.3), unless there are only two (RFC 3021).
    let hosts = u32::MAX >> bits;
    let number = u32::from(address) & hosts;
    if bits < 31 && (number == 0 || number == hosts) {
        let whose = if number == 0 { "the network itself" } else { "everybody in the network" };
        let first = Ipv4Addr::from(u32::from(address) & !hosts | 1);
        return Err(format!("this is the address of {whose}, and no interface's; write {first}/{bits}"));
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
