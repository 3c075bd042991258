//! The console on a Unix socket: one client at a time, who may leave and come back. The main thread accepts and reads,
//! the console's thread writes.

use std::fs;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::ConsoleError;
use super::output::{Sink, write_blocking};

/// A listening socket and its client. The file is removed with it.
pub(super) struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file, so that only our own is removed.
    identity: (u64, u64),
    client: Client,
}

/// The connected client, shared with the console's thread.
#[derive(Clone, Default)]
pub(super) struct Client(Arc<Mutex<Option<Arc<UnixStream>>>>);

impl Client {
    fn slot(&self) -> MutexGuard<'_, Option<Arc<UnixStream>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The client, if there is one.
    pub(super) fn get(&self) -> Option<Arc<UnixStream>> {
        self.slot().clone()
    }
}

impl Socket {
    /// Listens at `path`. A socket that a dead process left there is replaced.
    ///
    /// # Errors
    /// When something listens at `path` already, something else than a socket is there, or the host refuses.
    pub(super) fn listen(path: &Path) -> Result<Self, ConsoleError> {
        remove_stale(path)?;
        let open = || {
            let listener = UnixListener::bind(path)?;
            listener.set_nonblocking(true)?;
            let file = fs::symlink_metadata(path)?;
            Ok(Self { listener, path: path.to_owned(), identity: (file.dev(), file.ino()), client: Client::default() })
        };
        open().map_err(|error| ConsoleError::Socket { path: path.to_owned(), error })
    }

    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// Accepts whoever waits. The first becomes the client and is returned; the others find the line busy and are
    /// closed.
    pub(super) fn accept(&self) -> Option<Arc<UnixStream>> {
        let mut accepted = None;
        while let Ok((stream, _)) = self.listener.accept() {
            let mut client = self.client.slot();
            if client.is_none() && stream.set_nonblocking(true).is_ok() {
                *client = Some(Arc::new(stream));
                accepted.clone_from(&client);
            }
        }
        accepted
    }

    /// Lets the client go, and with it a write that waits for it.
    pub(super) fn disconnect(&self) {
        if let Some(client) = self.client.slot().take() {
            // Fails if the client went first.
            let _ = client.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.disconnect();
        if fs::symlink_metadata(&self.path).is_ok_and(|file| (file.dev(), file.ino()) == self.identity) {
            // Whoever removes it at the same moment does us no harm.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn remove_stale(path: &Path) -> Result<(), ConsoleError> {
    let refused = |error| ConsoleError::Socket { path: path.to_owned(), error };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(refused(error)),
        Ok(file) if !file.file_type().is_socket() => return Err(ConsoleError::NotASocket(path.to_owned())),
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(ConsoleError::SocketInUse(path.to_owned())),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(refused),
        Err(error) => Err(refused(error)),
    }
}

/// Whoever is the client; without one, [`ErrorKind::NotConnected`].
impl Sink for Client {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let client = self.get().ok_or(ErrorKind::NotConnected)?;
        // A client that is gone is taken away by the main thread, which sees it hang up.
        write_blocking(&*client, bytes).map_err(|_| ErrorKind::NotConnected.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn path(directory: &tempfile::TempDir) -> PathBuf {
        directory.path().join("console.sock")
    }

    #[test]
    fn the_file_is_removed_at_the_end() {
        let directory = tempfile::tempdir().unwrap();
        let socket = Socket::listen(&path(&directory)).unwrap();
        assert!(path(&directory).exists());
        drop(socket);
        assert!(!path(&directory).exists());
    }

    #[test]
    fn a_file_that_is_no_longer_ours_stays() {
        let directory = tempfile::tempdir().unwrap();
        let socket = Socket::listen(&path(&directory)).unwrap();
        fs::rename(path(&directory), directory.path().join("moved")).unwrap();
        fs::write(path(&directory), "somebody else's").unwrap();
        drop(socket);
        assert_eq!(fs::read_to_string(path(&directory)).unwrap(), "somebody else's");
    }

    #[test]
    fn a_stale_socket_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        drop(UnixListener::bind(path(&directory)).unwrap());
        assert!(path(&directory).exists(), "std leaves the file");
        Socket::listen(&path(&directory)).unwrap();
    }

    #[test]
    fn a_socket_in_use_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let _socket = Socket::listen(&path(&directory)).unwrap();
        let Err(ConsoleError::SocketInUse(named)) = Socket::listen(&path(&directory)) else { panic!() };
        assert_eq!(named, path(&directory));
        assert!(path(&directory).exists());
    }

    #[test]
    fn what_is_not_a_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(path(&directory), "precious").unwrap();
        assert!(matches!(Socket::listen(&path(&directory)), Err(ConsoleError::NotASocket(_))));
        assert_eq!(fs::read_to_string(path(&directory)).unwrap(), "precious");
    }

    #[test]
    fn one_client_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let socket = Socket::listen(&path(&directory)).unwrap();
        let mut sink = socket.client().clone();
        assert_eq!(sink.write(b"x").unwrap_err().kind(), ErrorKind::NotConnected);

        let mut first = UnixStream::connect(path(&directory)).unwrap();
        let mut second = UnixStream::connect(path(&directory)).unwrap();
        assert!(socket.accept().is_some());
        assert_eq!(second.read(&mut [0]).unwrap(), 0, "closed");
        assert_eq!(sink.write(b"hello").unwrap(), 5);
        let mut data = [0; 5];
        first.read_exact(&mut data).unwrap();
        assert_eq!(&data, b"hello");

        socket.disconnect();
        assert_eq!(first.read(&mut [0]).unwrap(), 0);
        let _third = UnixStream::connect(path(&directory)).unwrap();
        assert!(socket.accept().is_some());
        assert_eq!(sink.write(b"again").unwrap(), 5);
    }
}
