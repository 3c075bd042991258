//! TAPs as others made them: handed in open, and without virtio's headers.

use tests::{Machine, Network, Wired, assets, network};

use super::{from_host, is_content, set_up, tcp};

const MIB: u32 = 1 << 20;

/// Ping and transfers, begun by either end, with segments for the other to make.
fn meets(network: &Network, guest: &mut Machine) {
    set_up(guest);
    let report = guest.ask("ping -c 2 -i 0.1 -W 20 -s 1400 192.0.2.1");
    assert!(report.contains("2 packets received, 0% packet loss"), "{report}");
    let offloads = guest.ask("ethtool -k eth0 | grep -E '^(tx-checksumming|tcp-segmentation-offload):'");
    assert!(offloads.lines().all(|line| line.ends_with(": on")), "{offloads}");
    guest.ask(&format!("peer {}", tcp("192.0.2.1", 1, MIB / 2, MIB / 2)));
    from_host(network, &tcp("[2001:db8::2]", 1, MIB / 2, MIB / 2));
    from_host(network, "udp 192.0.2.2:7000 16 8 60000");
    is_content(guest);
}

/// A queue of a TAP of one, and one of a TAP of several.
#[test]
fn that_are_handed_in_open() {
    let folder = tempfile::tempdir().unwrap();
    for (queues, flags) in [(1, "tap,no_pi,vnet_hdr"), (2, "tap,no_pi,vnet_hdr,multi_queue")] {
        let Some(network) = Network::new() else { return };
        let Some(initrd) = network::initrd(folder.path()) else { return };
        network.tap("tap0", queues);
        let peer = assets::peer();
        let starter = [peer.to_str().unwrap(), "hand-in", "tap0", flags, "3", "--"];
        let mut guest = Wired::new(&network, &initrd, 1).started_by(&starter).boot("fd=3");
        let _peer = network.serve(super::PORT);
        meets(&network, &mut guest);
        assert_eq!(guest.power_off().code, Some(0));
    }
}

/// As `ip tuntap add` makes one. Whoever opens a TAP says whether its frames have headers (TUNSETIFF), so skiff has them all the
/// same; what the host's kernel leaves undone for a guest it does itself again for whoever comes next.
#[test]
fn that_had_no_headers() {
    let folder = tempfile::tempdir().unwrap();
    let Some(network) = Network::new() else { return };
    let Some(initrd) = network::initrd(folder.path()) else { return };
    network.run("ip tuntap add tap0 mode tap".split(' '));
    network.run("ip addr add 192.0.2.1/24 dev tap0".split(' '));
    network.run("ip addr add 2001:db8::1/64 dev tap0 nodad".split(' '));
    network.run("ip link set tap0 up".split(' '));
    // What is on, and not what somebody would like to be.
    let features = || network.run(["ethtool", "-k", "tap0"]).replace(" [requested on]", "");
    let before = features();
    let mut guest = Wired::new(&network, &initrd, 1).boot("tap=tap0");
    let _peer = network.serve(super::PORT);
    meets(&network, &mut guest);
    assert_ne!(features(), before, "the guest makes segments and checksums");
    assert_eq!(guest.power_off().code, Some(0));
    assert_eq!(features(), before);
}
