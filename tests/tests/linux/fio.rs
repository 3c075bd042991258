//! The guest's own judge of a disk: fio writes at random and in sequence through every engine in every cache mode, with
//! one queue and with several, reads it back, and compares checksums.

use std::path::{Path, PathBuf};

use tests::{Skiff, assets};

use crate::choices::{CHOICES, Choice, letters};

const SIZE: u64 = 384 << 10;

/// Bytes at the beginning of a disk that are written at random; what follows is written in sequence.
const RANDOM: usize = 128 << 10;

/// The magic number of a header that fio puts at the beginning of each block it verifies (`FIO_HDR_MAGIC`).
const MAGIC: [u8; 2] = 0xacca_u16.to_le_bytes();

const SEQUENTIAL: usize = 32 << 10;

const QUEUES: [&str; 2] = ["1", "4"];

struct Image {
    path: PathBuf,
    keys: String,
}

/// Disks of every choice with every number of queues.
fn disks(mut skiff: Skiff, folder: &Path, ioeventfd: &str) -> (Skiff, Vec<Image>) {
    let mut images = Vec::new();
    for queues in QUEUES {
        for Choice { aio, cache } in CHOICES {
            let keys = format!(",aio={aio},cache={cache},queues={queues},ioeventfd={ioeventfd}");
            let path = assets::blank_image(folder, &format!("{}.img", images.len()), SIZE);
            skiff = skiff.disk(&path, &keys);
            images.push(Image { path, keys });
        }
    }
    (skiff, images)
}

/// All disks of one machine at once, so that its workers contend as much as they can.
fn verified(ioeventfd: &str) {
    let folder = assets::folder_on_disk();
    let Some(skiff) = Skiff::with_tools(folder.path()) else { return };
    // The driver uses no more queues than there are CPUs.
    let (skiff, images) = disks(skiff.cpus(4).memory("512M"), folder.path(), ioeventfd);
    let mut guest = skiff.boot();
    let counts = guest.ask("for disk in /sys/block/vd*; do ls $disk/mq | wc -l; done");
    let expected = QUEUES.iter().flat_map(|queues| [*queues; CHOICES.len()]);
    assert!(counts.lines().eq(expected), "queues: {counts}");

    // A job file, for a line of the console takes 4 KiB.
    let global = "[global]\\nthread\\nioengine=libaio\\ndirect=1\\niodepth=8\\nverify=crc32c\\nverify_fatal=1\\n";
    let random = format!("rw=randwrite\\nbsrange=512-16k\\nblockalign=512\\nsize={RANDOM}\\n");
    let sequential = format!("rw=write\\nbs={SEQUENTIAL}\\noffset={RANDOM}\\n");
    let jobs = format!("[r%s]\\nfilename=/dev/vd%s\\n{random}[s%s]\\nfilename=/dev/vd%s\\n{sequential}");
    let disks: Vec<_> = letters(images.len()).map(String::from).collect();
    let each = format!("for d in {}; do printf '{jobs}' $d $d $d $d; done", disks.join(" "));
    guest.ask(&format!("(printf '{global}'; {each}) >/tmp/jobs"));
    // Of the terse format only the fifth field, a job's error: the console is slow.
    let errors = guest.ask("fio --minimal /tmp/jobs >/tmp/report; code=$?; cut -d';' -f5 /tmp/report; exit $code");
    assert!(errors.lines().eq(vec!["0"; 2 * images.len()]), "{errors}");
    assert_eq!(guest.power_off().code, Some(0));
    for Image { path, keys } in images {
        let content = std::fs::read(path).unwrap();
        assert_eq!(content.len() as u64, SIZE);
        let mut blocks = content[RANDOM..].chunks(SEQUENTIAL).chain([&content[..]]);
        assert!(blocks.all(|block| block.starts_with(&MAGIC)), "{keys}: not what fio wrote");
    }
}

#[test]
fn verifies_every_engine_in_every_cache_mode() {
    verified("on");
}

#[test]
fn verifies_them_without_ioeventfds() {
    verified("off");
}
