//! Raw Ethernet frames through a packet socket (packet(7)): of every size, there and back; and with headers for the
//! network device that no sane program would send.
#![expect(unsafe_code, reason = "std knows no packet sockets")]

use std::collections::BTreeSet;
use std::ffi::CString;
use std::io::ErrorKind;
use std::mem;
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::content::{Content, PIECE};

/// Destination, source and type.
const HEADER: usize = 14;

/// For experiments of one's own (IEEE 802, Local Experimental EtherType 1).
pub(crate) const ETHERTYPE: u16 = 0x88b5;

const ASKING: u8 = 1;
const ANSWERING: u8 = 2;

/// Frames under way at once, and their bytes, unless it is one: sockets keep no more.
const WINDOW: usize = 16;
const WINDOW_BYTES: usize = 32 << 10;
const TRIES: u32 = 20;
const PATIENCE: Duration = Duration::from_millis(500);

/// Not in the libc crate: `PACKET_VNET_HDR` of linux/if_packet.h.
const PACKET_VNET_HDR: libc::c_int = 15;

/// A packet socket for frames of our type on one interface. What it sends and receives are whole frames.
pub(crate) fn open(interface: &str, with_vnet_header: bool) -> anyhow::Result<UdpSocket> {
    let name = CString::new(interface)?;
    // SAFETY: a string that ends with a zero.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    ensure!(index != 0, "no interface {interface}");
    let protocol = ETHERTYPE.to_be();
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(protocol)) };
    ensure!(fd >= 0, "a packet socket: {}", std::io::Error::last_os_error());
    // SAFETY: just opened, and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    if with_vnet_header {
        let on: libc::c_int = 1;
        let size = mem::size_of_val(&on) as libc::socklen_t;
        // SAFETY: the kernel reads an int.
        let result = unsafe { libc::setsockopt(fd, libc::SOL_PACKET, PACKET_VNET_HDR, (&raw const on).cast(), size) };
        ensure!(result == 0, "PACKET_VNET_HDR: {}", std::io::Error::last_os_error());
    }
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: protocol,
        sll_ifindex: index.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let size = mem::size_of_val(&address) as libc::socklen_t;
    // SAFETY: an address of that size.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) };
    ensure!(result == 0, "binding to {interface}: {}", std::io::Error::last_os_error());
    // What std does to a datagram socket are system calls that know no families.
    Ok(UdpSocket::from(socket))
}

fn frame(content: &Content, who: u8, size: usize) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, who]);
    frame.extend(ETHERTYPE.to_be_bytes());
    frame.extend(&content.at(size as u64, 0)[..size - HEADER]);
    frame
}

/// Answers each intact frame with one of the same size, for ever; says what is not intact.
pub(crate) fn echo(interface: &str) -> anyhow::Result<()> {
    let (content, socket) = (Content::new(), open(interface, false)?);
    println!("serving");
    let mut buffer = vec![0; 2 * PIECE];
    loop {
        let size = match socket.recv(&mut buffer) {
            // While the link is down.
            Err(error) => {
                println!("receiving: {error}");
                continue;
            }
            Ok(size) => size,
        };
        if size >= HEADER && buffer[..size] == frame(&content, ASKING, size) {
            // A full queue is a loss like any other.
            let _ = socket.send(&frame(&content, ANSWERING, size));
        } else {
            println!("a frame of {size} bytes is not what was sent");
        }
    }
}

/// Sends frames of all of `sizes` until each was answered.
pub(crate) fn ask(interface: &str, sizes: &[usize]) -> anyhow::Result<()> {
    let (content, socket) = (Content::new(), open(interface, false)?);
    socket.set_read_timeout(Some(PATIENCE))?;
    let (mut again, mut rest) = (0, sizes);
    while !rest.is_empty() {
        let mut bytes = 0;
        let fits = |size: &&usize| {
            bytes += **size;
            bytes <= WINDOW_BYTES
        };
        let count = rest.iter().take(WINDOW).take_while(fits).count().max(1);
        let window;
        (window, rest) = rest.split_at(count);
        ensure!(window.iter().all(|&size| (HEADER..PIECE).contains(&size)), "sizes from {HEADER} to {}", PIECE - 1);
        let mut missing: BTreeSet<usize> = window.iter().copied().collect();
        for attempt in 0..TRIES {
            again += if attempt == 0 { 0 } else { missing.len() };
            for &size in &missing {
                socket.send(&frame(&content, ASKING, size)).with_context(|| format!("a frame of {size} bytes"))?;
            }
            collect(&socket, &content, &mut missing)?;
            if missing.is_empty() {
                break;
            }
        }
        ensure!(missing.is_empty(), "frames never answered: {missing:?}");
    }
    println!("intact: frames of {} sizes; {again} sent again", sizes.len());
    Ok(())
}

/// Sends frames of all sizes up to 1514 bytes, over and over, until the interface is gone or down. There are pauses, or with
/// one CPU nobody else would get anywhere.
pub(crate) fn flood(interface: &str) -> anyhow::Result<()> {
    let (content, socket) = (Content::new(), open(interface, false)?);
    println!("serving");
    for size in (HEADER..=1514).cycle() {
        match socket.send(&frame(&content, ASKING, size)) {
            // The queue of the interface is full.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
            result => _ = result?,
        }
        if size % WINDOW == 0 {
            thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(())
}

/// Takes answers until none is missing or none has come for a while.
fn collect(socket: &UdpSocket, content: &Content, missing: &mut BTreeSet<usize>) -> anyhow::Result<()> {
    let mut buffer = vec![0; 2 * PIECE];
    while !missing.is_empty() {
        match socket.recv(&mut buffer) {
            Ok(size) => {
                ensure!(size >= HEADER && buffer[..size] == frame(content, ANSWERING, size), "a wrong frame of {size}");
                missing.remove(&size);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error).context("receiving"),
        }
    }
    Ok(())
}

/// Sends `count` frames of random size and content whose virtio_net_hdr is random too. The guest's kernel takes some.
pub(crate) fn odd_headers(interface: &str, count: u32) -> anyhow::Result<()> {
    let (content, socket) = (Content::new(), open(interface, true)?);
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) % below
    };
    let (mut taken, mut refused) = (0_u32, 0_u32);
    for number in 0..count {
        let ethertype = [0x0800_u16, 0x86dd, ETHERTYPE][random(3) as usize];
        let size = HEADER + random(if number % 4 == 0 { 9000 } else { 1500 }) as usize;
        let near = |limit: u64, random: &mut dyn FnMut(u64) -> u64| match random(4) {
            0 => random(1 << 16) as u16,
            1 => 0,
            _ => random(limit) as u16,
        };
        // Flags, GSO type with and without the ECN bit, then four fields of 16 bits (virtio 1.2, 5.1.6).
        let mut message = vec![random(4) as u8, [0, 1, 3, 4, 5, 0x81, 0x84, 0xff][random(8) as usize]];
        let header_length = near(size as u64 + 1, &mut random);
        let segment = near(1500, &mut random);
        let start = near(size as u64 + 1, &mut random);
        let offset = near(32, &mut random);
        for field in [header_length, segment, start, offset] {
            message.extend(field.to_le_bytes());
        }
        message.extend([0xff; 6]);
        message.extend([2, 0, 0, 0, 0, ASKING]);
        message.extend(ethertype.to_be_bytes());
        // Something like an IPv4 header with TCP or UDP in it, so that more of the kernel looks further.
        let mut payload = content.at(u64::from(number), 0)[..size - HEADER].to_vec();
        for (place, value) in [(0, 0x45), (9, [6, 17][random(2) as usize])] {
            if let Some(byte) = payload.get_mut(place) {
                *byte = value;
            }
        }
        message.extend(payload);
        if socket.send(&message).is_ok() { taken += 1 } else { refused += 1 }
    }
    ensure!(taken > count / 100, "the kernel took {taken} of {count}");
    println!("sent: {taken} frames with odd headers; the guest's kernel refused {refused}");
    Ok(())
}
