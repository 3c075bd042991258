//! What is connected to COM1: standard input and output, a file, a pseudoterminal, a Unix socket, or nothing.
//!
//! The console outlives the machine: after a reset by the guest, [`Console::attach`] makes the serial port of the next
//! one. The main thread owns it and runs its input as an event subscriber; output has a thread of its own
//! (`output.rs`). Neither the guest nor whoever is at the other end can make the main thread wait.

mod escape;
mod output;
mod socket;
pub(crate) mod terminal;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind, IsTerminal, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;

use devices::serial::Serial;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use thiserror::Error;
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::escape::{Escape, HELP, Key};
use self::output::{Output, Sink, write_blocking};
use self::socket::Socket;
pub use self::terminal::restore as restore_terminal;
use crate::config::SerialConfig;

/// How much input waits for the guest.
const QUEUE: usize = 64 << 10;
/// The largest single read.
const READ: usize = 4 << 10;
/// Reads in one turn, so that an endless input leaves the main thread to others.
const READS_PER_TURN: usize = 16;

/// Why the console cannot be opened.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum ConsoleError {
    #[error("--serial file={path}: cannot create the file: {error}; name a file in a directory you may write")]
    File { path: PathBuf, error: io::Error },
    #[error("--serial pty: cannot open a pseudoterminal: {0}; is /dev/pts mounted?")]
    Pty(io::Error),
    #[error("--serial socket={path}: cannot listen: {error}; name another path")]
    Socket { path: PathBuf, error: io::Error },
    #[error("--serial socket={0}: another process listens there; name another path")]
    SocketInUse(PathBuf),
    #[error("--serial socket={0}: the path exists and is not a socket; remove it or name another path")]
    NotASocket(PathBuf),
    #[error("--serial stdio: cannot use standard input and output: {0}; try --serial none")]
    Stdio(io::Error),
    #[error("--serial: the host gives no eventfd or thread: {0}")]
    Host(io::Error),
}

/// What the user asks for by an escape key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConsoleAction {
    /// `Ctrl-A x`: end the machine at once.
    Quit,
    /// `Ctrl-A p`: press the power button.
    PowerButton,
    /// `Ctrl-A c`: let a paused machine go on.
    Continue,
}

/// The other end of the serial line. An event subscriber for the main thread; remove it from the event manager before
/// it is dropped.
pub struct Console {
    input: Input,
    /// Escape keys are looked for: the input is a terminal.
    escape: Option<Escape>,
    /// Input that the guest has not taken yet.
    queue: VecDeque<u8>,
    /// Input was dropped because the queue was full, and that was said.
    overrun: bool,
    /// Readable when the guest can take more, or when input was left for the next turn.
    room: EventFd,
    serial: Option<Arc<Serial>>,
    output: Arc<Output>,
    on_action: Box<dyn Fn(ConsoleAction) + Send>,
}

/// Where input comes from.
enum Input {
    Nowhere,
    /// Standard input. Only read while in the foreground of its terminal.
    Stream(File),
    /// The master of a pseudoterminal, non-blocking.
    Pty(Arc<File>),
    Socket(Socket),
}

/// What a read brought.
enum Got {
    Bytes(usize),
    /// Nothing is there now.
    Nothing,
    /// No more will come (from this client).
    End,
}

impl Console {
    /// Opens what `config` names. If standard input is a terminal, and ours to read, it is raw from now on and escape
    /// keys are looked for; `on_action` is called for them on the main thread, inside the console's event handler (so
    /// it must not lock the console).
    ///
    /// # Errors
    /// One line that names the option, the path and the remedy.
    pub fn open(
        config: &SerialConfig,
        on_action: impl Fn(ConsoleAction) + Send + 'static,
    ) -> Result<Self, ConsoleError> {
        let room = EventFd::new(EFD_NONBLOCK).map_err(ConsoleError::Host)?;
        let start = |sink, name: &str| Output::start(sink, name.to_owned()).map_err(ConsoleError::Host);
        let (input, output) = match config {
            SerialConfig::Stdio => {
                let stdout = io::stdout().as_fd().try_clone_to_owned().map_err(ConsoleError::Stdio)?;
                (Input::Nowhere, start(File::from(stdout), "standard output")?)
            }
            SerialConfig::File(path) => {
                let file = File::create(path).map_err(|error| ConsoleError::File { path: path.clone(), error })?;
                (Input::Nowhere, start(file, &path.display().to_string())?)
            }
            SerialConfig::Pty => {
                let (master, name) = terminal::open_pty().map_err(ConsoleError::Pty)?;
                let master = Arc::new(master);
                let output = Output::start(PtySink(master.clone()), name.display().to_string());
                tracing::info!("the serial console is at {}", name.display());
                (Input::Pty(master), output.map_err(ConsoleError::Host)?)
            }
            SerialConfig::Socket(path) => {
                let socket = Socket::listen(path)?;
                let output = Output::start(socket.client().clone(), path.display().to_string());
                tracing::info!("the serial console listens at {}", path.display());
                (Input::Socket(socket), output.map_err(ConsoleError::Host)?)
            }
            SerialConfig::None => (Input::Nowhere, Output::discard()),
        };
        let mut console = Self {
            input,
            escape: None,
            queue: VecDeque::new(),
            overrun: false,
            room,
            serial: None,
            output,
            on_action: Box::new(on_action),
        };
        if *config == SerialConfig::Stdio {
            let stdin = io::stdin().as_fd().try_clone_to_owned().map_err(ConsoleError::Stdio)?;
            console.read_from(File::from(stdin)).map_err(ConsoleError::Stdio)?;
        }
        Ok(console)
    }

    fn read_from(&mut self, stdin: File) -> io::Result<()> {
        if stdin.is_terminal() {
            if !terminal::in_foreground(stdin.as_fd()) {
                tracing::info!("in the background of the terminal: the serial console gets no input");
                return Ok(());
            }
            terminal::make_raw(stdin.as_fd())?;
            self.escape = Some(Escape::default());
        }
        self.input = Input::Stream(stdin);
        Ok(())
    }

    /// Makes the serial port of a machine, which interrupts by writing to `interrupt` (an irqfd, edge-triggered), and
    /// connects it in place of the one before. The machine puts it on its bus, and calls [`Serial::release`] when it
    /// stops its vCPUs.
    ///
    /// # Errors
    /// When the host gives no eventfd.
    pub fn attach(&mut self, interrupt: EventFd) -> io::Result<Arc<Serial>> {
        let serial = Arc::new(Serial::new(interrupt, Arc::new(self.output.line()), self.room.try_clone()?));
        self.serial = Some(serial.clone());
        self.feed();
        Ok(serial)
    }

    /// The end of the VM: writes out what the guest printed (a sink that takes nothing is given up after two seconds),
    /// discards what comes later, restores the terminal, and removes the socket. The vCPUs no longer run, and the
    /// console is no longer subscribed. Dropping the console does the same.
    pub fn finish(&mut self) {
        self.output.finish();
        if self.escape.is_some() {
            restore_terminal();
        }
        self.input = Input::Nowhere;
    }

    /// Gives the guest what it can take of the queue.
    fn feed(&mut self) {
        if let Some(serial) = &self.serial {
            let taken = serial.enqueue(self.queue.make_contiguous());
            self.queue.drain(..taken);
        }
    }

    /// Reads until nothing is there, or the queue is full. A terminal is read all the same, for its escape keys.
    fn pump(&mut self, ops: &mut EventOps) {
        let mut buffer = [0; READ];
        for _ in 0..READS_PER_TURN {
            self.feed();
            if self.queue.len() + READ > QUEUE && self.escape.is_none() {
                return;
            }
            match self.input.read(&mut buffer) {
                Got::Bytes(len) => self.take(&buffer[..len]),
                Got::Nothing => return,
                Got::End => return self.input.end(ops),
            }
        }
        self.feed();
        // Fails only when the counter is full, and then it is readable.
        let _ = self.room.write(1);
    }

    fn take(&mut self, bytes: &[u8]) {
        for byte in bytes {
            let key = self.escape.as_mut().map_or(Key::Guest(*byte), |escape| escape.key(*byte));
            match key {
                Key::Guest(byte) => self.push(byte),
                Key::Help => self.output.print(HELP),
                Key::Quit => (self.on_action)(ConsoleAction::Quit),
                Key::PowerButton => (self.on_action)(ConsoleAction::PowerButton),
                Key::Continue => (self.on_action)(ConsoleAction::Continue),
                Key::Nothing => {}
            }
        }
    }

    fn push(&mut self, byte: u8) {
        if self.queue.len() < QUEUE {
            self.queue.push_back(byte);
        } else if !self.overrun {
            self.overrun = true;
            tracing::warn!("the guest does not read its serial console: keys are lost");
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.finish();
    }
}

impl MutEventSubscriber for Console {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, self.room.as_raw_fd(), EventSet::IN);
        if let Input::Socket(socket) = &self.input {
            watch(ops, socket.listener().as_raw_fd(), EventSet::IN);
        }
        if let Some(fd) = self.input.fd() {
            watch(ops, fd, EDGE);
        }
        // A regular file cannot be watched, and is always ready.
        self.pump(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.room.as_raw_fd() {
            // Only resets the counter.
            let _ = self.room.read();
        } else if let Input::Socket(socket) = &self.input
            && events.fd() == socket.listener().as_raw_fd()
        {
            if let Some(client) = socket.accept() {
                watch(ops, client.as_raw_fd(), EDGE);
                self.output.attached();
            }
        } else if let Input::Pty(_) = self.input {
            self.output.attached();
        }
        self.pump(ops);
    }
}

/// Edge-triggered: a descriptor that hangs up, or that is not read because the guest does not take its input, must not
/// wake the main thread again and again.
const EDGE: EventSet = EventSet::IN.union(EventSet::EDGE_TRIGGERED);

fn watch(ops: &mut EventOps, fd: RawFd, events: EventSet) {
    match ops.add(Events::new_raw(fd, events)) {
        Ok(()) => {}
        // A regular file or /dev/null.
        Err(event_manager::Error::Epoll(error)) if error == errno::Error::new(libc::EPERM) => {}
        Err(error) => tracing::error!("the serial console's input cannot be watched: {error}"),
    }
}

impl Input {
    /// What is to be watched for input, besides the listener of a socket.
    fn fd(&self) -> Option<RawFd> {
        match self {
            Self::Nowhere => None,
            Self::Stream(file) => Some(file.as_raw_fd()),
            Self::Pty(master) => Some(master.as_raw_fd()),
            Self::Socket(socket) => socket.client().get().map(|client| client.as_raw_fd()),
        }
    }

    /// Reads once, without blocking.
    fn read(&self, buffer: &mut [u8]) -> Got {
        match self {
            Self::Nowhere => Got::Nothing,
            Self::Stream(file) if file.is_terminal() && !terminal::in_foreground(file.as_fd()) => Got::Nothing,
            Self::Stream(file) => read_ready(file.as_fd(), &mut &*file, buffer),
            Self::Pty(master) => match read_ready(master.as_fd(), &mut &**master, buffer) {
                // EIO while nobody has the slave open; somebody may come.
                Got::End => Got::Nothing,
                got => got,
            },
            Self::Socket(socket) => match socket.client().get() {
                None => Got::Nothing,
                Some(client) => read_ready(client.as_fd(), &mut &*client, buffer),
            },
        }
    }

    /// The end of the input: it is no longer watched, then closed.
    fn end(&mut self, ops: &mut EventOps) {
        if let Some(fd) = self.fd() {
            // Fails for what could not be watched.
            let _ = ops.remove(Events::empty_raw(fd));
        }
        match self {
            Self::Socket(socket) => socket.disconnect(),
            input => *input = Self::Nowhere,
        }
    }
}

/// Standard input is shared with other processes, so it must not be made non-blocking; hence the look before the read.
fn read_ready(fd: BorrowedFd, reader: &mut impl Read, buffer: &mut [u8]) -> Got {
    if !terminal::poll(fd, libc::POLLIN, false).is_ok_and(|shown| shown != 0) {
        return Got::Nothing;
    }
    match reader.read(buffer) {
        Ok(0) => Got::End,
        Ok(len) => Got::Bytes(len),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Got::Nothing,
        Err(_) => Got::End,
    }
}

/// The master of a pseudoterminal. While nobody has the slave open, [`ErrorKind::NotConnected`].
struct PtySink(Arc<File>);

impl Sink for PtySink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if terminal::poll(self.0.as_fd(), libc::POLLOUT, false)? & libc::POLLHUP != 0 {
            return Err(ErrorKind::NotConnected.into());
        }
        match write_blocking(&*self.0, bytes) {
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Err(ErrorKind::NotConnected.into()),
            result => result,
        }
    }
}

#[cfg(test)]
mod tests;
