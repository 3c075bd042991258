//! The output half of the console: a bounded buffer between the vCPUs, which fill it byte by byte, and the thread
//! `console`, which alone writes to the sink and may block there.
//!
//! The writer takes all there is at once and then lets bytes gather for a moment, so a burst costs few system calls
//! while a single byte goes out without delay. A vCPU never makes a system call for the sink; when the buffer is full
//! it waits, as for a slow UART, until there is room or its machine stops.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use devices::serial::SerialOutput;

use super::terminal::poll;

/// How much output waits for a slow sink.
const CAPACITY: usize = 1 << 20;
/// How much output is kept for the next client while nobody is there; the oldest bytes give way.
const HISTORY: usize = 64 << 10;
/// The largest single write.
const CHUNK: usize = 64 << 10;
/// How long bytes gather after a write.
const GATHER: Duration = Duration::from_micros(500);
/// At the end of the VM: how long a sink that takes nothing is waited for.
const PATIENCE: Duration = Duration::from_secs(2);
/// A stack below 2 MiB: a larger one may start with a transparent huge page, which is 2 MiB of host memory.
const STACK_BYTES: usize = 256 << 10;

/// Where the console's bytes go in the end. Used by the thread `console` only.
pub(super) trait Sink: Send + 'static {
    /// Writes at least one of `bytes`; may block.
    ///
    /// # Errors
    /// [`ErrorKind::NotConnected`]: nobody is there now, somebody may come. Any other: the sink is gone for good.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;
}

/// Writes to `fd`, and waits if it is non-blocking. (Standard output may have been made so by those who share it.)
pub(super) fn write_blocking(mut fd: impl Write + AsFd + Copy, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match fd.write(bytes) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                poll(fd.as_fd(), libc::POLLOUT, true)?;
            }
            result => return result,
        }
    }
}

/// A file, pipe or terminal.
impl Sink for File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        write_blocking(&*self, bytes)
    }
}

/// The buffer and its writer. Shared by the console and every serial port that is attached to it in turn.
pub(super) struct Output {
    state: Mutex<State>,
    /// The writer waits here.
    wake: Condvar,
    /// vCPUs that found the buffer full, and [`finish`](Output::finish), wait here.
    taken: Condvar,
}

#[derive(Default)]
struct State {
    bytes: VecDeque<u8>,
    /// Bytes that the sink took since the start.
    written: u64,
    writer: Writer,
    /// The VM ends: what is there is written, then the writer ends.
    ending: bool,
}

/// What the writer does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Writer {
    /// It writes, and looks at the buffer again before it waits.
    #[default]
    Busy,
    /// It found the buffer empty.
    Idle,
    /// It found nobody at the other end.
    Detached,
    /// There is none, or no longer: bytes are discarded.
    Gone,
}

impl Output {
    /// An output that discards everything.
    pub(super) fn discard() -> Arc<Self> {
        let state = State { writer: Writer::Gone, ..State::default() };
        Arc::new(Self { state: Mutex::new(state), wake: Condvar::new(), taken: Condvar::new() })
    }

    /// Starts the writer for `sink`, which messages call `name`.
    ///
    /// # Errors
    /// When the host gives no thread.
    pub(super) fn start(sink: impl Sink, name: String) -> io::Result<Arc<Self>> {
        let output =
            Arc::new(Self { state: Mutex::new(State::default()), wake: Condvar::new(), taken: Condvar::new() });
        let writer = output.clone();
        // Detached: a sink that blocks for ever must not keep the process from ending.
        thread::Builder::new()
            .name("console".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || writer.run(sink, &name))?;
        Ok(output)
    }

    /// The output of one serial port, which can be released without the others.
    pub(super) fn line(self: &Arc<Self>) -> Line {
        Line { output: self.clone(), released: AtomicBool::new(false) }
    }

    /// Puts a message of our own between the guest's output, if there is room.
    pub(super) fn print(&self, message: &str) {
        let mut state = self.state();
        if state.writer != Writer::Gone && state.bytes.len() + message.len() <= CAPACITY {
            state.bytes.extend(message.bytes());
            self.wake(&mut state);
        }
    }

    /// Tells the writer that somebody may be there now.
    pub(super) fn attached(&self) {
        self.wake(&mut self.state());
    }

    /// Writes out what is there and ends the writer. A sink that takes nothing for two seconds loses the rest.
    pub(super) fn finish(&self) {
        let mut state = self.state();
        state.ending = true;
        self.wake.notify_one();
        while state.writer != Writer::Gone {
            let written = state.written;
            let (next, waited) = self.taken.wait_timeout(state, PATIENCE).unwrap_or_else(PoisonError::into_inner);
            state = next;
            if waited.timed_out() && state.written == written && state.writer != Writer::Gone {
                tracing::warn!("the serial console's last {} bytes were not taken and are lost", state.bytes.len());
                state.writer = Writer::Gone;
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self, state: &mut State) {
        if matches!(state.writer, Writer::Idle | Writer::Detached) {
            state.writer = Writer::Busy;
            self.wake.notify_one();
        }
    }

    fn put(&self, byte: u8, released: &AtomicBool) {
        let mut state = self.state();
        while state.bytes.len() >= CAPACITY && state.writer != Writer::Gone {
            if released.load(Ordering::Relaxed) {
                return;
            }
            state = self.taken.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.writer == Writer::Gone {
            return;
        }
        if state.writer == Writer::Detached && state.bytes.len() >= HISTORY {
            state.bytes.pop_front();
        }
        state.bytes.push_back(byte);
        self.wake(&mut state);
    }

    fn run(&self, mut sink: impl Sink, name: &str) {
        let mut chunk = Vec::with_capacity(CHUNK);
        while self.next_chunk(&mut chunk) {
            let result = sink.write(&chunk);
            let mut state = self.state();
            match result {
                Ok(written) => {
                    state.bytes.drain(..written);
                    state.written += written as u64;
                }
                Err(error) if error.kind() == ErrorKind::NotConnected => {
                    state.writer = Writer::Detached;
                    let surplus = state.bytes.len().saturating_sub(HISTORY);
                    state.bytes.drain(..surplus);
                }
                Err(error) => {
                    tracing::warn!("{name}: {error}; the serial console's output is discarded from here on");
                    break;
                }
            }
            self.taken.notify_all();
            let ending = state.ending;
            drop(state);
            if !ending {
                thread::sleep(GATHER);
            }
        }
        let mut state = self.state();
        state.writer = Writer::Gone;
        state.bytes.clear();
        self.taken.notify_all();
    }

    /// Waits for bytes and copies them. False when it is time to end. They stay in the buffer until they are written,
    /// so that its length is what is not yet written.
    fn next_chunk(&self, chunk: &mut Vec<u8>) -> bool {
        let mut state = self.state();
        while state.bytes.is_empty() || state.writer == Writer::Detached {
            if state.ending {
                return false;
            }
            if state.writer == Writer::Busy {
                state.writer = Writer::Idle;
            }
            let waits = |state: &mut State| state.writer != Writer::Busy && !state.ending;
            state = self.wake.wait_while(state, waits).unwrap_or_else(PoisonError::into_inner);
        }
        // While we write, nothing leaves the buffer but by us.
        state.writer = Writer::Busy;
        chunk.clear();
        chunk.extend(state.bytes.iter().take(CHUNK));
        true
    }
}

/// One serial port's access to the [`Output`].
pub(super) struct Line {
    output: Arc<Output>,
    released: AtomicBool,
}

impl SerialOutput for Line {
    fn put(&self, byte: u8) {
        self.output.put(byte, &self.released);
    }

    fn release(&self) {
        // Under the lock, so that a vCPU that has just looked is not missed.
        let _state = self.output.state();
        self.released.store(true, Ordering::Relaxed);
        self.output.taken.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::sync::mpsc::{Receiver, Sender, channel};

    /// What the test lets the sink do, one write at a time, and what it did.
    struct Scripted {
        allow: Receiver<io::Result<usize>>,
        wrote: Sender<Vec<u8>>,
    }

    impl Sink for Scripted {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // A script at its end is a sink that blocks for ever.
            let Ok(allowed) = self.allow.recv() else {
                loop {
                    thread::park();
                }
            };
            let len = allowed?.min(bytes.len());
            self.wrote.send(bytes[..len].to_vec()).unwrap();
            Ok(len)
        }
    }

    fn scripted() -> (Arc<Output>, Sender<io::Result<usize>>, Receiver<Vec<u8>>) {
        let ((allow, allowed), (wrote, written)) = (channel(), channel());
        let sink = Scripted { allow: allowed, wrote };
        (Output::start(sink, "test".to_owned()).unwrap(), allow, written)
    }

    fn put_all(line: &Line, bytes: &[u8]) {
        for byte in bytes {
            line.put(*byte);
        }
    }

    fn receive(written: &Receiver<Vec<u8>>, len: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < len {
            all.extend(written.recv().unwrap());
        }
        all
    }

    #[test]
    fn everything_arrives_in_order_whatever_the_sink_takes_at_once() {
        let (output, allow, written) = scripted();
        let bytes: Vec<u8> = (0..=255).cycle().take(1000).collect();
        for _ in 0..1000 {
            allow.send(Ok(3)).unwrap();
        }
        put_all(&output.line(), &bytes);
        output.finish();
        assert_eq!(receive(&written, 1000), bytes);
    }

    #[test]
    fn finish_writes_out_what_is_there() {
        let (mut reader, writer) = io::pipe().unwrap();
        let output = Output::start(File::from(OwnedFd::from(writer)), "pipe".to_owned()).unwrap();
        let line = output.line();
        // More than a pipe holds, so that the writer really blocks.
        let bytes: Vec<u8> = (0..=250).cycle().take(300_000).collect();
        put_all(&line, &bytes);
        let reading = thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all
        });
        output.finish();
        put_all(&line, b"too late");
        assert_eq!(reading.join().unwrap(), bytes);
    }

    #[test]
    fn a_full_buffer_holds_back_until_there_is_room() {
        const MORE: usize = 100;
        let (output, allow, written) = scripted();
        let line = output.line();
        put_all(&line, &vec![b'.'; CAPACITY]);
        thread::scope(|scope| {
            let vcpu = scope.spawn(|| {
                for _ in 0..MORE {
                    line.put(b'!');
                    assert!(output.state().bytes.len() <= CAPACITY);
                }
            });
            for _ in 0..MORE {
                allow.send(Ok(1)).unwrap();
            }
            vcpu.join().unwrap();
        });
        for _ in 0..=CAPACITY.div_ceil(CHUNK) {
            allow.send(Ok(usize::MAX)).unwrap();
        }
        output.finish();
        let all = receive(&written, CAPACITY + MORE);
        assert_eq!(all.iter().position(|byte| *byte == b'!'), Some(CAPACITY));
    }

    #[test]
    fn a_released_line_never_waits_and_the_next_one_does_again() {
        let (output, allow, _written) = scripted();
        let line = output.line();
        put_all(&line, &vec![b'.'; CAPACITY]);
        thread::scope(|scope| {
            let vcpu = scope.spawn(|| line.put(b'!'));
            line.release();
            vcpu.join().unwrap();
        });
        line.put(b'!');
        let next = output.line();
        thread::scope(|scope| {
            let vcpu = scope.spawn(|| next.put(b'?'));
            allow.send(Ok(1)).unwrap();
            vcpu.join().unwrap();
        });
        assert_eq!(output.state().bytes.back(), Some(&b'?'));
        assert!(!output.state().bytes.contains(&b'!'));
    }

    #[test]
    fn a_closed_sink_discards_and_frees_the_vcpus() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let output = Output::start(File::from(OwnedFd::from(writer)), "pipe".to_owned()).unwrap();
        let line = output.line();
        put_all(&line, &vec![b'.'; 2 * CAPACITY]);
        output.finish();
        assert_eq!(output.state().writer, Writer::Gone);
    }

    #[test]
    fn finish_gives_up_on_a_sink_that_takes_nothing() {
        let (output, allow, _written) = scripted();
        put_all(&output.line(), b"lost");
        output.finish();
        assert_eq!(output.state().writer, Writer::Gone);
        drop(allow);
    }

    /// A sink at which nobody is until the test says so.
    struct Absent {
        present: Arc<AtomicBool>,
        wrote: Sender<Vec<u8>>,
    }

    impl Sink for Absent {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if !self.present.load(Ordering::SeqCst) {
                return Err(ErrorKind::NotConnected.into());
            }
            self.wrote.send(bytes.to_vec()).unwrap();
            Ok(bytes.len())
        }
    }

    #[test]
    fn the_newest_output_is_kept_while_nobody_is_there() {
        let (present, (wrote, written)) = (Arc::new(AtomicBool::new(false)), channel());
        let output = Output::start(Absent { present: present.clone(), wrote }, "test".to_owned()).unwrap();
        let bytes: Vec<u8> = (0..=250).cycle().take(HISTORY + CAPACITY).collect();
        put_all(&output.line(), &bytes);
        // The writer ran into the absence of anybody, and nothing is put any more.
        drop(output.taken.wait_while(output.state(), |state| state.writer != Writer::Detached).unwrap());
        present.store(true, Ordering::SeqCst);
        output.attached();
        assert_eq!(receive(&written, HISTORY), bytes[CAPACITY..]);
        output.finish();
        assert!(written.recv().is_err(), "nothing else was written");
    }

    #[test]
    fn no_sink_takes_everything_at_once() {
        let output = Output::discard();
        put_all(&output.line(), &vec![b'.'; 2 * CAPACITY]);
        output.print("help");
        output.finish();
        assert!(output.state().bytes.is_empty());
    }
}
