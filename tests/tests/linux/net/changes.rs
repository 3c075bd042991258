//! What changes under a running transfer: the link goes down and up at either end, the driver leaves and comes back, the
//! host's interface is removed.

use std::process::Command;
use std::thread;
use std::time::Duration;

use tests::{Machine, Network, Wired, assets, network};

use super::{from_host, is_content, set_up, tcp};

const MIB: u32 = 1 << 20;

/// How often the driver leaves.
const ROUNDS: usize = 100;

/// Starts a transfer in the guest that goes on meanwhile.
fn begin(guest: &mut Machine, bytes: u32) {
    let transfer = tcp("192.0.2.1", 2, bytes, bytes);
    guest.ask(&format!("rm -f /tmp/code; (peer {transfer}; echo $? >/tmp/code) >/tmp/transfer 2>&1 &"));
}

/// That it ends well.
fn finish(guest: &mut Machine) {
    let code = guest.ask("until [ -s /tmp/code ]; do usleep 10000; done; cat /tmp/transfer /tmp/code");
    assert!(code.starts_with("intact") && code.ends_with("\n0"), "{code}");
}

#[test]
fn the_link_goes_down_and_up_during_a_transfer() {
    let name = "linux::net::changes::the_link_goes_down_and_up_during_a_transfer";
    let folder = tempfile::tempdir().unwrap();
    let Some(network) = Network::new(name) else { return };
    let Some(initrd) = network::initrd(folder.path(), name) else { return };
    network.tap("tap0", 2);
    let mut guest = Wired::new(&network, &initrd, 2).boot("tap=tap0");
    set_up(&mut guest);
    let _peer = network.serve(super::PORT);
    for end in ["host", "guest"] {
        begin(&mut guest, 2 * MIB);
        for _ in 0..3 {
            if end == "host" {
                network.run(["ip", "link", "set", "tap0", "down"]);
                thread::sleep(Duration::from_millis(20));
                network.run(["ip", "link", "set", "tap0", "up"]);
            } else {
                guest.ask("ip link set eth0 down; usleep 20000; ip link set eth0 up");
            }
            thread::sleep(Duration::from_millis(400));
        }
        finish(&mut guest);
    }
    assert_eq!(guest.ask("cat /sys/class/net/eth0/carrier"), "1");
    is_content(&mut guest);
    assert_eq!(guest.power_off().code, Some(0));
}

/// Frames fly both ways each time.
#[test]
fn the_driver_leaves_under_load_and_comes_back() {
    let name = "linux::net::changes::the_driver_leaves_under_load_and_comes_back";
    let folder = tempfile::tempdir().unwrap();
    let Some(network) = Network::new(name) else { return };
    let Some(initrd) = network::initrd(folder.path(), name) else { return };
    network.tap("tap0", 2);
    let mut guest = Wired::new(&network, &initrd, 2).boot("tap=tap0");
    let device = guest.ask("basename $(readlink -f /sys/class/net/eth0/device)");
    let flood = network.start(Command::new(assets::peer()).args(["flood", "tap0"]));
    let (driver, statistics) = ("/sys/bus/virtio/drivers/virtio_net", "/sys/class/net/eth0/statistics");
    let moving = format!("[ $(cat {statistics}/rx_packets) -gt 5 ] && [ $(cat {statistics}/tx_packets) -gt 5 ]");
    let round = format!(
        "ip link set eth0 up; peer flood eth0 >/dev/null 2>&1 & until {moving}; do :; done; \
         echo {device} >{driver}/unbind; wait; echo {device} >{driver}/bind"
    );
    // A few at a time, for each answer is waited for only so long.
    for _ in 0..ROUNDS / 10 {
        assert_eq!(
            guest.ask(&format!("n=0; while [ $n -lt 10 ]; do {round} || break; n=$((n+1)); done; echo $n")),
            "10"
        );
    }
    drop(flood);
    set_up(&mut guest);
    from_host(&network, &tcp("192.0.2.2", 2, MIB, MIB));
    is_content(&mut guest);
    assert_eq!(guest.power_off().code, Some(0));
}

#[test]
fn the_hosts_interface_goes_and_comes_back() {
    let name = "linux::net::changes::the_hosts_interface_goes_and_comes_back";
    let folder = tempfile::tempdir().unwrap();
    let Some(network) = Network::new(name) else { return };
    let Some(initrd) = network::initrd(folder.path(), name) else { return };
    network.tap("tap0", 1);
    let mut guest = Wired::new(&network, &initrd, 1).boot("tap=tap0");
    set_up(&mut guest);
    let peer = network.serve(super::PORT);
    begin(&mut guest, 64 * MIB);
    network.run(["ip", "link", "delete", "tap0"]);
    guest.ask("until [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do usleep 10000; done");
    drop(peer);
    guest.ask("killall peer; ip link set eth0 down; ip link set eth0 up");

    network.tap("tap0", 1);
    guest.ask("until [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do usleep 10000; done");
    super::answer(&mut guest);
    from_host(&network, &tcp("192.0.2.2", 1, MIB, MIB));
    is_content(&mut guest);
    let ended = guest.power_off();
    assert_eq!(ended.code, Some(0));
    let told = |words: &str| ended.messages.matches(words).count();
    assert_eq!((told("the host's side is lost"), told("the link is up")), (1, 1), "{}", ended.messages);
}
