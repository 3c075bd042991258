//! Raw frames of every size, frames with headers that no sane driver writes, and what is counted of them.

use std::process::Command;

use tests::{Machine, Network, Wired, assets, network};

use super::{from_host, set_up, tcp};

/// Each size of usual frames, some of each page beyond, and the largest that tun(4) of Linux takes.
const SIZES: &str = "14-1600 1633-65535/331 65500-65535";

/// Entries of a queue, if nothing is said.
const RING: u64 = 256;

/// Frames that may follow when all is quiet, at most.
const WORDS: u64 = 16;

/// What the guest's kernel counted of eth0.
fn counted(guest: &mut Machine, counter: &str) -> u64 {
    guest.ask(&format!("cat /sys/class/net/eth0/statistics/{counter}")).parse().expect("a number")
}

fn come_back(queues: u32, vhost: bool) {
    let folder = tempfile::tempdir().unwrap();
    let Some(network) = Network::new() else { return };
    let Some(initrd) = network::initrd(folder.path()) else { return };
    network.tap("tap0", queues);
    network.run(["ip", "link", "set", "tap0", "mtu", "65521"]);
    let mut guest =
        Wired::new(&network, &initrd, queues).vhost(vhost).mtu(65535).option("--stats=json").boot("tap=tap0");
    guest.ask("ip link set eth0 up");
    guest.ask("peer echo eth0 >/tmp/echo & until grep -q serving /tmp/echo; do usleep 10000; done");
    let report = from_host(&network, &format!("frames tap0 {SIZES}"));
    assert!(report.starts_with("intact: frames of 1817 sizes"), "{report}");
    assert_eq!(guest.ask("cat /tmp/echo"), "serving");
    set_up(&mut guest);
    let report = guest.ask("peer odd eth0 4000");
    assert!(report.starts_with("sent: "), "{report}");
    let _peer = network.serve(super::PORT);
    guest.ask(&format!("peer {}", tcp("192.0.2.1", queues, 1 << 20, 1 << 20)));
    super::is_content(&mut guest);
    agrees(&network, guest, queues, vhost);
}

/// What each end counted.
fn agrees(network: &Network, mut guest: Machine, queues: u32, vhost: bool) {
    let queues = u64::from(queues);
    // Nobody has anything more to say.
    network.run(["ip", "link", "set", "tap0", "arp", "off"]);
    network.run(["ip", "addr", "flush", "dev", "tap0"]);
    guest.ask("ip link set eth0 arp off && ip addr flush dev eth0 && usleep 300000");
    let (received, sent) = (counted(&mut guest, "rx_packets"), counted(&mut guest, "tx_packets"));
    let (to_guest, from_guest) = (network.counter("tap0", "tx", "packets"), network.counter("tap0", "rx", "packets"));
    assert!(received <= to_guest, "{received} frames of {to_guest} received by the guest");
    // The guest counts a frame when it takes its buffers back, which it may put off: at most a ring's worth of each queue.
    assert!(from_guest <= sent + queues * RING, "{from_guest} frames of {sent} taken by the host");
    let ended = guest.power_off();
    assert_eq!(ended.code, Some(0));
    if Wired::is_qemu() || vhost {
        return;
    }
    let line = ended.messages.lines().find(|line| line.starts_with('{')).expect("a line of JSON");
    let report: serde_json::Value = serde_json::from_str(line).expect("JSON");
    let sum = |pointer: &str| -> u64 {
        let pairs = report["nets"][0]["pairs"].as_array().expect("pairs of queues");
        pairs.iter().map(|pair| pair.pointer(pointer).and_then(serde_json::Value::as_u64).expect(pointer)).sum()
    };
    // Until the end somebody may have said a word more: a router was looked for, a group joined.
    let (to_guest, from_guest) = (network.counter("tap0", "tx", "packets"), network.counter("tap0", "rx", "packets"));
    let frames = sum("/rx/frames");
    assert!((received..received + WORDS).contains(&frames), "{received} received: {line}");
    assert_eq!(sum("/tx/frames"), from_guest, "{line}");
    // The guest does not want every multicast frame.
    let dropped = |direction: &str| -> u64 {
        let reasons = ["length", "no-buffer", "offload", "filtered", "host", "link-down"];
        reasons.iter().map(|reason| sum(&format!("/{direction}/drops/{reason}"))).sum()
    };
    assert_eq!(frames + dropped("rx"), to_guest, "{line}");
    let taken = from_guest + dropped("tx");
    assert!((taken.saturating_sub(queues * RING + WORDS)..=taken).contains(&sent), "{sent} sent: {line}");
}

#[test]
fn of_every_size_come_back() {
    come_back(1, false);
}

#[test]
fn of_every_size_come_back_through_vhost() {
    if assets::has_vhost() {
        come_back(2, true);
    }
}

/// What the host sends while the guest has no driver is not kept for ever, and harms nobody.
#[test]
fn that_nobody_wants_are_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let Some(network) = Network::new() else { return };
    let Some(initrd) = network::initrd(folder.path()) else { return };
    network.tap("tap0", 1);
    let mut guest = Wired::new(&network, &initrd, 1).boot("tap=tap0");
    guest.ask("echo virtio0 >/sys/bus/virtio/drivers/virtio_net/unbind");
    drop(network.start(Command::new(assets::peer()).args(["flood", "tap0"])));
    guest.ask("echo virtio0 >/sys/bus/virtio/drivers/virtio_net/bind");
    set_up(&mut guest);
    from_host(&network, &tcp("192.0.2.2", 1, 1 << 20, 1 << 20));
    super::is_content(&mut guest);
    assert_eq!(guest.power_off().code, Some(0));
}
