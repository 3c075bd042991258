//! What the threads of a process have used so far (proc_pid_task(5)). The scheduler's own count, which unlike utime and
//! stime is not sampled at the timer tick.

use std::fs;
use std::io;
use std::ops::AddAssign;
use std::path::Path;

/// What some threads used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Used {
    /// Nanoseconds on a CPU.
    pub(super) cpu: u64,
    /// Times they left one, by their will or not.
    pub(super) switches: u64,
}

impl AddAssign for Used {
    fn add_assign(&mut self, other: Self) {
        self.cpu += other.cpu;
        self.switches += other.switches;
    }
}

#[derive(Debug)]
struct Thread {
    id: String,
    name: String,
    used: Used,
}

/// The threads of a process at one moment.
#[derive(Debug, Default)]
pub(super) struct Usage(Vec<Thread>);

impl Usage {
    /// Of the process with this number, now.
    ///
    /// # Errors
    /// When there is no such process.
    pub(super) fn of(process: u32) -> io::Result<Self> {
        let folder = fs::read_dir(format!("/proc/{process}/task"))?;
        // A thread may end between being listed and being read.
        Ok(Self(folder.filter_map(|entry| thread(&entry.ok()?.path())).collect()))
    }

    /// What the threads whose names `mine` accepts used since `before`. Threads that ended are not in it.
    pub(super) fn since(&self, before: &Self, mine: impl Fn(&str) -> bool) -> Used {
        let mut sum = Used::default();
        for thread in self.0.iter().filter(|thread| mine(&thread.name)) {
            let old = before.0.iter().find(|old| old.id == thread.id).map(|old| old.used).unwrap_or_default();
            let (cpu, switches) = (thread.used.cpu, thread.used.switches);
            sum += Used { cpu: cpu.saturating_sub(old.cpu), switches: switches.saturating_sub(old.switches) };
        }
        sum
    }

    /// The numbers of the threads whose names `mine` accepts.
    pub(super) fn ids(&self, mine: impl Fn(&str) -> bool) -> impl Iterator<Item = &str> {
        self.0.iter().filter(move |thread| mine(&thread.name)).map(|thread| thread.id.as_str())
    }
}

fn thread(folder: &Path) -> Option<Thread> {
    let read = |file: &str| fs::read_to_string(folder.join(file)).ok();
    let cpu = read("schedstat")?.split_ascii_whitespace().next()?.parse().ok()?;
    let status = read("status")?;
    let number = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)?.trim().parse::<u64>().ok());
    let switches = number("voluntary_ctxt_switches:")? + number("nonvoluntary_ctxt_switches:")?;
    let id = folder.file_name()?.to_str()?.to_owned();
    Some(Thread { id, name: read("comm")?.trim().to_owned(), used: Used { cpu, switches } })
}

/// Threads that run guest code: the names that skiff and Cloud Hypervisor, QEMU, and Firecracker give them.
pub(super) fn is_vcpu(name: &str) -> bool {
    ["vcpu", "CPU ", "fc_vcpu"].iter().any(|start| name.starts_with(start))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::thread;
    use std::time::{Duration, Instant};

    #[test]
    fn the_work_of_a_thread_is_in_its_count_and_no_other() {
        let (go, wait) = mpsc::channel::<()>();
        let (done, finished) = mpsc::channel();
        let worker = thread::Builder::new().name("usage-busy".to_owned());
        let worker = worker.spawn(move || {
            let _ = wait.recv();
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(20) {}
            done.send(()).unwrap();
            let _ = wait.recv();
        });
        let before = Usage::of(std::process::id()).unwrap();
        go.send(()).unwrap();
        finished.recv().unwrap();
        let after = Usage::of(std::process::id()).unwrap();
        let used = after.since(&before, |name| name == "usage-busy");
        assert!(used.cpu > 0 && used.switches > 0, "{used:?}");
        assert_eq!(after.ids(|name| name == "usage-busy").count(), 1);
        assert_eq!(after.since(&before, |name| name == "usage-none"), Used::default());
        drop(go);
        worker.unwrap().join().unwrap();
    }

    #[test]
    fn a_process_that_is_not_there() {
        assert!(Usage::of(u32::MAX).is_err());
    }
}
