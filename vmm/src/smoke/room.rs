//! How much memory and how many CPUs this host, or the container we are in, has for machines. Main thread, once.

use std::fs;
use std::path::Path;
use std::thread;

/// CPUs that our threads may use: those of the scheduler's mask, fewer if a control group has a smaller share.
pub(super) fn cpus() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Bytes that machines may take without others being swapped out, and none being killed: MemAvailable of proc_meminfo(5), or what
/// is left to our control group; less a tenth.
pub(super) fn memory() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: Option<u64> = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse().ok());
    // A kernel that does not say it is older than any with this KVM.
    let host = kib.map_or(u64::MAX, |kib| kib << 10);
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let group = left_in_groups(&groups, Path::new("/sys/fs/cgroup"));
    host.min(group.unwrap_or(u64::MAX)) / 10 * 9
}

/// The names that the two versions of control groups have for the same things.
struct Names {
    limits: &'static [&'static str],
    used: &'static str,
    /// Lines of `memory.stat`: what the kernel gives up before anybody is killed.
    cache: [&'static str; 2],
}

/// Documentation/admin-guide/cgroup-v2.rst of Linux, "Memory Interface Files".
const SECOND: Names =
    Names { limits: &["memory.max", "memory.high"], used: "memory.current", cache: ["inactive_file", "active_file"] };

/// Documentation/admin-guide/cgroup-v1/memory.rst.
const FIRST: Names = Names {
    limits: &["memory.limit_in_bytes"],
    used: "memory.usage_in_bytes",
    cache: ["total_inactive_file", "total_active_file"],
};

/// What our memory control groups leave to us, `groups` being cgroups(7)'s `/proc/self/cgroup` and `root` where they are mounted.
/// `None`: no group has a limit.
fn left_in_groups(groups: &str, root: &Path) -> Option<u64> {
    let lefts = groups.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        if controllers.is_empty() {
            // Beside groups of the first version, those of the second are mounted there.
            let mounts = [root.to_owned(), root.join("unified")];
            mounts.iter().filter_map(|mount| left_in(mount, path, &SECOND)).min()
        } else if controllers.split(',').any(|controller| controller == "memory") {
            left_in(&root.join("memory"), path, &FIRST)
        } else {
            None
        }
    });
    lefts.min()
}

/// A group's limit is one for all groups in it: the smallest rest counts. In a container the path may begin outside of what is
/// mounted; then it is the root that has the limit.
fn left_in(mount: &Path, path: &str, names: &Names) -> Option<u64> {
    let own = mount.join(path.trim_start_matches('/'));
    let groups = own.ancestors().take_while(|group| group.starts_with(mount));
    groups.filter_map(|group| left_in_one(group, names)).min()
}

fn left_in_one(group: &Path, names: &Names) -> Option<u64> {
    let number = |name: &str| fs::read_to_string(group.join(name)).ok()?.trim().parse::<u64>().ok();
    // "max" is no number, and no limit.
    let limit = names.limits.iter().filter_map(|name| number(name)).min()?;
    let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let cache = stat.lines().filter_map(|line| line.split_once(' '));
    let cache =
        cache.filter(|(name, _)| names.cache.contains(name)).filter_map(|(_, size)| size.trim().parse::<u64>().ok());
    let used = number(names.used)?.saturating_sub(cache.sum());
    Some(limit.saturating_sub(used))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn this_host_has_room() {
        assert!((MIB..u64::MAX).contains(&memory()));
        assert!(cpus() > 0);
    }

    /// Files as the kernel writes them, by its documentation.
    fn group(folder: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(folder).unwrap();
        for (name, content) in files {
            fs::write(folder.join(name), format!("{content}\n")).unwrap();
        }
    }

    #[test]
    fn the_second_version() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let left = |groups: &str| left_in_groups(groups, root);
        assert_eq!(left("0::/a/b\n"), None);
        group(&root.join("a/b"), &[("memory.max", "max"), ("memory.high", "max"), ("memory.current", "1048576")]);
        assert_eq!(left("0::/a/b\n"), None);
        let stat = "anon 1\ninactive_file 2097152\nactive_file 1048576\nfile 4194304";
        group(&root.join("a"), &[("memory.max", "104857600"), ("memory.current", "10485760"), ("memory.stat", stat)]);
        assert_eq!(left("0::/a/b\n"), Some((100 - 7) * MIB), "that of the group around it");
        group(&root.join("a/b"), &[("memory.high", "52428800")]);
        assert_eq!(left("0::/a/b\n"), Some(49 * MIB));
        group(&root.join("a/b"), &[("memory.current", "999999999")]);
        assert_eq!(left("0::/a/b\n"), Some(0));
        group(root, &[("memory.max", "1048576"), ("memory.current", "0")]);
        assert_eq!(left("0::/other/name\n"), Some(MIB), "a container sees its own as the root");
    }

    #[test]
    fn the_first_version() {
        let root = tempfile::tempdir().unwrap();
        let files = [
            ("memory.limit_in_bytes", "104857600"),
            ("memory.usage_in_bytes", "20971520"),
            ("memory.stat", "inactive_file 7\ntotal_inactive_file 10485760\ntotal_active_file 0"),
        ];
        group(&root.path().join("memory/docker/x"), &files);
        let groups = "12:cpu,cpuacct:/docker/x\n7:memory:/docker/x\n1:name=systemd:/docker/x\n0::/\n";
        assert_eq!(left_in_groups(groups, root.path()), Some(90 * MIB));
        assert_eq!(left_in_groups("7:blkio,memory:/docker/y\n", root.path()), None);
        // What the kernel has for "no limit".
        group(
            root.path().join("memory").as_path(),
            &[("memory.limit_in_bytes", "9223372036854771712"), ("memory.usage_in_bytes", "5")],
        );
        assert!(left_in_groups("7:memory:/\n", root.path()).unwrap() > 1 << 62);
    }
}
