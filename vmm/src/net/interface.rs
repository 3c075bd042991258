#![expect(unsafe_code, reason = "the ioctls of network interfaces")]
//! The interfaces of the host (netdevice(7)): what they are called, and how a new one gets its address. By ioctls, which see
//! the network namespace skiff is in; /sys may show another. Main thread; looking one up also on workers' threads.

use std::fs;
use std::io;
use std::mem;
use std::net::{Ipv4Addr, UdpSocket};

use libc::{AF_INET, IFF_RUNNING, IFF_UP, c_short, ifreq, sockaddr, sockaddr_in};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};

use super::mac::Mac;

/// Hardware addresses of Ethernet (net/if_arp.h).
const ARPHRD_ETHER: u16 = 1;

/// An interface that existed when it was looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Interface {
    /// Its name.
    pub(super) name: String,
    /// Its number.
    pub(super) index: u32,
}

impl Interface {
    /// # Errors
    /// ENODEV if there is no such interface.
    pub(super) fn find(name: &str) -> io::Result<Self> {
        let mut request = request(name);
        get(libc::SIOCGIFINDEX, &mut request)?;
        // SAFETY: the kernel filled in this member.
        let index = unsafe { request.ifr_ifru.ifru_ifindex };
        Ok(Self { name: name.to_owned(), index: index.cast_unsigned() })
    }

    /// Whether frames can pass.
    pub(super) fn is_up(&self) -> io::Result<bool> {
        let mut request = request(&self.name);
        get(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: the kernel filled in this member.
        Ok(unsafe { request.ifr_ifru.ifru_flags } & IFF_UP as c_short != 0)
    }

    /// Its hardware address, if it is one that an interface of a guest can have.
    pub(super) fn mac(&self) -> io::Result<Option<Mac>> {
        let mut request = request(&self.name);
        get(libc::SIOCGIFHWADDR, &mut request)?;
        // SAFETY: the kernel filled in this member.
        let address = unsafe { request.ifr_ifru.ifru_hwaddr };
        let octets = address.sa_data.first_chunk().map(|octets| octets.map(i8::cast_unsigned));
        Ok(octets.and_then(Mac::from_octets).filter(|_| address.sa_family == ARPHRD_ETHER))
    }

    /// Gives it an address in a network of `bits` bits.
    pub(super) fn set_address(&self, address: Ipv4Addr, bits: u8) -> io::Result<()> {
        let mask = Ipv4Addr::from(u32::MAX << (32 - u32::from(bits)));
        for (what, address) in [(libc::SIOCSIFADDR, address), (libc::SIOCSIFNETMASK, mask)] {
            let mut request = request(&self.name);
            request.ifr_ifru.ifru_addr = socket_address(address);
            set(what, &request)?;
        }
        if bits == 31 {
            // A network of two has no address for everybody (RFC 3021); the kernel keeps that of an older kind of network.
            let mut request = request(&self.name);
            request.ifr_ifru.ifru_addr = socket_address(Ipv4Addr::UNSPECIFIED);
            set(libc::SIOCSIFBRDADDR, &request)?;
        }
        Ok(())
    }

    /// Its MTU in bytes.
    pub(super) fn mtu(&self) -> io::Result<u32> {
        let mut request = request(&self.name);
        get(libc::SIOCGIFMTU, &mut request)?;
        // SAFETY: the kernel filled in this member.
        Ok(unsafe { request.ifr_ifru.ifru_mtu }.cast_unsigned())
    }

    /// Sets its MTU in bytes.
    pub(super) fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        let mut request = request(&self.name);
        request.ifr_ifru.ifru_mtu = mtu.into();
        set(libc::SIOCSIFMTU, &request)
    }

    /// Lets frames pass.
    pub(super) fn bring_up(&self) -> io::Result<()> {
        let mut request = request(&self.name);
        request.ifr_ifru.ifru_flags = (IFF_UP | IFF_RUNNING) as c_short;
        set(libc::SIOCSIFFLAGS, &request)
    }
}

/// The names of all interfaces, in no order.
pub(super) fn names() -> Vec<String> {
    // Two lines of headings, then "  name: numbers" (proc_pid_net(5)).
    let table = fs::read_to_string("/proc/net/dev").unwrap_or_default();
    table.lines().skip(2).filter_map(|line| Some(line.rsplit_once(':')?.0.trim().to_owned())).collect()
}

/// A request about the interface `name`, which has at most 15 bytes; longer ones are cut off.
pub(super) fn request(name: &str) -> ifreq {
    // SAFETY: all zero is a valid ifreq.
    let mut request: ifreq = unsafe { mem::zeroed() };
    let end = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..end].iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request
}

/// The name in a request that the kernel filled in.
pub(super) fn name(request: &ifreq) -> String {
    let bytes = request.ifr_name.iter().take_while(|&&letter| letter != 0).map(|letter| letter.cast_unsigned());
    String::from_utf8_lossy(&bytes.collect::<Vec<_>>()).into_owned()
}

fn socket_address(address: Ipv4Addr) -> sockaddr {
    // SAFETY: all zero is a valid sockaddr_in.
    let mut internet: sockaddr_in = unsafe { mem::zeroed() };
    internet.sin_family = AF_INET as u16;
    internet.sin_addr.s_addr = u32::from(address).to_be();
    // SAFETY: both have 16 bytes, all of which may have any value.
    unsafe { mem::transmute::<sockaddr_in, sockaddr>(internet) }
}

fn get(what: libc::c_ulong, request: &mut ifreq) -> io::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    // SAFETY: these requests read the name in an ifreq and fill in the rest.
    check(unsafe { ioctl_with_mut_ref(&socket, what, request) })
}

fn set(what: libc::c_ulong, request: &ifreq) -> io::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    // SAFETY: these requests read an ifreq.
    check(unsafe { ioctl_with_ref(&socket, what, request) })
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_interface_is_there() {
        assert!(names().contains(&"lo".to_owned()));
        let loopback = Interface::find("lo").unwrap();
        // The kernel makes it first in each network namespace.
        assert_eq!(loopback.index, 1);
        // As it is made (netdevice(7)), and until somebody changes it.
        assert_eq!(loopback.mtu().unwrap(), 65536);
        // It is no Ethernet.
        assert_eq!(loopback.mac().unwrap(), None);
    }

    #[test]
    fn an_interface_that_is_not_there() {
        let missing = Interface::find("no-such-thing").unwrap_err();
        assert_eq!(missing.raw_os_error(), Some(libc::ENODEV));
        let gone = Interface { name: "no-such-thing".into(), index: 9 };
        assert_eq!(gone.is_up().unwrap_err().raw_os_error(), Some(libc::ENODEV));
    }

    #[test]
    fn names_are_cut_off_where_the_kernel_ends_them() {
        assert_eq!(name(&request("sixteen-letters-")), "sixteen-letters");
        assert_eq!(name(&request("tap0")), "tap0");
    }
}
