//! `--net` that makes no network: each bad input ends with one line that names the option and the remedy, with exit code 2 for
//! usage and 1 for a failed start. The interfaces are in a network namespace of the test's own. No Linux guest runs here.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;
use tests::{Network, assets};

const USAGE: i32 = 2;
const FAILED_START: i32 = 1;

/// A namespace, and a kernel that would boot.
struct Host {
    network: Network,
    kernel: PathBuf,
    _folder: TempDir,
}

impl Host {
    /// What is wrong with an interface only shows when the machine starts, and that needs the host's KVM to be there.
    fn new() -> Option<Self> {
        if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
            skip::because(format_args!("/dev/kvm: {error}"));
            return None;
        }
        let network = Network::new()?;
        let folder = tempfile::tempdir().expect("a scratch folder");
        let kernel = folder.path().join("kernel");
        fs::write(&kernel, guest::ELF).expect("a scratch file");
        Some(Self { network, kernel, _folder: folder })
    }

    fn run(&self, words: &[&str]) {
        self.network.run(words);
    }

    /// `skiff run`, started by `wrapper`, with these networks.
    fn refuses_by(&self, wrapper: &[&str], nets: &[&str], code: i32, parts: &[&str]) {
        let skiff = assets::skiff();
        let words = wrapper.iter().map(Path::new).chain([skiff.as_path()]);
        let words: Vec<_> = words.collect();
        let mut command = self.network.command(words[0]);
        command.args(&words[1..]);
        refused(arguments(&mut command, &self.kernel, nets), nets, code, parts);
    }

    fn refuses(&self, nets: &[&str], parts: &[&str]) {
        self.refuses_by(&[], nets, FAILED_START, parts);
    }
}

fn arguments<'a>(command: &'a mut Command, kernel: &Path, nets: &[&str]) -> &'a mut Command {
    command.args(["run", "--kernel"]).arg(kernel).stdin(Stdio::null());
    command.args(nets.iter().flat_map(|net| ["--net", net]))
}

fn refused(command: &mut Command, nets: &[&str], code: i32, parts: &[&str]) {
    let output: Output = command.output().expect("the program starts");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{nets:?}: {text}");
    assert_eq!(output.stdout, b"", "{nets:?}: nothing on standard output");
    // Warnings that the machine would start with are no part of why it does not.
    let lines: Vec<_> = text.lines().filter(|line| !line.contains("WARN")).collect();
    let [line] = lines[..] else { panic!("{nets:?}: one line, not {text:?}") };
    for part in parts {
        assert!(line.contains(part), "{nets:?}: {part:?} is not in {line:?}");
    }
}

#[test]
fn values_that_no_interface_has() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let kernel = folder.path().join("kernel");
    fs::write(&kernel, guest::ELF).expect("a scratch file");
    let table: &[(&[&str], &[&str])] = &[
        (&["tap=tap0,mac=52:54:00:12:34"], &["mac", "not a MAC address", "52:54:00:12:34:56"]),
        (&["tap=tap0,mac=52:54:00:12:34:5g"], &["mac", "not a MAC address", "52:54:00:12:34:56"]),
        (&["tap=tap0,mac=33:33:00:00:00:01"], &["mac", "multicast", "32:33:00:00:00:01"]),
        (&["tap=tap0,mac=00:00:00:00:00:00"], &["mac", "leave mac= out"]),
        (&["tap=tap0,mtu=67"], &["mtu", "68 to 65535"]),
        (&["tap=tap0,mtu=65536"], &["mtu", "68 to 65535"]),
        (&["tap=tap0,ioeventfd=maybe"], &["ioeventfd", "maybe", "on", "off"]),
        (&["tap=tap0,vhost=maybe"], &["vhost", "maybe", "on", "off", "auto"]),
        (&["tap=tap0,queues=0"], &["queues", "1 to"]),
        (
            &["tap=tap0,mac=52:54:00:12:34:56", "tap=tap1,mac=52:54:00:12:34:56"],
            &["mac=52:54:00:12:34:56 belongs to net0", "one address"],
        ),
        (&["tap=tap0", "tap=tap0"], &["tap=tap0 belongs to net0", "its own"]),
        (&["tap=,host-ip=192.0.2.0/24"], &["host-ip", "the network itself", "192.0.2.1/24"]),
        (&["tap=,host-ip=192.0.2.255/24"], &["host-ip", "everybody", "192.0.2.1/24"]),
        (&["passt,forward=2222:22"], &["forward=2222:22", "tcp:2222:22"]),
        (&["tap=tap0,forward=tcp:1:1"], &["forward", "passt only"]),
    ];
    for (nets, parts) in table {
        refused(arguments(&mut Command::new(assets::skiff()), &kernel, nets), nets, USAGE, parts);
    }
}

#[test]
fn interfaces_that_cannot_be_used() {
    let Some(host) = Host::new() else { return };
    host.network.tap("tap0", 1);
    host.refuses(&["tap=tap1"], &["--net tap=tap1", "no such interface", "\"tap0\"", "ip tuntap add tap1 mode tap"]);
    host.refuses(&["tap=lo"], &["--net tap=lo", "neither a TAP nor a macvtap", "bridge"]);
    host.refuses(&["tap=tap0,queues=2"], &["--net tap=tap0", "one queue", "multi_queue"]);
    host.refuses(&["tap=tap0,host-ip=192.0.2.1/24"], &["tap0 exists", "leave host-ip= out"]);
    host.refuses(&["tap=tap9,host-ip=192.0.2.1/24,mtu=65522"], &["mtu=65522", "65521"]);
}

#[test]
fn files_that_are_no_taps() {
    let Some(host) = Host::new() else { return };
    let peer = assets::peer();
    let peer = peer.to_str().expect("UTF-8");
    let refuses = |wrapper: &[&str], parts: &[&str]| host.refuses_by(wrapper, &["fd=7"], FAILED_START, parts);
    refuses(&["env"], &["--net fd=7", "no open file at 7", "3<>/dev/tap5"]);
    refuses(&["sh", "-c", "exec \"$@\" 7</dev/null", "sh"], &["--net fd=7", "the open file at 7 is no TAP"]);
    let handed_in = |flags| [peer, "hand-in", "tap7", flags, "7", "--"];
    refuses(&handed_in("tun,no_pi,vnet_hdr"), &["--net fd=7", "tap7, a TUN", "IFF_TAP"]);
    refuses(&handed_in("tap,no_pi"), &["--net fd=7", "tap7 without virtio's headers", "IFF_VNET_HDR"]);
}

/// What skiff creates is as it was asked for while it runs, and gone afterwards.
#[test]
fn an_interface_of_our_own() {
    let Some(host) = Host::new() else { return };
    for (net, address, bits, mtu) in [
        ("tap=,host-ip=192.0.2.1/24,mtu=9000", "192.0.2.1", 24, 9000),
        ("tap=skiff0,host-ip=198.51.100.4/31,queues=2", "198.51.100.4", 31, 1500),
    ] {
        let mut command = Command::new(assets::skiff());
        // The machine starts again and again.
        arguments(&mut command, &host.kernel, &[net]).args(["--cmdline", "test=pci end=reset"]);
        let machine = host.network.start(&mut command);
        let text = host.network.run(["ip", "-json", "addr", "show", "dev", "skiff0"]);
        let links: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let link = &links[0];
        assert_eq!(link["mtu"], mtu, "{text}");
        assert!(link["flags"].as_array().is_some_and(|flags| flags.iter().any(|flag| flag == "UP")), "{text}");
        let internet: Vec<_> =
            link["addr_info"].as_array().into_iter().flatten().filter(|info| info["family"] == "inet").collect();
        let [info] = internet[..] else { panic!("one address: {text}") };
        assert_eq!((info["local"].as_str(), info["prefixlen"].as_u64()), (Some(address), Some(bits)), "{text}");
        // The last address of the network, if it is not a host's.
        assert_eq!(info["broadcast"].as_str(), (bits < 31).then_some("192.0.2.255"), "{text}");
        drop(machine);
        let gone = host.network.command("ip").args(["link", "show", "dev", "skiff0"]).output().expect("nsenter");
        assert!(!gone.status.success(), "{}", String::from_utf8_lossy(&gone.stdout));
    }
}

/// A TAP that somebody set up is used as it is, and left so.
#[test]
fn an_interface_of_others_stays_as_it_is() {
    let Some(host) = Host::new() else { return };
    host.network.tap("tap0", 2);
    host.run(&["ip", "link", "set", "tap0", "mtu", "1400", "address", "52:54:00:00:00:77"]);
    let shown = || {
        let text = host.network.run(["ip", "-json", "-details", "addr", "show", "dev", "tap0"]);
        let links: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let (link, tun) = (&links[0], &links[0]["linkinfo"]["info_data"]);
        // All that is set, and not what follows from there being a carrier: how many have it open, and addresses of the link.
        let up = link["flags"].as_array().is_some_and(|flags| flags.iter().any(|flag| flag == "UP"));
        let of_tun = ["type", "pi", "vnet_hdr", "multi_queue", "persist"].map(|key| tun[key].clone());
        let addresses = link["addr_info"].as_array().into_iter().flatten().filter(|info| info["scope"] == "global");
        let addresses: Vec<_> = addresses.map(|info| info["local"].clone()).collect();
        (up, ["mtu", "address", "txqlen"].map(|key| link[key].clone()), of_tun, addresses)
    };
    let before = shown();
    let mut command = Command::new(assets::skiff());
    arguments(&mut command, &host.kernel, &["tap=tap0,mtu=9000"]).args(["--cmdline", "test=pci end=reset"]);
    let machine = host.network.start(&mut command);
    let during = shown();
    drop(machine);
    assert_eq!((during, shown()), (before.clone(), before));
}

/// Made with other flags: who opens a TAP says whether headers are in front of its frames, and nothing else changes.
#[test]
fn an_interface_with_other_flags_stays_as_it_is() {
    let Some(host) = Host::new() else { return };
    for several in [&[][..], &["multi_queue"]] {
        let made = ["ip", "tuntap", "add", "tap0", "mode", "tap", "user", "0", "group", "0"];
        host.run(&[&made[..], several].concat());
        host.run(&["ip", "link", "set", "tap0", "mtu", "1400"]);
        let shown = || {
            let text = host.network.run(["ip", "-json", "-details", "link", "show", "dev", "tap0"]);
            let links: serde_json::Value = serde_json::from_str(&text).expect("JSON");
            let (link, tun) = (&links[0], &links[0]["linkinfo"]["info_data"]);
            let up = link["flags"].as_array().is_some_and(|flags| flags.iter().any(|flag| flag == "UP"));
            let of_tun = ["type", "pi", "multi_queue", "persist", "user", "group"].map(|key| tun[key].clone());
            (up, ["mtu", "address", "txqlen"].map(|key| link[key].clone()), of_tun)
        };
        let before = shown();
        assert_eq!((before.0, &before.2[2]), (false, &serde_json::Value::Bool(!several.is_empty())));
        let mut command = Command::new(assets::skiff());
        arguments(&mut command, &host.kernel, &["tap=tap0,mtu=9000"]).args(["--cmdline", "test=pci end=reset"]);
        let machine = host.network.start(&mut command);
        let during = shown();
        drop(machine);
        assert_eq!((during, shown()), (before.clone(), before));
        host.run(&["ip", "link", "delete", "tap0"]);
    }
}

/// The kernel has so many queues for a TAP (MAX_TAP_QUEUES of linux/drivers/net/tun.c), whoever has them.
#[test]
fn an_interface_without_queues_left() {
    let Some(host) = Host::new() else { return };
    host.network.tap("tap0", 2);
    let hold = |count: &str| host.network.start(Command::new(assets::peer()).args(["hold", "tap0", count]));
    let _most = hold("254");
    host.refuses(&["tap=tap0,queues=4"], &["--net tap=tap0", "no more than 2 queues left", "queues=2"]);
    let _others = hold("2");
    host.refuses(&["tap=tap0"], &["--net tap=tap0", "all queues", "in use"]);
}

#[test]
fn an_interface_in_use() {
    let Some(host) = Host::new() else { return };
    host.network.tap("tap0", 1);
    // The machine starts again and again.
    let mut command = Command::new(assets::skiff());
    arguments(&mut command, &host.kernel, &["tap=tap0"]).args(["--cmdline", "test=pci end=reset"]);
    let _first = host.network.start(&mut command);
    host.refuses(&["tap=tap0"], &["--net tap=tap0", "in use by another program"]);
}

/// Root's files without root's capabilities, so that it is the interface that is refused and not the host's KVM.
#[test]
fn interfaces_of_others() {
    let Some(host) = Host::new() else { return };
    let bare = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"];
    host.refuses_by(
        &bare,
        &["tap=,host-ip=192.0.2.1/24"],
        FAILED_START,
        &["--net tap=,host-ip=192.0.2.1/24", "CAP_NET_ADMIN", "ip tuntap add tap0 mode tap user $USER", "passt"],
    );
    let owned = host.network.command("ip").args("tuntap add tap0 mode tap user 65534".split(' ')).output();
    if !owned.expect("nsenter of util-linux").status.success() {
        skip::because("no interface can be another user's in a namespace of this user");
        return;
    }
    host.run(&["ip", "link", "set", "tap0", "up"]);
    host.refuses_by(
        &bare,
        &["tap=tap0"],
        FAILED_START,
        &["--net tap=tap0", "CAP_NET_ADMIN", "ip tuntap add tap0 mode tap user $USER"],
    );
}

#[test]
fn what_the_host_lacks() {
    let Some(host) = Host::new() else { return };
    host.refuses_by(
        &["env", "PATH=/nowhere"],
        &["passt"],
        FAILED_START,
        &["--net passt", "not installed", "sudo apt install passt"],
    );
    host.refuses(&["socket=/nowhere/passt.socket"], &["--net socket=", "nobody listens", "passt --socket"]);
    let long = format!("socket=/{}", "x".repeat(110));
    host.refuses(&[&long], &["--net socket=", "at most 107 bytes"]);
    if Path::new("/dev/vhost-net").exists() {
        skip::because("this host has /dev/vhost-net");
        return;
    }
    host.network.tap("tap0", 1);
    host.refuses(&["tap=tap0,vhost=on"], &["--net tap=tap0", "vhost=on", "/dev/vhost-net", "modprobe vhost_net"]);
}
