//! The machine as TOML: read from the file of `--config`, written by `--dry-run`. The keys are the flags without their
//! dashes, the values the same text; switches may be `true` and `false`, numbers numbers. Used on the main thread.
//!
//! ```toml
//! kernel = "vmlinuz"
//! memory = { size = "1G", hugepages = true }    # or "1G,hugepages=on"
//! [[disk]]
//! path = "root.img"
//! ```

use std::fmt::{Display, Write as _};
use std::path::Path;

use block::cache::CacheMode;
use block::choose::Access;
use block::engine::Aio;
use block::throttle::Limits;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::list::{self, Setting, Settings};
use super::net;
use super::options::AUTO;
use super::place::{ConfigError, Place};
use super::value::format_size;
use super::{DISK_KEYS, MEMORY_KEYS, NET_KEYS, OnReboot, Request, SerialConfig, StatsFormat, VmConfig};

/// The settings of a machine: the keys of a configuration file, and the flags of `skiff run`.
pub const KEYS: [&str; 13] = [
    "kernel",
    "initrd",
    "cmdline",
    "boot-protocol",
    "cpus",
    "memory",
    "disk",
    "net",
    "serial",
    "debug-exit",
    "no-reboot",
    "grace",
    "stats",
];

impl Request {
    /// Reads the file `path`. Relative paths in it start at its folder.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let place = Place::flag("--config", &path.display().to_string());
        let bytes = std::fs::read(path)
            .map_err(|error| place.error(format_args!("{error}; name a TOML file that can be read")))?;
        let text = String::from_utf8(bytes).map_err(|_| place.error("not text; name a TOML file"))?;
        Self::from_toml(path, &text)
    }

    /// Understands `text`, the content of `path`.
    pub fn from_toml(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let source = Source { path, text };
        let document = source.parse()?;
        let mut request = Self::default();
        for entry in source.entries(document.get_ref()) {
            request.set_entry(&source, &entry)?;
        }
        Ok(request)
    }

    /// Takes one entry of a table that has the keys of a machine.
    pub(crate) fn set_entry(&mut self, source: &Source<'_>, entry: &Entry<'_>) -> Result<(), ConfigError> {
        let place = source.place(entry.line, entry.key);
        match (entry.key, entry.value) {
            ("memory", DeValue::Table(table)) => {
                self.memory(&source.settings("memory", entry.line, table, &MEMORY_KEYS)?)
            }
            ("disk", DeValue::Array(disks)) => {
                for disk in disks {
                    let line = source.line(disk.span().start);
                    let DeValue::Table(table) = disk.get_ref() else { return Err(place.error(NOT_A_DISK)) };
                    self.disk(&source.settings("disk", line, table, &DISK_KEYS)?)?;
                }
                Ok(())
            }
            ("disk", _) => Err(place.error(NOT_A_DISK)),
            ("net", DeValue::Array(interfaces)) => {
                for net in interfaces {
                    let line = source.line(net.span().start);
                    let DeValue::Table(table) = net.get_ref() else { return Err(place.error(NOT_A_NET)) };
                    self.net(&source.settings("net", line, table, &NET_KEYS)?)?;
                }
                Ok(())
            }
            ("net", _) => Err(place.error(NOT_A_NET)),
            ("debug-exit", DeValue::Boolean(true)) => {
                self.debug_exit = Some(Some(super::DEBUG_EXIT_PORT));
                Ok(())
            }
            ("stats", DeValue::Boolean(true)) => {
                self.stats = Some(Some(StatsFormat::Text));
                Ok(())
            }
            (key, value) if KEYS.contains(&key) => {
                let text = scalar(value).ok_or_else(|| place.error(NOT_A_VALUE))?;
                self.set(&place.quoting(&text), key, &text)
            }
            (key, _) => Err(list::unknown_key(&source.place(entry.line, ""), key, &KEYS)),
        }
    }
}

const NOT_A_DISK: &str = "a disk is a table; write [[disk]], and path = \"IMAGE\" below it";
const NOT_A_NET: &str = "an interface is a table; write [[net]], and tap = \"NAME\" or passt = true below it";
const NOT_A_VALUE: &str = "neither a text, a number nor true or false; write one of those";

/// The file, for finding lines in it.
pub(crate) struct Source<'a> {
    pub(crate) path: &'a Path,
    pub(crate) text: &'a str,
}

/// One `key = value` and its line.
pub(crate) struct Entry<'a> {
    pub(crate) key: &'a str,
    pub(crate) line: usize,
    pub(crate) value: &'a DeValue<'a>,
}

impl<'a> Source<'a> {
    /// The tables and values of the file. An error is one line with its place.
    pub(crate) fn parse(&self) -> Result<Spanned<DeTable<'a>>, ConfigError> {
        DeTable::parse(self.text).map_err(|error| {
            let line = self.line(error.span().map_or(0, |span| span.start));
            self.place(line, "").error(error.message().replace('\n', "; "))
        })
    }

    /// The line, from 1, of the byte at `offset`.
    pub(crate) fn line(&self, offset: usize) -> usize {
        self.text.bytes().take(offset).filter(|&byte| byte == b'\n').count() + 1
    }

    pub(crate) fn place(&self, line: usize, key: &str) -> Place {
        Place::line(self.path, line, key)
    }

    /// The entries of `table` in the order they were written, so that the first mistake is the one complained about.
    pub(crate) fn entries<'t>(&self, table: &'t DeTable<'_>) -> Vec<Entry<'t>> {
        let mut entries: Vec<(usize, Entry<'t>)> = Vec::new();
        for (key, value) in table {
            let at = key.span().start;
            entries.push((at, Entry { key: key.get_ref(), line: self.line(at), value: value.get_ref() }));
        }
        entries.sort_by_key(|entry| entry.0);
        entries.into_iter().map(|entry| entry.1).collect()
    }

    /// The table of the option `name` at `line`, as the settings its flag would have.
    fn settings(&self, name: &str, line: usize, table: &DeTable<'_>, keys: &[&str]) -> Result<Settings, ConfigError> {
        let mut settings = Vec::new();
        for entry in self.entries(table) {
            let place = self.place(entry.line, name);
            let key = entry.key.to_owned();
            let values = match entry.value {
                DeValue::Array(values) if list::REPEATABLE.contains(&entry.key) => {
                    values.iter().map(|value| scalar(value.get_ref())).collect()
                }
                value => scalar(value).map(|value| vec![value]),
            };
            let values = values.ok_or_else(|| place.error(format_args!("{key}: {NOT_A_VALUE}")))?;
            settings.extend(values.into_iter().map(|value| Setting { key: key.clone(), value, place: place.clone() }));
        }
        Settings::new(self.place(line, name), settings, keys)
    }
}

/// A single value as a flag has it.
pub(crate) fn scalar(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) => Some(number.to_string()),
        DeValue::Float(number) => Some(number.to_string()),
        DeValue::Boolean(on) => Some(if *on { "on" } else { "off" }.to_owned()),
        _ => None,
    }
}

/// The machine as a file that `--config` reads back as the same machine.
///
/// # Errors
/// When a path is not UTF-8, which TOML cannot say.
pub fn to_toml(vm: &VmConfig) -> Result<String, ConfigError> {
    let mut out = String::new();
    line(&mut out, "kernel", text(path(&vm.kernel)?));
    if let Some(initrd) = &vm.initrd {
        line(&mut out, "initrd", text(path(initrd)?));
    }
    line(&mut out, "cmdline", text(&vm.cmdline));
    line(&mut out, "boot-protocol", text(vm.boot_protocol.name()));
    line(&mut out, "cpus", vm.cpus);
    // A comma inside a path is written twice in the text of this option.
    let doubled = |file: &Path| Ok::<_, ConfigError>(path(file)?.replace(',', ",,"));
    let serial = match &vm.serial {
        SerialConfig::Stdio => "stdio".to_owned(),
        SerialConfig::File(file) => format!("file={}", doubled(file)?),
        SerialConfig::Pty => "pty".to_owned(),
        SerialConfig::Socket(file) => format!("socket={}", doubled(file)?),
        SerialConfig::None => "none".to_owned(),
    };
    line(&mut out, "serial", text(&serial));
    match vm.debug_exit {
        Some(port) => line(&mut out, "debug-exit", format_args!("{port:#x}")),
        None => line(&mut out, "debug-exit", false),
    }
    line(&mut out, "no-reboot", vm.on_reboot == OnReboot::Exit);
    line(&mut out, "grace", vm.grace.as_secs());
    match vm.stats {
        Some(format) => line(&mut out, "stats", text(format.name())),
        None => line(&mut out, "stats", false),
    }
    out += "\n[memory]\n";
    line(&mut out, "size", text(&format_size(vm.memory.size)));
    line(&mut out, "hugepages", vm.memory.hugepages);
    line(&mut out, "prefault", vm.memory.prefault);
    line(&mut out, "shared", vm.memory.shared);
    for disk in &vm.disks {
        out += "\n[[disk]]\n";
        line(&mut out, "path", text(path(&disk.path)?));
        line(&mut out, "id", text(&disk.id));
        if let Some(serial) = &disk.serial {
            line(&mut out, "serial", text(serial));
        }
        line(&mut out, "readonly", disk.access == Access::Read);
        line(&mut out, "snapshot", disk.access == Access::Snapshot);
        if let Some(folder) = &disk.snapshot_dir {
            line(&mut out, "snapshot-dir", text(path(folder)?));
        }
        line(&mut out, "ioeventfd", disk.ioeventfd);
        line(&mut out, "rerror", text(disk.rerror.name()));
        line(&mut out, "werror", text(disk.werror.name()));
        if let Some(limits) = &disk.limits {
            write_limits(&mut out, limits);
        }
        line(&mut out, "queues", disk.queues);
        line(&mut out, "queue-size", disk.queue_size);
        line(&mut out, "poll-us", disk.poll.as_micros());
        line(&mut out, "merge", disk.merge);
        line(&mut out, "thread-pool-max", disk.thread_pool_max);
        line(&mut out, "discard", text(disk.discard.name()));
        line(&mut out, "aio", text(disk.aio.map_or(AUTO, Aio::name)));
        line(&mut out, "cache", text(disk.cache.map_or(AUTO, CacheMode::name)));
        // The only one there is, written out so that nobody has to guess.
        line(&mut out, "format", text("raw"));
    }
    for net in &vm.nets {
        out += "\n[[net]]\n";
        net::write(&mut out, net)?;
    }
    Ok(out)
}

fn write_limits(out: &mut String, limits: &Limits) {
    let Limits { requests, bytes, burst } = limits;
    for (key, rate) in [("iops", requests.total), ("iops-rd", requests.read), ("iops-wr", requests.write)] {
        if let Some(rate) = rate {
            line(out, key, rate);
        }
    }
    for (key, rate) in [("bps", bytes.total), ("bps-rd", bytes.read), ("bps-wr", bytes.write)] {
        if let Some(rate) = rate {
            line(out, key, text(&format_size(rate.get())));
        }
    }
    line(out, "burst", text(&format!("{}ms", burst.as_millis())));
}

pub(super) fn line(out: &mut String, key: &str, value: impl Display) {
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{key} = {value}");
}

/// `text` with TOML's quotes and escapes.
pub(super) fn text(text: &str) -> toml::Value {
    text.into()
}

pub(super) fn path(path: &Path) -> Result<&str, ConfigError> {
    path.to_str().ok_or_else(|| {
        ConfigError::new(format!("{}: a path that is not UTF-8 cannot be written as TOML; rename it", path.display()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::net::tests::any_nets;
    use crate::config::{BootProtocol, Discard, DiskConfig, MemoryConfig};
    use block::throttle::Rates;
    use devices::virtio::blk::errors::OnError;
    use proptest::prelude::*;
    use std::num::{NonZeroU64, NonZeroUsize};
    use std::path::PathBuf;
    use std::time::Duration;

    fn read(text: &str) -> Result<VmConfig, String> {
        let request = Request::from_toml(Path::new("/vms/vm.toml"), text).map_err(|error| error.to_string())?;
        request.resolve().map_err(|error| error.to_string())
    }

    #[test]
    fn a_whole_machine() {
        let text = r#"
            kernel = "vmlinuz"
            initrd = "../initrd.img"
            cmdline = "console=ttyS0"
            boot-protocol = "linux"
            cpus = 2
            memory = { size = "1.5G", prefault = true, shared = "on" }
            serial = "socket=console.sock"
            debug-exit = 0xf4
            no-reboot = true
            grace = 5
            stats = "text"
            [[disk]]
            path = "root.img"
            [[disk]]
            path = "/dev/vg/data"
            readonly = true
            id = "data"
            serial = "1"
            aio = "io_uring"
            cache = "none"
            werror = "stop"
            queues = 3
            queue-size = 64
            poll-us = 50
            merge = false
            thread-pool-max = 5
            discard = "ignore"
        "#;
        let disk = |path: &str, id: &str, serial: Option<&str>, readonly| DiskConfig {
            path: path.into(),
            id: id.into(),
            serial: serial.map(str::to_owned),
            access: if readonly { Access::Read } else { Access::Write },
            snapshot_dir: None,
            aio: if id == "data" { Some(Aio::IoUring) } else { None },
            cache: if id == "data" { Some(CacheMode::None) } else { None },
            ioeventfd: true,
            limits: None,
            rerror: OnError::Report,
            werror: if id == "data" { OnError::Stop } else { OnError::Report },
            queues: if id == "data" { 3 } else { 2 },
            queue_size: if id == "data" { 64 } else { 256 },
            poll: Duration::from_micros(if id == "data" { 50 } else { 100 }),
            merge: id != "data",
            thread_pool_max: NonZeroUsize::new(if id == "data" { 5 } else { 64 }).unwrap(),
            discard: if id == "data" { Discard::Ignore } else { Discard::Unmap },
        };
        let expected = VmConfig {
            kernel: "/vms/vmlinuz".into(),
            initrd: Some("/vms/../initrd.img".into()),
            cmdline: "console=ttyS0".into(),
            boot_protocol: BootProtocol::Linux,
            cpus: 2,
            memory: MemoryConfig { size: 3 << 29, hugepages: false, prefault: true, shared: true },
            disks: vec![disk("/vms/root.img", "disk0", None, false), disk("/dev/vg/data", "data", Some("1"), true)],
            nets: Vec::new(),
            serial: SerialConfig::Socket("/vms/console.sock".into()),
            debug_exit: Some(0xf4),
            on_reboot: OnReboot::Exit,
            grace: Duration::from_secs(5),
            stats: Some(StatsFormat::Text),
        };
        assert_eq!(read(text), Ok(expected));
    }

    #[test]
    fn short_forms() {
        let vm = read("kernel = \"k\"\nmemory = \"1G,hugepages=on\"\ndebug-exit = true\n").unwrap();
        assert_eq!((vm.memory.size, vm.memory.hugepages, vm.debug_exit), (1 << 30, true, Some(0x501)));
        assert_eq!(read("kernel = \"k\"\ndebug-exit = false\n").unwrap().debug_exit, None);
        for (value, stats) in
            [("true", Some(StatsFormat::Text)), ("\"json\"", Some(StatsFormat::Json)), ("false", None)]
        {
            assert_eq!(read(&format!("kernel = \"k\"\nstats = {value}\n")).unwrap().stats, stats);
        }
    }

    #[test]
    fn complaints_name_file_and_line() {
        for (text, complaint) in [
            (
                "kernel = \"k\"\nkernl = \"k\"\n",
                "/vms/vm.toml:2: unknown key \"kernl\"; did you mean \"kernel\"? (keys: kernel, initrd, cmdline, \
                 boot-protocol, cpus, memory, disk, net, serial, debug-exit, no-reboot, grace, stats)",
            ),
            ("\n\ncpus = 0\n", "/vms/vm.toml:3: cpus = 0: a machine has at least 1 CPU"),
            ("cpus = \"two\"\n", "/vms/vm.toml:1: cpus = two: not a number of CPUs; write it like 2"),
            (
                "memory = 1024\n",
                "/vms/vm.toml:1: memory = 1024: size=1024: a size needs a unit; write 1024M for MiB (units: K, M, G, T)",
            ),
            ("[memory]\nsize = \"1M\"\n", "/vms/vm.toml:1: memory: a machine has at least 64M"),
            ("[[disk]]\npath = \"a\"\nreadonly = \"yes\"\n", "/vms/vm.toml:3: disk: readonly=yes: say on or off"),
            (
                "[[disk]]\npath = \"a\"\n\n[[disk]]\nid = \"b\"\n",
                "/vms/vm.toml:4: disk: a disk needs an image; write path=IMAGE",
            ),
            (
                "[[disk]]\npath = \"a\"\nfile = \"b\"\n",
                "/vms/vm.toml:3: disk: unknown key \"file\" \
                 (keys: path, readonly, snapshot, snapshot-dir, serial, id, format, aio, cache, ioeventfd, queues, queue-size, \
                 poll-us, merge, thread-pool-max, discard, rerror, werror, \
                 iops, iops-rd, iops-wr, bps, bps-rd, bps-wr, burst)",
            ),
            (
                "disk = \"root.img\"\n",
                "/vms/vm.toml:1: disk: a disk is a table; write [[disk]], and path = \"IMAGE\" below it",
            ),
            (
                "kernel = [\"k\"]\n",
                "/vms/vm.toml:1: kernel: neither a text, a number nor true or false; write one of those",
            ),
            (
                "cmdline = \"a\\u0000b\"\n",
                "/vms/vm.toml:1: cmdline = a\0b: a NUL character ends the command line for the kernel; remove it",
            ),
            ("cpus = 1\ncpus = 2\n", "/vms/vm.toml:2: duplicate key"),
        ] {
            assert_eq!(read(text), Err(complaint.to_owned()), "{text}");
        }
    }

    #[test]
    fn a_syntax_error_is_one_line_with_its_place() {
        for text in ["kernel = \"k\"\ncpus = = 2\n", "kernel = \"k\"\n[disk\n", "kernel = \"k\"\nserial = pty\n"] {
            let complaint = read(text).unwrap_err();
            assert!(complaint.starts_with("/vms/vm.toml:2: "), "{complaint}");
            assert!(!complaint.contains('\n'), "{complaint}");
        }
    }

    #[test]
    fn a_file_that_cannot_be_read() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("vm.toml");
        let shown = missing.display();
        assert_eq!(
            Request::from_file(&missing).unwrap_err().to_string(),
            format!("--config {shown}: No such file or directory (os error 2); name a TOML file that can be read")
        );
        std::fs::write(&missing, b"kernel = \"\xff\"").unwrap();
        let complaint = Request::from_file(&missing).unwrap_err().to_string();
        assert_eq!(complaint, format!("--config {shown}: not text; name a TOML file"));
        std::fs::write(&missing, "kernel = \"k\"").unwrap();
        assert_eq!(Request::from_file(&missing).unwrap().kernel, Some(folder.path().join("k")));
    }

    prop_compose! {
        fn any_path()(name in "/[^\0]{1,20}") -> PathBuf { name.into() }
    }

    fn any_engine() -> impl Strategy<Value = (Option<Aio>, Option<CacheMode>)> {
        use proptest::{option::of, sample::select};
        let all = (of(select(&Aio::ALL[..])), of(select(&CacheMode::ALL[..])));
        all.prop_filter("impossible", |(aio, cache)| aio.zip(*cache).is_none_or(|(aio, cache)| aio.goes_with(cache)))
    }

    prop_compose! {
        fn any_limits()(rates in proptest::array::uniform6(0..3_u64), burst in 2..=60_000_u64) -> Option<Limits> {
            let rate = |at: usize, unit: u64| NonZeroU64::new(rates[at] * unit);
            let rates = |at, unit| Rates { total: rate(at, unit), read: rate(at + 1, unit), write: rate(at + 2, unit) };
            let (requests, bytes) = (rates(0, 500), rates(3, 3 << 10));
            let any = (requests, bytes) != Default::default();
            any.then_some(Limits { requests, bytes, burst: Duration::from_millis(burst) })
        }
    }

    prop_compose! {
        fn any_disk()(
            path in any_path(), id in "d[a-z0-9._-]{0,8}", serial in proptest::option::of("[ -~]{1,20}"),
            access in prop_oneof![
                Just((Access::Write, None)), Just((Access::Read, None)),
                proptest::option::of(any_path()).prop_map(|folder| (Access::Snapshot, folder)),
            ],
            ioeventfd: bool, (aio, cache) in any_engine(), queues in 1..=64_u16,
            rerror in proptest::sample::select(&OnError::READS[..]), werror in proptest::sample::select(&OnError::WRITES[..]),
            queue_size in (2..=10).prop_map(|shift| 1_u16 << shift),
            poll in (0..=10_000_u64).prop_map(Duration::from_micros), merge: bool, threads in 1..=64_usize,
            discard in proptest::sample::select(&Discard::ALL[..]), limits in any_limits(),
        ) -> DiskConfig {
            let (access, snapshot_dir) = access;
            DiskConfig {
                path, id, serial, access, snapshot_dir, aio, cache, ioeventfd, queues, queue_size, poll, merge, discard, rerror, werror,
                limits, thread_pool_max: NonZeroUsize::new(threads).unwrap(),
            }
        }
    }

    fn any_serial() -> impl Strategy<Value = SerialConfig> {
        prop_oneof![
            Just(SerialConfig::Stdio),
            Just(SerialConfig::Pty),
            Just(SerialConfig::None),
            any_path().prop_map(SerialConfig::File),
            any_path().prop_map(SerialConfig::Socket),
        ]
    }

    prop_compose! {
        fn any_machine()(
            kernel in any_path(), initrd in proptest::option::of(any_path()), cmdline in "[^\0]{0,40}",
            boot_protocol in prop_oneof![Just(BootProtocol::Auto), Just(BootProtocol::Linux), Just(BootProtocol::Pvh)],
            cpus in 1..u32::MAX, huge_pages in 32..1_u64 << 30, switches: [bool; 4],
            disks in proptest::collection::vec(any_disk(), 0..3), nets in any_nets(), serial in any_serial(),
            debug_exit in proptest::option::of(0x100..0x200_u16), grace: u32,
            stats in proptest::option::of(proptest::sample::select(&StatsFormat::ALL[..])),
        ) -> VmConfig {
            let mut disks = disks;
            for (at, disk) in disks.iter_mut().enumerate() {
                disk.id = format!("{}-{at}", disk.id);
            }
            let [hugepages, prefault, shared, exit] = switches;
            VmConfig {
                kernel, initrd, cmdline, boot_protocol, cpus,
                memory: MemoryConfig { size: huge_pages << 21, hugepages, prefault, shared },
                disks, nets, serial, debug_exit,
                on_reboot: if exit { OnReboot::Exit } else { OnReboot::Restart },
                grace: Duration::from_secs(grace.into()),
                stats,
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back_the_same(vm in any_machine()) {
            prop_assert_eq!(read(&to_toml(&vm).unwrap()), Ok(vm));
        }

        #[test]
        fn no_text_panics(text in any::<String>(), near in "((kernel|memory|disk|\\[\\[disk\\]\\]|\\[\\[net\\]\\]|passt|forward|cpus) ?=? ?[a-z0-9{}\"=,]*\n){0,4}") {
            let _ = (read(&text), read(&near));
        }
    }
}
