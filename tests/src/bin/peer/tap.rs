//! A queue of a TAP for a program that is given it open.
#![expect(unsafe_code, reason = "the ioctls of TAP devices, and what a program inherits")]

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;

use anyhow::{Context, bail, ensure};
use libc::{IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_TUN, IFF_VNET_HDR, TUNSETIFF, TUNSETSNDBUF, c_int, c_short};

/// Opens a queue of `interface`, made if there is none, and starts `command` in the place of this program with the queue as its
/// file `number`. `flags` are names of those of TUNSETIFF (linux/if_tun.h), with commas between.
pub(crate) fn hand_in(interface: &str, flags: &str, number: c_int, command: &[OsString]) -> anyhow::Result<()> {
    let file = queue(interface, flags.split(',').try_fold(0, |all, name| anyhow::Ok(all | flag(name)?))?)?;
    // SAFETY: numbers only. It is inherited, also if it has that number already.
    let result = unsafe { libc::dup2(file.as_raw_fd(), number) | libc::fcntl(number, libc::F_SETFD, 0) };
    ensure!(result == number, "{number}: {}", io::Error::last_os_error());
    start(command)
}

/// Opens `count` queues of `interface`, with virtio's headers, and keeps them for ever.
pub(crate) fn hold(interface: &str, count: usize) -> anyhow::Result<()> {
    let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE;
    let _queues = (0..count).map(|_| queue(interface, flags)).collect::<anyhow::Result<Vec<_>>>()?;
    println!("holding");
    loop {
        thread::park();
    }
}

/// A queue of `interface`, which is made if there is none.
fn queue(interface: &str, flags: c_int) -> anyhow::Result<File> {
    let file = File::options().read(true).write(true).open("/dev/net/tun").context("/dev/net/tun")?;
    // SAFETY: all zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = flags as c_short;
    // SAFETY: the kernel reads an ifreq.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF as _, &raw const request) };
    ensure!(result == 0, "{interface}: {}", io::Error::last_os_error());
    Ok(file)
}

/// Gives the open macvtap `number` no room for anything to be sent, and starts `command` in the place of this program.
pub(crate) fn full(number: c_int, command: &[OsString]) -> anyhow::Result<()> {
    let least: c_int = 1;
    // SAFETY: the kernel reads one int.
    let result = unsafe { libc::ioctl(number, TUNSETSNDBUF as _, &raw const least) };
    ensure!(result == 0, "{number}: {}", io::Error::last_os_error());
    start(command)
}

fn start(command: &[OsString]) -> anyhow::Result<()> {
    let (program, arguments) = command.split_first().context("a program to start")?;
    Err(Command::new(program).args(arguments).exec()).context("the program does not start")
}

fn flag(name: &str) -> anyhow::Result<c_int> {
    Ok(match name {
        "tap" => IFF_TAP,
        "tun" => IFF_TUN,
        "no_pi" => IFF_NO_PI,
        "vnet_hdr" => IFF_VNET_HDR,
        "multi_queue" => IFF_MULTI_QUEUE,
        _ => bail!("{name}: no flag of ours"),
    })
}
