#![expect(unsafe_code, reason = "std connects only to where it may have to wait")]
//! Joins a Unix socket that passt, or something else with its protocol, listens on. Main thread, and after a loss the worker's;
//! neither waits, for whoever listens need not accept.

use std::ffi::OsStr;
use std::io::{self, ErrorKind};
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use libc::{AF_UNIX, SOCK_CLOEXEC, SOCK_NONBLOCK, SOCK_STREAM, sockaddr_un, socklen_t};

/// Connects to `path`. The socket is nonblocking.
///
/// # Errors
/// [`ErrorKind::WouldBlock`] if as many are connected there already as the listener keeps waiting.
pub(super) fn connect(path: &Path) -> io::Result<UnixStream> {
    let (address, length) = address(path.as_os_str())?;
    // SAFETY: numbers only.
    let fd = unsafe { libc::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just opened, and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: an address of that length.
    let result = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(socket.into()) }
}

/// `path` as unix(7) has it, and its length.
fn address(path: &OsStr) -> io::Result<(sockaddr_un, socklen_t)> {
    // SAFETY: all zero is a valid sockaddr_un.
    let mut address: sockaddr_un = unsafe { mem::zeroed() };
    address.sun_family = AF_UNIX as u16;
    let bytes = path.as_bytes();
    // One of zero ends it.
    if bytes.len() >= address.sun_path.len() {
        let most = address.sun_path.len() - 1;
        return Err(io::Error::new(ErrorKind::InvalidInput, format!("the path of a socket has at most {most} bytes")));
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    Ok((address, mem::size_of::<sockaddr_un>() as socklen_t))
}

/// Why nobody could be joined at `path`, and what to do.
pub(super) fn refusal(path: &Path, error: &io::Error) -> String {
    let path = path.display();
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
            format!("nobody listens there; start \"passt --socket {path}\", or let skiff start it: --net passt")
        }
        ErrorKind::PermissionDenied => "permission denied; passt and skiff must run as the same user".to_owned(),
        ErrorKind::WouldBlock => {
            "whoever listens there takes no more connections; end the machine that has it, or use another socket"
                .to_owned()
        }
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    #[test]
    fn joins_who_listens_and_does_not_wait() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        assert_eq!(connect(&path).unwrap_err().kind(), ErrorKind::NotFound);
        let listener = UnixListener::bind(&path).unwrap();
        let mut ours = connect(&path).unwrap();
        let (mut theirs, _) = listener.accept().unwrap();
        theirs.write_all(b"word").unwrap();
        let mut word = [0; 5];
        assert_eq!(ours.read(&mut word).unwrap(), 4);
        assert_eq!(ours.read(&mut word).unwrap_err().kind(), ErrorKind::WouldBlock);
        drop(listener);
        assert_eq!(connect(&path).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }

    #[test]
    fn does_not_wait_for_one_who_does_not_accept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        // SAFETY: numbers only. No more than one may wait from now on.
        assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
        let _first = connect(&path).unwrap();
        let error = connect(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        assert!(refusal(&path, &error).contains("takes no more connections"));
    }

    #[test]
    fn a_path_that_is_too_long() {
        // unix(7): sun_path has 108 bytes.
        let long = "x".repeat(108);
        let error = connect(Path::new(&long)).unwrap_err();
        assert_eq!(error.to_string(), "the path of a socket has at most 107 bytes");
    }
}
