//! Disks with snapshot=on as a stock Linux sees them, and their image afterwards.

use std::fs;

use tests::{Skiff, assets};

use crate::disk::checksum;

/// Two machines at once have one root file system. What they write stays until they end, resets included, and then is gone.
#[test]
fn a_root_file_system_forgets_what_was_written() {
    let folder = assets::folder_on_disk();
    let image = assets::copy_image(&assets::guest("root.img"), folder.path());
    let before = checksum(&image);
    let start = |keys: &str| {
        let keys = format!(",snapshot=on,snapshot-dir={}{keys}", folder.path().display());
        Skiff::linux().cpus(2).disk(&image, &keys).cmdline("root=/dev/vda rw").start()
    };
    let mut guests = [start(""), start(",aio=native,cache=none")];
    for (number, guest) in guests.iter_mut().enumerate() {
        guest.log_in();
        assert!(guest.ask("mount").contains("/dev/vda on / type ext4 (rw"));
        assert_eq!(guest.ask("ls / | grep -c machine || true"), "0");
        guest.ask(&format!("dd if=/dev/urandom of=/data bs=64k count=64 && touch /machine-{number}"));
    }
    for (number, guest) in guests.iter_mut().enumerate() {
        let written = guest.ask("sha256sum </data");
        // busybox init unmounts first, as for powering off.
        guest.send("reboot\n");
        guest.log_in();
        assert_eq!(guest.ask("sha256sum </data"), written, "what it wrote before the reset");
        assert_eq!(guest.ask("ls / | grep machine"), format!("machine-{number}"));
        let complaints = guest.run("dmesg | grep -E 'EXT4-fs.*(error|warning|recover)|I/O error'");
        assert_eq!((complaints.text.as_str(), complaints.code), ("", 1));
    }
    let [mut first, mut second] = guests;
    first.send("poweroff\n");
    let ended = first.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.messages);
    // In the middle of its work.
    second.ask("dd if=/dev/urandom of=/more bs=64k count=16");
    second.signal("KILL");
    assert_eq!(second.wait().code, None);
    assert_eq!(checksum(&image), before);
    assets::tool("e2fsck", &["-f", "-n", image.to_str().unwrap()]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "something is left");
}

/// As the guest's own judge of a disk sees it: sectors of the image and of what was written over it, side by side.
#[test]
fn fio_reads_back_what_it_wrote_over_an_image() {
    let folder = assets::folder_on_disk();
    let Some(mut skiff) = Skiff::with_tools(folder.path()) else { return };
    let image = assets::blank_image(folder.path(), "disk.img", 4 << 20);
    fs::write(&image, "skiff123".repeat((4 << 20) / 8)).unwrap();
    let before = checksum(&image);
    let choices = ["", "aio=threads,cache=writeback", "aio=native,cache=directsync", "aio=io_uring,cache=none"];
    for choice in choices {
        let keys = format!(",snapshot=on,queues=2,snapshot-dir={},{choice}", folder.path().display());
        skiff = skiff.disk(&image, keys.trim_end_matches(','));
    }
    let mut guest = skiff.cpus(2).memory("512M").boot();
    // Some blocks of the first half.
    let jobs = "--name=j --thread --ioengine=libaio --direct=1 --iodepth=8 --verify=crc32c --verify_fatal=1 --rw=randwrite \
                --bsrange=512-16k --blockalign=512 --size=2m --io_size=1m";
    let second_half = assets::tool("sh", &["-c", &format!("tail -c 2097152 {} | sha256sum", image.display())]);
    for disk in ["a", "b", "c", "d"] {
        guest.ask(&format!("fio --minimal --filename=/dev/vd{disk} {jobs} >/tmp/report"));
        guest.ask("echo 3 >/proc/sys/vm/drop_caches");
        assert_eq!(guest.ask(&format!("tail -c 2097152 /dev/vd{disk} | sha256sum")), second_half.trim());
        let all = guest.ask(&format!("sha256sum </dev/vd{disk}"));
        assert_ne!(all.split(' ').next(), Some(before.as_str()), "vd{disk}");
    }
    assert_eq!(guest.power_off().code, Some(0));
    assert_eq!(checksum(&image), before);
}
