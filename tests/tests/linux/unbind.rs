//! The driver leaves its device while requests are in flight, and comes back, a hundred times.

use tests::{Skiff, assets};

use crate::choices::Choice;

const DISKS: [(Choice, &str); 4] = [
    (Choice { aio: "threads", cache: "writeback" }, "1"),
    (Choice { aio: "native", cache: "none" }, "1"),
    (Choice { aio: "io_uring", cache: "none" }, "1"),
    (Choice { aio: "io_uring", cache: "writethrough" }, "2"),
];

/// Of each disk; a hundred in all.
const ROUNDS: usize = 25;

/// Where the guest keeps what must survive all of it.
const KEPT: usize = 1 << 20;

/// One disk's rounds: dd writes behind what is kept until its disk is gone, which is an error. The name of the disk may be
/// another each time.
fn rounds() -> String {
    let driver = "/sys/bus/virtio/drivers/virtio_blk";
    format!(
        "n=0; f=0; while [ $n -lt {ROUNDS} ]; do n=$((n+1)); disk=$(ls /sys/bus/virtio/devices/$v/block); \
         dd if=/dev/zero of=/dev/$disk bs=64k seek=16 oflag=direct 2>/dev/null & \
         until grep -q [1-9] /sys/block/$disk/inflight; do :; done; \
         echo $v >{driver}/unbind; wait $! || f=$((f+1)); echo $v >{driver}/bind; done; echo $v failed $f"
    )
}

#[test]
fn the_driver_goes_and_comes_while_requests_are_in_flight() {
    let folder = assets::folder_on_disk();
    let mut skiff = Skiff::linux().cpus(2);
    let mut images = Vec::new();
    for (Choice { aio, cache }, queues) in DISKS {
        // Sparse, and never full within a round.
        let image = assets::blank_image(folder.path(), &format!("{aio}-{cache}.img"), 8 << 30);
        skiff = skiff.disk(&image, &format!(",aio={aio},cache={cache},queues={queues}"));
        images.push(image);
    }
    let mut guest = skiff.boot();
    let devices = guest.ask("cd /sys/block; for d in vda vdb vdc vdd; do basename $(readlink -f $d/device); done");
    let devices = devices.replace('\n', " ");
    assert_eq!(devices.split(' ').count(), DISKS.len());
    guest.ask("for d in a b c d; do yes disk-$d | dd of=/dev/vd$d bs=1M count=1 iflag=fullblock conv=fsync; done");

    let report = guest.ask(&format!("for v in {devices}; do ({}) & done; wait", rounds()));
    let mut failed: Vec<_> = report.lines().map(|line| line.split_once(" failed ").unwrap_or((line, ""))).collect();
    failed.sort_unstable();
    let mut expected: Vec<_> = devices.split(' ').map(|device| (device, "25")).collect();
    expected.sort_unstable();
    assert_eq!(failed, expected, "every round cut a writer short");

    // It works as before.
    for (device, letter) in devices.split(' ').zip('a'..) {
        let disk = format!("/dev/$(ls /sys/bus/virtio/devices/{device}/block)");
        assert_eq!(guest.ask(&format!("head -c 7 {disk}")), format!("disk-{letter}"));
        guest.ask(&format!("yes late-{letter} | dd of={disk} bs=64k count=1 iflag=fullblock conv=fsync"));
    }
    let complaints = guest.run("dmesg -r | grep -E '^<[0-3]>' | grep -vE 'I/O error|Buffer I/O|critical'");
    assert_eq!((complaints.text.as_str(), complaints.code), ("", 1));
    assert_eq!(guest.power_off().code, Some(0));
    for (image, letter) in images.iter().zip('a'..) {
        let mut content = vec![0; KEPT];
        std::os::unix::fs::FileExt::read_exact_at(&std::fs::File::open(image).unwrap(), &mut content, 0).unwrap();
        let text = |word: &str| format!("{word}-{letter}\n").repeat(KEPT / 7 + 1).into_bytes();
        assert!(content[..64 << 10] == text("late")[..64 << 10], "{}", image.display());
        assert!(content[64 << 10..] == text("disk")[64 << 10..KEPT], "{}", image.display());
    }
}
