//! Terminals, real and pseudo: raw mode that is always undone, job control, and opening a pty. Used on the main thread;
//! [`poll`] on the console's thread too.
#![expect(unsafe_code, reason = "termios, job control, ptys and poll are libc calls")]

use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::{Mutex, Once};

/// The terminal that is raw now, and how it was before.
static SAVED: Mutex<Option<(OwnedFd, libc::termios)>> = Mutex::new(None);

/// Puts the terminal `fd` into raw mode: every key arrives at once and as it is, nothing is echoed, no key is a signal.
/// Output is still processed, so that log lines of this process keep their line ends. The terminal is restored by
/// [`restore`], at the latest when the process exits or panics.
///
/// # Errors
/// When `fd` is not a terminal.
pub(super) fn make_raw(fd: BorrowedFd) -> io::Result<()> {
    static AT_THE_END: Once = Once::new();
    AT_THE_END.call_once(restore_at_the_end);
    let saved = attributes(fd)?;
    let mut raw = saved;
    raw.c_iflag &= !(libc::IGNBRK
        | libc::BRKINT
        | libc::PARMRK
        | libc::ISTRIP
        | libc::INLCR
        | libc::IGNCR
        | libc::ICRNL
        | libc::IXON);
    raw.c_lflag &= !(libc::ECHO | libc::ECHONL | libc::ICANON | libc::ISIG | libc::IEXTEN);
    raw.c_cflag = raw.c_cflag & !(libc::CSIZE | libc::PARENB) | libc::CS8;
    raw.c_cc[libc::VMIN] = 1;
    raw.c_cc[libc::VTIME] = 0;
    if let Ok(mut slot) = SAVED.lock() {
        *slot = Some((fd.try_clone_to_owned()?, saved));
    }
    set_attributes(fd, &raw)
}

/// Restores the terminal as it was before the console made it raw. Harmless if there is nothing to restore. Safe to call
/// from anywhere but a signal handler, a panic hook included.
///
/// Whoever ends the process in a way that runs neither destructors nor exit handlers (`_exit`, `abort`) calls it first.
pub fn restore() {
    // try_lock: this may be a panic while the lock is held.
    if let Ok(Some((fd, saved))) = SAVED.try_lock().map(|mut slot| slot.take()) {
        // From the background it would stop us, and the terminal is the shell's again anyway.
        if in_foreground(fd.as_fd()) {
            // What else could be done if it fails?
            let _ = set_attributes(fd.as_fd(), &saved);
        }
    }
}

fn restore_at_the_end() {
    extern "C" fn at_exit() {
        restore();
    }
    // SAFETY: the handler is a function without captures that does not unwind.
    unsafe { libc::atexit(at_exit) };
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        restore();
        previous(panic);
    }));
}

fn attributes(fd: BorrowedFd) -> io::Result<libc::termios> {
    let mut attributes = MaybeUninit::uninit();
    // SAFETY: tcgetattr writes a whole termios if it returns 0, and touches nothing else.
    unsafe {
        check(libc::tcgetattr(fd.as_raw_fd(), attributes.as_mut_ptr()))?;
        Ok(attributes.assume_init())
    }
}

fn set_attributes(fd: BorrowedFd, attributes: &libc::termios) -> io::Result<()> {
    // SAFETY: tcsetattr only reads the termios.
    check(unsafe { libc::tcsetattr(fd.as_raw_fd(), libc::TCSANOW, attributes) })
}

/// Whether reading from the terminal `fd` or changing it would not stop this process: it is in the terminal's
/// foreground process group, or the terminal does not control this process at all.
pub(super) fn in_foreground(fd: BorrowedFd) -> bool {
    // SAFETY: both calls take and return plain numbers.
    let (foreground, ours) = unsafe { (libc::tcgetpgrp(fd.as_raw_fd()), libc::getpgrp()) };
    foreground == -1 || foreground == ours
}

/// Rows and columns of the terminal `fd`, if it knows them.
pub(crate) fn size(fd: BorrowedFd) -> Option<(u16, u16)> {
    let mut size = MaybeUninit::<libc::winsize>::zeroed();
    // SAFETY: TIOCGWINSZ (ioctl_tty(2)) writes a winsize if it succeeds, and any bits are one, so zeroes too.
    let size = unsafe {
        check(libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, size.as_mut_ptr())).ok()?;
        size.assume_init()
    };
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

/// Opens a new pseudoterminal in raw mode and returns its master (non-blocking) and the name of its slave. Nobody has
/// the slave open then, which [`poll`] shows as `POLLHUP` of the master.
pub(super) fn open_pty() -> io::Result<(File, PathBuf)> {
    // SAFETY: posix_openpt takes flags and returns a descriptor, which is nobody else's.
    let master = unsafe {
        let fd = libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC | libc::O_NONBLOCK);
        check(fd)?;
        File::from_raw_fd(fd)
    };
    let mut name = [0; 64];
    // SAFETY: ptsname_r writes at most the length it is given, NUL included; the others take a descriptor only.
    unsafe {
        check(libc::grantpt(master.as_raw_fd()))?;
        check(libc::unlockpt(master.as_raw_fd()))?;
        match libc::ptsname_r(master.as_raw_fd(), name.as_mut_ptr().cast(), name.len()) {
            0 => {}
            error => return Err(io::Error::from_raw_os_error(error)),
        }
    }
    let name = CStr::from_bytes_until_nul(&name).map_err(io::Error::other)?;
    let name = PathBuf::from(OsStr::from_bytes(name.to_bytes()));
    // Opening and closing the slave makes the master show "nobody there" from the start.
    let slave = File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(&name)?;
    let mut raw = attributes(slave.as_fd())?;
    // SAFETY: cfmakeraw changes the termios only.
    unsafe { libc::cfmakeraw(&raw mut raw) };
    set_attributes(slave.as_fd(), &raw)?;
    Ok((master, name))
}

/// Waits until `fd` shows one of `events` (`POLLIN`, `POLLOUT`), an error or a hang-up, and returns what it shows. With
/// `wait` false it only looks.
pub(super) fn poll(fd: BorrowedFd, events: i16, wait: bool) -> io::Result<i16> {
    let mut polled = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    loop {
        // SAFETY: the count of 1 is the one pollfd that is passed.
        match check(unsafe { libc::poll(&raw mut polled, 1, if wait { -1 } else { 0 }) }) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result.map(|()| polled.revents),
        }
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::process::Command;

    /// Held by tests that make a terminal raw: there is one such terminal in a process.
    pub(in super::super) static RAW: Mutex<()> = Mutex::new(());

    /// The settings of `terminal` in stty(1)'s words.
    pub(in super::super) fn stty(terminal: &std::path::Path) -> String {
        let output = Command::new("stty").arg("-a").arg("-F").arg(terminal).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn raw_mode_is_undone() {
        let _raw = RAW.lock();
        let (_master, name) = open_pty().unwrap();
        let terminal = File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(&name).unwrap();
        let sane = Command::new("stty").arg("-F").arg(&name).arg("sane").status().unwrap();
        assert!(sane.success());
        let before = stty(&name);
        make_raw(terminal.as_fd()).unwrap();
        let raw = stty(&name);
        for setting in ["-icanon", "-echo", "-isig", "-iexten", "-icrnl", "-ixon", "\nopost"] {
            assert!(raw.contains(setting), "{setting} in {raw}");
        }
        restore();
        assert_eq!(stty(&name), before);
        restore();
        assert_eq!(stty(&name), before);
    }

    #[test]
    fn what_is_not_a_terminal_is_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(make_raw(file.as_fd()).is_err());
    }

    #[test]
    fn a_pty_is_raw_and_shows_whether_somebody_is_there() {
        let (mut master, name) = open_pty().unwrap();
        assert_ne!(poll(master.as_fd(), libc::POLLOUT, false).unwrap() & libc::POLLHUP, 0);
        let mut client = File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(&name).unwrap();
        assert_eq!(poll(master.as_fd(), libc::POLLOUT, false).unwrap(), libc::POLLOUT);
        let bytes = [3, 4, 13, 10, 17, 19, 26, 28, 127, 255];
        client.write_all(&bytes).unwrap();
        assert_eq!(poll(master.as_fd(), libc::POLLIN, true).unwrap(), libc::POLLIN);
        let mut data = [0; 10];
        master.read_exact(&mut data).unwrap();
        assert_eq!(data, bytes);
        master.write_all(&bytes).unwrap();
        client.read_exact(&mut data).unwrap();
        assert_eq!(data, bytes);
        drop(client);
        assert_ne!(poll(master.as_fd(), libc::POLLOUT, false).unwrap() & libc::POLLHUP, 0);
    }
}
