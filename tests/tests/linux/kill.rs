//! skiff dies in the middle of writes: what the guest was told is on the disk must be there.

use std::collections::BTreeMap;

use tests::{Skiff, assets};

use crate::choices::{Choice, letters};

const DISKS: [Choice; 4] = [
    Choice { aio: "threads", cache: "writeback" },
    Choice { aio: "native", cache: "none" },
    Choice { aio: "io_uring", cache: "writethrough" },
    Choice { aio: "threads", cache: "directsync" },
];

/// What the guest writes into each file.
const BYTES: usize = 20_000;

/// Files of every disk to wait for.
const FILES: usize = 6;

#[test]
fn files_that_were_synced_survive_sigkill() {
    let folder = assets::folder_on_disk();
    let mut skiff = Skiff::linux().cpus(2);
    let mut images = Vec::new();
    for Choice { aio, cache } in DISKS {
        let image = assets::blank_image(folder.path(), &format!("{aio}-{cache}.img"), 64 << 20);
        assets::tool("mke2fs", &["-qF", "-t", "ext4", image.to_str().unwrap()]);
        skiff = skiff.disk(&image, &format!(",aio={aio},cache={cache}"));
        images.push(image);
    }
    let mut guest = skiff.boot();
    guest.ask("for d in a b c d; do mkdir /$d && mount -t ext4 /dev/vd$d /$d || exit 1; done");
    let write = format!("yes disk-$d-$n | head -c {BYTES} >/tmp/$d; dd if=/tmp/$d of=/$d/$n bs={BYTES} conv=fsync");
    let report = "2>/dev/null && echo synced $d $n.";
    // It goes on until the end, and answers at once.
    let forever = format!("n=0; while {write} {report}; do n=$((n+1)); done");
    guest.send(&format!("for d in a b c d; do ({forever}) & done\n"));
    let mut synced: BTreeMap<char, Vec<u32>> = letters(DISKS.len()).map(|disk| (disk, vec![])).collect();
    while synced.values().any(|files| files.len() < FILES) {
        guest.wait_for("synced ");
        note(&mut synced, &guest.wait_for(".\n"));
    }
    guest.signal("KILL");
    let ended = guest.wait();
    assert_eq!(ended.code, None, "{}", ended.messages);
    // Also what it said after that.
    synced.values_mut().for_each(Vec::clear);
    for line in ended.console.lines() {
        if let Some(file) = line.strip_prefix("synced ").and_then(|line| line.strip_suffix('.')) {
            note(&mut synced, file);
        }
    }
    for (image, (disk, files)) in images.iter().zip(synced) {
        assert!(files.len() >= FILES);
        // Not clean, but nothing is wrong that the journal does not put right: without asking, or not at all.
        let path = image.to_str().unwrap();
        assets::tool("sh", &["-c", &format!("e2fsck -f -p {path}; test $? -le 1")]);
        let copy = image.with_extension("copy");
        std::fs::create_dir(&copy).unwrap();
        assets::tool("debugfs", &["-R", &format!("rdump / {}", copy.to_str().unwrap()), path]);
        for file in files {
            let expected = format!("disk-{disk}-{file}\n").repeat(BYTES / 9 + 1);
            let content = std::fs::read(copy.join(file.to_string())).unwrap_or_default();
            assert!(content == expected.as_bytes()[..BYTES], "{path}: file {file} was synced");
        }
    }
}

/// Takes down "DISK FILE".
fn note(synced: &mut BTreeMap<char, Vec<u32>>, words: &str) {
    let (disk, file) = words.split_once(' ').expect("a disk and a file");
    synced.get_mut(&disk.parse().expect("a letter")).expect("a disk").push(file.parse().expect("a number"));
}
