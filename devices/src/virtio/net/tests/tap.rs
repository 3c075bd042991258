#![expect(unsafe_code, reason = "a network of its own for a test, and raw frames in it")]
//! A TAP device of this kernel as the back end, with a packet socket (packet(7)) at the host's end of it.

use std::fs::File;
use std::io::{Read, Write};
use std::mem;
use std::os::fd::FromRawFd;
use std::process::{Command, Stdio};
use std::sync::Mutex;

use libc::{IFF_DETACH_QUEUE, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, TUNGETIFF, TUNSETIFF, c_short};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};

use super::*;
use crate::virtio::net::tap::Tap;

/// For local experiments (IEEE 802, 9.2.3): what the kernel itself sends is of other types.
const TYPE: [u8; 2] = [0x88, 0xb5];

/// Gives this thread, and what it starts, a network of its own. If that cannot be, says so.
fn alone() -> bool {
    // SAFETY: it concerns this thread only.
    let alone = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
    let able = alone && File::options().read(true).write(true).open("/dev/net/tun").is_ok();
    if !able {
        skip::because("no network namespaces or no /dev/net/tun for this user");
    }
    able
}

/// A queue of the interface `tap0`, which is made if there is none.
fn queue(flags: i32) -> io::Result<File> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: all zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"tap0") {
        *to = i8::try_from(*from).unwrap();
    }
    request.ifr_ifru.ifru_flags = (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | flags) as c_short;
    // SAFETY: the kernel reads an ifreq; the last call takes numbers.
    let done = unsafe {
        ioctl_with_ref(&file, TUNSETIFF, &request) == 0
            && libc::fcntl(file.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) == 0
    };
    if done { Ok(file) } else { Err(io::Error::last_os_error()) }
}

fn ip(words: &str) {
    let run = Command::new("ip").args(words.split(' ')).stdin(Stdio::null()).status().expect("ip of iproute2");
    assert!(run.success(), "ip {words}");
}

/// What the host sends and sees on `tap0`, whole frames.
fn host() -> File {
    // SAFETY: the address is initialized, and the name ends with a NUL.
    unsafe {
        let socket = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(0x0003_u16.to_be()));
        assert!(socket >= 0, "{}", io::Error::last_os_error());
        let file = File::from_raw_fd(socket);
        let mut address: libc::sockaddr_ll = mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = 0x0003_u16.to_be();
        address.sll_ifindex = i32::try_from(libc::if_nametoindex(c"tap0".as_ptr())).unwrap();
        let len = mem::size_of_val(&address) as u32;
        assert_eq!(libc::bind(socket, (&raw const address).cast(), len), 0, "{}", io::Error::last_os_error());
        file
    }
}

/// A frame of ours to `MAC`.
fn ours(len: usize) -> Vec<u8> {
    let mut frame = frame(len).split_off(HEADER);
    frame[..12].copy_from_slice(&[MAC, [2, 0, 0, 0, 0, 1]].concat());
    frame[12..14].copy_from_slice(&TYPE);
    frame
}

/// Reads frames of ours until one is `expected`.
fn sees(host: &mut File, expected: &[u8]) {
    let mut frame = vec![0; 1 << 17];
    loop {
        let count = host.read(&mut frame).unwrap();
        if frame[12..14] == TYPE {
            assert!(frame[..count] == *expected, "another frame of {count} bytes");
            return;
        }
    }
}

/// Sends `frame` from the driver behind `header`.
fn send(bench: &mut Bench, header: [u8; HEADER], frame: &[u8]) {
    bench.fill(DATA, &[&header, frame].concat());
    bench.queues[1].add(&[readable(DATA, (HEADER + frame.len()) as u32)]);
    bench.queues[1].kick(1);
    bench.used(1, 1);
}

fn bench(tap: Tap) -> Bench {
    Bench::over(Backend::new(vec![Box::new(tap)], Offloads::ALL), PLAIN | MRG_RXBUF | SEGMENTED, 256)
}

#[test]
fn frames_pass_both_ways_and_bad_headers_are_counted() {
    if !alone() {
        return;
    }
    let mut tap = Tap::new(queue(0).unwrap(), None).unwrap();
    // All but UDP segmentation is as old as the kernels that are supported.
    let old = Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6 | Offloads::ECN | Offloads::UFO;
    assert!(tap.offloads().unwrap().contains(old));
    ip("link set tap0 mtu 65521 up");
    let (mut bench, mut host) = (bench(tap), host());
    bench.activate();
    for len in [14, 60, 1514, 9000, 65_535] {
        send(&mut bench, [0; HEADER], &ours(len));
        sees(&mut host, &ours(len));
    }
    let good = bench.counted().tx;
    assert_eq!((good.frames, good.drops), (5, [0; DROPS]));
    // NEEDS_CSUM past the end; a kind of segments that does not exist; TCPV4 with segments of 0 bytes.
    for bad in [
        [1, 0, 0, 0, 0, 0, 0xff, 0xff, 2, 0, 0, 0],
        [0, 0x70, 0, 0, 100, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0],
    ] {
        send(&mut bench, bad, &ours(60));
    }
    assert_eq!(bench.counted().tx.drops[DropReason::Host as usize], 3);
    send(&mut bench, [0; HEADER], &ours(61));
    sees(&mut host, &ours(61));
    // To the guest, among what the kernel has to say.
    for len in [60, 1514, 65_535] {
        for at in 0..100 {
            bench.queues[0].add(&[writable(DATA + 0x10_0000 + at * 0x1000, 0x1000)]);
        }
        bench.queues[0].kick(100);
        host.write_all(&ours(len)).unwrap();
        let mut received = Vec::new();
        let mut used = 0;
        while received.get(HEADER + 12..HEADER + 14) != Some(&TYPE[..]) {
            let start = DATA + 0x10_0000 + used * 0x1000;
            let first = bench.used(0, 1)[0].1;
            let count = u64::from(bench.bytes(start + 10, 1)[0]);
            received = bench.bytes(start, first as usize);
            for at in 1..count {
                let more = bench.used(0, 1)[0].1;
                received.extend(bench.bytes(start + at * 0x1000, more as usize));
            }
            used += count;
        }
        assert!(received[HEADER..] == ours(len), "{len}");
        bench.net.reset();
        for (index, queue) in (0..).zip(&mut bench.queues) {
            (queue.driver, queue.used) = (Driver::new(bench.memory.clone(), RINGS + index * 0x8000, 256), 0);
        }
        bench.activate();
    }
}

#[test]
fn an_interface_that_goes_takes_the_link_with_it() {
    if !alone() {
        return;
    }
    // The worker's thread may be in another network: what it opens again is opened here.
    let fresh: Arc<Mutex<Option<File>>> = Arc::default();
    let given = fresh.clone();
    let reopen = move || given.lock().unwrap().take().ok_or_else(|| io::ErrorKind::NotFound.into());
    let tap = Tap::new(queue(0).unwrap(), Some(Box::new(reopen))).unwrap();
    let mut bench = bench(tap);
    bench.activate();
    wait(&bench.lines.config);
    assert_eq!(status(&bench), 0, "it is not up yet");
    ip("link set tap0 up");
    wait(&bench.lines.config);
    assert_eq!(status(&bench), 1);
    send(&mut bench, [0; HEADER], &ours(60));
    ip("link set tap0 down");
    send(&mut bench, [0; HEADER], &ours(61));
    wait(&bench.lines.config);
    ip("link set tap0 up");
    wait(&bench.lines.config);
    assert_eq!((status(&bench), bench.counted().tx.drops[DropReason::Link as usize]), (1, 1));
    // Removed: nobody sends, and yet it shows. There is room, also for what the kernel itself sends.
    (0..100).for_each(|_| _ = bench.queues[0].add(&[writable(DATA + 0x10_0000, 0x1000)]));
    bench.queues[0].kick(100);
    ip("link delete tap0");
    wait(&bench.lines.config);
    assert_eq!(status(&bench), 0);
    *fresh.lock().unwrap() = Some(queue(0).unwrap());
    ip("link set tap0 up");
    wait(&bench.lines.config);
    let mut host = host();
    send(&mut bench, [0; HEADER], &ours(62));
    sees(&mut host, &ours(62));
}

#[test]
fn queues_take_part_or_not() {
    if !alone() {
        return;
    }
    let mut taps = [(); 2].map(|()| Tap::new(queue(IFF_MULTI_QUEUE).unwrap(), None).unwrap());
    ip("link set tap0 up");
    let carry = |host: &mut File, taps: &mut [Tap; 2]| {
        host.write_all(&ours(60)).unwrap();
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap());
        let mut list = super::super::buffers::BufferList::new(memory, 0);
        assert!(list.push(GuestAddress(0), 0x10000));
        let mut got = [0; 2];
        for (tap, got) in taps.iter_mut().zip(&mut got) {
            while tap.receive(&list.first(1)).is_ok() {
                *got += 1;
            }
        }
        got
    };
    let mut host = host();
    for enabled in [0, 1, 0] {
        taps[enabled].set_enabled(true).unwrap();
        taps[1 - enabled].set_enabled(false).unwrap();
        let got = carry(&mut host, &mut taps);
        assert!(got[enabled] >= 1 && got[1 - enabled] == 0, "{enabled}: {got:?}");
        assert!(taps.iter_mut().all(Port::is_up));
    }
}

#[test]
fn queues_that_come_back_do_what_they_were_told() {
    if !alone() {
        return;
    }
    let fresh = <[Arc<Mutex<Option<File>>>; 2]>::default();
    let mut taps = fresh.clone().map(|given| {
        let reopen = move || given.lock().unwrap().take().ok_or_else(|| io::ErrorKind::NotFound.into());
        Tap::new(queue(IFF_MULTI_QUEUE).unwrap(), Some(Box::new(reopen))).unwrap()
    });
    taps[0].set_offloads(Offloads::CSUM).unwrap();
    ip("link delete tap0");
    assert!(!taps.iter_mut().any(Port::is_up));
    assert!(taps[1].set_enabled(false).is_err());
    for given in &fresh {
        *given.lock().unwrap() = Some(queue(IFF_MULTI_QUEUE).unwrap());
    }
    ip("link set tap0 up");
    assert!(taps.iter_mut().all(Port::is_up));
    let features = Command::new("ethtool").args(["-k", "tap0"]).output().expect("ethtool").stdout;
    let features = String::from_utf8(features).unwrap();
    assert!(features.contains("tx-checksum-ip-generic: on"), "{features}");
    // SAFETY: all zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    let takes_part = taps.each_ref().map(|tap| {
        // SAFETY: the kernel fills in an ifreq.
        let flags = unsafe {
            assert_eq!(ioctl_with_mut_ref(&tap.file(), TUNGETIFF, &mut request), 0);
            request.ifr_ifru.ifru_flags
        };
        flags & IFF_DETACH_QUEUE as c_short == 0
    });
    assert_eq!(takes_part, [true, false]);
}
