use super::*;
use std::num::NonZeroU64;

use block::throttle::Rates;
use proptest::prelude::*;

fn request(settings: &[(&str, &str)]) -> Result<Request, String> {
    let mut request = Request::default();
    for (key, text) in settings {
        let place = Place::flag(&format!("--{key}"), text);
        request.set(&place, key, text).map_err(|error| error.to_string())?;
    }
    Ok(request)
}

fn machine(settings: &[(&str, &str)]) -> Result<VmConfig, String> {
    request(settings)?.resolve().map_err(|error| error.to_string())
}

fn disk(path: &str, id: &str) -> DiskConfig {
    DiskConfig {
        path: path.into(),
        id: id.into(),
        serial: None,
        access: Access::Write,
        snapshot_dir: None,
        aio: None,
        cache: None,
        ioeventfd: true,
        rerror: OnError::Report,
        werror: OnError::Report,
        limits: None,
        queues: 1,
        queue_size: 256,
        poll: Duration::from_micros(100),
        merge: true,
        thread_pool_max: NonZeroUsize::new(64).unwrap(),
        discard: Discard::Unmap,
    }
}

#[test]
fn the_smallest_request_has_every_default() {
    let expected = VmConfig {
        kernel: "vmlinuz".into(),
        initrd: None,
        cmdline: String::new(),
        boot_protocol: BootProtocol::Auto,
        cpus: 1,
        memory: MemoryConfig { size: 512 << 20, hugepages: false, prefault: false, shared: false },
        disks: Vec::new(),
        nets: Vec::new(),
        serial: SerialConfig::Stdio,
        debug_exit: None,
        on_reboot: OnReboot::Restart,
        grace: Duration::from_secs(30),
        stats: None,
    };
    assert_eq!(machine(&[("kernel", "vmlinuz")]), Ok(expected));
}

#[test]
fn every_setting_arrives() {
    let rate = NonZeroU64::new;
    let limits = Limits {
        requests: Rates { total: rate(1000), read: rate(600), write: rate(500) },
        bytes: Rates { total: rate(50 << 20), read: rate(32 << 20), write: rate(512 << 10) },
        burst: Duration::from_secs(2),
    };
    let expected = VmConfig {
        kernel: "bzImage".into(),
        initrd: Some("initrd.img".into()),
        cmdline: "console=ttyS0 root=/dev/vda rw".into(),
        boot_protocol: BootProtocol::Pvh,
        cpus: 4,
        memory: MemoryConfig { size: 2 << 30, hugepages: true, prefault: true, shared: true },
        disks: vec![
            DiskConfig { queues: 4, ..disk("root.img", "disk0") },
            DiskConfig {
                queues: 4,
                access: Access::Snapshot,
                snapshot_dir: Some("/fast".into()),
                ..disk("base.img", "disk1")
            },
            DiskConfig {
                path: "a,b.img".into(),
                id: "data".into(),
                serial: Some("S 1".into()),
                access: Access::Read,
                snapshot_dir: None,
                aio: Some(Aio::Native),
                cache: Some(CacheMode::Directsync),
                ioeventfd: false,
                rerror: OnError::Stop,
                werror: OnError::Enospc,
                limits: Some(limits),
                queues: 2,
                queue_size: 1024,
                poll: Duration::from_micros(32),
                merge: false,
                thread_pool_max: NonZeroUsize::new(3).unwrap(),
                discard: Discard::Ignore,
            },
        ],
        nets: Vec::new(),
        serial: SerialConfig::File("console.log".into()),
        debug_exit: Some(0xf4),
        on_reboot: OnReboot::Exit,
        grace: Duration::from_secs(5),
        stats: Some(StatsFormat::Json),
    };
    let settings = [
        ("kernel", "bzImage"),
        ("initrd", "initrd.img"),
        ("cmdline", "console=ttyS0 root=/dev/vda rw"),
        ("boot-protocol", "pvh"),
        ("cpus", "4"),
        ("memory", "2G,hugepages=on,prefault=on,shared=on"),
        ("disk", "root.img"),
        ("disk", "base.img,snapshot=on,snapshot-dir=/fast"),
        (
            "disk",
            "path=a,,b.img,id=data,serial=S 1,readonly=on,ioeventfd=off,format=raw,aio=native,cache=directsync,\
             queues=2,queue-size=1024,poll-us=32,merge=off,thread-pool-max=3,discard=ignore,rerror=stop,werror=enospc,\
             iops=1000,iops-rd=600,iops-wr=500,bps=50M,bps-rd=32M,bps-wr=0.5M,burst=2s",
        ),
        ("serial", "file=console.log"),
        ("debug-exit", "0xf4"),
        ("no-reboot", "on"),
        ("grace", "5"),
        ("stats", "json"),
    ];
    assert_eq!(machine(&settings), Ok(expected));
}

#[test]
fn a_snapshot_is_one_or_not() {
    for (text, line) in [
        (
            "x,readonly=on,snapshot=on",
            "--disk x,readonly=on,snapshot=on: readonly=on,snapshot=on: the guest cannot write to a disk that is \
             read-only, so there is nothing to leave out of the image; write one of the two",
        ),
        (
            "x,snapshot-dir=/fast",
            "--disk x,snapshot-dir=/fast: snapshot-dir=/fast: the disk is no snapshot; add snapshot=on, or leave \
             snapshot-dir out",
        ),
    ] {
        assert_eq!(machine(&[("kernel", "vmlinuz"), ("disk", text)]), Err(line.to_owned()));
    }
    let said = |text| request(&[("disk", text)]).unwrap().disks.unwrap()[0].access;
    assert_eq!(said("x"), None);
    assert_eq!(said("x,readonly=off"), None);
    assert_eq!(said("x,snapshot=off"), Some(Access::Write));
    assert_eq!(said("x,readonly=on,snapshot=off"), Some(Access::Read));
    assert_eq!(said("x,readonly=off,snapshot=on"), Some(Access::Snapshot));
}

#[test]
fn complaints_name_the_flag_and_the_remedy() {
    for (key, text, line) in [
        ("kernel", "", "--kernel: an empty path; name a file"),
        ("boot-protocol", "uefi", "--boot-protocol uefi: no such protocol; say auto, linux or pvh"),
        ("cpus", "0", "--cpus 0: a machine has at least 1 CPU"),
        ("memory", "1024", "--memory 1024: size=1024: a size needs a unit; write 1024M for MiB (units: K, M, G, T)"),
        ("memory", "32M", "--memory 32M: a machine has at least 64M"),
        ("memory", "65537K", "--memory 65537K: the size is not a multiple of the 4K page; 64M is"),
        (
            "memory",
            "129M,hugepages=on",
            "--memory 129M,hugepages=on: the size is not a multiple of the 2M page; 128M is",
        ),
        ("memory", "1G,shared=yes", "--memory 1G,shared=yes: shared=yes: say on or off"),
        (
            "memory",
            "1G,hugepage=on",
            "--memory 1G,hugepage=on: unknown key \"hugepage\"; did you mean \"hugepages\"? \
             (keys: size, hugepages, prefault, shared)",
        ),
        ("disk", "readonly=on", "--disk readonly=on: a disk needs an image; write path=IMAGE"),
        ("disk", "x,aio=fast", "--disk x,aio=fast: aio=fast: no such aio; say auto, threads, native, io_uring"),
        (
            "disk",
            "x,cache=off",
            "--disk x,cache=off: cache=off: no such cache; say auto, writeback, none, writethrough, directsync, unsafe",
        ),
        (
            "disk",
            "x,aio=native,cache=writeback",
            "--disk x,aio=native,cache=writeback: aio=native needs cache=none or cache=directsync: through the page cache, which \
             cache=writeback uses, it would wait for every transfer; write cache=none, or use aio=io_uring or \
             aio=threads",
        ),
        (
            "disk",
            "x,format=qcow2",
            "--disk x,format=qcow2: format=qcow2: this build offers format=raw; make a raw copy with \
             \"qemu-img convert -O raw IMAGE COPY\"",
        ),
        ("disk", "x,discard=on", "--disk x,discard=on: discard=on: no such discard; say unmap, ignore"),
        (
            "disk",
            "x,queues=0",
            "--disk x,queues=0: queues=0: a disk has 1 to 64 queues; leave it out for one a CPU, at most 4",
        ),
        (
            "disk",
            "x,queues=65",
            "--disk x,queues=65: queues=65: a disk has 1 to 64 queues; leave it out for one a CPU, at most 4",
        ),
        (
            "disk",
            "x,queue-size=300",
            "--disk x,queue-size=300: queue-size=300: a queue has a power of two from 4 to 1024 entries; write 256",
        ),
        (
            "disk",
            "x,poll-us=20000",
            "--disk x,poll-us=20000: poll-us=20000: not 0 to 10000 microseconds; write it like 32, or 0 for none",
        ),
        (
            "disk",
            "x,queue-size=2048",
            "--disk x,queue-size=2048: queue-size=2048: a queue has a power of two from 4 to 1024 entries; write 1024",
        ),
        (
            "disk",
            "x,serial=123456789012345678901",
            "--disk x,serial=123456789012345678901: serial=123456789012345678901: a serial number is 1 to 20 \
             printable ASCII characters",
        ),
        ("disk", "x,id=0", "--disk x,id=0: id=0: an id is a letter followed by letters, digits, '-', '.' or '_'"),
        ("serial", "file", "--serial file: where? write file=PATH"),
        (
            "serial",
            "studio",
            "--serial studio: no such connection; did you mean \"stdio\"? (stdio, file=PATH, pty, socket=PATH, none)",
        ),
        (
            "serial",
            "file=a,socket=b",
            "--serial file=a,socket=b: COM1 has one other end: stdio, file=PATH, pty, socket=PATH or none",
        ),
        ("debug-exit", "0x3f8", "--debug-exit 0x3f8: the four ports from here on are not free: COM1; 0x501 is"),
        ("no-reboot", "yes", "--no-reboot yes: say on or off"),
        ("grace", "-1", "--grace -1: not a number of seconds; write it like 30"),
        ("stats", "xml", "--stats xml: no such format; say text, json or off"),
    ] {
        assert_eq!(machine(&[("kernel", "k"), (key, text)]), Err(line.to_owned()), "{key} {text}");
    }
    assert_eq!(
        machine(&[]),
        Err("--kernel is missing: name a kernel, or a file that has one with --config vm.toml".to_owned())
    );
}

#[test]
fn engines_and_cache_modes() {
    for aio in ["threads", "native", "io_uring"] {
        for cache in ["writeback", "none", "writethrough", "directsync", "unsafe"] {
            let text = format!("x,aio={aio},cache={cache}");
            let vm = machine(&[("kernel", "k"), ("disk", &text)]);
            if aio == "native" && cache != "none" && cache != "directsync" {
                assert!(vm.unwrap_err().contains("aio=native needs cache=none or cache=directsync"));
            } else {
                let disk = vm.unwrap().disks.remove(0);
                assert_eq!((disk.aio.unwrap().name(), disk.cache.unwrap().name()), (aio, cache));
            }
        }
    }
}

#[test]
fn a_disk_has_a_queue_for_each_cpu_and_no_more_than_four() {
    for (cpus, queues) in [("1", 1), ("2", 2), ("4", 4), ("5", 4), ("300", 4)] {
        let vm = machine(&[("disk", "x"), ("disk", "y,queues=3"), ("cpus", cpus), ("kernel", "k")]).unwrap();
        assert_eq!((vm.disks[0].queues, vm.disks[1].queues), (queues, 3));
    }
}

#[test]
fn engine_and_cache_mode_may_be_left_to_skiff() {
    for text in ["x", "x,aio=auto", "x,cache=auto", "x,aio=auto,cache=auto"] {
        let disk = machine(&[("kernel", "k"), ("disk", text)]).unwrap().disks.remove(0);
        assert_eq!((disk.aio, disk.cache), (None, None), "{text}");
    }
    let disk = machine(&[("kernel", "k"), ("disk", "x,aio=native")]).unwrap().disks.remove(0);
    assert_eq!((disk.aio, disk.cache), (Some(Aio::Native), None));
}

#[test]
fn limits() {
    let limits = |text: &str| machine(&[("kernel", "k"), ("disk", text)]).map(|vm| vm.disks[0].limits);
    let one = limits("x,bps-rd=1M").unwrap().unwrap();
    assert_eq!((one.bytes.read, one.burst), (NonZeroU64::new(1 << 20), Duration::from_millis(100)));
    assert_eq!((one.requests, one.bytes.total, one.bytes.write), (Rates::default(), None, None));
    assert_eq!(limits("x,iops=5,burst=2ms").unwrap().unwrap().burst, Duration::from_millis(2));
    let (number, time) =
        ("not a number of requests a second; write it like 500", "not a time; write it like 100ms or 2s");
    for (setting, complaint) in [
        ("iops=0", "at least 1 a second; leave it out for no limit"),
        ("iops=fast", number),
        ("iops=-1", number),
        ("iops-wr=1K", number),
        ("bps=0M", "at least 1K a second; leave it out for no limit"),
        ("bps=1.5K", "not a multiple of 1K"),
        ("bps=1000", "a size needs a unit; write 1000M for MiB (units: K, M, G, T)"),
        ("bps-rd=1MB", "not a size; write it like 512M or 2G (units: K, M, G, T)"),
        ("iops=5,burst=2", time),
        ("iops=5,burst=-1s", time),
        ("iops=5,burst=1ms", "2ms is the least; with less a disk would not get the whole of its limits"),
        ("iops=5,burst=61s", "a minute is the most"),
        ("burst=2s", "there is no limit it could go with; add one, such as bps=50M"),
    ] {
        let last = setting.rsplit(',').next().unwrap();
        let line = format!("--disk x,{setting}: {last}: {complaint}");
        assert_eq!(limits(&format!("x,{setting}")), Err(line));
    }
}

#[test]
fn what_errors_do() {
    let errors = ["report", "ignore", "stop", "enospc"];
    for (read, write) in errors.iter().flat_map(|read| errors.map(|write| (*read, write))) {
        let vm = machine(&[("kernel", "k"), ("disk", &format!("x,rerror={read},werror={write}"))]);
        if read == "enospc" {
            assert!(vm.unwrap_err().ends_with(": rerror=enospc: no such rerror; say report, ignore, stop"));
        } else {
            let disk = &vm.unwrap().disks[0];
            assert_eq!((disk.rerror.name(), disk.werror.name()), (read, write));
        }
    }
    let wrong = machine(&[("kernel", "k"), ("disk", "x,werror=pause")]);
    let line = "--disk x,werror=pause: werror=pause: no such werror; say report, ignore, stop, enospc";
    assert_eq!(wrong.unwrap_err(), line);
}

#[test]
fn every_other_end_of_com1() {
    for (text, serial) in [
        ("stdio", SerialConfig::Stdio),
        ("pty", SerialConfig::Pty),
        ("none", SerialConfig::None),
        ("file=a,,b=c", SerialConfig::File("a,b=c".into())),
        ("socket=/run/vm.sock", SerialConfig::Socket("/run/vm.sock".into())),
    ] {
        assert_eq!(machine(&[("kernel", "k"), ("serial", text)]).map(|vm| vm.serial), Ok(serial));
    }
}

#[test]
fn two_disks_cannot_share_a_name() {
    let given = machine(&[("kernel", "k"), ("disk", "a.img,id=data"), ("disk", "b.img,id=data")]);
    let line = "--disk b.img,id=data: the id \"data\" belongs to a.img; choose another with id=";
    assert_eq!(given, Err(line.to_owned()));
    let default = machine(&[("kernel", "k"), ("disk", "a.img,id=disk1"), ("disk", "b.img")]);
    assert_eq!(default, Err("--disk b.img: the id \"disk1\" belongs to a.img; choose another with id=".to_owned()));
}

#[test]
fn flags_replace_what_the_file_says() {
    let file = [("kernel", "filed"), ("cpus", "4"), ("memory", "4G,shared=on"), ("disk", "a"), ("disk", "b")];
    let file = || request(&file).unwrap();
    let flags = request(&[("cpus", "2"), ("memory", "1G"), ("disk", "c"), ("no-reboot", "off")]).unwrap();
    let vm = flags.over(file()).resolve().unwrap();
    assert_eq!((vm.kernel, vm.cpus), ("filed".into(), 2));
    assert_eq!(vm.memory, MemoryConfig { size: 1 << 30, hugepages: false, prefault: false, shared: false });
    assert_eq!(vm.disks, vec![DiskConfig { queues: 2, ..disk("c", "disk0") }]);
    assert_eq!(Request::default().over(file()), file());
    let off = request(&[("debug-exit", "off"), ("no-reboot", "off")]).unwrap();
    let on = request(&[("kernel", "k"), ("debug-exit", "0x501"), ("no-reboot", "on")]).unwrap();
    let vm = off.over(on).resolve().unwrap();
    assert_eq!((vm.debug_exit, vm.on_reboot), (None, OnReboot::Restart));
}

proptest! {
    #[test]
    fn no_text_panics(key in 0..super::super::file::KEYS.len(), text in any::<String>(), near in "[a-z0-9=,.GMK]*") {
        let key = super::super::file::KEYS[key];
        for text in [text.as_str(), near.as_str()] {
            if let Err(line) = machine(&[("kernel", "k"), (key, text)]) {
                let start = format!("--{key}");
                prop_assert!(line.starts_with(&start), "{}", line);
            }
        }
    }
}
