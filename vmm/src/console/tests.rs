use super::*;
use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Mutex;

use devices::bus::BusDevice;
use event_manager::{EventManager, SubscriberOps};

/// A console with a machine attached, in an event loop.
struct Rig {
    manager: EventManager<Arc<Mutex<Console>>>,
    console: Arc<Mutex<Console>>,
    serial: Arc<Serial>,
    actions: Arc<Mutex<Vec<ConsoleAction>>>,
}

impl Rig {
    fn new(config: &SerialConfig, stdin: Option<File>) -> Self {
        let actions = Arc::new(Mutex::new(Vec::new()));
        let seen = actions.clone();
        let mut console = Console::open(config, move |action| seen.lock().unwrap().push(action)).unwrap();
        if let Some(stdin) = stdin {
            console.read_from(stdin).unwrap();
        }
        let serial = console.attach(EventFd::new(EFD_NONBLOCK).unwrap()).unwrap();
        let console = Arc::new(Mutex::new(console));
        let mut manager = EventManager::new().unwrap();
        manager.add_subscriber(console.clone());
        Self { manager, console, serial, actions }
    }

    /// The guest's driver opens the port: it asserts DTR and RTS.
    fn open_port(&self) {
        self.serial.write(4, &[0x03]);
    }

    fn print(&self, text: &[u8]) {
        for byte in text {
            self.serial.write(0, &[*byte]);
        }
    }

    /// Runs the event loop until the guest has received `len` bytes.
    fn receive(&mut self, len: usize) -> Vec<u8> {
        let mut received = Vec::new();
        loop {
            let mut register = [0];
            self.serial.read(5, &mut register);
            if register[0] & 1 != 0 {
                self.serial.read(0, &mut register);
                received.push(register[0]);
            } else if received.len() >= len {
                return received;
            } else {
                self.manager.run().unwrap();
            }
        }
    }

    /// Runs the event loop until nothing is to be done. One that spins never gets there.
    fn settle(&mut self) {
        while self.manager.run_with_timeout(0).unwrap() != 0 {}
    }

    /// A client says `text`, and the guest says it back. The first hears what was said before it came.
    fn converse(&mut self, mut client: impl Read + Write, text: &[u8]) {
        client.write_all(text).unwrap();
        assert_eq!(self.receive(text.len()), text);
        self.print(text);
        let expected = [if text == b"second" { &b""[..] } else { b"early " }, text].concat();
        let mut data = vec![0; expected.len()];
        client.read_exact(&mut data).unwrap();
        assert_eq!(data, expected);
    }

    fn finish(self) {
        drop(self.manager);
        self.console.lock().unwrap().finish();
    }
}

fn pipe() -> (File, File) {
    let (reader, writer) = io::pipe().unwrap();
    (File::from(OwnedFd::from(reader)), File::from(OwnedFd::from(writer)))
}

fn open_terminal(path: &Path) -> File {
    File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(path).unwrap()
}

#[test]
fn piped_input_passes_unchanged_and_its_end_is_the_end() {
    let (stdin, mut feed) = pipe();
    let mut rig = Rig::new(&SerialConfig::None, Some(stdin));
    rig.open_port();
    let bytes: Vec<u8> = (0..=255).chain(*b"\x01x\x01p").collect();
    feed.write_all(&bytes).unwrap();
    assert_eq!(rig.receive(bytes.len()), bytes);
    drop(feed);
    rig.settle();
    assert!(matches!(rig.console.lock().unwrap().input, Input::Nowhere));
    assert!(rig.actions.lock().unwrap().is_empty());
}

#[test]
fn input_waits_for_a_guest_that_is_not_ready_and_is_bounded() {
    let (stdin, mut feed) = pipe();
    let mut rig = Rig::new(&SerialConfig::None, Some(stdin));
    let bytes: Vec<u8> = (0..=250).cycle().take(4 * QUEUE).collect();
    let expected = bytes.clone();
    let feeder = std::thread::spawn(move || feed.write_all(&bytes).unwrap());
    while rig.console.lock().unwrap().queue.len() + READ <= QUEUE {
        rig.manager.run().unwrap();
    }
    rig.settle();
    assert!(rig.console.lock().unwrap().queue.len() <= QUEUE);
    rig.open_port();
    assert_eq!(rig.receive(expected.len()), expected);
    feeder.join().unwrap();
}

#[test]
fn a_regular_file_can_be_the_input() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..=250).cycle().take(2 * QUEUE).collect();
    file.write_all(&bytes).unwrap();
    let mut rig = Rig::new(&SerialConfig::None, Some(File::open(file.path()).unwrap()));
    rig.open_port();
    assert_eq!(rig.receive(bytes.len()), bytes);
    rig.settle();
}

#[test]
fn dev_null_can_be_the_input() {
    let mut rig = Rig::new(&SerialConfig::None, Some(File::open("/dev/null").unwrap()));
    rig.settle();
    assert!(matches!(rig.console.lock().unwrap().input, Input::Nowhere));
}

#[test]
fn a_terminal_is_raw_meanwhile_and_has_escape_keys() {
    let _raw = terminal::tests::RAW.lock();
    let (mut keyboard, name) = terminal::open_pty().unwrap();
    let sane = std::process::Command::new("stty").arg("-F").arg(&name).args(["sane"]).status().unwrap();
    assert!(sane.success());
    let before = terminal::tests::stty(&name);
    let screen = tempfile::NamedTempFile::new().unwrap();
    let mut rig = Rig::new(&SerialConfig::File(screen.path().to_owned()), Some(open_terminal(&name)));
    assert_ne!(terminal::tests::stty(&name), before);
    rig.open_port();
    keyboard.write_all(b"a\x03\x01pb\x01").unwrap();
    assert_eq!(rig.receive(3), b"a\x03b");
    keyboard.write_all(b"x\x01h\x01\x01").unwrap();
    assert_eq!(rig.receive(1), b"\x01");
    assert_eq!(*rig.actions.lock().unwrap(), [ConsoleAction::PowerButton, ConsoleAction::Quit]);
    rig.finish();
    assert_eq!(terminal::tests::stty(&name), before);
    assert!(fs::read_to_string(screen.path()).unwrap().contains("Ctrl-A x"));
}

#[test]
fn escape_keys_work_while_the_guest_does_not_read() {
    let _raw = terminal::tests::RAW.lock();
    let (keyboard, name) = terminal::open_pty().unwrap();
    let mut rig = Rig::new(&SerialConfig::None, Some(open_terminal(&name)));
    let typist = std::thread::spawn(move || {
        let mut keys = vec![b'.'; 2 * QUEUE];
        keys.extend(b"\x01x");
        let mut rest = &keys[..];
        while !rest.is_empty() {
            let len = write_blocking(&keyboard, rest).unwrap();
            rest = &rest[len..];
        }
        keyboard
    });
    while rig.actions.lock().unwrap().is_empty() {
        rig.manager.run().unwrap();
    }
    assert_eq!(*rig.actions.lock().unwrap(), [ConsoleAction::Quit]);
    assert_eq!(rig.console.lock().unwrap().queue.len(), QUEUE);
    typist.join().unwrap();
    rig.finish();
}

#[test]
fn a_file_takes_the_output() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("serial.log");
    fs::write(&path, "what was there before, longer than what comes").unwrap();
    let rig = Rig::new(&SerialConfig::File(path.clone()), None);
    rig.print(b"Linux version\r\n");
    rig.finish();
    assert_eq!(fs::read(&path).unwrap(), b"Linux version\r\n");
}

#[test]
fn a_file_that_cannot_be_created_is_named_with_its_option() {
    let directory = tempfile::tempdir().unwrap();
    let Err(error) = Console::open(&SerialConfig::File(directory.path().to_owned()), |_| {}) else { panic!() };
    let message = error.to_string();
    assert!(message.starts_with(&format!("--serial file={}: ", directory.path().display())), "{message}");
    assert!(!message.contains('\n'));
}

#[test]
fn a_pty_survives_its_clients() {
    let mut rig = Rig::new(&SerialConfig::Pty, None);
    let fd = rig.console.lock().unwrap().input.fd().unwrap();
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
    let index = info.lines().find_map(|line| line.strip_prefix("tty-index:")).unwrap().trim();
    let name = format!("/dev/pts/{index}");
    rig.open_port();
    rig.settle();
    rig.print(b"early ");
    for text in [&b"first\x01x"[..], b"second"] {
        rig.converse(open_terminal(Path::new(&name)), text);
        rig.settle();
    }
    rig.finish();
}

#[test]
fn a_socket_survives_its_clients() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console.sock");
    let mut rig = Rig::new(&SerialConfig::Socket(path.clone()), None);
    rig.open_port();
    rig.print(b"early ");
    for text in [&b"first"[..], b"second"] {
        rig.converse(UnixStream::connect(&path).unwrap(), text);
        while rig.console.lock().unwrap().input.fd().is_some() {
            rig.manager.run().unwrap();
        }
        rig.settle();
    }
    rig.finish();
    assert!(!path.exists());
}

#[test]
fn the_next_machine_takes_the_console_over() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("serial.log");
    let (stdin, mut feed) = pipe();
    let mut rig = Rig::new(&SerialConfig::File(path.clone()), Some(stdin));
    rig.print(b"one ");
    feed.write_all(b"typed ahead").unwrap();
    while rig.console.lock().unwrap().queue.is_empty() {
        rig.manager.run().unwrap();
    }
    rig.serial.release();
    rig.serial = rig.console.lock().unwrap().attach(EventFd::new(EFD_NONBLOCK).unwrap()).unwrap();
    rig.open_port();
    assert_eq!(rig.receive(11), b"typed ahead");
    rig.print(b"two");
    rig.finish();
    assert_eq!(fs::read(&path).unwrap(), b"one two");
}
