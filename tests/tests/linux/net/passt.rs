//! passt: the host's network without a TAP interface, started by skiff or joined.

use std::fs;
use std::process::Command;

use tests::{Network, Wired, assets, network};

use super::{PORT, answer, from_host, is_content, tcp};

const MIB: u32 = 1 << 20;

/// Where the host asks for names, as far as passt can see.
const NAME_SERVER: &str = "198.51.100.53";

/// DHCP as passt answers it: the host's own address, and all else of it.
const JOIN: &str = "ip link set eth0 up && udhcpc -i eth0 -n -q -f -t 10";

#[test]
fn reaches_the_host_and_is_reached() {
    let name = "linux::net::passt::reaches_the_host_and_is_reached";
    let folder = tempfile::tempdir().unwrap();
    let Some(network) = Network::new(name) else { return };
    let Some(initrd) = network::initrd(folder.path(), name) else { return };
    network.uplink();
    let resolver = folder.path().join("resolv.conf");
    fs::write(&resolver, format!("nameserver {NAME_SERVER}\n")).unwrap();
    network.run(["mount", "--bind", resolver.to_str().unwrap(), "/etc/resolv.conf"]);
    network.run(["ip", "addr", "add", &format!("{NAME_SERVER}/32"), "dev", "lo"]);
    let _names = network.start(Command::new(assets::peer()).args(["names", NAME_SERVER]));
    let _peer = network.serve(PORT);

    let mut guest = Wired::new(&network, &initrd, 1).boot("passt,forward=tcp:2222:80,forward=udp:7002:7000");
    guest.ask(JOIN);
    assert!(guest.ask("ip -4 addr show dev eth0").contains("inet 198.51.100.1/24 "), "the host's address");
    let route = guest.ask("ip route | grep default");
    assert_eq!(route, format!("default via {} dev eth0", Network::GATEWAY));
    assert_eq!(guest.ask("cat /etc/resolv.conf"), format!("nameserver {NAME_SERVER}"));
    let found = guest.ask("nslookup host.example");
    assert!(found.contains("203.0.113.80"), "{found}");

    answer(&mut guest);
    guest.ask(&format!("peer {}", tcp(Network::GATEWAY, 1, MIB, MIB)));
    guest.ask(&format!("peer {}", tcp(Network::GATEWAY, 4, MIB / 2, MIB / 2)));
    guest.ask(&format!("peer udp {}:{PORT} 32 8 1400", Network::GATEWAY));
    from_host(&network, "udp 127.0.0.1:7002 32 8 1400");
    // HTTP by programs that know nothing of each other.
    guest.ask("mkdir /www && head -c 1000001 /dev/urandom >/www/file && httpd -p 80 -h /www");
    let fetch = format!("{} wget -q -O - http://127.0.0.1:2222/file | sha256sum", assets::guest("busybox").display());
    assert_eq!(network.run(["sh", "-c", &fetch]).trim(), guest.ask("sha256sum </www/file"));
    is_content(&mut guest);
    assert_eq!(guest.power_off().code, Some(0));
}

#[test]
fn may_end_and_begin_again() {
    let name = "linux::net::passt::may_end_and_begin_again";
    let folder = tempfile::tempdir().unwrap();
    let Some(network) = Network::new(name) else { return };
    let Some(initrd) = network::initrd(folder.path(), name) else { return };
    network.uplink();
    let socket = folder.path().join("passt.socket");
    let passt = network.passt(&socket);
    let _peer = network.serve(PORT);
    let mut guest = Wired::new(&network, &initrd, 1).boot(&format!("socket={}", socket.display()));
    guest.ask(JOIN);
    let transfer = format!("peer {}", tcp(Network::GATEWAY, 1, MIB, MIB));
    guest.ask(&transfer);
    let carrier =
        |state: &str| format!("until [ $(cat /sys/class/net/eth0/carrier) = {state} ]; do usleep 10000; done");
    drop(passt);
    guest.ask(&carrier("0"));
    let _passt = network.passt(&socket);
    guest.ask(&carrier("1"));
    guest.ask(JOIN);
    guest.ask(&transfer);
    assert_eq!(guest.power_off().code, Some(0));
}
