//! A macvtap: on a cable to the host, by its name and by its open file, moved by skiff and by the kernel.

use tests::{Machine, Network, Wired, assets, network};

use super::{from_host, is_content, set_up, tcp};

const MIB: u32 = 1 << 20;

/// One of this test.
const ADDRESS: &str = "52:54:00:0a:0b:0c";

/// Ping and transfers, begun by either end.
fn meets(network: &Network, guest: &mut Machine) {
    assert_eq!(guest.ask("cat /sys/class/net/eth0/address"), ADDRESS, "it hears no other");
    for there in ["192.0.2.1", "2001:db8::1"] {
        let report = guest.ask(&format!("ping -c 2 -i 0.1 -W 20 -s 1400 {there}"));
        assert!(report.contains("2 packets received, 0% packet loss"), "{report}");
    }
    guest.ask(&format!("peer {}", tcp("192.0.2.1", 1, MIB, MIB)));
    from_host(network, &tcp("[2001:db8::2]", 1, MIB, MIB));
    from_host(network, "udp 192.0.2.2:7000 16 8 60000");
}

#[test]
fn carries_frames_and_may_go_and_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let Some(network) = Network::new() else { return };
    let Some(initrd) = network::initrd(folder.path()) else { return };
    let Some(()) = network.cable() else { return };
    let Some(_) = network.macvtap("macvtap0", ADDRESS) else { return };
    let mut guest = Wired::new(&network, &initrd, 1).boot("tap=macvtap0");
    let _peer = network.serve(super::PORT);
    set_up(&mut guest);
    meets(&network, &mut guest);
    let carrier = |state: u8| format!("until [ $(cat /sys/class/net/eth0/carrier) = {state} ]; do usleep 10000; done");
    network.run(["ip", "link", "delete", "macvtap0"]);
    guest.ask(&carrier(0));
    // With another number, and so another file.
    let Some(_) = network.macvtap("macvtap0", ADDRESS) else { return };
    guest.ask(&carrier(1));
    meets(&network, &mut guest);
    is_content(&mut guest);
    assert_eq!(guest.power_off().code, Some(0));
}

/// As a shell hands it in: "3<>/dev/tap5".
#[test]
fn is_handed_in_open() {
    if !assets::has_vhost() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(network) = Network::new() else { return };
    let Some(initrd) = network::initrd(folder.path()) else { return };
    let Some(()) = network.cable() else { return };
    let Some(file) = network.macvtap("macvtap0", ADDRESS) else { return };
    let open = format!("exec \"$@\" 3<>{}", file.display());
    let mut guest = Wired::new(&network, &initrd, 1).vhost(true).started_by(&["sh", "-c", &open, "sh"]).boot("fd=3");
    let _peer = network.serve(super::PORT);
    set_up(&mut guest);
    meets(&network, &mut guest);
    is_content(&mut guest);
    assert_eq!(guest.power_off().code, Some(0));
}

/// When its cable takes less than the guest has to send: that is no reason to take the link down.
#[test]
fn is_there_while_it_is_full() {
    let folder = tempfile::tempdir().unwrap();
    let Some(network) = Network::new() else { return };
    let Some(initrd) = network::initrd(folder.path()) else { return };
    let Some(()) = network.cable() else { return };
    let Some(file) = network.macvtap("macvtap0", ADDRESS) else { return };
    let open = format!("exec {} full 3 -- \"$@\" 3<>{}", assets::peer().display(), file.display());
    let mut guest = Wired::new(&network, &initrd, 1).started_by(&["sh", "-c", &open, "sh"]).boot("fd=3");
    guest.ask("ip link set eth0 up && ip addr add 192.0.2.2/24 dev eth0");
    let carrier = "cd /sys/class/net/eth0; cat carrier carrier_down_count";
    let before = guest.ask(carrier);
    assert!(before.starts_with('1'), "{before}");
    // Some looks of skiff's.
    guest.ask("sleep 3");
    assert_eq!(guest.ask(carrier), before);
    assert_eq!(guest.power_off().code, Some(0));
}
