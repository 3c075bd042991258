//! Networks as a stock Linux sees them: a TAP interface in a namespace of its own, the peer at both ends.

mod changes;
mod frames;
mod limits;
mod macvtap;
mod passt;
mod sizes;
mod taps;
mod transfers;

use std::fs;
use std::path::Path;
use std::process::Command;

use tests::network::Running;
use tests::{Machine, Network, assets};

/// Where the peers answer.
const PORT: u16 = 7000;

/// The server of busybox: it has one address, 192.0.2.2, to give.
fn dhcp_server(network: &Network, folder: &Path) -> Running {
    let path = folder.join("udhcpd.conf");
    let files = format!("lease_file {0}/leases\npidfile {0}/pid\n", folder.display());
    let lease = "start 192.0.2.2\nend 192.0.2.2\noption subnet 255.255.255.0\noption router 192.0.2.1\n";
    fs::write(&path, format!("interface tap0\n{lease}option dns 192.0.2.53\n{files}")).unwrap();
    fs::write(folder.join("leases"), "").unwrap();
    let script = format!("exec {} udhcpd -f {} 2>&1", assets::guest("busybox").display(), path.display());
    network.start(Command::new("sh").args(["-c", &script]))
}

/// Gives eth0 the address 2001:db8::2, which is there at once.
fn set_up_ipv6(guest: &mut Machine) {
    guest.ask("echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad; ip addr add 2001:db8::2/64 dev eth0");
}

/// Has the guest's peer answer.
fn answer(guest: &mut Machine) {
    guest.ask(&format!("peer serve {PORT} >/tmp/peer & until grep -q serving /tmp/peer; do usleep 10000; done"));
}

/// Gives eth0 the addresses 192.0.2.2 and 2001:db8::2 and has the guest's peer answer there.
fn set_up(guest: &mut Machine) {
    guest.ask("ip link set eth0 up && ip addr add 192.0.2.2/24 dev eth0");
    set_up_ipv6(guest);
    answer(guest);
}

/// That the guest's peer had nothing to complain about, and the kernel neither.
fn is_content(guest: &mut Machine) {
    assert_eq!(guest.ask("cat /tmp/peer"), "serving");
    let complaints = guest.run("dmesg -r | grep -E '^<[0-3]>'");
    // A complaint alone seldom tells what it is about.
    let log = if complaints.code == 1 { String::new() } else { guest.ask("dmesg | tail -n 100") };
    assert!(complaints.code == 1, "{}\n--- the end of the guest's log\n{log}", complaints.text);
}

/// The arguments of the peer for transfers over TCP to the other end: streams, bytes up and down of each.
fn tcp(address: &str, streams: u32, up: u32, down: u32) -> String {
    format!("tcp {address}:{PORT} {streams} {up} {down}")
}

/// Runs the host's peer.
fn from_host(network: &Network, arguments: &str) -> String {
    let peer = assets::peer();
    network.run([peer.to_str().unwrap()].into_iter().chain(arguments.split(' ')))
}
