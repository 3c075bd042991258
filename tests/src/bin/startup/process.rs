//! One running machine: when its console says the marker, what memory it holds, how much CPU it takes.

use std::fs;
use std::io::{self, Read};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::report::Memory;

/// A machine that has not come so far by then never will.
const PATIENCE: Duration = Duration::from_secs(60);

/// A machine, killed when dropped.
pub(crate) struct Process {
    child: Child,
    started: Instant,
    console: mpsc::Receiver<(Instant, Vec<u8>)>,
}

impl Process {
    /// The clock starts just before the fork, and its fork and exec are in every figure.
    pub(crate) fn start(command: &mut Command) -> io::Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let started = Instant::now();
        let mut child = command.spawn()?;
        let output = child.stdout.take().expect("standard output is a pipe");
        let (sender, console) = mpsc::channel();
        thread::spawn(move || read_console(output, &sender));
        Ok(Self { child, started, console })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// The time from exec to the arrival of `marker` on the console.
    pub(crate) fn wait_for(&mut self, marker: &[u8]) -> anyhow::Result<Duration> {
        let mut seen = Vec::new();
        loop {
            let left = PATIENCE.saturating_sub(self.started.elapsed());
            match self.console.recv_timeout(left) {
                Ok((time, bytes)) => {
                    seen.extend(bytes);
                    if seen.windows(marker.len()).any(|window| window == marker) {
                        return Ok(time - self.started);
                    }
                }
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => {
                    self.child.wait()?;
                    break;
                }
            }
        }
        let _ = self.child.kill();
        let mut errors = String::new();
        self.child.stderr.take().context("no standard error")?.read_to_string(&mut errors)?;
        bail!("the guest did not reach its marker\nconsole: {}\nmessages: {errors}", String::from_utf8_lossy(&seen))
    }

    /// CPU time of every thread of the machine, and of KVM's kernel threads, over `time`; as a fraction of one core.
    pub(crate) fn idle_cpu(&self, time: Duration) -> anyhow::Result<f64> {
        let kernel_threads = kvm_threads()?;
        let used = || -> anyhow::Result<u64> {
            let own = fs::read_dir(format!("/proc/{}/task", self.id()))?;
            let own = own.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
            own.iter().chain(&kernel_threads).map(|task| run_time(task)).sum()
        };
        let (start, before) = (Instant::now(), used()?);
        thread::sleep(time);
        let (elapsed, after) = (start.elapsed(), used()?);
        Ok(Duration::from_nanos(after.saturating_sub(before)).as_secs_f64() / elapsed.as_secs_f64())
    }

    /// Memory of the process except the mapping of its guest's, which is the one of exactly `guest` bytes.
    pub(crate) fn memory_beyond(&self, guest: u64) -> anyhow::Result<Memory> {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", self.id())).context("smaps")?;
        let mut memory = Memory::default();
        let mut guests = 0;
        let mut is_guest = false;
        for line in smaps.lines() {
            let Some((key, value)) = line.split_once(':') else { continue };
            let Some(kib) = value.trim().strip_suffix(" kB").and_then(|number| number.parse::<u64>().ok()) else {
                continue;
            };
            match key {
                "Size" => {
                    is_guest = kib << 10 == guest;
                    guests += u32::from(is_guest);
                }
                "Rss" if !is_guest => memory.resident += kib,
                "Private_Dirty" if !is_guest => memory.private_dirty += kib,
                _ => (),
            }
        }
        if guests != 1 {
            bail!("smaps shows {guests} mappings of the size of the guest's memory, not one");
        }
        Ok(memory)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Each piece of output with the time it came; ends when the machine does.
fn read_console(mut output: ChildStdout, sender: &mpsc::Sender<(Instant, Vec<u8>)>) {
    let mut bytes = [0; 4096];
    while let Ok(count @ 1..) = output.read(&mut bytes) {
        let now = Instant::now();
        if sender.send((now, bytes[..count].to_vec())).is_err() {
            return;
        }
    }
}

/// Nanoseconds a task ran (Documentation/scheduler/sched-stats.rst, "/proc/<pid>/schedstat"), guest time included.
/// Finer than utime and stime, which are sampled at the timer tick.
fn run_time(task: &std::path::Path) -> anyhow::Result<u64> {
    let text = match fs::read_to_string(task.join("schedstat")) {
        // The task has ended in the meantime: a thread of the machine before this one.
        Err(_) if !task.exists() => return Ok(0),
        text => text.context("schedstat (a kernel with CONFIG_SCHED_INFO)")?,
    };
    text.split_ascii_whitespace().next().and_then(|number| number.parse().ok()).context("schedstat is empty")
}

/// The kernel's threads whose names start with "kvm", as folders of /proc.
fn kvm_threads() -> io::Result<Vec<std::path::PathBuf>> {
    let mut threads = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
        let is_kernel = fs::read(path.join("cmdline")).is_ok_and(|words| words.is_empty());
        if name.starts_with("kvm") && is_kernel {
            threads.push(path);
        }
    }
    Ok(threads)
}
