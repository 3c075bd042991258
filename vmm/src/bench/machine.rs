//! A measurement inside a machine: `skiff run` or QEMU as a child process with the guest in it, so that its CPU time is
//! its own and nothing of it is left afterwards. The guest says when it is ready and when it is done, and waits each time,
//! so that the counters of the process are read where nothing runs.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use block::engine::Aio;
use block::engine::threads::DEFAULT_THREADS;

use super::pin::Pin;
use super::plan::{Cell, Completion, Subject};
use super::sample::{GuestReport, Handed, Sample};
use super::usage::Usage;
use crate::child::{end_with_this_thread, signal_group};

/// How long a machine may say nothing, besides the time it measures.
const HUNG: Duration = Duration::from_secs(60);

/// How long to wait between looks at whether the user wants to stop.
const TICK: Duration = Duration::from_millis(100);

/// How long to measure.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    pub(super) warm_up: Duration,
    pub(super) runtime: Duration,
}

/// What all machines of a run have in common.
#[derive(Debug)]
pub(super) struct Machines<'a> {
    /// The guest's image.
    pub(super) guest: PathBuf,
    /// The rate of the guests' TSC.
    pub(super) tsc_khz: u32,
    pub(super) timing: Timing,
    pub(super) seed: u64,
    pub(super) pin: Option<Pin>,
    pub(super) stop: &'a AtomicBool,
}

impl Machines<'_> {
    /// Measures `cell` on the image at `disk` under `subject`, which is not the host. `aio` is the engine of the cell, or what
    /// skiff chooses if the cell leaves it to skiff: QEMU has no such choice.
    ///
    /// # Errors
    /// When the machine does not start or the guest does not succeed: what it said last. Or when it is to stop.
    pub(super) fn run(&self, subject: Subject, cell: &Cell, aio: Aio, disk: &Path) -> anyhow::Result<Sample> {
        let mut command = match subject {
            Subject::Qemu => self.qemu(cell, aio, disk),
            Subject::Skiff | Subject::Host => self.skiff(cell, disk)?,
        };
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        end_with_this_thread(&mut command);
        let child =
            command.spawn().with_context(|| format!("{} cannot be started", command.get_program().display()))?;
        Conversation::new(child, self.stop, HUNG + self.timing.warm_up + self.timing.runtime)
            .measure(self.tsc_khz, self.pin.as_ref(), subject == Subject::Skiff)
            .with_context(|| format!("{} under {}", describe(cell), subject.name()))
    }

    /// 64 MiB besides the buffers, in MiB.
    fn memory(cell: &Cell) -> u64 {
        let buffers = u64::from(cell.work.bs) * u64::from(cell.work.depth) * u64::from(cell.work.queues);
        64 + 2 * u64::from(cell.work.queues) + buffers.div_ceil(1 << 20)
    }

    fn words(&self, cell: &Cell) -> String {
        let (work, timing) = (&cell.work, &self.timing);
        let mut words = format!("bench pace=on rw={} bs={} depth={}", work.rw.name(), work.bs, work.depth);
        let (runtime, warm_up) = (timing.runtime.as_millis(), timing.warm_up.as_millis());
        let _ = write!(words, " queues={} runtime={runtime} warmup={warm_up}", work.queues);
        let poll = if cell.way.completion == Completion::Poll { "on" } else { "off" };
        let _ = write!(words, " tsc_khz={} seed={} poll={poll}", self.tsc_khz, self.seed);
        words
    }

    fn skiff(&self, cell: &Cell, disk: &Path) -> anyhow::Result<Command> {
        let way = &cell.way;
        let switch = |on| if on { "on" } else { "off" };
        let option = format!(
            "path={},readonly={},aio={},cache={},ioeventfd={},poll-us={},merge={},thread-pool-max={},queues={},queue-size={}",
            disk.display().to_string().replace(',', ",,"),
            switch(!cell.work.rw.writes()),
            way.aio_name(),
            way.cache.name(),
            switch(way.ioeventfd),
            way.poll_us,
            switch(way.merge),
            way.thread_pool_max,
            cell.work.queues,
            queue_size(cell),
        );
        let mut command = Command::new(std::env::current_exe().context("the path of skiff itself")?);
        command.arg("run").arg("--kernel").arg(&self.guest).args(["--cmdline", &self.words(cell)]);
        command.args(["--memory", &format!("{}M", Self::memory(cell)), "--disk", &option]);
        command.args(["--debug-exit", "--serial", "stdio"]);
        Ok(command)
    }

    /// With an I/O thread, its fastest way. It merges always, and polls as it likes.
    fn qemu(&self, cell: &Cell, aio: Aio, disk: &Path) -> Command {
        let (work, way) = (&cell.work, &cell.way);
        let drive = format!(
            "if=none,id=disk,format=raw,file={},read-only={},aio={},cache={}",
            disk.display().to_string().replace(',', ",,"),
            if work.rw.writes() { "off" } else { "on" },
            aio.name(),
            way.cache.name(),
        );
        let device = format!(
            "virtio-blk-pci,disable-legacy=on,drive=disk,iothread=io0,num-queues={},queue-size={},ioeventfd={}",
            work.queues,
            queue_size(cell),
            if way.ioeventfd { "on" } else { "off" },
        );
        let mut iothread = "iothread,id=io0".to_owned();
        if way.thread_pool_max != DEFAULT_THREADS {
            let _ = write!(iothread, ",thread-pool-max={}", way.thread_pool_max);
        }
        let mut command = Command::new(QEMU);
        command.args(["-M", MICROVM, "-bios", "qboot.rom", "-accel", "kvm", "-cpu", "host,-arch-capabilities"]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]);
        command.args(["-name", "bench,debug-threads=on", "-m", &Self::memory(cell).to_string()]);
        command.args(["-device", "isa-debug-exit,iobase=0x501,iosize=2", "-object", &iothread]);
        command.args(["-drive", &drive, "-device", &device, "-kernel"]).arg(&self.guest);
        command.args(["-append", &format!("{} {MICROVM_PCI}", self.words(cell))]);
        command
    }
}

/// QEMU's program.
pub(super) const QEMU: &str = "qemu-system-x86_64";

/// QEMU's machine without firmware that a software KVM would interpret for seconds.
const MICROVM: &str = "microvm,rtc=on,pcie=on,acpi=on";
/// Where that machine has its configuration space and its window for BARs: its tables do not say the one, its firmware does
/// not use the other (QEMU, include/hw/i386/microvm.h).
const MICROVM_PCI: &str = "ecam=0xe0000000 bars=0xc0000000";

/// Entries of each queue: QEMU's and our default, or more if more are to be in flight.
pub(super) fn queue_size(cell: &Cell) -> u16 {
    cell.work.depth.next_power_of_two().max(256)
}

/// A cell in a few words.
pub(super) fn describe(cell: &Cell) -> String {
    let (work, way) = (&cell.work, &cell.way);
    let way: Vec<_> =
        [format!("aio={},cache={}", way.aio_name(), way.cache.name())].into_iter().chain(way.unusual()).collect();
    format!("{} rw={} bs={} depth={}", way.join(","), work.rw.name(), work.bs, work.depth)
}

/// A running machine and what it says. Dropping it ends it.
struct Conversation<'a> {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
    errors: Receiver<String>,
    stop: &'a AtomicBool,
    patience: Duration,
    last: String,
}

impl<'a> Conversation<'a> {
    fn new(mut child: Child, stop: &'a AtomicBool, patience: Duration) -> Self {
        let stdin = child.stdin.take().expect("it is piped");
        let lines = lines_of(child.stdout.take().expect("it is piped"));
        let errors = lines_of(child.stderr.take().expect("it is piped"));
        Self { child, stdin, lines, errors, stop, patience, last: String::new() }
    }

    /// `counts`: SIGUSR1 makes it print its statistics.
    fn measure(&mut self, tsc_khz: u32, pin: Option<&Pin>, counts: bool) -> anyhow::Result<Sample> {
        self.wait_for(|line| (line == "# bench ready").then_some(()))?;
        if let Some(pin) = pin {
            pin.vcpus(&Usage::of(self.child.id())?)?;
        }
        let before = Usage::of(self.child.id())?;
        self.stdin.write_all(b"\n")?;
        self.wait_for(|line| (line == "# bench done").then_some(()))?;
        let after = Usage::of(self.child.id())?;
        let handed = if counts { self.statistics()? } else { None };
        self.stdin.write_all(b"\n")?;
        let report = self.wait_for(GuestReport::parse)?;
        let status = self.child.wait()?;
        // isa-debug-exit: (v << 1) | 1.
        if status.code() != Some(i32::from(guest::PASSED) << 1 | 1) {
            self.wait_for::<()>(|_| None)?;
        }
        let used = |vcpu: bool| after.since(&before, |name| is_vcpu(name) == vcpu);
        Ok(report.sample(tsc_khz, (used(true), used(false)), handed))
    }

    /// What the disk of a skiff that waits has counted. Without `--stats` it does not read the clock for that.
    fn statistics(&mut self) -> anyhow::Result<Option<Handed>> {
        signal_group(&self.child, libc::SIGUSR1).context("asking for its statistics")?;
        let mut text = String::new();
        // The last line that there is if requests were served.
        while !text.contains("\n  batches: ") {
            let line = self.errors.recv_timeout(HUNG).context("it says nothing of its disk")?;
            text.extend([line.as_str(), "\n"]);
        }
        Ok(Handed::parse(&text))
    }

    /// Waits for a line that means something to `wanted`.
    fn wait_for<T>(&mut self, wanted: impl Fn(&str) -> Option<T>) -> anyhow::Result<T> {
        let start = Instant::now();
        loop {
            if self.stop.load(Ordering::Relaxed) {
                bail!("interrupted");
            }
            match self.lines.recv_timeout(TICK) {
                Ok(line) => {
                    if let Some(meaning) = wanted(&line) {
                        return Ok(meaning);
                    }
                    if !line.is_empty() {
                        self.last = line;
                    }
                }
                Err(RecvTimeoutError::Timeout) if start.elapsed() > self.patience => {
                    bail!("the machine says no more after \"{}\"", self.last)
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(self.failure()),
            }
        }
    }

    /// What a machine that ended too early said.
    fn failure(&mut self) -> anyhow::Error {
        let last = self.errors.iter().last().filter(|line| !self.last.starts_with("not ok") && !line.is_empty());
        anyhow::anyhow!("{}", last.as_ref().map_or(self.last.as_str(), |line| without_name(line)))
    }
}

/// The lines of a pipe as they come, without what ends them.
fn lines_of(pipe: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = mpsc::channel();
    // Ends with the child, or when nobody listens any more.
    thread::spawn(move || {
        for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                return;
            }
        }
    });
    lines
}

impl Drop for Conversation<'_> {
    fn drop(&mut self) {
        // Both fail if it ended by itself and was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a program says, without its name in front: who it was is said anyway.
fn without_name(line: &str) -> &str {
    ["skiff: ", "qemu-system-x86_64: "].iter().find_map(|name| line.strip_prefix(name)).unwrap_or(line)
}

/// Threads that run guest code: skiff's and QEMU's names.
pub(super) fn is_vcpu(name: &str) -> bool {
    name.starts_with("vcpu") || name.starts_with("CPU ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_does_not_start_is_named_once() {
        for (script, said) in [
            ("echo 'skiff: --disk x: no such file' >&2", "--disk x: no such file"),
            ("echo 'qemu-system-x86_64: -drive: no' >&2; exit 1", "-drive: no"),
            ("echo half a line; echo >&2", "half a line"),
        ] {
            let mut command = Command::new("sh");
            command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let (child, stop) = (command.spawn().unwrap(), AtomicBool::new(false));
            let failed = Conversation::new(child, &stop, HUNG).wait_for::<()>(|_| None);
            assert_eq!(failed.unwrap_err().to_string(), said, "{script}");
        }
    }
}
