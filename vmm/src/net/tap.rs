#![expect(unsafe_code, reason = "the ioctls of TAP devices, and a descriptor that was handed in")]
//! Opens TAPs and macvtaps: those that exist, one that skiff creates, one that was handed in. Main thread, but for opening one
//! again that was removed.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use anyhow::{Context, anyhow, bail};
use devices::virtio::net::backend::{Backend, Port};
use devices::virtio::net::tap::{Reopen, Tap};
use libc::{
    F_GETFL, F_SETFD, F_SETFL, FD_CLOEXEC, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_TUN_EXCL, IFF_VNET_HDR, O_NONBLOCK,
    TUNGETIFF, TUNSETIFF, c_int, c_short, ifreq,
};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};

use super::interface::{self, Interface};
use super::mac::Mac;
use crate::config::{self, TapSource};

const TUN: &str = "/dev/net/tun";

/// What a new interface is called if it is given no name; the kernel puts a number there.
const NEW_NAME: &str = "skiff%d";

/// What every queue is asked for: Ethernet frames, nothing in front of them but the header of virtio.
const FLAGS: c_int = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;

/// The most that the kernel takes for the MTU of a TAP: 65535 without the Ethernet header.
const LARGEST_MTU: u16 = 65521;

/// What a driver begins with that is told nothing: Ethernet's.
const USUAL_MTU: u16 = 1500;

/// An interface of the host, open.
pub(super) struct OpenTap {
    /// One a pair of queues, nonblocking, with IFF_VNET_HDR.
    pub(super) queues: Vec<File>,
    /// How to open a queue of it again, if it may be there again after it was removed.
    reopen: Option<Way>,
    /// The address that its other end must have: of a macvtap, which hears no other.
    pub(super) mac: Option<Mac>,
    /// The MTU that its other end does well to have, unless that is what every driver begins with: one that is told a number may
    /// not go beyond it, and the interface may be changed later.
    pub(super) mtu: Option<u16>,
}

impl OpenTap {
    /// Opens, or creates, what `source` names. `mtu` is that of a new one.
    ///
    /// # Errors
    /// One line that says what is wrong with the interface and what to do.
    pub(super) fn open(source: &TapSource, mtu: Option<u16>) -> anyhow::Result<Self> {
        match source {
            TapSource::Named { name, queues } => {
                let mut tap = named(name, *queues)?;
                let interface = Interface::find(name)?;
                tap.mtu = u16::try_from(interface.mtu()?).ok().filter(|mtu| *mtu != USUAL_MTU);
                if !interface.is_up()? {
                    tracing::warn!(
                        "net: {name} is down, and no frame passes; bring it up with \"sudo ip link set {name} up\""
                    );
                }
                Ok(tap)
            }
            TapSource::New { name, address, queues } => create(name.as_deref(), *address, *queues, mtu),
            TapSource::Descriptor(fd) => handed_in(*fd),
        }
    }

    /// What moves its frames in skiff.
    pub(super) fn backend(self) -> anyhow::Result<Backend> {
        let reopen = |way: &Way| {
            let way = way.clone();
            Box::new(move || way.open()) as Reopen
        };
        let taps = self.queues.into_iter().map(|file| Tap::new(file, self.reopen.as_ref().map(reopen)));
        let mut taps = taps.collect::<io::Result<Vec<_>>>().context("the kernel refuses headers of 12 bytes")?;
        let offloads = taps[0].offloads().context("the kernel does not say what it can do")?;
        Ok(Backend::new(taps.into_iter().map(|tap| Box::new(tap) as Box<dyn Port>).collect(), offloads))
    }
}

/// How a queue of an interface that exists is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Way {
    /// By TUNSETIFF, with these flags.
    Tap { name: String, flags: c_int },
    /// By the file of a macvtap.
    Macvtap(String),
}

impl Way {
    /// # Errors
    /// ENODEV if there is no such interface: none is created. [`ErrorKind::ResourceBusy`] if another program has it for now.
    fn open(&self) -> io::Result<File> {
        match self {
            Self::Tap { name, flags } => {
                Interface::find(name)?;
                let (file, _) = attach(name, *flags)?;
                // Whoever makes it anew has a queue of it for a moment, and as long as somebody has it stays as that one wanted.
                if flags_of(&file)?.1 & FLAGS == FLAGS { Ok(file) } else { Err(ErrorKind::ResourceBusy.into()) }
            }
            Self::Macvtap(name) => open(&macvtap_file(&Interface::find(name)?)),
        }
    }
}

/// Where the queues of a macvtap are opened.
fn macvtap_file(interface: &Interface) -> PathBuf {
    format!("/dev/tap{}", interface.index).into()
}

fn open(path: &PathBuf) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(O_NONBLOCK).open(path)
}

/// A queue of the interface `name`, and what it is called.
fn attach(name: &str, flags: c_int) -> io::Result<(File, String)> {
    let file = open(&TUN.into())?;
    let mut request = interface::request(name);
    request.ifr_ifru.ifru_flags = flags as c_short;
    // SAFETY: the kernel reads an ifreq and writes the name back.
    check(unsafe { ioctl_with_mut_ref(&file, TUNSETIFF, &mut request) })?;
    Ok((file, interface::name(&request)))
}

fn named(name: &str, queues: u16) -> anyhow::Result<OpenTap> {
    let interface = Interface::find(name).map_err(|_| anyhow!("{}", missing(name)))?;
    if macvtap_file(&interface).exists() {
        return macvtap(&interface, queues);
    }
    // The kernel wants to hear whether an interface has several queues, and refuses the wrong answer: nothing is changed.
    let (flags, first) = match attach(name, FLAGS) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            (FLAGS | IFF_MULTI_QUEUE, attach(name, FLAGS | IFF_MULTI_QUEUE))
        }
        result => (FLAGS, result),
    };
    let (first, _) = first.map_err(|error| anyhow!("{}", refusal(name, &error)))?;
    if flags & IFF_MULTI_QUEUE == 0 && queues > 1 {
        bail!(
            "{name} was made with one queue; leave queues= out, or make it anew: \"sudo ip tuntap del {name} mode tap\" and \
             \"sudo ip tuntap add {name} mode tap multi_queue user $USER\""
        );
    }
    let mut files = vec![first];
    for number in 1..queues {
        let (file, _) = attach(name, flags).map_err(|error| match error.raw_os_error() {
            Some(libc::E2BIG) => anyhow!("{name} has no more than {number} queues left; write queues={number}"),
            _ => anyhow!("{}", refusal(name, &error)),
        })?;
        files.push(file);
    }
    // One that another program is attached to keeps what that one has asked for.
    if flags_of(&files[0])?.1 & FLAGS != FLAGS {
        bail!("{name} is in use by another program, without IFF_VNET_HDR; end that, or use another interface");
    }
    let reopen = Some(Way::Tap { name: name.to_owned(), flags });
    Ok(OpenTap { queues: files, reopen, mac: None, mtu: None })
}

fn macvtap(interface: &Interface, queues: u16) -> anyhow::Result<OpenTap> {
    let (name, path) = (&interface.name, macvtap_file(interface));
    let open = |_| {
        let file = open(&path).map_err(|error| match error.kind() {
            ErrorKind::PermissionDenied => {
                anyhow!(
                    "{}: permission denied; \"sudo chown $USER {}\" lets you use {name}",
                    path.display(),
                    path.display()
                )
            }
            _ if error.raw_os_error() == Some(libc::EBUSY) => {
                anyhow!("all queues of {name} are in use; end the program that has them")
            }
            _ => anyhow!("{}: {error}", path.display()),
        })?;
        let mut request = interface::request(name);
        request.ifr_ifru.ifru_flags = FLAGS as c_short;
        // SAFETY: the kernel reads an ifreq.
        check(unsafe { ioctl_with_ref(&file, TUNSETIFF, &request) }).with_context(|| path.display().to_string())?;
        Ok(file)
    };
    let queues: Vec<_> = (0..queues).map(open).collect::<anyhow::Result<_>>()?;
    if flags_of(&queues[0])?.0 != *name {
        bail!("{} belongs to another interface than {name}, in another network namespace", path.display());
    }
    Ok(OpenTap { queues, reopen: Some(Way::Macvtap(name.clone())), mac: interface.mac()?, mtu: None })
}

fn create(name: Option<&str>, address: (Ipv4Addr, u8), queues: u16, mtu: Option<u16>) -> anyhow::Result<OpenTap> {
    if let Some(mtu) = mtu.filter(|mtu| *mtu > LARGEST_MTU) {
        bail!("mtu={mtu}: a TAP has an MTU of at most {LARGEST_MTU}");
    }
    if let Some(name) = name.filter(|name| Interface::find(name).is_ok()) {
        bail!("{name} exists; leave host-ip= out to use it as it is, or choose another name");
    }
    let several = if queues > 1 { IFF_MULTI_QUEUE } else { 0 };
    let new = attach(name.unwrap_or(NEW_NAME), FLAGS | several | IFF_TUN_EXCL);
    let (first, name) =
        new.map_err(|error| anyhow!("{}", refusal_to_create(name.unwrap_or("tap0"), address, &error)))?;
    let mut files = vec![first];
    for _ in 1..queues {
        files.push(attach(&name, FLAGS | several).with_context(|| format!("a further queue of {name}"))?.0);
    }
    let interface = Interface::find(&name)?;
    if let Some(mtu) = mtu {
        interface.set_mtu(mtu).with_context(|| format!("{name} with an MTU of {mtu}"))?;
    }
    let (ip, bits) = address;
    interface.set_address(ip, bits).with_context(|| format!("giving {name} the address {ip}/{bits}"))?;
    interface.bring_up().with_context(|| format!("bringing {name} up"))?;
    tracing::info!("net: created {name} with the address {ip}/{bits}");
    // Should it be removed, one that somebody makes in its place does as well.
    let reopen = Some(Way::Tap { name, flags: FLAGS | several });
    Ok(OpenTap { queues: files, reopen, mac: None, mtu: None })
}

fn handed_in(fd: RawFd) -> anyhow::Result<OpenTap> {
    // SAFETY: borrowed for the look only; a number that is not open makes the look fail.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let (name, flags) = flags_of(&borrowed).map_err(|error| match error.raw_os_error() {
        Some(libc::EBADF) => anyhow!(
            "whoever started skiff left no open file at {fd}; in a shell write \"3<>/dev/tap5\" for a macvtap, and fd=3"
        ),
        _ => anyhow!("the open file at {fd} is no TAP"),
    })?;
    if flags & IFF_TAP == 0 {
        bail!("the open file at {fd} is {name}, a TUN: it moves packets without Ethernet; open it with IFF_TAP");
    }
    if flags & FLAGS != FLAGS {
        bail!(
            "the open file at {fd} is a queue of {name} without virtio's headers; open it with IFF_VNET_HDR and IFF_NO_PI"
        );
    }
    // SAFETY: numbers only.
    let nonblocking = unsafe {
        let status = libc::fcntl(fd, F_GETFL);
        libc::fcntl(fd, F_SETFL, status | O_NONBLOCK) | libc::fcntl(fd, F_SETFD, FD_CLOEXEC)
    };
    check(nonblocking).with_context(|| format!("fd={fd}"))?;
    let interface = Interface::find(&name).ok().filter(|interface| macvtap_file(interface).exists());
    let mac = interface.and_then(|interface| interface.mac().ok().flatten());
    // SAFETY: it was handed in for us to own, and the configuration names it once.
    let file = unsafe { File::from_raw_fd(fd) };
    Ok(OpenTap { queues: vec![file], reopen: None, mac, mtu: None })
}

/// The name and the flags of the interface that `file` is a queue of.
fn flags_of(file: &impl AsRawFd) -> io::Result<(String, c_int)> {
    let mut request: ifreq = interface::request("");
    // SAFETY: the kernel fills in an ifreq.
    check(unsafe { ioctl_with_mut_ref(file, TUNGETIFF, &mut request) })?;
    // SAFETY: the kernel filled in this member.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok((interface::name(&request), c_int::from(flags.cast_unsigned())))
}

/// There is no such interface.
fn missing(name: &str) -> String {
    let names = interface::names();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    let guess = config::nearest(name, &names).map(|near| format!(" (did you mean \"{near}\"?)")).unwrap_or_default();
    format!(
        "no such interface{guess}; create it with \"sudo ip tuntap add {name} mode tap user $USER\" and \
         \"sudo ip link set {name} up\", or let skiff do it: tap={name},host-ip=192.0.2.1/24"
    )
}

/// Why an interface that exists cannot be used.
fn refusal(name: &str, error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM) => format!(
            "not yours, and using it takes CAP_NET_ADMIN; make it anew for yourself: \"sudo ip tuntap del {name} mode tap\", \
             \"sudo ip tuntap add {name} mode tap user $USER\" and \"sudo ip link set {name} up\""
        ),
        Some(libc::E2BIG) => {
            "all queues of it are in use; end a program that has some, or use another interface".to_owned()
        }
        Some(libc::EBUSY) => "in use by another program; end that, or use another interface".to_owned(),
        Some(libc::EINVAL) => {
            "this is neither a TAP nor a macvtap; put a TAP on a bridge with it, or a macvtap on it: \
                               \"sudo ip link add link INTERFACE name macvtap0 type macvtap mode bridge\""
                .replace("INTERFACE", name)
        }
        _ => tun_refusal(error),
    }
}

fn refusal_to_create(name: &str, (address, bits): (Ipv4Addr, u8), error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM) => format!(
            "creating an interface takes CAP_NET_ADMIN; use sudo, or create one for yourself: \"sudo ip tuntap add {name} mode \
             tap user $USER\", \"sudo ip addr add {address}/{bits} dev {name}\", \"sudo ip link set {name} up\", and write \
             tap={name}; passt needs none of this"
        ),
        _ => tun_refusal(error),
    }
}

fn tun_refusal(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::NotFound => {
            format!("{TUN}: no such device; load the module with \"sudo modprobe tun\", or use passt")
        }
        ErrorKind::PermissionDenied => {
            format!("{TUN}: permission denied; allow it with \"sudo chmod 0666 {TUN}\", or use passt")
        }
        _ => format!("{TUN}: {error}"),
    }
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use libc::TUNSETPERSIST;
    use vmm_sys_util::ioctl::ioctl_with_val;

    use super::*;

    #[test]
    fn what_another_program_has_is_not_opened_again_without_headers() {
        // SAFETY: it concerns this thread only.
        let alone = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
        if !alone || open(&TUN.into()).is_err() {
            skip::because(format_args!("no network namespaces or no {TUN} for this user"));
            return;
        }
        let way = Way::Tap { name: "tap0".to_owned(), flags: FLAGS | IFF_MULTI_QUEUE };
        assert_eq!(way.open().unwrap_err().raw_os_error(), Some(libc::ENODEV));
        // As ip-tuntap(8) makes it, which ends then.
        let (maker, _) = attach("tap0", IFF_TAP | IFF_NO_PI | IFF_MULTI_QUEUE).unwrap();
        // SAFETY: the argument is a number.
        check(unsafe { ioctl_with_val(&maker, TUNSETPERSIST, 1) }).unwrap();
        assert_eq!(way.open().unwrap_err().kind(), ErrorKind::ResourceBusy);
        drop(maker);
        let queues = [way.open().unwrap(), way.open().unwrap()];
        assert_eq!(flags_of(&queues[1]).unwrap().1 & IFF_VNET_HDR, IFF_VNET_HDR);
    }
}
