//! What is chosen for an image on the filesystems that people have, really mounted: it is what the tables of
//! `block/src/choose.rs` promise, and the guest's bytes are right there.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;
use tests::{Skiff, assets};

use crate::disk::checksum;

const MIB: usize = 1 << 20;
const SIZE: usize = 8 * MIB;

/// Where the guest writes, which is no multiple of a block, and how much.
const OFFSET: usize = 2 * MIB + 512;
const WRITTEN: usize = 3 * MIB;

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Whether a test can mount what needs `modules` and `programs`. If not, that is said. Filesystems are mounted in
/// the lab only: a developer's host keeps its modules, mounts and servers as they are.
fn can_mount(modules: &[&str], package: &str, programs: &[&str]) -> bool {
    if std::env::var_os("SKIFF_IN_LAB").is_none() {
        skip::because("filesystems are mounted in the lab only (SKIFF_LAB=always)");
        return false;
    }
    let found =
        |program: &&&str| Path::new("/usr/sbin").join(program).exists() || Path::new("/sbin").join(program).exists();
    if let Some(program) = programs.iter().find(|program| !found(program)) {
        skip::because(format_args!("no {program}; install it with \"tests/packages {package}\""));
        return false;
    }
    let folder = assets::target().join("linux/modules");
    let mut modprobe = Command::new("/sbin/modprobe");
    modprobe.arg("-d").arg(folder).arg("-a").args(modules);
    let loaded = modprobe.status().is_ok_and(|status| status.success());
    if !loaded {
        skip::because(format_args!("the lab's kernel does not load {modules:?}"));
    }
    loaded
}

/// A mounted filesystem, until it is dropped.
struct Mount(PathBuf);

impl Mount {
    fn new(options: &[&str], what: &str, folder: &Path) -> Self {
        fs::create_dir_all(folder).unwrap();
        assets::tool("mount", &[options, &[what, text(folder)]].concat());
        Self(folder.to_owned())
    }

    /// A new filesystem that the program `mkfs` makes in a file of `folder`.
    fn made(folder: &Path, mkfs: &[&str]) -> Self {
        let image = assets::blank_image(folder, "filesystem.img", 512 << 20);
        assets::tool(mkfs[0], &[&mkfs[1..], &[text(&image)]].concat());
        Self::new(&["-o", "loop"], text(&image), &folder.join("mounted"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let done = Command::new("umount").arg(&self.0).status();
        assert!(done.is_ok_and(|it| it.success()) || std::thread::panicking(), "umount {}", self.0.display());
    }
}

/// An image, how it is called in the evidence, and what must be chosen for it, with words of the reason.
struct Expected<'a> {
    image: &'a Path,
    fact: &'a str,
    aio: &'a str,
    cache: &'a str,
    why: &'a str,
}

/// Every byte has its block.
fn full(path: &Path) {
    let content: Vec<u8> = (0..SIZE / 8).flat_map(|number| (number as u64 * 0x9e37_79b9).to_be_bytes()).collect();
    let mut file = fs::File::create(path).unwrap();
    file.write_all(&content).and_then(|()| file.sync_all()).unwrap();
}

/// Only the first MiB was written.
fn with_holes(path: &Path) {
    let mut file = fs::File::create(path).unwrap();
    file.write_all(&vec![0x5a; MIB]).and_then(|()| file.set_len(SIZE as u64)).and_then(|()| file.sync_all()).unwrap();
}

/// `skiff disk explain` says what is expected.
fn explained(Expected { image, fact, aio, cache, why }: &Expected) {
    let output = Command::new(assets::skiff()).args(["disk", "explain", "--json"]).arg(image).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((said["aio"].as_str(), said["cache"].as_str()), (Some(*aio), Some(*cache)), "{said:#}");
    assert!(said["aio_why"].as_str().unwrap().contains(why), "{why}: {said:#}");
    assert!(said["cache_why"].as_str().unwrap().starts_with("O_DIRECT works"), "{said:#}");
    assert_eq!(said["missing"], Value::Array(Vec::new()), "{said:#}");
    let facts = said["evidence"].as_array().unwrap();
    assert!(facts.iter().any(|it| it["name"] == "image" && it["fact"] == *fact), "{fact}: {said:#}");
}

/// A machine with all the images: each runs on what was expected, reads as the host wrote it, and holds afterwards what the
/// guest wrote, where it wrote it.
fn used(images: &[Expected]) {
    let folder = TempDir::new().unwrap();
    let log = folder.path().join("log");
    let mut skiff = Skiff::linux().flag("-v").option("--log-file", &log);
    for expected in images {
        explained(expected);
        skiff = skiff.disk(expected.image, "");
    }
    let before: Vec<_> = images.iter().map(|it| (fs::read(it.image).unwrap(), checksum(it.image))).collect();
    let mut guest = skiff.boot();
    let said = fs::read_to_string(&log).unwrap();
    let mut written = Vec::new();
    for ((number, expected), letter) in images.iter().enumerate().zip('a'..) {
        let (aio, cache) = (format!("aio={} (", expected.aio), format!("cache={} (", expected.cache));
        let line = said.lines().find(|line| line.contains(&format!("disk disk{number}: "))).expect("a line for each");
        assert!(line.contains(&aio) && line.contains(&cache), "{line}");
        assert_eq!(guest.ask(&format!("sha256sum </dev/vd{letter}")).split(' ').next(), Some(&*before[number].1));
        guest.ask(&format!("dd if=/dev/urandom of=/tmp/data bs=64k count={}", WRITTEN >> 16));
        guest.ask(&format!("dd if=/tmp/data of=/dev/vd{letter} bs=512 seek={} conv=fsync", OFFSET / 512));
        guest.ask("echo 3 >/proc/sys/vm/drop_caches");
        let sum = guest.ask("sha256sum </tmp/data");
        let read = format!("dd if=/dev/vd{letter} bs=512 skip={} count={} | sha256sum", OFFSET / 512, WRITTEN / 512);
        assert!(guest.ask(&read).contains(&sum), "vd{letter}");
        written.push(sum.split(' ').next().unwrap().to_owned());
    }
    assert_eq!(guest.power_off().code, Some(0));
    for ((Expected { image, fact, .. }, (before, _)), sum) in images.iter().zip(before).zip(written) {
        let content = fs::read(image).unwrap();
        assert_eq!(content.len(), SIZE, "{fact}");
        let (start, end) = (OFFSET, OFFSET + WRITTEN);
        assert!(content[..start] == before[..start] && content[end..] == before[end..], "{fact}: what was not written");
        let part = folder.path().join("part");
        fs::write(&part, &content[start..end]).unwrap();
        assert_eq!(checksum(&part), sum, "{fact}: what was written");
    }
}

#[test]
fn xfs() {
    if !can_mount(&["xfs"], "xfsprogs", &["mkfs.xfs"]) {
        return;
    }
    let folder = TempDir::new().unwrap();
    let mount = Mount::made(folder.path(), &["mkfs.xfs", "-q"]);
    let (written, holes) = (mount.path("written.img"), mount.path("holes.img"));
    full(&written);
    with_holes(&holes);
    let expected = |image, aio, why| Expected { image, fact: "a file of 8M on xfs", aio, cache: "none", why };
    used(&[
        expected(&written, "native", "every byte has its block"),
        expected(&holes, "io_uring", "the file has holes"),
    ]);
}

#[test]
fn btrfs() {
    if !can_mount(&["btrfs"], "btrfs-progs", &["mkfs.btrfs"]) {
        return;
    }
    let folder = TempDir::new().unwrap();
    let mount = Mount::made(folder.path(), &["mkfs.btrfs", "-q"]);
    let (written, holes) = (mount.path("written.img"), mount.path("holes.img"));
    full(&written);
    with_holes(&holes);
    let why = "every write goes to a new place";
    let expected = |image| Expected { image, fact: "a file of 8M on btrfs", aio: "io_uring", cache: "none", why };
    used(&[expected(&written), expected(&holes)]);
    // Btrfs has checksums of its own.
    assets::tool("btrfs", &["scrub", "start", "-B", text(&mount.0)]);
}

/// The kernel's NFS server, for version 4 on the loopback interface, with one folder.
struct Server {
    mountd: Child,
    exported: String,
    _mounts: [Mount; 2],
}

impl Server {
    fn start(folder: &Path) -> Self {
        // Of its own state nothing is left; the lab's /var is read-only anyhow.
        let state = Mount::new(&["-t", "tmpfs"], "state", Path::new("/var/lib/nfs"));
        let control = Mount::new(&["-t", "nfsd"], "nfsd", Path::new("/proc/fs/nfsd"));
        for name in ["v4recovery", "rpc_pipefs"] {
            fs::create_dir(state.path(name)).unwrap();
        }
        for name in ["etab", "rmtab"] {
            fs::write(state.path(name), "").unwrap();
        }
        // Nobody is waited for who had files open before.
        fs::write(control.path("nfsv4gracetime"), "10").unwrap();
        let mut mountd = Command::new("/usr/sbin/rpc.mountd");
        let mountd = mountd
            .args(["--foreground", "-N", "3", "-V", "4"])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let exported = format!("127.0.0.1:{}", folder.display());
        assets::tool("exportfs", &["-o", "rw,no_root_squash,insecure,sync,fsid=0", &exported]);
        assets::tool("rpc.nfsd", &["-N", "3", "-V", "4.2", "-H", "127.0.0.1", "2"]);
        fs::write(control.path("v4_end_grace"), "Y").unwrap();
        Self { mountd, exported, _mounts: [state, control] }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for words in [&["rpc.nfsd", "0"][..], &["exportfs", "-u", &self.exported]] {
            let _ = Command::new(Path::new("/usr/sbin").join(words[0])).args(&words[1..]).status();
        }
        let _ = self.mountd.kill();
        let _ = self.mountd.wait();
    }
}

/// Its package is not installed unasked: it starts a server on the developer's host too.
#[test]
fn nfs() {
    let programs = ["rpc.nfsd", "rpc.mountd", "exportfs", "mount.nfs4"];
    if !can_mount(&["nfsd", "nfsv4"], "nfs-kernel-server", &programs) {
        return;
    }
    let folder = TempDir::new().unwrap();
    let behind = Mount::made(folder.path(), &["mke2fs", "-qF", "-t", "ext4"]);
    let server = Server::start(&behind.0);
    let mount = Mount::new(&["-t", "nfs4", "-o", "vers=4.2,proto=tcp"], "127.0.0.1:/", &folder.path().join("nfs"));
    let (written, holes) = (mount.path("written.img"), mount.path("holes.img"));
    full(&written);
    with_holes(&holes);
    let why = "the filesystem cannot be asked not to wait";
    let expected = |image| Expected { image, fact: "a file of 8M on nfs", aio: "threads", cache: "none", why };
    used(&[expected(&written), expected(&holes)]);
    // What the guest flushed has reached the server.
    for name in ["written.img", "holes.img"] {
        assert_eq!(checksum(&behind.path(name)), checksum(&mount.path(name)), "{name}");
    }
    drop((mount, server, behind));
}
