//! What is said between us and the guest of a running machine, on its COM1.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::{HUNG, terminal};
use crate::bench::pin::Pin;
use crate::bench::sample::{GuestReport, Handed, Sample};
use crate::bench::usage::{Usage, is_vcpu};
use crate::child::{end_with_this_thread, signal_group};

/// How long to wait between looks at whether the user wants to stop.
const TICK: Duration = Duration::from_millis(100);

/// The guest's last words where nothing ends its machine (resources/guest/src/report.rs).
const LAST_WORDS: &str = "# nothing answers at the exit port";

/// How a machine is measured.
pub(super) struct Measure<'a> {
    /// The rate of the guest's TSC.
    pub(super) tsc_khz: u32,
    pub(super) pin: Option<&'a Pin>,
    /// SIGUSR1 makes it print its statistics.
    pub(super) counts: bool,
    /// It ends when the guest says so; else we end it.
    pub(super) has_exit_port: bool,
}

/// A running machine and what it says. Dropping it ends it.
pub(super) struct Conversation<'a> {
    child: Child,
    input: File,
    lines: Receiver<String>,
    errors: Receiver<String>,
    stop: &'a AtomicBool,
    patience: Duration,
    last: String,
}

impl<'a> Conversation<'a> {
    /// Starts `command`, whose input and output are the guest's COM1, `on_terminal` or as pipes. When it says nothing for
    /// `patience` it hangs.
    ///
    /// # Errors
    /// When it cannot be started, or the host has no pseudo-terminal.
    pub(super) fn start(
        mut command: Command,
        on_terminal: bool,
        stop: &'a AtomicBool,
        patience: Duration,
    ) -> anyhow::Result<Self> {
        end_with_this_thread(&mut command);
        command.stderr(Stdio::piped());
        let terminal = if on_terminal { Some(terminal::open().context("a pseudo-terminal")?) } else { None };
        match &terminal {
            Some((_, theirs)) => command.stdin(theirs.try_clone()?).stdout(theirs.try_clone()?),
            None => command.stdin(Stdio::piped()).stdout(Stdio::piped()),
        };
        let child = command.spawn();
        let mut child = child.with_context(|| format!("{} cannot be started", command.get_program().display()))?;
        // `command` and `theirs` end here: the terminal hangs up when the child's are the last.
        drop(command);
        let (input, output): (File, File) = if let Some((ours, _)) = terminal {
            (ours.try_clone()?, ours)
        } else {
            let ours = (child.stdin.take().expect("it is piped"), child.stdout.take().expect("so is this"));
            (OwnedFd::from(ours.0).into(), OwnedFd::from(ours.1).into())
        };
        let errors = lines_of(child.stderr.take().expect("it is piped"));
        Ok(Self { child, input, lines: lines_of(output), errors, stop, patience, last: String::new() })
    }

    /// Lets the guest run, and counts what the process used meanwhile.
    ///
    /// # Errors
    /// When the guest does not succeed: what it, or the machine, said last. Or when it is to stop.
    pub(super) fn measure(&mut self, how: &Measure<'_>) -> anyhow::Result<Sample> {
        self.wait_for(|line| (line == "# bench ready").then_some(()))?;
        if let Some(pin) = how.pin {
            pin.vcpus(&Usage::of(self.child.id())?)?;
        }
        let before = Usage::of(self.child.id())?;
        self.input.write_all(b"\n")?;
        self.wait_for(|line| (line == "# bench done").then_some(()))?;
        let after = Usage::of(self.child.id())?;
        let handed = if how.counts { self.statistics()? } else { None };
        self.input.write_all(b"\n")?;
        let report = self.wait_for(GuestReport::parse)?;
        if how.has_exit_port {
            let status = self.child.wait()?;
            // isa-debug-exit: (v << 1) | 1.
            if status.code() != Some(i32::from(guest::PASSED) << 1 | 1) {
                self.wait_for::<()>(|_| None)?;
            }
        } else {
            self.wait_for(|line| (line == LAST_WORDS).then_some(()))?;
            // A guest that is not content says so before.
            if self.last.starts_with("not ok") {
                bail!("{}", self.last);
            }
        }
        let used = |vcpu: bool| after.since(&before, |name| is_vcpu(name) == vcpu);
        Ok(report.sample(how.tsc_khz, (used(true), used(false)), handed))
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
                    if line == LAST_WORDS {
                        bail!("{}", self.last);
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
        let errors = self.errors.iter().filter(|line| !line.is_empty()).last();
        let last = errors.filter(|_| !self.last.starts_with("not ok"));
        anyhow::anyhow!("{}", last.as_ref().map_or(self.last.as_str(), |line| without_name(line)))
    }
}

/// The lines of a pipe or a terminal as they come, without what ends them.
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
        // With what it has started: a program may be a script that starts the machine. Its number is its own until it is waited for.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = signal_group(&self.child, libc::SIGKILL);
        }
        let _ = self.child.wait();
    }
}

/// What a program says, without its name in front: who it was is said anyway.
fn without_name(line: &str) -> &str {
    ["skiff: ", "qemu-system-x86_64: "].iter().find_map(|name| line.strip_prefix(name)).unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_machine_that_does_not_start_is_named_once() {
        for on_terminal in [false, true] {
            for (script, said) in [
                ("echo 'skiff: --disk x: no such file' >&2", "--disk x: no such file"),
                ("echo 'qemu-system-x86_64: -drive: no' >&2; exit 1", "-drive: no"),
                ("echo half a line; echo >&2", "half a line"),
                (
                    "echo 'not ok bench: no disk'; echo '# nothing answers at the exit port'; exec sleep 60",
                    "not ok bench: no disk",
                ),
            ] {
                let stop = AtomicBool::new(false);
                let mut conversation = Conversation::start(sh(script), on_terminal, &stop, HUNG).unwrap();
                let failed = conversation.wait_for::<()>(|_| None);
                assert_eq!(failed.unwrap_err().to_string(), said, "{script}");
            }
        }
    }

    /// It may be a script that starts the machine: nobody has its errors open any more.
    #[test]
    fn nothing_of_it_is_left() {
        let stop = AtomicBool::new(false);
        let mut conversation = Conversation::start(sh("sleep 1000 & echo started; wait"), false, &stop, HUNG).unwrap();
        conversation.wait_for(|line| (line == "started").then_some(())).unwrap();
        let errors = std::mem::replace(&mut conversation.errors, mpsc::channel().1);
        drop(conversation);
        assert_eq!(errors.recv_timeout(HUNG), Err(RecvTimeoutError::Disconnected));
    }

    /// Without a port to end it: the guest's last words count, and what it said before them.
    #[test]
    fn a_machine_that_does_not_end_by_itself() {
        let how = Measure { tsc_khz: 1000, pin: None, counts: false, has_exit_port: false };
        let histogram = r#"{"block":512,"ticks":1000000,"requests":2,"writes":0,"started":2,"errors":0,"mismatches":0,"kicks":1,"interrupts":0,"latency_sum":20,"latency_min":10,"latency_max":10,"histogram":[[10,2]]}"#;
        let script = |end: &str| {
            format!(
                "echo '# bench ready'; read line; echo '# bench done'; read line; echo 'bench {histogram}'; {end} \
                 echo '# nothing answers at the exit port'; exec sleep 60"
            )
        };
        for on_terminal in [false, true] {
            let stop = AtomicBool::new(false);
            let measured =
                |end: &str| Conversation::start(sh(&script(end)), on_terminal, &stop, HUNG).unwrap().measure(&how);
            assert_eq!(measured("").unwrap().requests, 2);
            let failed = measured("echo 'not ok bench: it failed';").unwrap_err();
            assert_eq!(failed.to_string(), "not ok bench: it failed");
        }
    }
}
