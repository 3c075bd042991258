#![expect(unsafe_code, reason = "open file description locks exist only as a raw fcntl")]
//! Open file description locks (`fcntl(2)`, F_OFD_SETLK): they belong to one opening of a file, so two disks of one
//! process exclude each other too, and the kernel drops them however the process ends.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A process that holds a lock.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Holder {
    /// Its process id, in our pid namespace.
    pub(crate) pid: u32,
    /// The name of its program, at most 15 bytes.
    pub(crate) command: String,
}

/// Locks the whole of `file`, shared or exclusively; `false` if someone else's lock excludes ours. The lock ends when
/// every descriptor of this opening is closed.
///
/// # Errors
/// What the host says where locks do not work at all.
pub(crate) fn try_lock(file: &File, exclusive: bool) -> io::Result<bool> {
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    // From 0 with length 0 is the whole file however long it becomes; the pid must be 0.
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open for the whole call and the structure is read, not kept, by the kernel.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

/// Who holds a lock on `file`'s inode. The kernel names no owner of these locks, but shows them in the fdinfo of the
/// descriptors they belong to. `None` when that process is hidden from us or has ended meanwhile.
pub(crate) fn find_holder(file: &File) -> Option<Holder> {
    let ours = file.metadata().ok()?;
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(descriptors) = fs::read_dir(process.path().join("fd")) else { continue };
        for descriptor in descriptors.flatten() {
            let same =
                descriptor.path().metadata().is_ok_and(|file| file.ino() == ours.ino() && file.dev() == ours.dev());
            if same && has_lock(&process.path().join("fdinfo").join(descriptor.file_name())) {
                let command = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                return Some(Holder { pid, command: command.trim_end().escape_debug().to_string() });
            }
        }
    }
    None
}

fn has_lock(fdinfo: &Path) -> bool {
    // Only these two kinds exclude ours: "lock:\t1: OFDLCK  ADVISORY  WRITE -1 08:01:4711 0 EOF" (proc_pid_fdinfo(5)).
    let excludes = |line: &str| line.starts_with("lock:") && (line.contains(" OFDLCK ") || line.contains(" POSIX "));
    fs::read_to_string(fdinfo).is_ok_and(|info| info.lines().any(excludes))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::process::Command;
    use std::sync::Mutex;

    /// Held by tests that start processes or depend on who holds a lock: between fork and exec, a child has them all.
    pub(crate) static FORKING: Mutex<()> = Mutex::new(());

    #[test]
    fn names_the_process_that_holds_the_lock() {
        let _alone = FORKING.lock();
        let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        let ours = File::options().write(true).open(&path).unwrap();
        let held = File::open(&path).unwrap();
        assert!(try_lock(&held, false).unwrap());
        assert_eq!(find_holder(&ours).unwrap().pid, std::process::id());

        // A child that inherits the descriptor holds the lock as well; now it alone does.
        let mut sleeper = Command::new("sleep").arg("600").stdin(held).spawn().unwrap();
        assert!(!try_lock(&ours, true).unwrap());
        let holder = loop {
            // Until it has become `sleep`, it still has our name.
            match find_holder(&ours) {
                Some(holder) if holder.command == "sleep" => break holder,
                _ => std::thread::yield_now(),
            }
        };
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
        assert_eq!(holder.pid, sleeper.id());
        assert!(try_lock(&ours, true).unwrap());
        assert_eq!(find_holder(&File::open(&path).unwrap()).unwrap().pid, std::process::id());
    }
}
