//! What was asked for, by flags or in a file, before anything is filled in. Used on the main thread.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use block::cache::CacheMode;
use block::choose::Access;
use block::engine::Aio;
use block::throttle::Limits;
use devices::virtio::blk::errors::OnError;

use super::list::Settings;
use super::net::{self, NetRequest};
use super::place::{ConfigError, Place};
use super::{
    BootProtocol, Discard, DiskConfig, MemoryConfig, OnReboot, SerialConfig, StatsFormat, VmConfig, options, value,
};

/// The settings that were written, each parsed; `None` where nothing was said. The meaning of each is at [`VmConfig`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// `kernel`.
    pub kernel: Option<PathBuf>,
    /// `initrd`.
    pub initrd: Option<PathBuf>,
    /// `cmdline`.
    pub cmdline: Option<String>,
    /// `boot-protocol`.
    pub boot_protocol: Option<BootProtocol>,
    /// `cpus`.
    pub cpus: Option<u32>,
    /// `memory`.
    pub memory: Option<MemoryConfig>,
    /// `disk`, all of them.
    pub disks: Option<Vec<DiskRequest>>,
    /// `net`, all of them.
    pub nets: Option<Vec<NetRequest>>,
    /// `serial`.
    pub serial: Option<SerialConfig>,
    /// `debug-exit`; the inner `None` is an explicit `off`.
    pub debug_exit: Option<Option<u16>>,
    /// `no-reboot`.
    pub no_reboot: Option<bool>,
    /// `grace`.
    pub grace: Option<Duration>,
    /// `stats`; the inner `None` is an explicit `off`.
    pub stats: Option<Option<StatsFormat>>,
}

/// One disk as it was written: it may still lack an id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskRequest {
    /// See [`DiskConfig::path`].
    pub path: PathBuf,
    /// See [`DiskConfig::id`]; `None` for the default.
    pub id: Option<String>,
    /// See [`DiskConfig::serial`].
    pub serial: Option<String>,
    /// See [`DiskConfig::access`]; `None` for the default.
    pub access: Option<Access>,
    /// See [`DiskConfig::snapshot_dir`].
    pub snapshot_dir: Option<PathBuf>,
    /// See [`DiskConfig::aio`].
    pub aio: Option<Aio>,
    /// See [`DiskConfig::cache`].
    pub cache: Option<CacheMode>,
    /// See [`DiskConfig::ioeventfd`].
    pub ioeventfd: bool,
    /// See [`DiskConfig::rerror`].
    pub rerror: OnError,
    /// See [`DiskConfig::werror`].
    pub werror: OnError,
    /// See [`DiskConfig::limits`].
    pub limits: Option<Limits>,
    /// See [`DiskConfig::queues`]; `None` for the default.
    pub queues: Option<u16>,
    /// See [`DiskConfig::discard`].
    pub discard: Discard,
    /// See [`DiskConfig::queue_size`].
    pub queue_size: u16,
    /// See [`DiskConfig::poll`].
    pub poll: Duration,
    /// See [`DiskConfig::merge`].
    pub merge: bool,
    /// See [`DiskConfig::thread_pool_max`].
    pub thread_pool_max: NonZeroUsize,
    /// Where it was written, for complaints.
    pub place: Place,
}

impl Request {
    /// Takes the text of the setting `key` as a flag or a line of a file gives it. `key` is the name of the flag without
    /// its dashes, as in [`super::KEYS`]; a further `disk` is a further disk.
    pub fn set(&mut self, place: &Place, key: &str, text: &str) -> Result<(), ConfigError> {
        let wrong = |what: String| place.error(what);
        match key {
            "kernel" => self.kernel = Some(place.path(text)?),
            "initrd" => self.initrd = Some(place.path(text)?),
            "cmdline" if text.contains('\0') => {
                return Err(place.error("a NUL character ends the command line for the kernel; remove it"));
            }
            "cmdline" => self.cmdline = Some(text.to_owned()),
            "boot-protocol" => self.boot_protocol = Some(boot_protocol(text).map_err(wrong)?),
            "cpus" => self.cpus = Some(value::cpus(text).map_err(wrong)?),
            "memory" => self.memory(&Settings::parse(place, text, "size", &options::MEMORY_KEYS)?)?,
            "disk" => self.disk(&Settings::parse(place, text, "path", &options::DISK_KEYS)?)?,
            "net" => self.net(&net::settings(place, text)?)?,
            "serial" => self.serial = Some(options::serial(place, text)?),
            "debug-exit" => self.debug_exit = Some(value::debug_exit(text).map_err(wrong)?),
            "no-reboot" => self.no_reboot = Some(value::switch(text).map_err(wrong)?),
            "grace" => self.grace = Some(value::seconds(text).map_err(wrong)?),
            "stats" => self.stats = Some(stats(text).map_err(wrong)?),
            _ => return Err(super::list::unknown_key(place, key, &super::file::KEYS)),
        }
        Ok(())
    }

    pub(super) fn memory(&mut self, settings: &Settings) -> Result<(), ConfigError> {
        self.memory = Some(options::memory(settings)?);
        Ok(())
    }

    pub(super) fn disk(&mut self, settings: &Settings) -> Result<(), ConfigError> {
        self.disks.get_or_insert_default().push(options::disk(settings)?);
        Ok(())
    }

    pub(super) fn net(&mut self, settings: &Settings) -> Result<(), ConfigError> {
        self.nets.get_or_insert_default().push(net::request(settings)?);
        Ok(())
    }

    /// Lays these settings over those of `file`: each that is set here replaces the whole setting of the file. So one
    /// `--disk` replaces all disks of the file, one `--net` all its interfaces, and `--memory 2G` its hugepages too.
    #[must_use]
    pub fn over(self, file: Self) -> Self {
        Self {
            kernel: self.kernel.or(file.kernel),
            initrd: self.initrd.or(file.initrd),
            cmdline: self.cmdline.or(file.cmdline),
            boot_protocol: self.boot_protocol.or(file.boot_protocol),
            cpus: self.cpus.or(file.cpus),
            memory: self.memory.or(file.memory),
            disks: self.disks.or(file.disks),
            nets: self.nets.or(file.nets),
            serial: self.serial.or(file.serial),
            debug_exit: self.debug_exit.or(file.debug_exit),
            no_reboot: self.no_reboot.or(file.no_reboot),
            grace: self.grace.or(file.grace),
            stats: self.stats.or(file.stats),
        }
    }

    /// The machine, with the defaults filled in.
    pub fn resolve(self) -> Result<VmConfig, ConfigError> {
        let kernel = self.kernel.ok_or_else(|| {
            ConfigError::new("--kernel is missing: name a kernel, or a file that has one with --config vm.toml")
        })?;
        let cpus = self.cpus.unwrap_or(1);
        Ok(VmConfig {
            kernel,
            initrd: self.initrd,
            cmdline: self.cmdline.unwrap_or_default(),
            boot_protocol: self.boot_protocol.unwrap_or_default(),
            cpus,
            memory: self.memory.unwrap_or_default(),
            disks: disks(self.disks.unwrap_or_default(), cpus)?,
            nets: net::interfaces(self.nets.unwrap_or_default())?,
            serial: self.serial.unwrap_or_default(),
            debug_exit: self.debug_exit.unwrap_or_default(),
            on_reboot: if self.no_reboot == Some(true) { OnReboot::Exit } else { OnReboot::Restart },
            grace: self.grace.unwrap_or(super::GRACE),
            stats: self.stats.unwrap_or_default(),
        })
    }
}

fn boot_protocol(text: &str) -> Result<BootProtocol, String> {
    let named = BootProtocol::ALL.into_iter().find(|protocol| protocol.name() == text);
    named.ok_or_else(|| "no such protocol; say auto, linux or pvh".to_owned())
}

fn stats(text: &str) -> Result<Option<StatsFormat>, String> {
    if text == "off" {
        return Ok(None);
    }
    let named = StatsFormat::ALL.into_iter().find(|format| format.name() == text);
    named.map(Some).ok_or_else(|| "no such format; say text, json or off".to_owned())
}

/// Names the disks that have no id by their position, checks that the names differ, and gives those that say nothing a
/// queue for each of the `cpus`, within reason.
fn disks(requests: Vec<DiskRequest>, cpus: u32) -> Result<Vec<DiskConfig>, ConfigError> {
    let mut disks: Vec<DiskConfig> = Vec::with_capacity(requests.len());
    for (at, request) in requests.into_iter().enumerate() {
        let id = request.id.unwrap_or_else(|| format!("disk{at}"));
        if let Some(other) = disks.iter().find(|other| other.id == id) {
            let path = other.path.display();
            return Err(request
                .place
                .error(format_args!("the id \"{id}\" belongs to {path}; choose another with id=")));
        }
        let access = request.access.unwrap_or_default();
        if let (Some(folder), false) = (&request.snapshot_dir, access == Access::Snapshot) {
            let folder = folder.display();
            return Err(request.place.error(format_args!(
                "snapshot-dir={folder}: the disk is no snapshot; add snapshot=on, or leave snapshot-dir out"
            )));
        }
        let queues = request.queues.unwrap_or_else(|| cpus.min(super::DISK_QUEUES.into()) as u16);
        disks.push(DiskConfig {
            path: request.path,
            id,
            serial: request.serial,
            access,
            snapshot_dir: request.snapshot_dir,
            aio: request.aio,
            cache: request.cache,
            ioeventfd: request.ioeventfd,
            queues,
            queue_size: request.queue_size,
            poll: request.poll,
            merge: request.merge,
            thread_pool_max: request.thread_pool_max,
            discard: request.discard,
            rerror: request.rerror,
            werror: request.werror,
            limits: request.limits,
        });
    }
    Ok(disks)
}

#[cfg(test)]
mod tests;
