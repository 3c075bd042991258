//! What the guest gives back, the host has again: its blocks, counted by the host's filesystem.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use tests::{Skiff, assets};

use crate::choices::Choice;

const DISKS: [(Choice, &str); 4] = [
    (Choice { aio: "threads", cache: "writeback" }, "unmap"),
    (Choice { aio: "native", cache: "none" }, "unmap"),
    (Choice { aio: "io_uring", cache: "none" }, "unmap"),
    (Choice { aio: "threads", cache: "writeback" }, "ignore"),
];

const MIB: usize = 1 << 20;
const SIZE: usize = 8 * MIB;

/// Bytes on the host, at any time.
fn allocated(image: &Path) -> u64 {
    File::open(image).and_then(|file| file.sync_all().and_then(|()| file.metadata())).unwrap().blocks() * 512
}

#[test]
fn what_is_discarded_is_free_on_the_host() {
    let folder = assets::folder_on_disk();
    let mut skiff = Skiff::linux();
    let mut images = Vec::new();
    for (number, (Choice { aio, cache }, discard)) in DISKS.into_iter().enumerate() {
        let image = folder.path().join(format!("{number}.img"));
        std::fs::write(&image, vec![0x5a; SIZE]).unwrap();
        assert!(allocated(&image) >= SIZE as u64);
        skiff = skiff.disk(&image, &format!(",aio={aio},cache={cache},discard={discard}"));
        images.push((image, discard == "unmap"));
    }
    let mut guest = skiff.boot();
    for ((image, unmaps), letter) in images.iter().zip('a'..) {
        let limit = guest.ask(&format!("cat /sys/block/vd{letter}/queue/discard_max_bytes"));
        assert_eq!(limit != "0", *unmaps, "{}: {limit}", image.display());
        if *unmaps {
            guest.ask(&format!("blkdiscard -o {MIB} -l {} /dev/vd{letter}", 2 * MIB));
            let left = allocated(image);
            assert!((SIZE - 2 * MIB..SIZE - 2 * MIB + 65536).contains(&(left as usize)), "{}: {left}", image.display());
        } else {
            assert_ne!(guest.run(&format!("blkdiscard /dev/vd{letter}")).code, 0);
        }
    }
    // The neighbours keep what they had.
    for letter in ['a', 'b', 'c'] {
        let zeroes = guest.ask(&format!("tr -d Z </dev/vd{letter} | wc -c"));
        assert_eq!(zeroes, (2 * MIB).to_string(), "vd{letter}");
        guest.ask(&format!("blkdiscard /dev/vd{letter}"));
    }
    assert_eq!(guest.power_off().code, Some(0));
    for (image, unmaps) in images {
        let (left, content) = (allocated(&image), std::fs::read(&image).unwrap());
        assert_eq!(content.len(), SIZE);
        if unmaps {
            assert!(left < 65536 && content.iter().all(|byte| *byte == 0), "{}: {left}", image.display());
        } else {
            assert!(left >= SIZE as u64 && content.iter().all(|byte| *byte == 0x5a), "{}: {left}", image.display());
        }
    }
}

/// A file system that is trimmed after its files went is as small as it was.
#[test]
fn a_trimmed_file_system_shrinks() {
    let folder = assets::folder_on_disk();
    let image = assets::blank_image(folder.path(), "data.img", 64 << 20);
    assets::tool("mke2fs", &["-qF", "-t", "ext4", "-E", "lazy_itable_init=0", image.to_str().unwrap()]);
    let empty = allocated(&image);
    let mut guest = Skiff::linux().disk(&image, "").boot();
    guest.ask("mount -t ext4 /dev/vda /mnt && dd if=/dev/urandom of=/mnt/file bs=64k count=128 && sync");
    let full = allocated(&image);
    assert!(full >= empty + (8 << 20), "{empty} {full}");
    guest.ask("rm /mnt/file && sync && fstrim /mnt && umount /mnt");
    assert_eq!(guest.power_off().code, Some(0));
    let trimmed = allocated(&image);
    // What it wrote meanwhile, in its journal above all.
    assert!(trimmed < empty + (1 << 20), "{empty} {full} {trimmed}");
    assets::tool("e2fsck", &["-f", "-n", image.to_str().unwrap()]);
}
