#![expect(unsafe_code, reason = "what a child inherits is said by fcntl")]
//! passt(1), which gives a machine the network of the host without any right there: started by skiff on one end of a socket
//! pair, and ended by the end of that. Main thread; started anew on a worker's thread.

use std::fs;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{anyhow, bail};

use crate::config::Forward;

/// The program, found by PATH.
const PROGRAM: &str = "passt";

/// How lines of it begin that help nobody: what it says for every line where there is no system log, and that it gives up
/// root's rights, which is as it should be.
const NOISE: [&str; 2] = ["Failed to send ", "Don't run as root"];

/// Held while a child is started.
static SPAWNING: Mutex<()> = Mutex::new(());

/// How to start it.
#[derive(Clone, Debug)]
pub(super) struct Passt {
    /// Its options, all but the socket.
    options: Vec<String>,
}

/// It is starting: it goes to the background when it is ready, which ends what was started.
struct Starting {
    child: Child,
    words: ChildStderr,
    socket: UnixStream,
}

impl Passt {
    /// With these ports of the host leading to the guest, which is told an MTU of `mtu` if there is one.
    pub(super) fn new(forwards: &[Forward], mtu: Option<u16>) -> Self {
        let mut options = Vec::new();
        for forward in forwards {
            let option = if forward.udp { "--udp-ports" } else { "--tcp-ports" };
            options.extend([option.to_owned(), ports(forward)]);
        }
        if let Some(mtu) = mtu {
            options.extend(["--mtu".to_owned(), mtu.to_string()]);
        }
        Self { options }
    }

    /// Starts it and waits until it is ready.
    ///
    /// # Errors
    /// One line with what it said.
    pub(super) fn start(&self) -> anyhow::Result<UnixStream> {
        let starting = self.spawn().map_err(|error| match error.kind() {
            ErrorKind::NotFound => anyhow!("not installed; \"sudo apt install passt\" installs it"),
            _ => anyhow!("cannot be started: {error}"),
        })?;
        let Starting { mut child, words, socket } = starting;
        let status = child.wait()?;
        let words = said(words);
        if status.success() {
            for line in words {
                tracing::debug!("passt: {line}");
            }
            return Ok(socket);
        }
        let words = if words.is_empty() { status.to_string() } else { words.join("; ") };
        if words.contains("bind") {
            bail!("{words}; is a port of forward= in use, or below 1024, which takes root?");
        }
        if words.contains("routable interface") || words.contains("default route") {
            bail!("{words}; it needs an interface of the host with a default route: see \"ip route\"");
        }
        bail!("{words}");
    }

    /// The way to get another, which never waits.
    pub(super) fn again(self) -> impl FnMut() -> io::Result<UnixStream> + Send {
        let mut starting: Option<Starting> = None;
        move || {
            let Some(Starting { mut child, words, socket }) = starting.take() else {
                starting = Some(self.spawn()?);
                return Err(ErrorKind::WouldBlock.into());
            };
            match child.try_wait()? {
                None => {
                    starting = Some(Starting { child, words, socket });
                    Err(ErrorKind::WouldBlock.into())
                }
                Some(status) if status.success() => Ok(socket),
                Some(status) => Err(io::Error::other(status.to_string())),
            }
        }
    }

    fn spawn(&self) -> io::Result<Starting> {
        let (ours, theirs) = UnixStream::pair()?;
        // While it may be inherited no other child may start, or the connection would not end with passt.
        let _alone = SPAWNING.lock().unwrap_or_else(PoisonError::into_inner);
        keep_all_files().map_err(|error| io::Error::other(format!("/proc/self/fd: {error}")))?;
        // SAFETY: numbers only; the descriptor is ours.
        if unsafe { libc::fcntl(theirs.as_raw_fd(), libc::F_SETFD, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut command = Command::new(PROGRAM);
        command.args(["--fd", &theirs.as_raw_fd().to_string()]).args(&self.options);
        // In a group of its own: Ctrl-C is for us.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
        let mut child = command.spawn()?;
        let words = child.stderr.take().expect("its standard error is a pipe");
        Ok(Starting { child, words, socket: ours })
    }
}

/// From now on no child inherits any file that is open here, whoever opened it: eventfds, and what skiff was started with.
fn keep_all_files() -> io::Result<()> {
    for entry in fs::read_dir("/proc/self/fd")? {
        let fd = entry?.file_name().to_str().and_then(|number| number.parse().ok());
        if let Some(fd) = fd.filter(|fd: &RawFd| *fd > libc::STDERR_FILENO) {
            // SAFETY: numbers only. One that was closed since is none that a child inherits.
            unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
        }
    }
    Ok(())
}

/// Its option for a forward: `[ADDRESS/]PORTS:PORTS`.
fn ports(forward: &Forward) -> String {
    let Forward { address, from: (first, last), to, .. } = forward;
    let address = address.map(|address| format!("{address}/")).unwrap_or_default();
    if first == last {
        format!("{address}{first}:{to}")
    } else {
        format!("{address}{first}-{last}:{to}-{}", to + (last - first))
    }
}

/// The lines that it wrote until now; something of it may live on and hold the other end.
fn said(mut words: ChildStderr) -> Vec<String> {
    let mut text = Vec::new();
    // SAFETY: numbers only; the descriptor is ours.
    let nonblocking = unsafe { libc::fcntl(words.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) } == 0;
    if nonblocking {
        // Until there is no more, which is said as an error while the other end is open.
        let _ = words.read_to_end(&mut text);
    }
    let text = String::from_utf8_lossy(&text);
    let lines = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !NOISE.iter().any(|start| line.starts_with(start)));
    lines.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn forwards_as_passt_reads_them() {
        let forward = |udp, address, from, to| Forward { udp, address, from, to };
        let forwards = [
            forward(false, None, (2222, 2222), 22),
            forward(false, Some(Ipv4Addr::LOCALHOST), (8000, 8010), 80),
            forward(true, None, (53, 53), 53),
        ];
        // passt(1), -t: "-t 22:23", "-t 22-80:32-90", "-t 192.0.2.1/22".
        let expected = [
            "--tcp-ports",
            "2222:22",
            "--tcp-ports",
            "127.0.0.1/8000-8010:80-90",
            "--udp-ports",
            "53:53",
            "--mtu",
            "1400",
        ];
        assert_eq!(Passt::new(&forwards, Some(1400)).options, expected);
        assert_eq!(Passt::new(&[], None).options, [""; 0]);
    }
}
