//! Machines as child processes of ours: they end with us, however we end, and take signals. The thread that starts one owns
//! it until it is gone.
#![expect(unsafe_code, reason = "between fork and exec a child can be told to end with us; signals go by number")]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

/// However this thread ends, by SIGKILL too, what `command` starts is killed then. It gets a process group of its own:
/// Ctrl-C is for us, and we end it.
pub(crate) fn end_with_this_thread(command: &mut Command) {
    command.process_group(0);
    let parent = std::process::id();
    let ask = move || {
        // SAFETY: prctl takes numbers here and touches no memory (PR_SET_PDEATHSIG(2const)).
        if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // Nobody is left to end with if we are gone already.
        if std::os::unix::process::parent_id() == parent { Ok(()) } else { Err(io::ErrorKind::Interrupted.into()) }
    };
    // SAFETY: between fork and exec `ask` makes two system calls, and neither allocates nor takes a lock.
    unsafe { command.pre_exec(ask) };
}

/// Sends `signal` to a child that was started by [`end_with_this_thread`] and not waited for, and to what it has started.
pub(crate) fn signal_group(child: &Child, signal: i32) -> io::Result<()> {
    let group = child.id().cast_signed();
    // SAFETY: kill takes numbers; until it is waited for, the child's number belongs to nobody else.
    if unsafe { libc::kill(-group, signal) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
