//! The options that are lists of settings: `--memory`, `--disk`, `--serial`. Used on the main thread.

use std::num::NonZeroU64;

use block::cache::CacheMode;
use block::choose::Access;
use block::engine::Aio;
use block::engine::threads::DEFAULT_THREADS;
use block::throttle::{BURST, Limits, Rates};
use devices::virtio::blk::QUEUE_SIZE;
use devices::virtio::blk::errors::OnError;

use super::list::Settings;
use super::place::{ConfigError, Place};
use super::request::DiskRequest;
use super::value::{self, format_size};
use super::{Discard, MemoryConfig, SerialConfig};

/// The keys of `--memory`; the first may be left out.
pub const MEMORY_KEYS: [&str; 4] = ["size", "hugepages", "prefault", "shared"];

/// The keys of `--disk`; the first may be left out.
pub const DISK_KEYS: [&str; 25] = [
    "path",
    "readonly",
    "snapshot",
    "snapshot-dir",
    "serial",
    "id",
    "format",
    "aio",
    "cache",
    "ioeventfd",
    "queues",
    "queue-size",
    "poll-us",
    "merge",
    "thread-pool-max",
    "discard",
    "rerror",
    "werror",
    "iops",
    "iops-rd",
    "iops-wr",
    "bps",
    "bps-rd",
    "bps-wr",
    "burst",
];

/// What `--serial` can be connected to; the first two take a path.
pub const SERIAL_KEYS: [&str; 5] = ["file", "socket", "stdio", "pty", "none"];

/// What leaves an engine or a cache mode to skiff.
pub(super) const AUTO: &str = "auto";

/// The smallest machine: 64 MiB.
const SMALLEST: u64 = 64 << 20;
const PAGE: u64 = 4 << 10;
const HUGE_PAGE: u64 = 2 << 20;

pub(super) fn memory(settings: &Settings) -> Result<MemoryConfig, ConfigError> {
    let memory = MemoryConfig {
        size: settings.value("size", value::size)?.unwrap_or(super::MEMORY_SIZE),
        hugepages: settings.switch("hugepages", false)?,
        prefault: settings.switch("prefault", false)?,
        shared: settings.switch("shared", false)?,
    };
    let page = if memory.hugepages { HUGE_PAGE } else { PAGE };
    if memory.size < SMALLEST {
        return Err(settings.place().error(format_args!("a machine has at least {}", format_size(SMALLEST))));
    }
    if !memory.size.is_multiple_of(page) {
        let nearest = (memory.size / page).max(1) * page;
        return Err(settings.place().error(format_args!(
            "the size is not a multiple of the {} page; {} is",
            format_size(page),
            format_size(nearest)
        )));
    }
    Ok(memory)
}

pub(super) fn disk(settings: &Settings) -> Result<DiskRequest, ConfigError> {
    offered(settings, "format", &["raw"], &["qcow", "qcow2", "qed", "vdi", "vhdx", "vmdk", "vpc"])?;
    let aio = choice(settings, "aio", Some(AUTO), &Aio::ALL, Aio::name)?;
    let cache = choice(settings, "cache", Some(AUTO), &CacheMode::ALL, CacheMode::name)?;
    let refused = aio.zip(cache).filter(|(aio, cache)| !aio.goes_with(*cache));
    if let Some((aio, cache)) = refused {
        return Err(settings.place().error(format_args!(
            "aio={} needs cache=none or cache=directsync: through the page cache, which cache={} uses, it would wait for \
             every transfer; write cache=none, or use aio=io_uring or aio=threads",
            aio.name(),
            cache.name()
        )));
    }
    let path = settings.path("path")?;
    Ok(DiskRequest {
        path: path.ok_or_else(|| settings.place().error("a disk needs an image; write path=IMAGE"))?,
        id: settings.value("id", value::id)?,
        serial: settings.value("serial", value::disk_serial)?,
        access: access(settings)?,
        snapshot_dir: settings.path("snapshot-dir")?,
        aio,
        cache,
        ioeventfd: settings.switch("ioeventfd", true)?,
        rerror: choice(settings, "rerror", None, &OnError::READS, OnError::name)?.unwrap_or_default(),
        werror: choice(settings, "werror", None, &OnError::WRITES, OnError::name)?.unwrap_or_default(),
        queues: settings.value("queues", value::queues)?,
        queue_size: settings.value("queue-size", value::queue_size)?.unwrap_or(QUEUE_SIZE),
        poll: settings.value("poll-us", value::poll)?.unwrap_or(super::DISK_POLL),
        merge: settings.switch("merge", true)?,
        thread_pool_max: settings.value("thread-pool-max", value::thread_pool_max)?.unwrap_or(DEFAULT_THREADS),
        limits: limits(settings)?,
        discard: choice(settings, "discard", None, &Discard::ALL, Discard::name)?.unwrap_or_default(),
        place: settings.place().clone(),
    })
}

/// What is done with the image; `None` if nothing is said, or only what goes without saying.
fn access(settings: &Settings) -> Result<Option<Access>, ConfigError> {
    let readonly = settings.switch("readonly", false)?;
    let snapshot = settings.value("snapshot", value::switch)?;
    match (readonly, snapshot) {
        (true, Some(true)) => Err(settings.place().error(
            "readonly=on,snapshot=on: the guest cannot write to a disk that is read-only, so there is nothing to leave out of \
             the image; write one of the two",
        )),
        (true, _) => Ok(Some(Access::Read)),
        (false, Some(true)) => Ok(Some(Access::Snapshot)),
        (false, Some(false)) => Ok(Some(Access::Write)),
        (false, None) => Ok(None),
    }
}

/// The choice of the user between `all`; `None` if nothing is said, or the word that leaves it to skiff if there is one.
pub(super) fn choice<T: Copy>(
    settings: &Settings,
    key: &str,
    auto: Option<&'static str>,
    all: &[T],
    name: fn(T) -> &'static str,
) -> Result<Option<T>, ConfigError> {
    let Some(setting) = settings.get(key).filter(|setting| Some(setting.value.as_str()) != auto) else {
        return Ok(None);
    };
    let chosen = all.iter().copied().find(|&one| name(one) == setting.value);
    chosen.map(Some).ok_or_else(|| {
        let names: Vec<_> = auto.into_iter().chain(all.iter().copied().map(name)).collect();
        setting.error(format_args!("no such {key}; say {}", names.join(", ")))
    })
}

/// Checks a choice between names. `known` are QEMU's words for what this build does not do: those are no typing slip, and
/// no other choice stands in for them silently.
fn offered(settings: &Settings, key: &str, offered: &[&str], known: &[&str]) -> Result<(), ConfigError> {
    let Some(setting) = settings.get(key) else { return Ok(()) };
    if offered.contains(&setting.value.as_str()) {
        return Ok(());
    }
    let here = offered.iter().map(|value| format!("{key}={value}")).collect::<Vec<_>>().join(", ");
    Err(match (known.contains(&setting.value.as_str()), key) {
        (true, "format") => setting.error(format_args!(
            "this build offers {here}; make a raw copy with \"qemu-img convert -O raw IMAGE COPY\""
        )),
        (true, _) => setting.error(format_args!("this build offers {here}")),
        (false, _) => setting.error(format_args!("no such {key}; this build offers {here}")),
    })
}

fn limits(settings: &Settings) -> Result<Option<Limits>, ConfigError> {
    let rates = |keys: [&str; 3], parse: fn(&str) -> Result<NonZeroU64, String>| {
        let [total, read, write] = keys.map(|key| settings.value(key, parse));
        Ok::<_, ConfigError>(Rates { total: total?, read: read?, write: write? })
    };
    let requests = rates(["iops", "iops-rd", "iops-wr"], value::iops)?;
    let bytes = rates(["bps", "bps-rd", "bps-wr"], value::bps)?;
    let burst = settings.value("burst", value::burst)?;
    if (requests, bytes) != (Rates::default(), Rates::default()) {
        return Ok(Some(Limits { requests, bytes, burst: burst.unwrap_or(BURST) }));
    }
    match settings.get("burst") {
        Some(burst) => Err(burst.error("there is no limit it could go with; add one, such as bps=50M")),
        None => Ok(None),
    }
}

/// `stdio`, `pty`, `none`, `file=PATH` or `socket=PATH`.
pub(super) fn serial(place: &Place, text: &str) -> Result<SerialConfig, ConfigError> {
    match text {
        "stdio" => return Ok(SerialConfig::Stdio),
        "pty" => return Ok(SerialConfig::Pty),
        "none" => return Ok(SerialConfig::None),
        "file" | "socket" => return Err(place.error(format_args!("where? write {text}=PATH"))),
        _ if !text.contains('=') => return Err(unknown_serial(place, text)),
        _ => (),
    }
    let settings = Settings::parse(place, text, "stdio", &SERIAL_KEYS)?;
    match (settings.path("file")?, settings.path("socket")?) {
        (Some(path), None) if settings.len() == 1 => Ok(SerialConfig::File(path)),
        (None, Some(path)) if settings.len() == 1 => Ok(SerialConfig::Socket(path)),
        _ => Err(place.error("COM1 has one other end: stdio, file=PATH, pty, socket=PATH or none")),
    }
}

fn unknown_serial(place: &Place, text: &str) -> ConfigError {
    let guess = value::nearest(text, &SERIAL_KEYS).map(|near| format!("; did you mean \"{near}\"?"));
    place.error(format_args!(
        "no such connection{} (stdio, file=PATH, pty, socket=PATH, none)",
        guess.unwrap_or_default()
    ))
}
