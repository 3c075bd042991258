//! Frames of every size that there is, from the host to a stock Linux, each compared with what was sent.
//!
//! What a host can send depends on what the interface is connected to. To a TAP its kernel gives frames of 14 bytes, an
//! Ethernet header (packet(7) refuses less), to 65535, the largest MTU of tun(4) behind such a header; and to 65539 with a
//! VLAN tag. A stream has no such limits: whoever is at its other end may send frames of 1 byte to 65553, which skiff takes.
//! What has no whole header the guest's kernel counts as an error. Here all that a TAP takes are tried, and of a stream's all
//! that a TAP does not take and some others; all of 1 to 65550 through either kind, without Linux and into other buffers than
//! its driver gives, in `devices/src/virtio/net/tests/sizes.rs`.

use std::path::Path;
use std::process::Command;

use tests::{Machine, Network, Wired, assets, network};

/// What a TAP takes only some of.
const SIZES: [&str; 3] = ["1-1600", "1633-65500/331", "65501-65550"];

/// An interface that hears all, and the peer that counts there.
fn count(guest: &mut Machine) {
    guest.ask("ip link set eth0 promisc on up");
    guest.ask("peer count eth0 >/tmp/count & until grep -q serving /tmp/count; do usleep 10000; done");
}

/// That each was as it was sent.
fn is_content(guest: &mut Machine) {
    assert_eq!(guest.ask("cat /tmp/count"), "serving");
}

#[test]
fn that_a_tap_takes() {
    let folder = tempfile::tempdir().unwrap();
    let Some(network) = Network::new() else { return };
    let Some(initrd) = network::initrd(folder.path()) else { return };
    network.tap("tap0", 1);
    network.run(["ip", "link", "set", "tap0", "mtu", "65521"]);
    let mut guest = Wired::new(&network, &initrd, 1).boot("tap=tap0");
    if !Wired::is_qemu() {
        assert_eq!(guest.ask("cat /sys/class/net/eth0/mtu"), "65521", "the TAP's");
    }
    count(&mut guest);
    let report = super::from_host(&network, "sizes tap0 14-65539");
    assert!(report.starts_with("intact: frames of 65526 sizes"), "{report}");
    is_content(&mut guest);
    assert_eq!(guest.power_off().code, Some(0));
}

#[test]
fn that_a_stream_takes() {
    let folder = tempfile::tempdir().unwrap();
    let Some(network) = Network::new() else { return };
    let Some(initrd) = network::initrd(folder.path()) else { return };
    let socket = folder.path().join("socket");
    let sender = network.start(Command::new(assets::peer()).args([Path::new("sizes"), &socket]).args(SIZES));
    let mut guest = Wired::new(&network, &initrd, 1).boot(&format!("socket={}", socket.display()));
    count(&mut guest);
    let report = sender.finish();
    assert!(report.starts_with("intact: frames of 1843 sizes"), "{report}");
    is_content(&mut guest);
    assert_eq!(guest.ask("cat /sys/class/net/eth0/statistics/rx_length_errors"), "13");
    assert_eq!(guest.power_off().code, Some(0));
}
