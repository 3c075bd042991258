//! What the host is asked for: engines and cache modes.

use std::fs;
use std::process::Command;

use super::*;

fn choices() -> impl Iterator<Item = (Aio, CacheMode)> {
    let all = Aio::ALL.into_iter().flat_map(|aio| CacheMode::ALL.map(|cache| (aio, cache)));
    all.filter(|(aio, cache)| aio.goes_with(*cache))
}

/// Requests of one batch.
const BATCH: u64 = 8;

/// What a driver does at every choice of engine and cache mode, with buffers that lie anywhere.
fn exercise(image: &Image, aio: Aio, cache: CacheMode) {
    let mut blk = image.open_as(false, None, cache, aio);
    let mut guest = Guest::new(PLAIN & (blk.features() | !(1 << VIRTIO_BLK_F_FLUSH)));
    // All there before the worker looks: one batch.
    for n in 0..BATCH {
        guest.offer(IN, n, &[writable(DATA + 4096 * n, 4096)]);
    }
    guest.activate(&mut blk);
    for _ in 0..BATCH {
        guest.turn();
    }
    let content = pattern(3072, 5);
    for address in [DATA, DATA + 0x1001] {
        guest.fill(address, &content);
        let scattered = [readable(address, 1), readable(address + 1, 2559), readable(address + 2560, 512)];
        assert_eq!(guest.request(OUT, 7, &scattered), (OK, 1), "{aio:?} {cache:?}");
        assert_eq!(guest.request(OUT, 16, &[readable(address, 2048)]), (OK, 1), "{aio:?} {cache:?}");
        assert_eq!(guest.request(FLUSH, 0, &[]), (OK, 1), "{aio:?} {cache:?}");
        let back = [writable(DATA + 0x4000, 3000), writable(DATA + 0x5003, 72)];
        assert_eq!(guest.request(IN, 7, &back), (OK, 3073), "{aio:?} {cache:?}");
        assert!(guest.bytes(DATA + 0x4000, 3000) == content[..3000]);
        assert!(guest.bytes(DATA + 0x5003, 72) == content[3000..]);
    }
    blk.reset();
    let file = fs::read(&image.path).unwrap();
    assert!(file[7 * 512..13 * 512] == content && file[16 * 512..20 * 512] == content[..2048]);
}

#[test]
fn every_engine_in_every_cache_mode() {
    for (aio, cache) in choices() {
        exercise(&image_on_disk(), aio, cache);
    }
}

/// The system calls to look at.
const CALLS: &str = "trace=openat,pwritev2,fdatasync,fallocate,io_submit,io_getevents,io_uring_enter";

/// What the host is asked for, seen from outside: the test `name` runs again under strace, once for each choice, and does
/// `work` there; `check` sees the trace.
fn trace(name: &str, work: impl Fn(&Image, Aio, CacheMode), check: impl Fn(&str, Aio, CacheMode)) {
    if let Ok(choice) = std::env::var("SKIFF_TEST_CHOICE") {
        let (aio, cache) = choices().find(|found| format!("{found:?}") == choice).unwrap();
        let path = PathBuf::from(std::env::var_os("SKIFF_TEST_IMAGE").unwrap());
        return work(&Image { _dir: TempDir::new().unwrap(), path }, aio, cache);
    }
    if Command::new("strace").arg("-V").output().is_err() {
        skip::because("strace is not installed");
        return;
    }
    for (aio, cache) in choices() {
        let image = image_on_disk();
        let trace = image.path.with_extension("trace");
        let run = Command::new("strace")
            .args(["-f", "-qq", "-e", CALLS, "-o"])
            .arg(&trace)
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", &format!("virtio::blk::tests::host::{name}")])
            .env("SKIFF_TEST_CHOICE", format!("{:?}", (aio, cache)))
            .env("SKIFF_TEST_IMAGE", &image.path)
            .output()
            .unwrap();
        assert!(run.status.success(), "{aio:?} {cache:?}: {run:?}");
        check(&fs::read_to_string(trace).unwrap(), aio, cache);
    }
}

#[test]
fn the_host_is_asked_for_what_the_cache_mode_says() {
    trace("the_host_is_asked_for_what_the_cache_mode_says", exercise, |trace, aio, cache| {
        let seen = |words: &[&str]| trace.lines().any(|line| words.iter().all(|word| line.contains(word)));
        let case = format!("{aio:?} {cache:?}\n{trace}");
        assert!(seen(&["openat(", "disk.img", "O_RDWR"]), "{case}");
        assert_eq!(
            seen(&["openat(", "disk.img", "O_DIRECT"]),
            [CacheMode::None, CacheMode::Directsync].contains(&cache),
            "{case}"
        );
        // One call for the batch, and none for its completions.
        match aio {
            Aio::Threads => {}
            Aio::Native => assert!(seen(&["io_submit(", ", 8, ["]) && !seen(&["io_getevents("]), "{case}"),
            Aio::IoUring => assert!(seen(&["io_uring_enter(", ", 8, 0, 0, "]), "{case}"),
        }
        let (dsync, sync) = match aio {
            // Buffers that are not aligned are written by helpers, and those are seen with every engine.
            Aio::Threads | Aio::IoUring => (seen(&["pwritev2(", "RWF_DSYNC"]), seen(&["fdatasync("])),
            Aio::Native => (seen(&["io_submit(", "RWF_DSYNC"]), seen(&["io_submit(", "IOCB_CMD_FDSYNC"])),
        };
        let (dsync_expected, sync_expected) = match cache {
            CacheMode::Writeback | CacheMode::None => (false, true),
            CacheMode::Writethrough | CacheMode::Directsync => (true, false),
            CacheMode::Unsafe => (false, false),
        };
        if aio == Aio::IoUring {
            // Its own transfers are no system calls; only the helper's are.
            assert!(!sync, "{case}");
            assert!(!dsync || dsync_expected, "{case}");
        } else {
            assert_eq!((dsync, sync), (dsync_expected, sync_expected), "{case}");
        }
    });
}

/// The calls of a trace that change the image or make it stable, in the order they were begun.
fn changes(trace: &str) -> Vec<&'static str> {
    let name = |line: &str| {
        let has = |word: &str| line.contains(word);
        match () {
            () if has("fallocate(") && has("FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE") => Some("punch"),
            () if has("fallocate(") && has("FALLOC_FL_KEEP_SIZE|FALLOC_FL_ZERO_RANGE") => Some("zero"),
            () if has("fallocate(") => Some("another fallocate"),
            () if has("fdatasync(") => Some("sync"),
            () if has("pwritev2(") && has("RWF_DSYNC") => Some("durable write"),
            () if has("pwritev2(") => Some("write"),
            () => None,
        }
    };
    trace.lines().filter_map(name).collect()
}

/// Discarding and zeroing are durable like writes, and flushed like them.
#[test]
fn the_host_is_asked_to_discard_and_to_zero() {
    let work = |image: &Image, aio, cache| {
        let mut blk = image.open_as(false, None, cache, aio);
        let mut guest = Guest::new(PLAIN | 1 << 13 | 1 << 14);
        guest.activate(&mut blk);
        // virtio 1.2, 5.2.6: discard; write zeroes with and without unmap.
        for (kind, flags) in [(11, 0), (13, 1), (13, 0)] {
            guest.fill(DATA, &8_u64.to_le_bytes());
            guest.fill(DATA + 8, &16_u32.to_le_bytes());
            guest.fill(DATA + 12, &u32::to_le_bytes(flags));
            assert_eq!(guest.request(kind, 0, &[readable(DATA, 16)]), (OK, 1));
        }
        blk.reset();
    };
    trace("the_host_is_asked_to_discard_and_to_zero", work, |trace, aio, cache| {
        let expected: &[_] = match cache {
            CacheMode::Writethrough | CacheMode::Directsync => &["punch", "sync", "punch", "sync", "zero", "sync"],
            // The flush at the end, which the other engines leave to their queue in the kernel.
            CacheMode::Writeback | CacheMode::None if aio == Aio::Threads => &["punch", "punch", "zero", "sync"],
            _ => &["punch", "punch", "zero"],
        };
        assert_eq!(changes(trace), expected, "{aio:?} {cache:?}\n{trace}");
    });
}

/// The write cache is switched off and on again: what was written before is flushed at once, what comes then is durable.
#[test]
fn the_host_is_asked_for_what_the_switched_write_cache_says() {
    let work = |image: &Image, aio, cache| {
        let mut blk = image.open_as(false, None, cache, aio);
        let mut guest = Guest::new(PLAIN | 1 << 11);
        guest.activate(&mut blk);
        guest.fill(DATA, &[7; 512]);
        for on in [true, false, true] {
            blk.write_config(32, &[on.into()]);
            assert_eq!(guest.request(OUT, 0, &[readable(DATA + 1, 512)]), (OK, 1));
            if !on {
                assert_eq!(guest.request(FLUSH, 0, &[]), (OK, 1));
            }
        }
        blk.reset();
    };
    trace("the_host_is_asked_for_what_the_switched_write_cache_says", work, |trace, aio, cache| {
        // Buffers that are not aligned, so that the helpers of every engine write them where O_DIRECT minds.
        if aio != Aio::Threads {
            return;
        }
        let expected: &[_] = match cache {
            CacheMode::Unsafe => &["write", "write", "write"],
            _ => &["write", "sync", "durable write", "write", "sync"],
        };
        assert_eq!(changes(trace), expected, "{aio:?} {cache:?}\n{trace}");
    });
}
