//! What changes under a running transfer, whoever moves its frames: the link goes down and up at either end, the driver leaves
//! and comes back, the host's interface is removed.

use std::process::Command;
use std::thread;
use std::time::Duration;

use tests::{Machine, Network, Wired, assets, network};

use super::{from_host, is_content, set_up, tcp};

const MIB: u32 = 1 << 20;

/// How often the driver leaves skiff, and the kernel, where what is ours in it is less.
const ROUNDS: usize = 100;
const ROUNDS_OF_VHOST: usize = 20;

/// More keys of `--net`, and the bytes of a first transfer: by limits, which the kernel does not know, it lasts however fast the
/// host is.
fn lasting(vhost: bool) -> (&'static str, u32) {
    if vhost { ("", 8 * MIB) } else { (",rx-bps=2M,tx-bps=2M", 4 * MIB) }
}

/// Has `what` happen during a transfer, and says so if it was under way when that mattered. If not, host or guest were too fast or
/// too slow: all of it once more, with twice as much.
fn during(guest: &mut Machine, mut bytes: u32, mut what: impl FnMut(&mut Machine) -> bool) {
    loop {
        begin(guest, bytes);
        let was_under_way = what(guest);
        finish(guest);
        if was_under_way {
            return;
        }
        bytes = bytes.checked_mul(2).expect("a transfer that lasts");
    }
}

/// Starts a transfer in the guest that goes on meanwhile, of so many bytes on each of two connections and both ways, and waits
/// until it is under way: its connections, which a link that is down would refuse, are there by then.
fn begin(guest: &mut Machine, bytes: u32) {
    let transfer = tcp("192.0.2.1", 2, bytes, bytes);
    let started = "until [ -s /tmp/transfer ]; do usleep 10000; done";
    guest.ask(&format!(
        "rm -f /tmp/code /tmp/transfer; (peer {transfer}; echo $? >/tmp/code) >/tmp/transfer 2>&1 & {started}"
    ));
    let sent = "cat /sys/class/net/eth0/statistics/tx_packets";
    let enough = format!("[ $({sent}) -gt $((first + 100)) ] || [ -s /tmp/code ]");
    guest.ask(&format!("first=$({sent}); until {enough}; do usleep 1000; done"));
}

fn is_under_way(guest: &mut Machine) -> bool {
    guest.run("[ -s /tmp/code ]").code == 1
}

/// That it ends well.
fn finish(guest: &mut Machine) {
    let code = guest.ask("until [ -s /tmp/code ]; do usleep 10000; done; cat /tmp/transfer /tmp/code");
    assert!(code.starts_with("connected\nintact") && code.ends_with("\n0"), "{code}");
}

/// The link goes down and up during a transfer.
fn flaps(vhost: bool) {
    let folder = tempfile::tempdir().unwrap();
    let Some(network) = Network::new() else { return };
    let Some(initrd) = network::initrd(folder.path()) else { return };
    network.tap("tap0", 2);
    let (keys, bytes) = lasting(vhost);
    let mut guest = Wired::new(&network, &initrd, 2).vhost(vhost).keys(keys).boot("tap=tap0");
    set_up(&mut guest);
    let _peer = network.serve(super::PORT);
    for end in ["host", "guest"] {
        during(&mut guest, bytes, |guest| {
            let mut lasts = true;
            for _ in 0..3 {
                lasts = is_under_way(guest);
                if end == "host" {
                    network.run(["ip", "link", "set", "tap0", "down"]);
                    thread::sleep(Duration::from_millis(20));
                    network.run(["ip", "link", "set", "tap0", "up"]);
                } else {
                    guest.ask("ip link set eth0 down; usleep 20000; ip link set eth0 up");
                }
                thread::sleep(Duration::from_millis(400));
            }
            lasts
        });
    }
    assert_eq!(guest.ask("cat /sys/class/net/eth0/carrier"), "1");
    is_content(&mut guest);
    assert_eq!(guest.power_off().code, Some(0));
}

/// The driver leaves under load and comes back; frames fly both ways each time.
fn rebinds(vhost: bool) {
    let folder = tempfile::tempdir().unwrap();
    let Some(network) = Network::new() else { return };
    let Some(initrd) = network::initrd(folder.path()) else { return };
    network.tap("tap0", 2);
    let mut guest = Wired::new(&network, &initrd, 2).vhost(vhost).boot("tap=tap0");
    let device = guest.ask("basename $(readlink -f /sys/class/net/eth0/device)");
    let flood = network.start(Command::new(assets::peer()).args(["flood", "tap0"]));
    let (driver, statistics) = ("/sys/bus/virtio/drivers/virtio_net", "/sys/class/net/eth0/statistics");
    // A process more would take as long as the rest.
    let moving =
        format!("read r <{statistics}/rx_packets; read t <{statistics}/tx_packets; [ $r -gt 5 ] && [ $t -gt 5 ]");
    let round = format!(
        "ip link set eth0 up; peer flood eth0 >/dev/null 2>&1 & until {moving}; do :; done; \
         echo {device} >{driver}/unbind; wait; echo {device} >{driver}/bind"
    );
    // A few at a time, for each answer is waited for only so long.
    let rounds = if vhost { ROUNDS_OF_VHOST } else { ROUNDS };
    for _ in 0..rounds / 10 {
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

/// The host's interface goes and comes back, while frames fly and while none does. The guest does nothing about it.
fn is_lost(queues: u32, vhost: bool) {
    let folder = tempfile::tempdir().unwrap();
    let Some(network) = Network::new() else { return };
    let Some(initrd) = network::initrd(folder.path()) else { return };
    network.tap("tap0", queues);
    let (keys, bytes) = lasting(vhost);
    let mut guest = Wired::new(&network, &initrd, queues).vhost(vhost).keys(keys).boot("tap=tap0");
    set_up(&mut guest);
    let _peer = network.serve(super::PORT);
    let carrier = |state: u8| format!("until [ $(cat /sys/class/net/eth0/carrier) = {state} ]; do usleep 10000; done");
    let downs = |guest: &mut Machine| -> usize {
        guest.ask("cat /sys/class/net/eth0/carrier_down_count").parse().expect("a number")
    };
    let before = downs(&mut guest);
    let mut losses = 0;
    let mut lose = |guest: &mut Machine| {
        losses += 1;
        network.run(["ip", "link", "delete", "tap0"]);
        guest.ask(&carrier(0));
        let is_busy = is_under_way(guest);
        network.tap("tap0", queues);
        guest.ask(&carrier(1));
        is_busy
    };
    // The same connections go on: what was under way is sent again.
    during(&mut guest, bytes, &mut lose);
    lose(&mut guest);
    from_host(&network, &tcp("192.0.2.2", 2, MIB, MIB));
    is_content(&mut guest);
    // Each time once, however many queues there are.
    assert_eq!(downs(&mut guest) - before, losses);
    let ended = guest.power_off();
    assert_eq!(ended.code, Some(0));
    for words in ["the host's side is lost", "the host's side is back"] {
        // A guest or host that never rests is not allowed to fill a log: later ones may be left out.
        let times = ended.messages.matches(words).count();
        assert!((1..=losses).contains(&times), "{}", ended.messages);
    }
}

#[test]
fn the_link_goes_down_and_up_during_a_transfer() {
    flaps(false);
}

#[test]
fn the_link_goes_down_and_up_during_a_transfer_by_vhost() {
    if assets::has_vhost() {
        flaps(true);
    }
}

#[test]
fn the_driver_leaves_under_load_and_comes_back() {
    rebinds(false);
}

#[test]
fn the_driver_leaves_vhost_under_load_and_comes_back() {
    if assets::has_vhost() {
        rebinds(true);
    }
}

#[test]
fn the_hosts_interface_goes_and_comes_back() {
    is_lost(1, false);
}

#[test]
fn the_hosts_interface_leaves_vhost_and_comes_back() {
    if assets::has_vhost() {
        is_lost(2, true);
    }
}
