//! A network of its own for a test: a namespace that is gone when the test is, with TAP interfaces and programs in it. What
//! is mounted there is seen there only.
//! Owned by the test thread.

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::assets;

/// A network namespace. The process that holds it ends when its input does, however the test does.
#[derive(Debug)]
pub struct Network {
    holder: Child,
    _input: ChildStdin,
    /// Whether it is in a user namespace too, in which this user has the rights of root.
    is_mapped: bool,
}

impl Network {
    /// A namespace with nothing in it but a loopback interface. `None` if this host does not let this user have one or has
    /// no TAP interfaces; that is then said.
    ///
    /// # Panics
    /// If the tools are missing.
    pub fn new() -> Option<Self> {
        let is_mapped = fs::metadata("/proc/self").expect("/proc").uid() != 0;
        let mut command = Command::new("unshare");
        if is_mapped {
            command.args(["--user", "--map-root-user"]);
        }
        command.args(["--net", "--mount", "sh", "-c", "echo; exec cat"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = command.stderr(Stdio::null()).spawn().expect("unshare of util-linux");
        let input = holder.stdin.take().expect("a piped stdin");
        let begun = holder.stdout.as_mut().expect("a piped stdout").read(&mut [0]).expect("a pipe");
        let network = Self { holder, _input: input, is_mapped };
        if begun == 0 || fs::File::options().read(true).write(true).open("/dev/net/tun").is_err() {
            skip::because("no network namespaces or no /dev/net/tun for this user");
            return None;
        }
        network.run(["ip", "link", "set", "lo", "up"]);
        Some(network)
    }

    /// A program in this network.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        if self.is_mapped {
            command.args(["--user", "--preserve-credentials"]);
        }
        command.args(["--net", "--mount", "--target", &self.holder.id().to_string(), "--"]).arg(program);
        let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
        command.env("PATH", path);
        command
    }

    /// The same command, in this network.
    pub fn inside(&self, command: &Command) -> Command {
        let mut inside = self.command(command.get_program());
        inside.args(command.get_args());
        inside
    }

    /// Runs a program to its end and returns what it printed on both streams.
    ///
    /// # Panics
    /// If it is missing or fails.
    pub fn run<I: IntoIterator<Item: AsRef<OsStr>>>(&self, words: I) -> String {
        let mut words = words.into_iter();
        let mut command = self.command(words.next().expect("a program"));
        let run = command.args(words).stdin(Stdio::null()).output().expect("nsenter of util-linux");
        let text = String::from_utf8_lossy(&[run.stdout, run.stderr].concat()).into_owned();
        assert!(run.status.success(), "{command:?}: {}\n{text}", run.status);
        text
    }

    /// Starts a program that runs until the guard is dropped, and waits until it has written a line.
    ///
    /// # Panics
    /// If it cannot be started or says nothing.
    pub fn start(&self, command: &mut Command) -> Running {
        let mut child = self.inside(command).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("nsenter");
        let output = child.stdout.as_mut().expect("a piped stdout");
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            assert_eq!(output.read(&mut byte).expect("a pipe"), 1, "{command:?} ended at once");
            line.push(byte[0]);
        }
        Running(child)
    }

    /// The peer of this build, answering at `port`.
    ///
    /// # Panics
    /// If it does not start.
    pub fn serve(&self, port: u16) -> Running {
        self.start(Command::new(assets::peer()).args(["serve", &port.to_string()]))
    }

    /// A TAP interface that is there until this network is gone, with 192.0.2.1/24 and 2001:db8::1/64 as addresses (RFC
    /// 5737, RFC 3849), and up. With more than one queue it is one of IFF_MULTI_QUEUE.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn tap(&self, name: &str, queues: u32) {
        let mut words = vec!["ip", "tuntap", "add", name, "mode", "tap", "vnet_hdr"];
        if queues > 1 {
            words.push("multi_queue");
        }
        self.run(words);
        self.run(["ip", "addr", "add", "192.0.2.1/24", "dev", name]);
        self.run(["ip", "addr", "add", "2001:db8::1/64", "dev", name, "nodad"]);
        self.run(["ip", "link", "set", name, "up"]);
    }

    /// Two ends of a cable, `near` and `far`, which has 192.0.2.1/24 and 2001:db8::1/64. Both are up. `None` if this host has
    /// none; that is then said.
    ///
    /// # Panics
    /// If they cannot be set up.
    pub fn cable(&self) -> Option<()> {
        let mut add = self.command("ip");
        let added = add.args("link add near type veth peer name far".split(' ')).stderr(Stdio::null()).status();
        if !added.expect("nsenter of util-linux").success() {
            skip::because("no veth interfaces");
            return None;
        }
        self.run(["ip", "addr", "add", "192.0.2.1/24", "dev", "far"]);
        self.run(["ip", "addr", "add", "2001:db8::1/64", "dev", "far", "nodad"]);
        for end in ["near", "far"] {
            self.run(["ip", "link", "set", end, "up"]);
        }
        Some(())
    }

    /// A macvtap on the near end of the cable, with this address, and up. Returns its file; `None` if this host has none for
    /// this user, which is then said.
    ///
    /// # Panics
    /// If it cannot be brought up.
    pub fn macvtap(&self, interface: &str, address: &str) -> Option<PathBuf> {
        let mut add = self.command("ip");
        add.args([
            "link", "add", "link", "near", "name", interface, "address", address, "type", "macvtap", "mode", "bridge",
        ]);
        let added = add.stderr(Stdio::null()).status().expect("nsenter of util-linux").success();
        let file = added.then(|| {
            self.run(["ip", "link", "set", interface, "up"]);
            let link: serde_json::Value =
                serde_json::from_str(&self.run(["ip", "-json", "link", "show", interface])).expect("JSON");
            PathBuf::from(format!("/dev/tap{}", link[0]["ifindex"]))
        });
        let file = file.filter(|file| fs::File::options().read(true).write(true).open(file).is_ok());
        if file.is_none() {
            skip::because("no macvtap interfaces for this user");
        }
        file
    }

    /// What passt tells its guest to be the gateway, and what leads to the loopback interface of this network.
    pub const GATEWAY: &str = "198.51.100.2";

    /// An interface that passt takes for the one to the world: 198.51.100.1/24 (RFC 5737). Nothing is behind it.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn uplink(&self) {
        self.run(["ip", "tuntap", "add", "uplink", "mode", "tap"]);
        self.run(["ip", "addr", "add", "198.51.100.1/24", "dev", "uplink"]);
        self.run(["ip", "link", "set", "uplink", "up"]);
        self.run(["ip", "route", "add", "default", "via", Self::GATEWAY]);
    }

    /// passt, waiting at `socket`. It wants an uplink.
    ///
    /// # Panics
    /// If it does not start.
    pub fn passt(&self, socket: &Path) -> Running {
        // What an earlier one left.
        let _ = fs::remove_file(socket);
        // It may end its days as nobody, who must be able to get there.
        let folder = socket.parent().expect("a folder");
        fs::set_permissions(folder, fs::Permissions::from_mode(0o777)).expect("a folder of ours");
        let mut command = Command::new("sh");
        command.args(["-c", "exec \"$@\" 2>&1", "sh", "passt", "--foreground", "--socket", text(socket)]);
        let running = self.start(&mut command);
        while !socket.exists() {
            thread::sleep(Duration::from_millis(10));
        }
        running
    }

    /// A counter of an interface, by its name in `ip -json -statistics link`: `rx`, `packets`.
    ///
    /// # Panics
    /// If there is no such interface or counter.
    pub fn counter(&self, interface: &str, direction: &str, counter: &str) -> u64 {
        let text = self.run(["ip", "-json", "-statistics", "link", "show", "dev", interface]);
        let links: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        links[0]["stats64"][direction][counter].as_u64().unwrap_or_else(|| panic!("{direction} {counter}: {text}"))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // Both fail only if it is gone already.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// A program that is ended with its guard.
#[derive(Debug)]
pub struct Running(Child);

impl Running {
    /// Ends it and returns what it wrote since its first line.
    ///
    /// # Panics
    /// If that is no text.
    pub fn end(mut self) -> String {
        let _ = self.0.kill();
        let mut text = String::new();
        self.0.stdout.take().expect("a piped stdout").read_to_string(&mut text).expect("text");
        text
    }

    /// Waits until it ends by itself, and returns what it wrote since its first line.
    ///
    /// # Panics
    /// If it fails, or that is no text.
    pub fn finish(mut self) -> String {
        let mut text = String::new();
        self.0.stdout.take().expect("a piped stdout").read_to_string(&mut text).expect("text");
        let status = self.0.wait().expect("a child");
        assert!(status.success(), "{status}: {text}");
        text
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The initrd of the test guest with the tools and the peer in it, as `/bin/peer`, made in `folder`. `None` if the tools
/// were not built; that is then said.
///
/// # Panics
/// If it cannot be written.
pub fn initrd(folder: &Path) -> Option<PathBuf> {
    let Some(path) = assets::tools_initrd(folder) else {
        skip::because("no ethtool for the guest; resources/rootfs/tools makes it where a mirror can be reached");
        return None;
    };
    let bin = folder.join("peer/bin");
    fs::create_dir_all(&bin).expect("a folder");
    assets::tool("strip", &["-o", text(&bin.join("peer")), text(&assets::peer())]);
    // An archive that is not compressed begins at a multiple of four.
    let (peer, initrd, busybox) = (folder.join("peer"), text(&path), assets::guest("busybox"));
    let archive = format!("find . | {} cpio -o -H newc 2>/dev/null >>{initrd}", text(&busybox));
    let script = format!("truncate -s %4 {initrd} && cd {} && {archive}", text(&peer));
    assets::tool("sh", &["-c", &script]);
    Some(path)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}
