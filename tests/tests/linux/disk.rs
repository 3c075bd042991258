//! Disks as a stock Linux sees them: the root file system, a read-only one, many of them.

use std::path::Path;

use tests::{Machine, Skiff, assets};

pub(crate) fn checksum(path: &Path) -> String {
    let line = assets::tool("sha256sum", &[path.to_str().expect("UTF-8")]);
    line.split(' ').next().expect("a checksum").to_owned()
}

/// Boots the image to its login prompt and logs in.
fn boot_root(image: &Path) -> Machine {
    let mut guest = Skiff::linux().cpus(2).disk(image, "").cmdline("root=/dev/vda rw").start();
    guest.log_in();
    guest
}

#[test]
fn a_root_file_system_keeps_what_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let image = assets::copy_image(&assets::guest("root.img"), folder.path());

    let mut guest = boot_root(&image);
    assert!(guest.ask("mount").contains("/dev/vda on / type ext4 (rw"));
    guest.ask("dd if=/dev/urandom of=/data bs=64k count=64 && mkdir /many && cd /many && touch $(seq 500)");
    let written = guest.ask("sha256sum </data");
    // busybox init unmounts and powers off.
    guest.send("poweroff\n");
    let ended = guest.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.messages);

    // Exit code 0: the file system is clean and nothing had to be repaired.
    assets::tool("e2fsck", &["-f", "-n", image.to_str().unwrap()]);

    let mut guest = boot_root(&image);
    assert_eq!(guest.ask("sha256sum </data"), written);
    assert_eq!(guest.ask("ls /many | wc -l"), "500");
    let complaints = guest.run("dmesg | grep -E 'EXT4-fs.*(error|warning|recover)|I/O error'");
    assert_eq!((complaints.text.as_str(), complaints.code), ("", 1));
    assert_eq!(guest.power_off().code, Some(0));
}

/// The guest is stopped by force after fsync: what it was told is on the disk must be there.
#[test]
fn what_was_synced_survives_a_stop_by_force() {
    let folder = tempfile::tempdir().unwrap();
    let image = assets::blank_image(folder.path(), "data.img", 16 << 20);
    let mut guest = Skiff::linux().disk(&image, "").option("--grace", "0").boot();
    let text = "dd if=/dev/urandom of=/tmp/data bs=64k count=64 && dd if=/tmp/data of=/dev/vda bs=64k conv=fsync";
    guest.ask(text);
    let written = guest.ask("sha256sum </tmp/data");
    guest.ask("killall acpid");
    guest.signal("TERM");
    assert_eq!(guest.wait().code, Some(10));
    let script = format!("head -c {} {} | sha256sum", 64 * 64 * 1024, image.display());
    assert_eq!(assets::tool("sh", &["-c", &script]).trim(), written);
}

#[test]
fn a_read_only_disk_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let image = assets::copy_image(&assets::guest("root.img"), folder.path());
    let before = checksum(&image);
    let mut guest = Skiff::linux().disk(&image, ",readonly=on").boot();
    assert_eq!(guest.ask("cat /sys/block/vda/ro"), "1");
    assert_eq!(guest.ask("sha256sum </dev/vda").split(' ').next(), Some(before.as_str()));
    assert_ne!(guest.run("dd if=/dev/zero of=/dev/vda bs=4096 count=1 conv=fsync").code, 0);
    assert_ne!(guest.run("mount -t ext4 -o rw /dev/vda /mnt && touch /mnt/file").code, 0);
    guest.run("umount /mnt");
    guest.ask("mount -t ext4 -o ro /dev/vda /mnt && test -x /mnt/sbin/init");
    assert_eq!(guest.power_off().code, Some(0));
    assert_eq!(checksum(&image), before);
}

#[test]
fn eight_disks_in_the_order_they_were_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut skiff = Skiff::linux().cpus(2);
    let mut images = Vec::new();
    for number in 1..=8u64 {
        let image = assets::blank_image(folder.path(), &format!("{number}.img"), number << 20);
        skiff = skiff.disk(&image, &format!(",serial=DISK-{number}"));
        images.push(image);
    }
    let mut guest = skiff.boot();
    for (number, letter) in (1..=8).zip('a'..) {
        assert_eq!(guest.ask(&format!("cat /sys/block/vd{letter}/serial")), format!("DISK-{number}"));
        assert_eq!(guest.ask(&format!("cat /sys/block/vd{letter}/size")), (number * 2048).to_string());
    }
    let write = "yes disk-$d | dd of=/dev/vd$d bs=1M count=1 iflag=fullblock conv=fsync";
    guest.ask(&format!("for d in a b c d e f g h; do {write} & done; wait"));
    assert_eq!(guest.power_off().code, Some(0));
    for (image, letter) in images.iter().zip('a'..) {
        let content = std::fs::read(image).unwrap();
        let expected = format!("disk-{letter}\n").repeat((1 << 20) / 7 + 1);
        assert!(content[..1 << 20] == expected.as_bytes()[..1 << 20], "{}", image.display());
        assert!(content[1 << 20..].iter().all(|byte| *byte == 0), "{}", image.display());
    }
}

#[test]
fn two_machines_cannot_have_one_image() {
    let folder = tempfile::tempdir().unwrap();
    let image = assets::blank_image(folder.path(), "shared.img", 1 << 20);
    let mut first = Skiff::linux().disk(&image, "").boot();
    let second = Skiff::linux().disk(&image, "").run();
    assert_eq!(second.code, Some(1));
    assert_eq!(second.console, "");
    let line = second.messages.trim_end();
    assert_eq!(line.lines().count(), 1, "{line}");
    assert!(line.contains("shared.img") && line.contains(&format!("{}", first.pid())), "{line}");
    first.ask("dd if=/dev/vda of=/dev/null bs=64k");
    assert_eq!(first.power_off().code, Some(0));
}
