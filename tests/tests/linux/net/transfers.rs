//! What passes through a TAP interface is what was sent, whoever moves it and whatever the guest lets the device do.

use std::path::Path;

use tests::{Machine, Network, Wired, assets, network};

use super::{answer, dhcp_server, from_host, is_content, set_up_ipv6, tcp};

const MIB: u32 = 1 << 20;

/// Some of what ethtool(8) can switch of a virtio-net device on a TAP, since Linux 5.10 at least.
const OFFLOADS: [&str; 8] = [
    "tx-checksum-ip-generic",
    "tx-scatter-gather",
    "tx-tcp-segmentation",
    "tx-tcp-ecn-segmentation",
    "tx-tcp6-segmentation",
    "tx-generic-segmentation",
    "rx-gro",
    "rx-gro-hw",
];

/// DHCP, and ping both ways over both protocols.
fn meets(network: &Network, guest: &mut Machine, folder: &Path) {
    let _server = dhcp_server(network, folder);
    guest.ask("ip link set eth0 up && udhcpc -i eth0 -n -q -f -t 10");
    assert!(guest.ask("ip -4 addr show dev eth0").contains("inet 192.0.2.2/24 "), "the server's address");
    assert_eq!(guest.ask("ip route | grep default"), "default via 192.0.2.1 dev eth0");
    assert_eq!(guest.ask("cat /etc/resolv.conf"), "nameserver 192.0.2.53");
    set_up_ipv6(guest);
    for (there, back) in [("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")] {
        let report = guest.ask(&format!("ping -c 3 -i 0.1 -W 20 -s 1400 {there}"));
        assert!(report.contains("3 packets received, 0% packet loss"), "{report}");
        let busybox = assets::guest("busybox");
        let report = network.run([busybox.to_str().unwrap(), "ping", "-c", "3", "-i", "0.1", "-W", "20", back]);
        assert!(report.contains("3 packets received, 0% packet loss"), "{report}");
    }
}

/// Transfers over TCP and UDP begun by either end, in both directions at once.
fn exchanges(network: &Network, guest: &mut Machine, streams: u32) {
    for host in ["192.0.2.1", "[2001:db8::1]"] {
        guest.ask(&format!("peer {}", tcp(host, streams, MIB, MIB)));
    }
    from_host(network, &tcp("192.0.2.2", streams, MIB / 2, MIB / 2));
    // Those above the MTU travel in fragments.
    guest.ask("peer udp 192.0.2.1:7000 32 8 65507");
    from_host(network, "udp [2001:db8::2]:7000 32 8 65487");
}

/// The same file by tools that know nothing of each other: netcat and sha256sum of busybox.
fn carries_a_file(network: &Network, guest: &mut Machine, folder: &Path) {
    let busybox = assets::guest("busybox");
    let (busybox, file) = (busybox.display(), folder.join("file"));
    network.run(["sh", "-c", &format!("head -c 3000001 /dev/urandom >{}", file.display())]);
    let sum = network.run(["sh", "-c", &format!("sha256sum <{}", file.display())]);
    // Something to read that never ends, or it would hang up at once.
    guest.ask("mkfifo /tmp/in; (nc -l -p 7001 >/tmp/file <>/tmp/in; touch /tmp/done) 2>/dev/null &");
    guest.ask("until netstat -ltn | grep -q :7001; do usleep 10000; done");
    network.run(["sh", "-c", &format!("{busybox} nc 192.0.2.2 7001 <{}", file.display())]);
    guest.ask("until [ -e /tmp/done ]; do usleep 10000; done");
    assert_eq!(guest.ask("sha256sum </tmp/file"), sum.trim());
}

/// All that the guest's kernel can switch of the interface, one by one and back again, whatever it has; with transfers after each.
fn switches_offloads(network: &Network, guest: &mut Machine) {
    let shown = guest.ask("ethtool -k eth0");
    let features: Vec<(&str, &str)> = shown.lines().filter_map(switchable).collect();
    assert!(OFFLOADS.iter().all(|name| features.contains(&(*name, "on"))), "{shown}");
    for (feature, before) in features {
        for state in [if before == "on" { "off" } else { "on" }, before] {
            guest.ask(&format!("ethtool -K eth0 {feature} {state}"));
            guest.ask(&format!("peer {}", tcp("192.0.2.1", 1, MIB / 4, MIB / 4)));
            guest.ask(&format!("peer {}", tcp("[2001:db8::1]", 1, MIB / 4, MIB / 4)));
            from_host(network, "udp 192.0.2.2:7000 8 1000 20000");
        }
    }
    assert_eq!(guest.ask("ethtool -k eth0"), shown, "all as it was");
}

/// The kernel's name of a feature that can be switched and whether it is on, from a line of `ethtool -k`: "name: on", with
/// "[fixed]" behind it otherwise. What stands for several features, which follow, is none.
fn switchable(line: &str) -> Option<(&str, &str)> {
    let (name, state) = line.trim().split_once(": ")?;
    let name = match name {
        "rx-checksumming" => "rx-checksum",
        "generic-segmentation-offload" => "tx-generic-segmentation",
        "generic-receive-offload" => "rx-gro",
        "large-receive-offload" => "rx-lro",
        "tx-checksumming" | "scatter-gather" | "tcp-segmentation-offload" => return None,
        name => name,
    };
    ["on", "off"].contains(&state).then_some((name, state))
}

/// Packets of the smallest, the usual and the largest size of each end.
fn changes_mtu(network: &Network, guest: &mut Machine) {
    // tun(4) of Linux takes Ethernet frames of at most 65535 bytes, 14 of them header; the driver's limit is 65535.
    for (mtu, most) in [("576", "576"), ("1280", "1280"), ("9000", "9000"), ("65535", "65521"), ("1500", "1500")] {
        guest.ask(&format!("ip link set eth0 mtu {mtu}"));
        network.run(["ip", "link", "set", "tap0", "mtu", most]);
        guest.ask(&format!("peer {}", tcp("192.0.2.1", 1, MIB / 2, MIB / 2)));
        from_host(network, "udp 192.0.2.2:7000 8 1000 60000");
        if mtu == "65535" {
            // The largest packets that there are, whole: from the host one of its MTU, from the guest one of 65535 bytes.
            from_host(network, "udp 192.0.2.2:7000 2 65493 65493");
            guest.ask("peer udp 192.0.2.1:7000 2 65507 65507");
        }
    }
}

/// What the control queue does beside pairs and offloads: another address, and frames to others.
fn changes_filters(network: &Network, guest: &mut Machine) {
    let before = guest.ask("cat /sys/class/net/eth0/address");
    // The host has to be told, or it looks for the old one for a while.
    for address in ["52:54:00:00:00:99", &before] {
        guest.ask(&format!("ip link set eth0 address {address}"));
        network.run(["ip", "neigh", "flush", "dev", "tap0"]);
        from_host(network, &tcp("192.0.2.2", 1, MIB / 4, MIB / 4));
    }
    // To an address that is not the guest's: it comes only when the guest wants all.
    network.run("ip neigh replace 192.0.2.9 lladdr 52:54:00:00:00:09 dev tap0".split(' '));
    let seen = |guest: &mut Machine| {
        guest.ask("cat /sys/class/net/eth0/statistics/rx_packets").parse::<u64>().expect("a number")
    };
    for (mode, comes) in [("off", false), ("on", true), ("off", false)] {
        guest.ask(&format!("ip link set eth0 promisc {mode}"));
        let before = seen(guest);
        from_host(network, "shout 192.0.2.9:9 500");
        // What was sent before this has come, or will not.
        guest.ask("ping -c 1 -W 20 192.0.2.1");
        let came = seen(guest) - before >= 500;
        assert_eq!(came, comes, "promisc {mode}");
    }
}

/// All of it, with this many pairs of queues.
fn transfers(queues: u32, vhost: bool) {
    let folder = tempfile::tempdir().unwrap();
    let Some(network) = Network::new() else { return };
    let Some(initrd) = network::initrd(folder.path()) else { return };
    network.tap("tap0", queues);
    let mut guest = Wired::new(&network, &initrd, queues).vhost(vhost).boot("tap=tap0");
    let _peer = network.serve(super::PORT);
    meets(&network, &mut guest, folder.path());
    answer(&mut guest);
    let channels = guest.run("ethtool -l eth0 | grep Combined");
    let pairs: Vec<_> = channels.text.lines().filter_map(|line| line.split_whitespace().nth(1)).collect();
    assert_eq!(pairs, [queues.to_string(), queues.to_string()], "most and current: {}", channels.text);
    exchanges(&network, &mut guest, queues);
    if queues == 1 {
        carries_a_file(&network, &mut guest, folder.path());
        switches_offloads(&network, &mut guest);
        changes_mtu(&network, &mut guest);
        if !vhost {
            changes_filters(&network, &mut guest);
        }
    } else {
        guest.ask("ethtool -L eth0 combined 1");
        from_host(&network, &tcp("192.0.2.2", 2, MIB / 2, MIB / 2));
        guest.ask(&format!("ethtool -L eth0 combined {queues}"));
        from_host(&network, &tcp("192.0.2.2", queues, MIB / 2, MIB / 2));
    }
    is_content(&mut guest);
    assert_eq!(guest.power_off().code, Some(0));
}

#[test]
fn through_one_pair_of_queues() {
    transfers(1, false);
}

#[test]
fn through_four_pairs_of_queues() {
    transfers(4, false);
}

#[test]
fn through_vhost() {
    if assets::has_vhost() {
        transfers(1, true);
    }
}

#[test]
fn through_four_pairs_of_queues_of_vhost() {
    if assets::has_vhost() {
        transfers(4, true);
    }
}
