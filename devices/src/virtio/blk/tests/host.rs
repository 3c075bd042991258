//! What the host is asked for: engines and cache modes.

use std::fs;
use std::io::Write;
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
const CALLS: &str = "trace=openat,pwritev2,fdatasync,io_submit,io_getevents,io_uring_enter";

/// What the host is asked for, seen from outside: this test runs again under strace, once for each choice.
#[test]
fn the_host_is_asked_for_what_the_cache_mode_says() {
    if let Ok(choice) = std::env::var("SKIFF_TEST_CHOICE") {
        let (aio, cache) = choices().find(|found| format!("{found:?}") == choice).unwrap();
        let path = PathBuf::from(std::env::var_os("SKIFF_TEST_IMAGE").unwrap());
        return exercise(&Image { _dir: TempDir::new().unwrap(), path }, aio, cache);
    }
    if Command::new("strace").arg("-V").output().is_err() {
        // Past the capture of the test harness.
        let name = "blk::the_host_is_asked_for_what_the_cache_mode_says";
        let _ = writeln!(std::io::stderr(), "SKIPPED {name}: strace is not installed");
        return;
    }
    for (aio, cache) in choices() {
        let image = image_on_disk();
        let trace = image.path.with_extension("trace");
        let name = "virtio::blk::tests::host::the_host_is_asked_for_what_the_cache_mode_says";
        let run = Command::new("strace")
            .args(["-f", "-qq", "-e", CALLS, "-o"])
            .arg(&trace)
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", name])
            .env("SKIFF_TEST_CHOICE", format!("{:?}", (aio, cache)))
            .env("SKIFF_TEST_IMAGE", &image.path)
            .output()
            .unwrap();
        assert!(run.status.success(), "{aio:?} {cache:?}: {run:?}");
        let trace = fs::read_to_string(trace).unwrap();
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
    }
}
