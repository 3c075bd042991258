//! A pseudo-terminal (pty(7)) for programs that take no console input from anything else. Raw: bytes pass as they are.
#![expect(unsafe_code, reason = "a terminal is unlocked, opened and made raw by ioctls")]

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::OpenOptionsExt;

/// Our end, and the one that is a program's terminal; nobody's controlling terminal.
///
/// # Errors
/// What the kernel says, as where /dev/ptmx is not to be had.
pub(super) fn open() -> io::Result<(File, File)> {
    let flags = libc::O_NOCTTY | libc::O_CLOEXEC;
    let ours = File::options().read(true).write(true).custom_flags(flags).open("/dev/ptmx")?;
    let lock: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads an int (ioctl_tty(2)), and there is one.
    check(unsafe { libc::ioctl(ours.as_raw_fd(), libc::TIOCSPTLCK, &raw const lock) })?;
    // SAFETY: TIOCGPTPEER takes the flags by value and touches no memory.
    let theirs = check(unsafe { libc::ioctl(ours.as_raw_fd(), libc::TIOCGPTPEER, libc::O_RDWR | flags) })?;
    // SAFETY: the kernel has just opened it, and nobody else has it.
    let theirs = unsafe { File::from_raw_fd(theirs) };
    let mut settings = MaybeUninit::<libc::termios>::uninit();
    // SAFETY: tcgetattr fills the structure it is given.
    check(unsafe { libc::tcgetattr(theirs.as_raw_fd(), settings.as_mut_ptr()) })?;
    // SAFETY: it succeeded, so the structure is filled; cfmakeraw changes it, tcsetattr reads it.
    unsafe {
        let mut settings = settings.assume_init();
        libc::cfmakeraw(&raw mut settings);
        check(libc::tcsetattr(theirs.as_raw_fd(), libc::TCSANOW, &raw const settings))?;
    }
    Ok((ours, theirs))
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{IsTerminal, Read, Write};

    #[test]
    fn bytes_pass_as_they_are_and_none_comes_back() {
        let (mut ours, mut theirs) = open().unwrap();
        assert!(theirs.is_terminal());
        let mut bytes = [0; 4];
        ours.write_all(b"a\r\n\x03").unwrap();
        theirs.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"a\r\n\x03");
        theirs.write_all(b"\nb\n\r").unwrap();
        ours.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"\nb\n\r", "neither an echo nor a carriage return more");
    }

    #[test]
    fn it_hangs_up_with_its_program() {
        let (mut ours, theirs) = open().unwrap();
        drop(theirs);
        assert_eq!(ours.read(&mut [0]).unwrap_err().raw_os_error(), Some(libc::EIO));
    }
}
