//! Command lines against the programs' own documents: QEMU's qemu-options.hx, Cloud Hypervisor's `--help` and docs/, and
//! Firecracker's docs/ and API specification (firecracker.yaml).

use super::*;
use crate::bench::machine::Timing;
use crate::bench::{Content, Way, Work};
use guest::workload::Mix;
use serde_json::Value;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

fn cell(rw: Mix, cache: CacheMode, aio: Aio) -> Cell {
    let work = Work { content: Content::Written, rw, bs: 4096, depth: 32, queues: 1, busy: 0 };
    Cell { work, way: Way { aio: Some(aio), cache, ..Way::default() } }
}

fn machines(stop: &AtomicBool) -> Machines<'_> {
    let timing = Timing { warm_up: Duration::from_millis(100), runtime: Duration::from_secs(1) };
    let folder = Path::new(".");
    Machines { guest: "/guest.elf".into(), folder, tsc_khz: 2_000_000, timing, seed: 7, pin: None, stop }
}

/// What the guest is told for a cell of [`cell`].
fn words(rw: &str) -> String {
    format!("bench pace=on rw={rw} bs=4096 depth=32 queues=1 runtime=1000 warmup=100 tsc_khz=2000000 seed=7 poll=on")
}

fn line(command: &Command) -> Vec<String> {
    let words = [command.get_program()].into_iter().chain(command.get_args());
    words.map(|word| word.to_str().unwrap().to_owned()).collect()
}

#[test]
fn cloud_hypervisor() {
    let stop = AtomicBool::new(false);
    for (rw, cache, aio, knows, disk) in [
        (
            Mix::RandRead,
            CacheMode::None,
            Aio::IoUring,
            true,
            "readonly=on,direct=on,num_queues=1,queue_size=256,image_type=raw",
        ),
        (Mix::RandRead, CacheMode::None, Aio::IoUring, false, "readonly=on,direct=on,num_queues=1,queue_size=256"),
        (
            Mix::RandWrite,
            CacheMode::None,
            Aio::Native,
            true,
            "readonly=off,direct=on,num_queues=1,queue_size=256,image_type=raw,_disable_io_uring=on",
        ),
        (
            Mix::RandWrite,
            CacheMode::Writeback,
            Aio::IoUring,
            false,
            "readonly=off,direct=off,num_queues=1,queue_size=256",
        ),
    ] {
        let command = machines(&stop).cloud_hypervisor(&cell(rw, cache, aio), aio, Path::new("/proc/9/fd/3"), knows);
        let (words, disk) = (words(rw.name()), format!("path=/proc/9/fd/3,{disk}"));
        let expected =
            ["cloud-hypervisor", "--cpus", "boot=1", "--memory", "size=67M", "--kernel", "/guest.elf", "--cmdline"];
        let expected =
            expected.into_iter().chain([words.as_str(), "--disk", &disk, "--serial", "tty", "--console", "off"]);
        assert_eq!(line(&command), expected.collect::<Vec<_>>());
    }
}

#[test]
fn firecrackers_configuration() {
    let stop = AtomicBool::new(false);
    for (rw, cache, readonly, cache_type) in
        [(Mix::Read, CacheMode::Writeback, true, "Writeback"), (Mix::RandRw, CacheMode::Unsafe, false, "Unsafe")]
    {
        let cell = cell(rw, cache, Aio::IoUring);
        let text = machines(&stop).firecracker_config(&cell, Path::new("/proc/9/fd/3"));
        let expected = format!(
            r#"{{
              "boot-source": {{ "kernel_image_path": "/guest.elf", "boot_args": "{}" }},
              "drives": [{{
                "drive_id": "disk", "path_on_host": "/proc/9/fd/3", "is_root_device": false, "is_read_only": {readonly},
                "cache_type": "{cache_type}", "io_engine": "Async"
              }}],
              "machine-config": {{ "vcpu_count": 1, "mem_size_mib": 67 }}
            }}"#,
            words(rw.name())
        );
        let [text, expected]: [Value; 2] = [&text, &expected].map(|text| serde_json::from_str(text).unwrap());
        assert_eq!(text, expected);
    }
    let expected = ["firecracker", "--no-api", "--enable-pci", "--level", "Error", "--config-file", "/proc/9/fd/4"];
    assert_eq!(line(&firecracker(Path::new("/proc/9/fd/4"))), expected);
}

#[test]
fn qemu() {
    let stop = AtomicBool::new(false);
    let cell = cell(Mix::RandWrite, CacheMode::None, Aio::Native);
    let line = line(&machines(&stop).qemu(&cell, Aio::Native, Path::new("/a,b")));
    let after = |word: &str| &line[line.iter().position(|other| other == word).unwrap() + 1];
    assert_eq!(after("-drive"), "if=none,id=disk,format=raw,file=/a,,b,read-only=off,aio=native,cache=none");
    assert_eq!(after("-object"), "iothread,id=io0");
    assert_eq!(after("-append"), &format!("{} {MICROVM_PCI}", words("randwrite")));
}
