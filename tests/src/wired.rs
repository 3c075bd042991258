//! A machine with an interface in a [`Network`]: skiff, or QEMU beside it, or in its place to see what the tests themselves
//! are worth. Owned by the test thread.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Machine, Network, Skiff, assets};

/// Set to `qemu`, it puts QEMU in the place of skiff.
const IN_PLACE: &str = "SKIFF_NET_TESTS";

/// What the kernel is told: a quiet console, and interfaces by their old names.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 net.ifnames=0";

/// A command line of a machine with one interface, which the guest sees as eth0.
#[derive(Debug)]
pub struct Wired<'a> {
    network: &'a Network,
    initrd: PathBuf,
    queues: u32,
    vhost: bool,
    keys: String,
    properties: String,
    options: Vec<String>,
    program: PathBuf,
    starter: Vec<String>,
    is_qemu: bool,
}

impl<'a> Wired<'a> {
    /// A machine in `network` with as many CPUs as pairs of queues, its frames moved by skiff itself. `initrd` is that of
    /// [`network::initrd`](crate::network::initrd).
    pub fn new(network: &'a Network, initrd: &Path, queues: u32) -> Self {
        let (keys, properties) = (String::new(), String::new());
        let (initrd, options, starter) = (initrd.to_owned(), Vec::new(), Vec::new());
        let (program, is_qemu) = (assets::skiff(), Self::is_qemu());
        Self { network, initrd, queues, vhost: false, keys, properties, options, program, starter, is_qemu }
    }

    /// QEMU instead of skiff.
    #[must_use]
    pub fn qemu(mut self) -> Self {
        self.is_qemu = true;
        self
    }

    /// Another build of skiff, which is at `program`.
    #[must_use]
    pub fn program(mut self, program: &Path) -> Self {
        program.clone_into(&mut self.program);
        self
    }

    /// Whether vhost-net moves the frames.
    #[must_use]
    pub fn vhost(mut self, vhost: bool) -> Self {
        self.vhost = vhost;
        self
    }

    /// More keys of `--net`, each after a comma.
    #[must_use]
    pub fn keys(mut self, keys: &str) -> Self {
        self.keys += keys;
        self
    }

    /// The largest packet that the guest is told.
    #[must_use]
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.properties = format!("{},host_mtu={mtu}", self.properties);
        self.keys(&format!(",mtu={mtu}"))
    }

    /// An option of `skiff run`, which QEMU does not get.
    #[must_use]
    pub fn option(mut self, option: &str) -> Self {
        self.options.push(option.to_owned());
        self
    }

    /// A program with its first words that starts skiff in its place, as env(1) does.
    #[must_use]
    pub fn started_by(mut self, words: &[&str]) -> Self {
        self.starter = words.iter().map(|word| (*word).to_owned()).collect();
        self
    }

    /// Whether QEMU is in the place of skiff.
    pub fn is_qemu() -> bool {
        std::env::var(IN_PLACE).is_ok_and(|name| name == "qemu")
    }

    /// Starts the test guest with its interface on what `--net` names, `tap=NAME` or `socket=PATH` for QEMU, and waits until it takes commands.
    ///
    /// # Panics
    /// If it does not get there.
    pub fn boot(&self, backend: &str) -> Machine {
        let command = if self.is_qemu { self.qemu_command(backend) } else { self.skiff_command(backend) };
        let mut words = self.starter.iter().map(OsStr::new).chain([command.get_program()]).chain(command.get_args());
        let mut started = self.network.command(words.next().expect("a program"));
        started.args(words);
        let mut machine = Machine::start(started);
        machine.wait_ready();
        machine
    }

    fn skiff_command(&self, backend: &str) -> Command {
        let Self { queues, keys, .. } = self;
        let many = if backend.starts_with("tap=") { format!(",queues={queues}") } else { String::new() };
        let path = match self.vhost {
            true => ",vhost=on",
            false if backend.starts_with("tap=") || backend.starts_with("fd=") => ",vhost=off",
            false => "",
        };
        let mut command = Skiff::of(&self.program)
            .option("--kernel", assets::guest("vmlinuz"))
            .option("--initrd", &self.initrd)
            .cpus(*queues)
            .option("--net", format!("{backend}{many}{path}{keys}"))
            .cmdline(CMDLINE)
            .into_command();
        command.args(&self.options);
        command
    }

    fn qemu_command(&self, backend: &str) -> Command {
        let Self { queues, properties, .. } = self;
        let vhost = if self.vhost { "on" } else { "off" };
        let many = if *queues > 1 { format!(",mq=on,vectors={}", 2 * queues + 2) } else { String::new() };
        let netdev = match backend.split_once('=').expect("tap=NAME or socket=PATH") {
            ("tap", name) => format!("tap,id=net,ifname={name},script=no,downscript=no,queues={queues},vhost={vhost}"),
            (_, path) => format!("stream,id=net,server=off,addr.type=unix,addr.path={path}"),
        };
        let mut command = Command::new("qemu-system-x86_64");
        command.args("-accel kvm -cpu host -M q35 -m 512 -nodefaults -no-user-config -display none".split(' '));
        command.args("-name net,debug-threads=on -serial stdio -no-reboot -append".split(' ')).arg(CMDLINE);
        command.arg("-kernel").arg(assets::guest("vmlinuz")).arg("-initrd").arg(&self.initrd);
        command.args(["-smp", &queues.to_string(), "-netdev", &netdev]);
        command.arg("-device").arg(format!("virtio-net-pci,netdev=net,disable-legacy=on{many}{properties}"));
        command
    }
}
