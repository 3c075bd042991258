//! passt: the host's network without a TAP interface, started by skiff or joined.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tests::{Network, Wired, assets, network};

use super::{PORT, answer, from_host, is_content, tcp};

const MIB: u32 = 1 << 20;

/// An MTU below Ethernet's, and the largest datagram in one packet of that (RFC 791, RFC 768). A larger one is sent in fragments,
/// of which passt takes the first for the whole (that of 2023-03-09), whoever gives it frames.
const MTU: usize = 1400;
const LARGEST: usize = MTU - 20 - 8;

/// Where the host asks for names, as far as passt can see.
const NAME_SERVER: &str = "198.51.100.53";

/// DHCP as passt answers it: the host's own address, and all else of it.
const JOIN: &str = "ip link set eth0 up && udhcpc -i eth0 -n -q -f -t 10";

#[test]
fn reaches_the_host_and_is_reached() {
    let folder = tempfile::tempdir().unwrap();
    let Some(network) = Network::new() else { return };
    let Some(initrd) = network::initrd(folder.path()) else { return };
    network.uplink();
    let resolver = folder.path().join("resolv.conf");
    fs::write(&resolver, format!("nameserver {NAME_SERVER}\n")).unwrap();
    network.run(["mount", "--bind", resolver.to_str().unwrap(), "/etc/resolv.conf"]);
    network.run(["ip", "addr", "add", &format!("{NAME_SERVER}/32"), "dev", "lo"]);
    let _names = network.start(Command::new(assets::peer()).args(["names", NAME_SERVER]));
    let _peer = network.serve(PORT);

    let (path, pid) = watched(folder.path());
    let machine = Wired::new(&network, &initrd, 1).started_by(&["env", &path]);
    let keys = format!("mac=52:54:00:11:22:33,mtu={MTU},ioeventfd=off");
    let mut guest = machine.boot(&format!("passt,forward=tcp:2222:80,forward=udp:7002:7000,{keys}"));
    let shown = guest.ask("cd /sys/class/net/eth0; cat address mtu");
    assert_eq!(shown.lines().collect::<Vec<_>>(), ["52:54:00:11:22:33", &MTU.to_string()]);
    // A stream has no headers, so nothing can be left to anybody.
    let offloads = guest.ask("ethtool -k eth0 | grep -E '^(tx-checksumming|tcp-segmentation-offload):'");
    assert!(offloads.lines().all(|line| line.contains(": off")), "{offloads}");
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
    guest.ask(&format!("peer udp {}:{PORT} 32 8 {LARGEST}", Network::GATEWAY));
    from_host(&network, &format!("udp 127.0.0.1:7002 32 8 {LARGEST}"));
    // HTTP by programs that know nothing of each other.
    guest.ask("mkdir /www && head -c 1000001 /dev/urandom >/www/file && httpd -p 80 -h /www");
    let fetch = format!("{} wget -q -O - http://127.0.0.1:2222/file | sha256sum", assets::guest("busybox").display());
    assert_eq!(network.run(["sh", "-c", &fetch]).trim(), guest.ask("sha256sum </www/file"));

    // It ends, skiff starts another, and all is as before.
    let downs = guest.ask("cat /sys/class/net/eth0/carrier_down_count");
    network.run(["kill", "-KILL", fs::read_to_string(&pid).unwrap().trim()]);
    guest.ask(&format!("until [ $(cat /sys/class/net/eth0/carrier_down_count) -gt {downs} ]; do usleep 10000; done"));
    guest.ask("until [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do usleep 10000; done");
    guest.ask(JOIN);
    guest.ask(&format!("peer {}", tcp(Network::GATEWAY, 1, MIB, MIB)));
    assert_eq!(network.run(["sh", "-c", &fetch]).trim(), guest.ask("sha256sum </www/file"));
    is_content(&mut guest);
    assert_eq!(guest.power_off().code, Some(0));
    for start in 0..2 {
        let files = fs::read_to_string(folder.path().join(format!("files.{start}"))).unwrap();
        // Its three streams, of which ls(1) has one, the folder that ls reads, and the connection.
        let known = |file: &&str| !["/dev/null", "pipe:", "/files.", "/proc/"].iter().any(|known| file.contains(known));
        let others: Vec<_> =
            files.lines().filter_map(|line| line.split_once("-> ")).map(|(_, file)| file).filter(known).collect();
        assert!(matches!(others[..], [socket] if socket.starts_with("socket:")), "start {start}: {files}");
    }
}

/// A passt that notes which files it has, at each start, and its number. The variable that makes skiff find it, and where the number is.
fn watched(folder: &Path) -> (String, PathBuf) {
    let (script, pid) = (folder.join("bin/passt"), folder.join("pid"));
    fs::create_dir(folder.join("bin")).unwrap();
    // It ends its days as nobody, who must be able to write there.
    fs::set_permissions(folder, fs::Permissions::from_mode(0o777)).unwrap();
    let folder = folder.display();
    let words = format!(
        "#!/bin/sh\nn=0; while [ -e {folder}/files.$n ]; do n=$((n+1)); done\nls -l /proc/self/fd >{folder}/files.$n\n\
         PATH=${{PATH#*:}} exec passt --pid {} \"$@\"\n",
        pid.display()
    );
    fs::write(&script, words).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    (format!("PATH={folder}/bin:{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()), pid)
}

#[test]
fn may_end_and_begin_again() {
    let folder = tempfile::tempdir().unwrap();
    let Some(network) = Network::new() else { return };
    let Some(initrd) = network::initrd(folder.path()) else { return };
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
