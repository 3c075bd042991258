//! The checks of what the host has for disks, networks and memory. Main thread; `root` is where the host's files are.

use std::env;
use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use block::engine::{Aio, Unusable, native};

use super::{Check, Status};

pub(super) fn checks(root: &Path) -> Vec<Check> {
    vec![
        engine("io-uring", Aio::IoUring.probe(1)),
        linux_aio(engine("linux-aio", Aio::Native.probe(1)), native::room()),
        device(&TUN, open(root, &TUN)),
        device(&VHOST_NET, open(root, &VHOST_NET)),
        passt(env::var_os("PATH")),
        memory_lock(root),
        memory(root),
    ]
}

fn engine(name: &'static str, probed: Result<(), Unusable>) -> Check {
    match probed {
        Ok(()) => Check::ok(name, "works"),
        Err(missing) => Check::warning(name, missing.reason(), missing.remedy()),
    }
}

/// Requests that linux-aio should have left for a few disks.
const AIO_ROOM: u64 = 4096;

/// It may work, and not for long.
fn linux_aio(works: Check, room: Option<u64>) -> Check {
    match room {
        Some(room) if works.status == Status::Ok && room < AIO_ROOM => Check::warning(
            works.name,
            format!("works, but the host has only {room} requests left"),
            "raise the limit with \"sudo sysctl fs.aio-max-nr=1048576\"",
        ),
        _ => works,
    }
}

/// A device that only some machines need.
struct Device {
    name: &'static str,
    path: &'static str,
    module: &'static str,
    purpose: &'static str,
}

const TUN: Device = Device { name: "tun", path: "dev/net/tun", module: "tun", purpose: "networks" };
const VHOST_NET: Device =
    Device { name: "vhost-net", path: "dev/vhost-net", module: "vhost_net", purpose: "faster networks" };

fn open(root: &Path, device: &Device) -> io::Result<()> {
    OpenOptions::new().read(true).write(true).open(root.join(device.path)).map(drop)
}

fn device(device: &Device, opened: io::Result<()>) -> Check {
    let Device { name, path, module, purpose } = *device;
    let Err(error) = opened else { return Check::ok(name, format!("/{path}")) };
    let message = match error.kind() {
        io::ErrorKind::NotFound => format!("/{path}: no such device; it is for {purpose}"),
        io::ErrorKind::PermissionDenied => format!("/{path}: permission denied; it is for {purpose}"),
        _ => format!("/{path}: {error}; it is for {purpose}"),
    };
    if error.kind() == io::ErrorKind::PermissionDenied {
        return Check::warning(
            name,
            message,
            format!("let your group use it with \"sudo chgrp kvm /{path}\" and \"sudo chmod g+rw /{path}\""),
        );
    }
    Check::warning(name, message, format!("load the module with \"sudo modprobe {module}\""))
}

/// passt(1), where `--net passt` looks for it.
fn passt(path: Option<OsString>) -> Check {
    let is_program =
        |file: &Path| fs::metadata(file).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0);
    let path = path.unwrap_or_default();
    match env::split_paths(&path).map(|folder| folder.join("passt")).find(|file| is_program(file)) {
        Some(file) => Check::ok("passt", file.display().to_string()),
        None => Check::warning(
            "passt",
            "not installed; it is for networks without root (--net passt)",
            "install it with \"sudo apt install passt\"",
        ),
    }
}

/// What the kernel itself gives every process since Linux 5.16: 8 MiB.
const LOCK_ROOM: u64 = 8 << 20;

fn memory_lock(root: &Path) -> Check {
    let name = "memory-lock";
    let limits = read(root, "proc/self/limits");
    let soft = limits.lines().find_map(|line| line.strip_prefix("Max locked memory")?.split_ascii_whitespace().next());
    let bytes = match soft {
        Some("unlimited") => return Check::ok(name, "no limit"),
        Some(number) => number.parse().unwrap_or(0),
        None => 0,
    };
    let message = format!("a process may lock {} KiB of memory", bytes >> 10);
    if bytes < LOCK_ROOM {
        let remedy = "raise it with \"ulimit -l unlimited\", for good in /etc/security/limits.conf";
        return Check::warning(name, message, remedy);
    }
    Check::ok(name, message)
}

/// A machine of the default size and something beside it, in KiB.
const MEMORY_ROOM: u64 = 640 << 10;

fn memory(root: &Path) -> Check {
    let name = "memory";
    let meminfo = read(root, "proc/meminfo");
    let number = |key: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(key));
        line.and_then(|rest| rest.split_ascii_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
    };
    let available = number("MemAvailable:");
    let (free_pages, page) = (number("HugePages_Free:"), number("Hugepagesize:"));
    let message = format!("{} MiB available; {free_pages} free huge pages of {} MiB", available >> 10, page >> 10);
    if available < MEMORY_ROOM {
        return Check::warning(name, message, "end other programs, or run smaller machines with --memory");
    }
    Check::ok(name, message)
}

/// The text of a file of the host, empty if it cannot be read.
fn read(root: &Path, file: &str) -> String {
    fs::read_to_string(root.join(file)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (file, text) in files {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn engines_that_work_are_ok() {
        for aio in Aio::ALL {
            let check = engine("engine", aio.probe(1));
            assert_eq!(check.status == Status::Ok, aio.probe(1).is_ok(), "{check:?}");
            assert_eq!(check.remedy.is_none(), aio.probe(1).is_ok(), "{check:?}");
        }
    }

    #[test]
    fn linux_aio_may_be_near_its_end() {
        let works = Check::ok("linux-aio", "works");
        assert_eq!(linux_aio(works.clone(), Some(65536)), works);
        assert_eq!(linux_aio(works.clone(), None), works);
        let near = linux_aio(works, Some(536));
        assert_eq!(
            (near.status, near.message.as_str()),
            (Status::Warning, "works, but the host has only 536 requests left")
        );
        assert!(near.remedy.unwrap().contains("fs.aio-max-nr="));
        let forbidden = Check::warning("linux-aio", "forbidden", "allow it");
        assert_eq!(linux_aio(forbidden.clone(), Some(0)), forbidden);
    }

    #[test]
    fn devices_of_networks() {
        let there = host(&[("dev/net/tun", "")]);
        assert_eq!(device(&TUN, open(there.path(), &TUN)), Check::ok("tun", "/dev/net/tun"));
        let missing = device(&VHOST_NET, open(there.path(), &VHOST_NET));
        assert_eq!(missing.message, "/dev/vhost-net: no such device; it is for faster networks");
        assert_eq!(missing.remedy.unwrap(), "load the module with \"sudo modprobe vhost_net\"");
        let denied = device(&TUN, Err(io::Error::from_raw_os_error(libc::EACCES)));
        assert_eq!(denied.status, Status::Warning);
        assert!(denied.remedy.unwrap().contains("sudo chmod g+rw /dev/net/tun"));
    }

    #[test]
    fn passt_is_looked_for_where_it_would_be_started_from() {
        let there = host(&[("bin/passt", ""), ("notes/passt", "")]);
        let (bin, notes) = (there.path().join("bin"), there.path().join("notes"));
        fs::set_permissions(bin.join("passt"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(notes.join("passt"), fs::Permissions::from_mode(0o644)).unwrap();
        let found = passt(Some(env::join_paths([&notes, &bin]).unwrap()));
        assert_eq!(found, Check::ok("passt", bin.join("passt").display().to_string()));
        for path in [None, Some(notes.into_os_string())] {
            let missing = passt(path);
            assert_eq!(missing.status, Status::Warning);
            assert_eq!(missing.remedy.unwrap(), "install it with \"sudo apt install passt\"");
        }
    }

    #[test]
    fn memory_lock_limits() {
        // As /proc/self/limits of Linux 6.1 shows it.
        let limits = |soft: &str| {
            let text = format!(
                "Limit                     Soft Limit           Hard Limit           Units     \n\
                 Max locked memory         {soft:<20} unlimited            bytes     \n"
            );
            memory_lock(host(&[("proc/self/limits", &text)]).path())
        };
        assert_eq!(limits("8388608"), Check::ok("memory-lock", "a process may lock 8192 KiB of memory"));
        assert_eq!(limits("unlimited"), Check::ok("memory-lock", "no limit"));
        assert_eq!(limits("65536").status, Status::Warning);
        assert_eq!(memory_lock(host(&[]).path()).status, Status::Warning);
    }

    #[test]
    fn memory_of_the_host() {
        let meminfo = |available: u64| {
            let text = format!(
                "MemTotal:        8000000 kB\nMemAvailable:    {available} kB\n\
                 HugePages_Total:      16\nHugePages_Free:       12\nHugepagesize:       2048 kB\n"
            );
            memory(host(&[("proc/meminfo", &text)]).path())
        };
        let plenty = Check::ok("memory", "4096 MiB available; 12 free huge pages of 2 MiB");
        assert_eq!(meminfo(4 << 20), plenty);
        assert_eq!(meminfo(100 << 10).status, Status::Warning);
    }
}
