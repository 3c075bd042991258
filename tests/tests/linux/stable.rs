//! What writes and flushes of the guest come to in the host's filesystem, by its own count. Of the other engines the system
//! calls tell that (`devices/src/virtio/blk/tests/host.rs`); what io_uring does is none.

use std::fs;
use std::path::Path;

use tests::{Skiff, assets};

use crate::choices::{Choice, letters};

/// Who knows what is asked of ext4: for `fdatasync` and for a write with RWF_DSYNC alike.
const TRACE: &str = "/sys/kernel/debug/tracing";

const EVENT: &str = "events/ext4/ext4_sync_file_enter/enable";

const WRITES: usize = 8;

const CACHES: [(&str, [usize; 2]); 5] = [
    // How often something becomes stable when the guest has written so much, and when it flushes after that.
    ("writeback", [0, 1]),
    ("none", [0, 1]),
    ("writethrough", [WRITES, 0]),
    ("directsync", [WRITES, 0]),
    ("unsafe", [0, 0]),
];

fn tell(file: &str, word: &str) {
    fs::write(Path::new(TRACE).join(file), word).unwrap_or_else(|error| panic!("{file}: {error}"));
}

/// How often files were made stable since the last time.
fn count() -> usize {
    let trace = fs::read_to_string(Path::new(TRACE).join("trace")).unwrap();
    tell("trace", "");
    trace.lines().filter(|line| line.contains("ext4_sync_file_enter:")).count()
}

#[test]
fn is_made_stable_when_the_cache_mode_says_so() {
    if std::env::var_os("SKIFF_IN_LAB").is_none() {
        // On a host others make files stable too.
        skip::because("the kernel is traced in the lab only (SKIFF_LAB=always)");
        return;
    }
    let folder = assets::folder_on_disk();
    let choices = ["threads", "io_uring"].into_iter().flat_map(|aio| CACHES.map(|(cache, _)| Choice { aio, cache }));
    let mut skiff = Skiff::linux();
    for Choice { aio, cache } in choices.clone() {
        let image = assets::blank_image(folder.path(), &format!("{aio}-{cache}.img"), 1 << 20);
        skiff = skiff.disk(&image, &format!(",aio={aio},cache={cache}"));
    }
    let mut guest = skiff.boot();
    tell(EVENT, "1");
    count();
    for ((choice, (cache, [written, flushed])), letter) in choices.zip(CACHES.iter().cycle()).zip(letters(26)) {
        assert_eq!(choice.cache, *cache);
        guest.ask(&format!("dd if=/dev/zero of=/dev/vd{letter} bs=4k count={WRITES} oflag=direct"));
        assert_eq!(count(), *written, "{choice:?}: written");
        guest.ask(&format!("dd if=/dev/null of=/dev/vd{letter} conv=fsync"));
        assert_eq!(count(), *flushed, "{choice:?}: flushed");
    }
    tell(EVENT, "0");
    assert_eq!(guest.power_off().code, Some(0));
}
