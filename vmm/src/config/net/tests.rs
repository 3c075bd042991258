//! What `--net` and `[[net]]` mean, and what they refuse.

use std::num::NonZeroU64;
use std::path::Path;

use devices::virtio::net::MAX_PAIRS;
use proptest::prelude::*;

use super::*;
use crate::config::{Request, VmConfig};

/// Interfaces that `resolve` could have made.
pub(in crate::config) fn any_nets() -> impl Strategy<Value = Vec<NetConfig>> {
    proptest::collection::vec(any_net(), 0..3).prop_map(|mut nets| {
        for (at, net) in nets.iter_mut().enumerate() {
            net.id = format!("{}-{at}", net.id);
            net.mac = net.mac.and_then(|mac| {
                let mut octets = mac.octets();
                octets[5] = at as u8;
                Mac::from_octets(octets)
            });
            match &mut net.backend {
                NetBackend::Tap { source: TapSource::Named { name, .. }, .. } => *name = format!("{name}{at}"),
                NetBackend::Tap { source: TapSource::New { name: Some(name), .. }, .. } => {
                    *name = format!("{name}{at}");
                }
                NetBackend::Tap { source: TapSource::Descriptor(fd), .. } => *fd += RawFd::try_from(at).unwrap(),
                NetBackend::Tap { .. } => {}
                NetBackend::Passt { forwards, .. } => {
                    for (number, forward) in forwards.iter_mut().enumerate() {
                        let port = 1000 * (at * 4 + number) as u16 + forward.from.0;
                        (forward.from, forward.to) = ((port, port + forward.from.1), forward.to);
                    }
                }
                NetBackend::Socket { path, .. } => path.as_mut_os_string().push(at.to_string()),
            }
        }
        nets
    })
}

fn any_rate(unit: u64) -> impl Strategy<Value = Option<NonZeroU64>> {
    proptest::option::of((1..1_u64 << 30).prop_map(move |rate| NonZeroU64::new(rate * unit).unwrap()))
}

prop_compose! {
    fn any_limits()(rx_bytes in any_rate(1024), tx_bytes in any_rate(1024), frames in any_rate(1)) -> Limits {
        Limits { rx_bytes, tx_bytes, frames }
    }
}

prop_compose! {
    fn any_forward()(udp: bool, address: Option<u32>, first in 1..900_u16, more in 0..99_u16, to in 1..60000_u16) -> Forward {
        Forward { udp, address: address.map(Ipv4Addr::from), from: (first, more), to }
    }
}

fn any_source() -> impl Strategy<Value = TapSource> {
    let name = || "[a-z][a-z0-9-]{0,12}";
    let address = (1..224_u8, any::<[u8; 3]>(), 1..=31_u8)
        .prop_filter("a loopback address", |(first, ..)| *first != 127)
        .prop_map(|(a, [b, c, d], bits)| (Ipv4Addr::new(a, b, c, d), bits))
        .prop_filter("a network or a broadcast address", |(address, bits)| {
            let hosts = u32::MAX >> bits;
            *bits == 31 || ![0, hosts].contains(&(u32::from(*address) & hosts))
        });
    prop_oneof![
        (name(), 1..=MAX_PAIRS).prop_map(|(name, queues)| TapSource::Named { name, queues }),
        (proptest::option::of(name()), address, 1..=MAX_PAIRS).prop_map(|(name, address, queues)| TapSource::New {
            name,
            address,
            queues
        }),
        (3..1000).prop_map(TapSource::Descriptor),
    ]
}

fn any_backend() -> impl Strategy<Value = NetBackend> {
    let path = prop_oneof![Just(DataPath::Kernel), Just(DataPath::Either), any_limits().prop_map(DataPath::Skiff)];
    prop_oneof![
        (any_source(), path).prop_map(|(source, path)| NetBackend::Tap { source, path }),
        (proptest::collection::vec(any_forward(), 0..4), any_limits())
            .prop_map(|(forwards, limits)| NetBackend::Passt { forwards, limits }),
        ("/[a-z ,]{1,20}", any_limits()).prop_map(|(path, limits)| NetBackend::Socket { path: path.into(), limits }),
    ]
}

prop_compose! {
    fn any_net()(
        id in "[a-z][a-z0-9._-]{0,8}", backend in any_backend(), mac: Option<[u8; 5]>,
        mtu in proptest::option::of(68..=u16::MAX), ioeventfd: bool, queue_size in 8..=10_u32,
    ) -> NetConfig {
        let mac = mac.and_then(|[first, rest @ ..]| {
            let mut octets = [first & 0xfc | 2, 0, 0, 0, 0, 0];
            octets[1..5].copy_from_slice(&rest);
            Mac::from_octets(octets)
        });
        NetConfig { id, backend, mac, mtu, ioeventfd, queue_size: 1 << queue_size }
    }
}

fn machine(nets: &[&str]) -> Result<VmConfig, String> {
    let mut request = Request::default();
    request.set(&Place::flag("--kernel", "k"), "kernel", "k").unwrap();
    let made = nets.iter().try_for_each(|text| request.set(&Place::flag("--net", text), "net", text));
    made.and_then(|()| request.resolve()).map_err(|error| error.to_string())
}

fn one(text: &str) -> NetConfig {
    machine(&[text]).unwrap().nets.remove(0)
}

fn tap(name: &str, queues: u16) -> TapSource {
    TapSource::Named { name: name.into(), queues }
}

const NO_LIMITS: Limits = Limits { rx_bytes: None, tx_bytes: None, frames: None };

#[test]
fn the_shortest_forms_have_every_default() {
    let plain = |id: &str, backend| NetConfig {
        id: id.into(),
        backend,
        mac: None,
        mtu: None,
        ioeventfd: true,
        queue_size: 256,
    };
    let nets =
        machine(&["tap=tap0", "passt", "socket=/run/passt.sock", "fd=5", "tap=,host-ip=192.0.2.1/24"]).unwrap().nets;
    let expected = [
        plain("net0", NetBackend::Tap { source: tap("tap0", 1), path: DataPath::Skiff(NO_LIMITS) }),
        plain("net1", NetBackend::Passt { forwards: Vec::new(), limits: NO_LIMITS }),
        plain("net2", NetBackend::Socket { path: "/run/passt.sock".into(), limits: NO_LIMITS }),
        plain("net3", NetBackend::Tap { source: TapSource::Descriptor(5), path: DataPath::Skiff(NO_LIMITS) }),
        plain(
            "net4",
            NetBackend::Tap {
                source: TapSource::New { name: None, address: (Ipv4Addr::new(192, 0, 2, 1), 24), queues: 1 },
                path: DataPath::Skiff(NO_LIMITS),
            },
        ),
    ];
    assert_eq!(nets, expected);
}

#[test]
fn a_host_has_any_address_of_its_network_that_is_a_hosts() {
    // RFC 3021: of two addresses both are; in larger networks all but the first and the last (RFC 1122, 3.2.1.3).
    for (host_ip, expected) in [
        ("192.0.2.0/31", ([192, 0, 2, 0], 31)),
        ("192.0.2.1/31", ([192, 0, 2, 1], 31)),
        ("192.0.2.2/30", ([192, 0, 2, 2], 30)),
        ("11.0.0.0/7", ([11, 0, 0, 0], 7)),
        ("10.255.255.255/7", ([10, 255, 255, 255], 7)),
    ] {
        let NetBackend::Tap { source: TapSource::New { address, .. }, .. } =
            one(&format!("tap=,host-ip={host_ip}")).backend
        else {
            panic!("{host_ip}")
        };
        assert_eq!(address, (Ipv4Addr::from(expected.0), expected.1));
    }
}

#[test]
fn every_setting_arrives() {
    let rate = NonZeroU64::new;
    let net =
        one("tap=br0.5,queues=4,mac=52:54:00:12:34:56,mtu=9000,vhost=auto,ioeventfd=off,queue-size=1024,rx-bps=50M,\
         tx-bps=512K,pps=10000,id=lan");
    let limits = Limits { rx_bytes: rate(50 << 20), tx_bytes: rate(512 << 10), frames: rate(10000) };
    let expected = NetConfig {
        id: "lan".into(),
        // The kernel's path knows no limits, so it is not tried.
        backend: NetBackend::Tap { source: tap("br0.5", 4), path: DataPath::Skiff(limits) },
        mac: Some(Mac::parse("52:54:00:12:34:56").unwrap()),
        mtu: Some(9000),
        ioeventfd: false,
        queue_size: 1024,
    };
    assert_eq!(net, expected);
    for (text, path) in [
        ("tap=t,vhost=on", DataPath::Kernel),
        ("tap=t,vhost=auto", DataPath::Either),
        ("fd=3,vhost=off", DataPath::Skiff(NO_LIMITS)),
    ] {
        let NetBackend::Tap { path: found, .. } = one(text).backend else { panic!("{text}") };
        assert_eq!(found, path, "{text}");
    }
}

#[test]
fn forwards() {
    let forward =
        |udp, address: Option<[u8; 4]>, from, to| Forward { udp, address: address.map(Ipv4Addr::from), from, to };
    let net = one("passt,forward=tcp:2222:22,forward=udp:53,forward=tcp:127.0.0.1:8000-8010:80");
    let expected = vec![
        forward(false, None, (2222, 2222), 22),
        forward(true, None, (53, 53), 53),
        forward(false, Some([127, 0, 0, 1]), (8000, 8010), 80),
    ];
    assert_eq!(net.backend, NetBackend::Passt { forwards: expected, limits: NO_LIMITS });
    let wrong = "not a forward; write it like tcp:2222:22, udp:5353:53 or tcp:127.0.0.1:8000-8010:8000";
    for text in
        ["", "2222:22", "sctp:1:1", "tcp", "tcp:0:22", "tcp:22:0", "tcp:1:2:3", "tcp:1.2.3:1:1", "tcp:x", "tcp:+1"]
    {
        assert_eq!(Forward::parse(text).unwrap_err(), wrong, "{text}");
    }
    for text in ["tcp:20-10", "tcp:60000-60010:65530"] {
        assert_eq!(Forward::parse(text).unwrap_err(), "the ports end before they begin, or past 65535", "{text}");
    }
    let twice = machine(&["passt,forward=tcp:2222:22,forward=tcp:127.0.0.1:2220-2230:22"]).unwrap_err();
    assert!(twice.ends_with("tcp:2222:22 leads elsewhere from the same port; choose another"), "{twice}");
    machine(&["passt,forward=tcp:2222:22,forward=udp:2222:22"]).unwrap();
    machine(&["passt,forward=tcp:127.0.0.1:2222:22,forward=tcp:127.0.0.2:2222:22"]).unwrap();
}

#[test]
fn complaints_name_the_setting_and_the_remedy() {
    const NETWORKS: &str = "tap=NAME, tap=,host-ip=192.0.2.1/24, fd=N, passt, socket=PATH";
    const NAME: &str = "no interface can be called so: a name has at most 15 letters, none of them /, : or %";
    const HOST_IP: &str = "not an address and the bits of its network; write it like 192.0.2.1/24";
    const FD: &str =
        "not the number of an open TAP; open one in the shell, \"3<>/dev/tap5\" for a macvtap, and write fd=3";
    for (text, line) in [
        ("tap", "which? write tap=NAME, or tap=,host-ip=192.0.2.1/24 for one that skiff creates".to_owned()),
        ("past", format!("no such network; did you mean \"passt\"? ({NETWORKS})")),
        ("user", format!("no such network ({NETWORKS})")),
        ("mtu=1500", format!("an interface has one network, and it has none; write one of {NETWORKS}")),
        ("passt,tap=t", format!("an interface has one network, and it has two; write one of {NETWORKS}")),
        ("tap=t,queue=2", "unknown key \"queue\"; did you mean \"queues\"? (keys: tap, fd, passt, socket, host-ip, forward, vhost, \
          queues, mac, mtu, ioeventfd, queue-size, rx-bps, tx-bps, pps, id)".to_owned()),
        ("tap=t,mtu=9000,mtu=1500", "mtu is given twice; give it once".to_owned()),
        ("tap=", "which interface? write tap=NAME, or let skiff create one: tap=,host-ip=192.0.2.1/24 (the host's address on it)".to_owned()),
        ("tap=a/b", format!("tap=a/b: {NAME}")),
        ("tap=sixteen-letters-", format!("tap=sixteen-letters-: {NAME}")),
        ("tap=%d", format!("tap=%d: {NAME}")),
        ("tap=,host-ip=192.0.2.1", format!("host-ip=192.0.2.1: {HOST_IP}")),
        ("tap=,host-ip=fe80::1/64", format!("host-ip=fe80::1/64: {HOST_IP}")),
        ("tap=,host-ip=192.0.2.1/32", "host-ip=192.0.2.1/32: a network of 1 to 31 bits leaves room for the host and the guest; \
          write it like 192.0.2.1/24".to_owned()),
        ("tap=,host-ip=192.0.2.0/24", "host-ip=192.0.2.0/24: this is the address of the network itself, and no interface's; \
          write 192.0.2.1/24".to_owned()),
        ("tap=,host-ip=192.0.2.7/29", "host-ip=192.0.2.7/29: this is the address of everybody in the network, and no interface's; \
          write 192.0.2.1/29".to_owned()),
        ("tap=,host-ip=224.0.0.1/24", "host-ip=224.0.0.1/24: no interface can have this address; write it like 192.0.2.1/24".to_owned()),
        ("fd=x", format!("fd=x: {FD}")),
        ("fd=1", format!("fd=1: {FD}")),
        ("tap=t,queues=0", "queues=0: an interface has 1 to 64 pairs of queues".to_owned()),
        ("tap=t,queues=65", "queues=65: an interface has 1 to 64 pairs of queues".to_owned()),
        ("tap=t,queue-size=300", "queue-size=300: a queue has a power of two from 256 to 1024 entries; write 256".to_owned()),
        ("tap=t,mac=01:00:5e:00:00:01", "mac=01:00:5e:00:00:01: a multicast address, which no interface can have; \
          02:00:5e:00:00:01 is none".to_owned()),
        ("tap=t,mtu=67", "mtu=67: an MTU is 68 to 65535 bytes; write it like 1500".to_owned()),
        ("tap=t,mtu=65536", "mtu=65536: an MTU is 68 to 65535 bytes; write it like 1500".to_owned()),
        ("tap=t,ioeventfd=auto", "ioeventfd=auto: say on or off".to_owned()),
        ("tap=t,vhost=yes", "vhost=yes: no such vhost; say on, off, auto".to_owned()),
        ("tap=t,vhost=on,pps=5", "rx-bps, tx-bps and pps do not go with vhost=on: the kernel moves the frames then, and knows \
          no limits; leave them out, or write vhost=off".to_owned()),
        ("tap=t,pps=0", "pps=0: at least 1 a second; leave it out for no limit".to_owned()),
        ("tap=t,pps=+5", "pps=+5: not a number of frames a second; write it like 10000".to_owned()),
        ("tap=t,rx-bps=1000", "rx-bps=1000: a size needs a unit; write 1000M for MiB (units: K, M, G, T)".to_owned()),
        ("tap=t,forward=tcp:1:1", "forward=tcp:1:1: this goes with passt only; leave it out".to_owned()),
        ("passt,queues=2", "queues=2: this goes with tap= only; leave it out".to_owned()),
        ("fd=3,queues=2", "queues=2: this goes with tap= only; leave it out".to_owned()),
        ("passt,host-ip=192.0.2.1/24", "host-ip=192.0.2.1/24: this goes with tap= only; leave it out".to_owned()),
        ("socket=s,vhost=on", "vhost=on: this goes with tap= and fd= only; leave it out".to_owned()),
        ("socket=", "an empty path; name a file".to_owned()),
        ("passt,id=0", "id=0: an id is a letter followed by letters, digits, '-', '.' or '_'".to_owned()),
    ] {
        assert_eq!(machine(&[text]).unwrap_err(), format!("--net {text}: {line}"));
    }
}

#[test]
fn what_two_interfaces_cannot_share() {
    for (one, two, what) in [
        ("passt,id=a", "tap=t,id=a", "the id \"a\" belongs to another interface; choose another with id="),
        ("passt,id=net1", "passt", "the id \"net1\" belongs to another interface; choose another with id="),
        (
            "passt,mac=52:54:00:12:34:56",
            "tap=t,mac=52:54:00:12:34:56",
            "mac=52:54:00:12:34:56 belongs to net0; two interfaces with one address hear nothing",
        ),
        ("tap=t", "tap=t,queues=2", "tap=t belongs to net0; give each interface its own"),
        ("tap=t", "tap=t,host-ip=192.0.2.1/24", "tap=t belongs to net0; give each interface its own"),
        ("fd=3", "fd=3", "fd=3 belongs to net0; give each interface its own"),
        ("socket=s", "socket=s", "socket=s belongs to net0; give each interface its own"),
        (
            "passt,forward=tcp:22:22",
            "passt,forward=tcp:20-30:20",
            "the host's port of forward=tcp:22:22 belongs to net0; give each interface its own",
        ),
    ] {
        assert_eq!(machine(&[one, two]).unwrap_err(), format!("--net {two}: {what}"));
    }
    machine(&["passt", "passt", "tap=,host-ip=192.0.2.1/24", "tap=,host-ip=198.51.100.1/24"]).unwrap();
}

#[test]
fn tables_of_a_file() {
    let read = |text: &str| {
        let request = Request::from_toml(Path::new("/vms/vm.toml"), &format!("kernel = \"k\"\n{text}"));
        request.and_then(Request::resolve).map(|vm| vm.nets).map_err(|error| error.to_string())
    };
    let nets = read(
        "[[net]]\npasst = true\nforward = [\"tcp:2222:22\", \"udp:53\"]\n[[net]]\nsocket = \"p.sock\"\nmtu = 1400\n",
    )
    .unwrap();
    assert_eq!(nets[0].backend, one("passt,forward=tcp:2222:22,forward=udp:53").backend);
    assert_eq!(nets[1].backend, NetBackend::Socket { path: "/vms/p.sock".into(), limits: NO_LIMITS });
    assert_eq!(nets[1].mtu, Some(1400));
    for (text, line) in [
        (
            "[[net]]\ntap = \"t\"\nqueues = \"no\"\n",
            "/vms/vm.toml:4: net: queues=no: an interface has 1 to 64 pairs of queues",
        ),
        (
            "net = \"passt\"\n",
            "/vms/vm.toml:2: net: an interface is a table; write [[net]], and tap = \"NAME\" or passt = true below it",
        ),
        (
            "[[net]]\ntap = [\"t\"]\n",
            "/vms/vm.toml:3: net: tap: neither a text, a number nor true or false; write one of those",
        ),
    ] {
        assert_eq!(read(text).unwrap_err(), line);
    }
}
