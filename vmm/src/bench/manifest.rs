//! Under what circumstances a run was made: whatever a reader of its figures has to know. What the host does not tell is
//! left out.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::plan::{Place, Plan};
use super::subject::Subject;
use crate::doctor::{KvmKind, kvm_kind};

/// Where and how a run was made.
#[derive(Clone, Debug, Serialize)]
pub struct Manifest {
    /// Version of skiff.
    pub skiff: &'static str,
    /// First line of QEMU's version, if it took part.
    pub qemu: Option<String>,
    /// The same of Cloud Hypervisor.
    pub cloud_hypervisor: Option<String>,
    /// The same of Firecracker.
    pub firecracker: Option<String>,
    /// The words of the command line.
    pub command: Vec<String>,
    /// When it began, in seconds since 1970.
    pub time: u64,
    /// See [`Plan::seed`].
    pub seed: u64,
    /// See [`Plan::runtime`], in seconds.
    pub runtime: f64,
    /// See [`Plan::repeat`].
    pub repeat: u32,
    /// The host's kernel.
    pub kernel: String,
    /// The model of its processor.
    pub processor: String,
    /// How many there are.
    pub cpus: usize,
    /// The frequency governor of the first.
    pub governor: Option<String>,
    /// Hardware or software.
    pub kvm: Option<KvmKind>,
    /// What the disk is on.
    pub storage: Storage,
}

/// What a file is on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Storage {
    /// The image, or the folder of our own files.
    pub path: String,
    /// Bytes of a file of our own.
    pub size: Option<u64>,
    /// The filesystem.
    pub filesystem: Option<String>,
    /// Its mount options.
    pub options: Option<String>,
    /// The block device.
    pub device: Option<String>,
    /// The device's queue: scheduler, number of requests, write cache, and whether it turns.
    pub queue: Vec<(String, String)>,
}

impl Manifest {
    /// Of this process, on this host, now. `subjects` take part.
    pub(super) fn new(plan: &Plan, subjects: &[Subject]) -> Self {
        let version =
            |subject: Subject| subjects.contains(&subject).then(|| first_line(subject.program()?, "--version"));
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Self {
            skiff: env!("CARGO_PKG_VERSION"),
            qemu: version(Subject::Qemu).flatten(),
            cloud_hypervisor: version(Subject::CloudHypervisor).flatten(),
            firecracker: version(Subject::Firecracker).flatten(),
            command: std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect(),
            time: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
            seed: plan.seed,
            runtime: plan.runtime.as_secs_f64(),
            repeat: plan.repeat,
            kernel: text("/proc/sys/kernel/osrelease").unwrap_or_default(),
            processor: model.map_or_else(String::new, |(_, model)| model.to_owned()),
            cpus: std::thread::available_parallelism().map_or(1, Into::into),
            governor: text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            kvm: kvm_kind().ok(),
            storage: Storage::of(&plan.place),
        }
    }
}

impl Storage {
    fn of(place: &Place) -> Self {
        let (path, size) = match place {
            Place::Given(path) => (path, None),
            Place::Own(folder, size) => (folder, Some(*size)),
        };
        let known = Self { path: path.display().to_string(), size, ..Self::default() };
        let Ok(metadata) = fs::metadata(path) else { return known };
        if metadata.rdev() != 0 {
            return Self::on_device(known, metadata.rdev());
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let number = number(metadata.dev());
        let mount = mounts.lines().rfind(|line| line.split(' ').nth(2) == Some(&number));
        // proc_pid_mountinfo(5): six fields and optional ones, a dash, then type, source and options of the filesystem.
        let Some((before, after)) = mount.and_then(|line| line.split_once(" - ")) else { return known };
        let (filesystem, super_options) = (after.split(' ').next(), after.split(' ').nth(2).unwrap_or_default());
        let options = format!("{},{super_options}", before.split(' ').nth(5).unwrap_or_default());
        let known = Self { filesystem: filesystem.map(str::to_owned), options: Some(options), ..known };
        Self::on_device(known, metadata.dev())
    }

    fn on_device(known: Self, device: u64) -> Self {
        let folder = Path::new("/sys/dev/block").join(number(device));
        let Ok(folder) = folder.canonicalize() else { return known };
        let name = folder.file_name().and_then(OsStr::to_str).map(str::to_owned);
        // A partition has the queue of its disk.
        let queue = [folder.join("queue"), folder.join("../queue")].into_iter().find(|queue| queue.exists());
        let read = |key: &str| Some((key.to_owned(), text(queue.as_ref()?.join(key))?));
        let keys = ["scheduler", "nr_requests", "write_cache", "rotational"];
        Self { device: name, queue: keys.into_iter().filter_map(read).collect(), ..known }
    }
}

/// A device as sysfs and mountinfo name it (makedev(3)).
fn number(device: u64) -> String {
    format!("{}:{}", libc::major(device), libc::minor(device))
}

fn text(path: impl AsRef<Path>) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

fn first_line(program: &str, flag: &str) -> Option<String> {
    let output = Command::new(program).arg(flag).output().ok()?;
    String::from_utf8_lossy(&output.stdout).lines().next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tool(program: &str, args: &[&str]) -> String {
        let output = Command::new(program).args(args).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    #[test]
    fn storage_as_the_tools_see_it() {
        let here = std::env::current_dir().unwrap();
        let storage = Storage::of(&Place::Own(here.clone(), 1 << 20));
        // stat(1) and findmnt(8) ask the kernel in their own ways.
        let folder = here.to_str().unwrap();
        let filesystem = tool("findmnt", &["--noheadings", "--output", "FSTYPE", "--target", folder]);
        assert_eq!(storage.filesystem, Some(filesystem));
        assert_eq!((storage.path.as_str(), storage.size), (folder, Some(1 << 20)));
    }

    #[test]
    fn what_is_not_there_is_left_out() {
        let path = "/nonexistent/disk.img".to_owned();
        assert_eq!(Storage::of(&Place::Given(path.clone().into())), Storage { path, ..Storage::default() });
    }
}
