//! The files the tests need, found relative to the test binary: skiff itself and the guest of `resources/rootfs/build`.
//! Any thread.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

/// The target directory of this build, where guests and images are: a test is `target/TRIPLE/PROFILE/deps/NAME`, a benchmark
/// `target/TRIPLE/PROFILE/NAME`.
///
/// # Panics
/// If this program is elsewhere.
pub fn target() -> PathBuf {
    profile().ancestors().nth(2).expect("target/TRIPLE/PROFILE").to_owned()
}

fn profile() -> PathBuf {
    let this = std::env::current_exe().expect("this program has a path");
    let folder = this.parent().expect("TRIPLE/PROFILE/deps/NAME or TRIPLE/PROFILE/NAME");
    let is_test = folder.file_name().is_some_and(|name| name == "deps");
    if is_test { folder.parent().expect("TRIPLE/PROFILE") } else { folder }.to_owned()
}

/// The `skiff` under test: `SKIFF_BIN`, or the one that was built beside the test.
///
/// # Panics
/// If there is none; the message says how to build it.
pub fn skiff() -> PathBuf {
    let path = std::env::var_os("SKIFF_BIN").map_or_else(|| profile().join("skiff"), PathBuf::from);
    assert!(path.is_file(), "{}: no skiff; run cargo build first", path.display());
    path
}

/// The program for both ends of a network, which was built beside the test. It is static, so it runs in a guest too.
///
/// # Panics
/// If there is none.
pub fn peer() -> PathBuf {
    let path = profile().join("peer");
    assert!(path.is_file(), "{}: missing; run cargo build first", path.display());
    path
}

/// Whether this host has vhost-net for this user. If not, that is said.
pub fn has_vhost() -> bool {
    let has = std::fs::File::options().read(true).write(true).open("/dev/vhost-net").is_ok();
    if !has {
        skip::because("no /dev/vhost-net for this user");
    }
    has
}

/// A file of the stock Linux guest: `vmlinuz`, `vmlinux`, `initrd.img`, `root.img`, `busybox`.
///
/// # Panics
/// If it was not built; the message says how.
pub fn guest(name: &str) -> PathBuf {
    let path = target().join("linux").join(name);
    assert!(path.is_file(), "{}: missing; run resources/rootfs/build first", path.display());
    path
}

/// The initrd of the test guest with the tools of `resources/rootfs/tools` in it, if they were built. One archive follows
/// the other, as the kernel takes them.
///
/// # Panics
/// If it cannot be written to `folder`.
pub fn tools_initrd(folder: &Path) -> Option<PathBuf> {
    let tools = std::fs::read(target().join("linux/tools.img")).ok()?;
    let mut archives = std::fs::read(guest("initrd.img")).expect("the test guest's initrd");
    archives.extend(tools);
    let path = folder.join("initrd.img");
    std::fs::write(&path, archives).expect("a new initrd");
    Some(path)
}

/// A temporary folder for images that are opened with O_DIRECT, which one in memory might not take: where the build is,
/// or the lab's own disk.
///
/// # Panics
/// If it cannot be made.
pub fn folder_on_disk() -> TempDir {
    let in_lab = std::env::var_os("SKIFF_IN_LAB").is_some();
    if in_lab { TempDir::new() } else { TempDir::new_in(target()) }.expect("a temporary folder")
}

/// A private copy of an image, with its holes.
///
/// # Panics
/// If it cannot be copied.
pub fn copy_image(image: &Path, folder: &Path) -> PathBuf {
    let copy = folder.join("root.img");
    tool("cp", &["--sparse=auto", image.to_str().expect("UTF-8"), copy.to_str().expect("UTF-8")]);
    copy
}

/// A new image of `size` bytes, all zeros, as a sparse file.
///
/// # Panics
/// If it cannot be made.
pub fn blank_image(folder: &Path, name: &str, size: u64) -> PathBuf {
    let path = folder.join(name);
    std::fs::File::create(&path).and_then(|file| file.set_len(size)).expect("a new image");
    path
}

/// Where the console of a failed machine is kept. In the lab, a folder shared with the host.
///
/// # Panics
/// If the folder cannot be made.
pub fn logs() -> PathBuf {
    let folder = target().join("lab/logs");
    std::fs::create_dir_all(&folder).expect("a folder for logs");
    folder
}

/// Runs a tool of the host and returns what it printed on both streams.
///
/// # Panics
/// If the tool is missing or fails.
pub fn tool(program: &str, arguments: &[&str]) -> String {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let run = Command::new(program).args(arguments).env("PATH", path).stdin(Stdio::null()).output();
    let run = run.unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = [run.stdout, run.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(run.status.success(), "{program} {arguments:?}: {}\n{text}", run.status);
    text
}
