//! A program that a test runs: a machine, or a tool that looks at what a machine left. Its output comes in bounded memory,
//! its end is certain. Owned by the thread of the test.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGKILL, SIGTERM};

use crate::child::{end_with_this_thread, signal_group};

/// Bytes read at a time.
const READ: usize = 16 << 10;
/// Reads that may wait to be looked at. When there are more, the program waits, as for a slow terminal.
const QUEUE: usize = 16;
/// How long what a program wrote may take to be read after its end.
const DRAIN: Duration = Duration::from_secs(1);
/// Between two looks at a program whose output has ended.
const LOOK: Duration = Duration::from_millis(5);

/// What a program did.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// It wrote to standard output.
    Output(Vec<u8>),
    /// It wrote to standard error.
    Message(Vec<u8>),
    /// Both are closed, or it is gone: nothing will come any more.
    End,
    /// Nothing, for the time that was given.
    Silence,
}

/// Dropping it kills the program.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    input: UnixStream,
    output: Receiver<Heard>,
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts `command`. Two threads, named after its streams, read what it says until that ends.
    pub(super) fn start(mut command: Command) -> io::Result<Self> {
        let (input, theirs) = UnixStream::pair()?;
        command.stdin(OwnedFd::from(theirs)).stdout(Stdio::piped()).stderr(Stdio::piped());
        end_with_this_thread(&mut command);
        let mut child = command.spawn()?;
        let (sender, output) = sync_channel(QUEUE);
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let process = Self { child, input, output, status: None };
        read(stdout, "stdout", sender.clone(), Heard::Output)?;
        read(stderr, "stderr", sender, Heard::Message)?;
        Ok(process)
    }

    /// What it does next, waiting for `patience` at most.
    pub(super) fn hear(&mut self, patience: Duration) -> Heard {
        match self.output.recv_timeout(patience) {
            Ok(heard) => heard,
            Err(RecvTimeoutError::Disconnected) => Heard::End,
            // What it wrote may not have been read yet, and what it started may hold its output open for ever.
            Err(RecvTimeoutError::Timeout) if self.has_ended() => self.output.recv_timeout(DRAIN).unwrap_or(Heard::End),
            Err(RecvTimeoutError::Timeout) => Heard::Silence,
        }
    }

    /// Types `bytes`, waiting for `patience` at most until it takes them.
    pub(super) fn send(&mut self, bytes: &[u8], patience: Duration) -> io::Result<()> {
        // Zero would mean for ever.
        self.input.set_write_timeout(Some(patience.max(Duration::from_millis(1))))?;
        self.input.write_all(bytes)
    }

    /// Says that there is no more input.
    pub(super) fn close_input(&self) {
        // Fails if it is gone.
        let _ = self.input.shutdown(Shutdown::Write);
    }

    /// SIGTERM: a machine presses its power button.
    pub(super) fn terminate(&mut self) -> io::Result<()> {
        if self.has_ended() { Ok(()) } else { signal_group(&self.child, SIGTERM) }
    }

    /// Kills it if it still runs, and says how it ended.
    pub(super) fn end(&mut self) -> io::Result<ExitStatus> {
        if !self.has_ended() {
            signal_group(&self.child, SIGKILL)?;
        }
        let status = self.child.wait()?;
        self.status = Some(status);
        Ok(status)
    }

    /// Whether it ended by itself within `patience`.
    pub(super) fn ends_within(&mut self, patience: Duration) -> bool {
        let begin = Instant::now();
        while !self.has_ended() {
            if begin.elapsed() >= patience {
                return false;
            }
            thread::sleep(LOOK);
        }
        true
    }

    fn has_ended(&mut self) -> bool {
        if self.status.is_none() {
            self.status = self.child.try_wait().ok().flatten();
        }
        self.status.is_some()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Nobody is left to tell.
        let _ = self.end();
    }
}

/// Ends with the stream, or when nobody listens any more.
fn read(
    stream: Option<impl Read + Send + 'static>,
    name: &str,
    sender: SyncSender<Heard>,
    heard: fn(Vec<u8>) -> Heard,
) -> io::Result<()> {
    let Some(mut stream) = stream else { return Ok(()) };
    let reader = move || {
        let mut buffer = vec![0; READ];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) if sender.send(heard(buffer[..count].to_vec())).is_err() => return,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    };
    thread::Builder::new().name(name.to_owned()).spawn(reader).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn shell(script: &str) -> Process {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Process::start(command).unwrap()
    }

    #[test]
    fn hears_both_streams_and_the_end() {
        let mut process = shell("read line; echo \"$line\"; echo oops >&2; exit 7");
        process.send(b"hello\n", LONG).unwrap();
        let mut heard = Vec::new();
        while heard.last() != Some(&Heard::End) {
            heard.push(process.hear(LONG));
        }
        assert!(
            heard.contains(&Heard::Output(b"hello\n".to_vec())) && heard.contains(&Heard::Message(b"oops\n".to_vec()))
        );
        assert!(process.ends_within(LONG));
        assert_eq!(process.end().unwrap().code(), Some(7));
    }

    #[test]
    fn kills_what_does_not_end() {
        let mut process = shell("trap '' TERM; echo ready; while :; do sleep 1; done");
        assert_eq!(process.hear(LONG), Heard::Output(b"ready\n".to_vec()));
        process.terminate().unwrap();
        assert_eq!(process.hear(Duration::from_millis(20)), Heard::Silence);
        assert_eq!(process.end().unwrap().code(), None);
    }

    #[test]
    fn a_child_of_the_program_does_not_keep_it_alive() {
        let mut process = shell("sleep 1000 & echo $!; exit 3");
        let Heard::Output(child) = process.hear(LONG) else { panic!("no output") };
        let begin = Instant::now();
        while process.hear(Duration::from_millis(50)) != Heard::End {
            assert!(begin.elapsed() < LONG);
        }
        assert_eq!(process.end().unwrap().code(), Some(3));
        let child = String::from_utf8(child).unwrap();
        // It is ours to clean up: the program left it behind.
        Command::new("kill").arg(child.trim()).status().unwrap();
    }

    #[test]
    fn input_that_nobody_takes_is_no_reason_to_wait_for_ever() {
        let mut process = shell("sleep 1000");
        let error = process.send(&vec![b'x'; 4 << 20], Duration::from_millis(50)).unwrap_err();
        assert!([io::ErrorKind::WouldBlock, io::ErrorKind::TimedOut].contains(&error.kind()), "{error}");
    }
}
