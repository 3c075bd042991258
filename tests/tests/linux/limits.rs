//! What keeps a disk from going on as a stock Linux sees it: limits, and a host without space.

use std::fs;
use std::process::Command;

use tests::{Machine, Skiff, assets};

/// fio in the guest, by the guest's clock, never sees more than the limit: a quarter more is for what the disk saved up and
/// for clocks that differ. A host that is slow makes it less.
#[test]
fn fio_sees_at_most_the_limit() {
    let folder = assets::folder_on_disk();
    let Some(mut skiff) = Skiff::with_tools(folder.path()) else { return };
    // The limit, the job, the field of fio's terse format that tells of it, and the most.
    let reads = "--rw=randread --number_ios=400";
    let table = [
        ("iops=200", format!("{reads} --bs=512"), 8, 250),
        ("iops-rd=200,queues=2", format!("{reads} --bs=4k"), 8, 250),
        // In KiB a second.
        ("bps-wr=1M", "--rw=write --bs=16k --size=3m".to_owned(), 48, 1280),
    ];
    let mut jobs = vec!["fio --minimal --thread --ioengine=libaio --direct=1 --iodepth=16".to_owned()];
    for ((limit, job, ..), letter) in table.iter().zip('a'..) {
        let image = assets::blank_image(folder.path(), &format!("{letter}.img"), 8 << 20);
        skiff = skiff.disk(&image, &format!(",{limit}"));
        jobs.push(format!("--name={letter} --filename=/dev/vd{letter} {job}"));
    }
    let mut guest = skiff.cpus(2).memory("512M").boot();
    guest.ask(&format!("{} >/tmp/report", jobs.join(" ")));
    for ((limit, _, field, most), letter) in table.iter().zip('a'..) {
        let seen: f64 = guest.ask(&format!("grep ';{letter};' /tmp/report | cut -d';' -f{field}")).parse().unwrap();
        assert!(seen > 0.0 && seen <= f64::from(*most), "{limit}: fio saw {seen}");
    }
    assert_eq!(guest.power_off().code, Some(0));
}

/// A command that runs others where it may mount, as root or as root of its own.
fn with_mounts() -> Option<Command> {
    [&["--mount"][..], &["--mount", "--map-root-user"]].into_iter().find_map(|words| {
        let works = Command::new("unshare").args(words).arg("true").output().is_ok_and(|done| done.status.success());
        let mut command = Command::new("unshare");
        command.args(words);
        works.then_some(command)
    })
}

/// The image is on a filesystem that is full: the guest writes on when there is room, and all it wrote is right.
#[test]
fn a_guest_writes_on_when_there_is_room() {
    let Some(mut command) = with_mounts() else {
        skip::because("no mounts");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let small = folder.path().join("small");
    fs::create_dir(&small).unwrap();
    let shell = "mount -t tmpfs -o size=6m small \"$1\" && truncate -s 4M \"$1\"/disk.img && \
                 head -c 5M /dev/zero >\"$1\"/ballast && shift && exec \"$@\"";
    command.args(["sh", "-c", shell, "sh"]).arg(&small);
    let skiff = Skiff::linux().disk(&small.join("disk.img"), ",werror=stop").into_command();
    command.arg(skiff.get_program()).args(skiff.get_args());
    let mut guest = Machine::start(command);
    guest.wait_ready();
    guest.ask("dd if=/dev/urandom of=/tmp/data bs=64k count=64");
    guest.send("dd if=/tmp/data of=/dev/vda bs=64k oflag=direct\n");
    guest.wait_for_message("No space left on device");
    guest.wait_for_message("the machine is paused");
    fs::remove_file(format!("/proc/{}/root{}/ballast", guest.pid(), small.display())).unwrap();
    guest.signal("USR2");
    guest.wait_for(">>> 0\n");
    assert_eq!(guest.ask("dmesg | grep -c 'I/O error' || true"), "0");
    guest.ask("echo 3 >/proc/sys/vm/drop_caches");
    assert_eq!(guest.ask("sha256sum </dev/vda"), guest.ask("sha256sum </tmp/data"));
    assert_eq!(guest.power_off().code, Some(0));
}
