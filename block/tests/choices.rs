#![expect(unsafe_code, reason = "system calls are forbidden to a thread, which gets mounts of its own")]
//! What is chosen for images of every kind on this host, and on hosts that lack an engine; and that it works: bytes go
//! there, are flushed and come back.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr;
use std::sync::{Arc, Mutex};
use std::thread;

use block::cache::CacheMode;
use block::choose::{self, Access, Choice, Wish};
use block::disk::Disk;
use block::engine::{Aio, Op, OpKind, native};
use block::facts::{Facts, Host, Kind};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const SIZE: u32 = 1 << 20;
const EPERM: u16 = libc::EPERM as u16;
const ENOSYS: u16 = libc::ENOSYS as u16;
const ENOMEM: u16 = libc::ENOMEM as u16;
const EAGAIN: u16 = libc::EAGAIN as u16;
const AUTO: Wish = Wish { aio: None, cache: None, access: Access::Write };

/// Held by every test: one that starts a program would for a moment have the locks of the others' images in it.
static ALONE: Mutex<()> = Mutex::new(());

/// A folder where the build is; a temporary one may be in memory.
fn folder() -> TempDir {
    TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

#[derive(Clone, Copy)]
enum Image {
    Written,
    Reserved,
    Sparse,
}

fn image(folder: &Path, kind: Image) -> PathBuf {
    let path = folder.join("disk.img");
    let file = File::create(&path).unwrap();
    match kind {
        Image::Written => file.write_all_at(&vec![7; SIZE as usize], 0).unwrap(),
        // SAFETY: it takes a descriptor and numbers.
        Image::Reserved => assert_eq!(unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, SIZE.into()) }, 0),
        Image::Sparse => file.set_len(SIZE.into()).unwrap(),
    }
    path
}

/// Opens what is at `path`, and sees that it works.
fn open(path: &Path, wish: Wish) -> Choice {
    let (disk, choice) = choose::open(path, "disk0", wish, 2).unwrap();
    assert_eq!(disk.cache(), choice.cache);
    let disk = Arc::new(disk);
    let (_, fallback) = choice.engines.start(&disk, "test-io").unwrap();
    assert_eq!(fallback, None, "it runs on what was chosen");
    works(&disk, &choice, path);
    choice
}

/// Some sectors, not all of them at whole blocks, through two queues.
fn works(disk: &Arc<Disk>, choice: &Choice, path: &Path) {
    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap());
    let mut engines = [0, 1].map(|_| choice.engines.start(disk, "test-io").unwrap().0);
    let mut done = Vec::new();
    for (n, engine) in engines.iter_mut().enumerate() {
        let (from, to, offset) = (GuestAddress(n as u64 * 8192 + 512), GuestAddress(32768), n as u64 * 65536 + 1536);
        let text = vec![b'a' + n as u8; 6144];
        memory.write_slice(&text, from).unwrap();
        let ops = [
            (OpKind::Write { durable: false }, vec![(from, 6144)]),
            (OpKind::Flush, vec![]),
            (OpKind::Read, vec![(to, 6144)]),
        ];
        for (tag, (kind, segments)) in ops.into_iter().enumerate() {
            engine.push(Op { kind, offset, segments, ranges: Vec::new(), memory: memory.clone() }, tag as u16);
            engine.drain(&mut done);
            done.pop().unwrap().result.unwrap();
        }
        let mut back = vec![0; 6144];
        memory.read_slice(&mut back, to).unwrap();
        assert!(back == text, "what was written comes back");
        File::open(path).unwrap().read_exact_at(&mut back, offset).unwrap();
        assert!(back == text, "and others see it");
    }
}

fn decision(choice: &Choice) -> (Aio, CacheMode) {
    (choice.engines.best(), choice.cache)
}

/// Whether the folder of the build is on a filesystem whose files are as the tests expect.
fn is_usual(folder: &Path) -> bool {
    let facts = Facts::gather(&image(folder, Image::Written), 1).unwrap();
    let usual = matches!(&facts.kind, Kind::File { filesystem, .. } if ["ext4", "xfs"].contains(&filesystem.name));
    if !usual || facts.host.native.is_err() || facts.host.io_uring.is_err() {
        skip::because(format_args!("needs ext4 or xfs, linux-aio and io_uring, not {facts:?}"));
        return false;
    }
    true
}

#[test]
fn files_on_a_usual_filesystem() {
    let _alone = ALONE.lock();
    let folder = folder();
    if !is_usual(folder.path()) {
        return;
    }
    for (kind, aio) in [(Image::Written, Aio::Native), (Image::Reserved, Aio::Native), (Image::Sparse, Aio::IoUring)] {
        let path = image(folder.path(), kind);
        assert_eq!(decision(&open(&path, AUTO)), (aio, CacheMode::None));
        let buffered = Wish { cache: Some(CacheMode::Writeback), ..AUTO };
        assert_eq!(decision(&open(&path, buffered)), (Aio::IoUring, CacheMode::Writeback));
        let native = Wish { aio: Some(Aio::Native), ..AUTO };
        assert_eq!(decision(&open(&path, native)), (Aio::Native, CacheMode::None));
    }
    // It had all its blocks and has grown since.
    let path = image(folder.path(), Image::Written);
    File::options().write(true).open(&path).unwrap().set_len(2 * u64::from(SIZE)).unwrap();
    assert_eq!(decision(&open(&path, AUTO)), (Aio::IoUring, CacheMode::None));
}

#[test]
fn files_in_memory() {
    let _alone = ALONE.lock();
    let folder = TempDir::new_in("/dev/shm").unwrap();
    for kind in [Image::Written, Image::Sparse] {
        let choice = open(&image(folder.path(), kind), AUTO);
        let best = if Host::gather(1).io_uring.is_ok() { Aio::IoUring } else { Aio::Threads };
        assert_eq!(decision(&choice), (best, CacheMode::Writeback));
    }
}

#[test]
fn block_devices() {
    let _alone = ALONE.lock();
    let folder = folder();
    for sector in ["512", "4096"] {
        let path = image(folder.path(), Image::Sparse);
        let losetup = Command::new("losetup").args(["--find", "--show", "--sector-size", sector]).arg(path).output();
        let device = match losetup {
            Ok(made) if made.status.success() => PathBuf::from(String::from_utf8(made.stdout).unwrap().trim()),
            other => return skip::because(format_args!("no loop device: {other:?}")),
        };
        let choice = thread::scope(|scope| scope.spawn(|| open(&device, AUTO)).join());
        assert!(Command::new("losetup").arg("-d").arg(&device).status().unwrap().success());
        let best = if Host::gather(2).native.is_ok() { Aio::Native } else { Aio::IoUring };
        assert_eq!(decision(&choice.unwrap()), (best, CacheMode::None));
    }
}

#[test]
fn files_in_an_overlay() {
    let _alone = ALONE.lock();
    let folder = folder();
    let [lower, upper, work, target] = ["lower", "upper", "work", "target"].map(|name| folder.path().join(name));
    for path in [&lower, &upper, &work, &target] {
        std::fs::create_dir(path).unwrap();
    }
    image(&lower, Image::Written);
    let options = format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
    // The mount is that thread's alone, and gone with it.
    let test = move || {
        mount_overlay(&options, &target)?;
        let path = target.join("disk.img");
        let facts = Facts::gather(&path, 1).unwrap();
        assert!(matches!(&facts.kind, Kind::File { filesystem, .. } if filesystem.name == "overlayfs"), "{facts:?}");
        let input = format!("if={}", path.display());
        let dd = Command::new("dd").args([&input, "of=/dev/null", "iflag=direct", "bs=4096", "count=1"]).output();
        let cache = if dd.unwrap().status.success() { CacheMode::None } else { CacheMode::Writeback };
        // No overlayfs so far can be asked not to wait.
        assert_eq!(decision(&open(&path, AUTO)), (Aio::Threads, cache), "{facts:?}");
        io::Result::Ok(())
    };
    if let Err(error) = thread::spawn(test).join().unwrap() {
        skip::because(format_args!("no overlay can be mounted: {error}"));
    }
}

fn mount_overlay(options: &str, target: &Path) -> io::Result<()> {
    let options = CString::new(options).unwrap();
    let target = CString::new(target.as_os_str().as_bytes()).unwrap();
    let (root, overlay) = (c"/".as_ptr(), c"overlay".as_ptr());
    // SAFETY: it takes a number.
    let alone = unsafe { libc::unshare(libc::CLONE_NEWNS) } == 0;
    let private = libc::MS_REC | libc::MS_PRIVATE;
    // SAFETY: texts that end with their NUL.
    let mounted = alone
        && unsafe { libc::mount(ptr::null(), root, ptr::null(), private, ptr::null()) } == 0
        && unsafe { libc::mount(overlay, target.as_ptr(), overlay, 0, options.as_ptr().cast()) } == 0;
    if mounted { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A system call, and the error it gets.
type Denied = (i64, u16);

/// Runs `test` on a thread that gets this error from these system calls, as in a container with such a seccomp filter.
fn without(calls: &[Denied], test: impl FnOnce() + Send) {
    let step = |code: u32, k: u32, jf: u8| libc::sock_filter { code: code as u16, jt: 0, jf, k };
    // The number of the call is at 0 of struct seccomp_data.
    let mut program = vec![step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0)];
    for &(call, errno) in calls {
        program.push(step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, u32::try_from(call).unwrap(), 1));
        program.push(step(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | u32::from(errno), 0));
    }
    program.push(step(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0));
    let forbid = move || {
        let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
        // SAFETY: numbers, and a program that is read; both concern this thread and those it starts.
        unsafe {
            assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
            assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter), 0);
        }
        test();
    };
    thread::scope(|scope| scope.spawn(forbid).join()).unwrap();
}

#[test]
fn hosts_that_lack_engines() {
    let _alone = ALONE.lock();
    let folder = folder();
    if !is_usual(folder.path()) {
        return;
    }
    let (uring, native) = (libc::SYS_io_uring_setup, libc::SYS_io_setup);
    let table: &[(&[Denied], Image, Aio, &str)] = &[
        (&[(uring, EPERM)], Image::Sparse, Aio::Native, "io_uring is forbidden"),
        (&[(uring, ENOSYS)], Image::Sparse, Aio::Native, "io_uring is not in this kernel"),
        (&[(uring, ENOMEM)], Image::Sparse, Aio::Native, "memory lock limit"),
        (&[(uring, EPERM)], Image::Written, Aio::Native, ""),
        (&[(native, EAGAIN)], Image::Written, Aio::IoUring, "too few are left"),
        (&[(native, ENOSYS)], Image::Written, Aio::IoUring, "linux-aio is not in this kernel"),
        (&[(native, EAGAIN), (uring, EPERM)], Image::Written, Aio::Threads, "too few are left"),
        (&[(native, EPERM), (uring, ENOMEM)], Image::Sparse, Aio::Threads, "memory lock limit"),
    ];
    for &(calls, kind, aio, reason) in table {
        let path = image(folder.path(), kind);
        without(calls, || {
            let choice = open(&path, AUTO);
            assert_eq!(decision(&choice), (aio, CacheMode::None), "{calls:?}");
            assert!(choice.to_string().contains(reason), "{choice}");
            assert_eq!(choice.missing.is_empty(), reason.is_empty(), "{choice}");
            for lacks in Aio::ALL {
                let wish = Wish { aio: Some(lacks), ..AUTO };
                let refused = choose::open(&path, "disk0", wish, 2).err();
                let call = if lacks == Aio::Native { native } else { uring };
                let expected = lacks != Aio::Threads && calls.iter().any(|denied| denied.0 == call);
                assert_eq!(refused.is_some(), expected, "an explicit choice is kept to or refused: {refused:?}");
            }
        });
    }
}

/// linux-aio gives each queue its requests out of what the host has left.
#[test]
fn a_disk_with_more_queues_than_linux_aio_has_left() {
    let _alone = ALONE.lock();
    let Some(room) = native::room().filter(|_| Host::gather(1).native.is_ok()) else {
        return skip::because("no linux-aio");
    };
    let Ok(queues) = u16::try_from(room / 256 + 1) else {
        return skip::because("this host has more than enough");
    };
    let missing = Aio::Native.probe(queues).unwrap_err();
    assert!(missing.reason().contains("too few are left") && missing.remedy().contains("fs.aio-max-nr"), "{missing}");
}

/// Every request that linux-aio has is taken between opening the disk and starting its queues.
#[test]
fn an_engine_that_does_not_start_after_all_is_replaced() {
    let _alone = ALONE.lock();
    let folder = folder();
    if !is_usual(folder.path()) {
        return;
    }
    let path = image(folder.path(), Image::Written);
    let (disk, choice) = choose::open(&path, "disk0", AUTO, 1).unwrap();
    let disk = Arc::new(disk);
    assert_eq!(choice.engines.best(), Aio::Native);
    without(&[(libc::SYS_io_setup, EAGAIN)], || {
        let line = choice.engines.start(&disk, "test-io").unwrap().1.unwrap();
        assert!(
            line.contains("aio=native cannot be started now") && line.ends_with("it runs on aio=io_uring"),
            "{line}"
        );
        works(&disk, &choice, &path);
    });
    without(&[(libc::SYS_io_setup, EAGAIN), (libc::SYS_io_uring_setup, EPERM)], || {
        let line = choice.engines.start(&disk, "test-io").unwrap().1.unwrap();
        assert!(line.ends_with("it runs on aio=threads"), "{line}");
        works(&disk, &choice, &path);
    });
}
