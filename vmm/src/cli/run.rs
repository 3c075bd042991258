//! `skiff run`: a machine from flags and a configuration file. Main thread.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use skiff::config::{self, BootProtocol, ConfigError, Place, Request, VmConfig};
use skiff::exit::{self, ExitReason};

use super::Failure;

/// Run a virtual machine until it powers off
///
/// A flag replaces the same setting of the configuration file as a whole: one --disk replaces all disks of the file. A
/// comma inside a path of a list (--disk, --net, --serial) is written as two commas. Ctrl-A x on the console ends the machine,
/// Ctrl-A h lists the other keys. SIGTERM and SIGINT press the power button; a second one stops at once.
#[derive(Debug, Args)]
#[command(after_help = after_help())]
#[command(next_help_heading = "Machine")]
pub(super) struct RunArgs {
    /// The kernel: a bzImage as distributions ship it, or an ELF vmlinux
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    kernel: Option<String>,
    /// The initial RAM disk
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    initrd: Option<String>,
    /// The kernel command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// How the kernel is entered [default: auto]
    #[arg(long, value_name = "PROTOCOL", value_parser = BootProtocol::ALL.map(BootProtocol::name))]
    boot_protocol: Option<String>,
    /// Number of CPUs, up to the limit of the host's KVM [default: 1]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    cpus: Option<String>,
    /// Guest memory, such as 512M or 2G, at least 64M [default: 512M]
    #[arg(long, value_name = "SIZE[,hugepages=on|off][,prefault=on|off][,shared=on|off]", allow_hyphen_values = true)]
    memory: Option<String>,
    /// A raw disk image or block device, seen by the guest as virtio-blk; repeat for more disks
    ///
    /// Keys: readonly=on|off, snapshot=on|off (on: the image stays as it is, and what the guest writes is gone at the end),
    /// snapshot-dir=FOLDER (for what it writes meanwhile) [default: $TMPDIR or /var/tmp], serial=TEXT, id=NAME, format=raw, ioeventfd=on|off, aio=auto|threads|io_uring|native (what
    /// moves the bytes; native is Linux AIO and needs cache=none or cache=directsync) [default: auto, what suits the image
    /// and the host], cache=auto|writeback|none|writethrough|directsync|unsafe (none and directsync go past the host's page
    /// cache, unsafe ignores flushes) [default: auto, none where that works, else writeback], queues=N (each with a thread
    /// and an engine of its own) [default: one a CPU, at most 4], queue-size=N (entries, a power of two up to 1024)
    /// [default: 256], poll-us=N (how many microseconds each queue's thread looks for work before it sleeps, at most, while
    /// that pays) [default: 100], merge=on|off (requests for neighbouring sectors that come at once go to the host as one)
    /// [default: on], thread-pool-max=N (of aio=threads, for each queue) [default: 64], discard=unmap|ignore (unmap: what
    /// the guest discards is given back to the host) [default: unmap], rerror=report|ignore|stop and
    /// werror=report|ignore|stop|enospc (what an error of the host does to reads, and to all else: stop pauses the machine
    /// until Ctrl-A c or SIGUSR2, then it is tried again; enospc stops only when there is no space left) [default: report],
    /// iops=N, iops-rd=N, iops-wr=N, bps=SIZE, bps-rd=SIZE, bps-wr=SIZE (at most so many requests or bytes a second, all or
    /// reads or writes; queues share them), burst=TIME (what an idle disk may save up of them) [default: 100ms].
    #[arg(long, value_name = "path=FILE[,KEY=VALUE]...", value_hint = clap::ValueHint::FilePath)]
    disk: Vec<String>,
    /// A network interface, seen by the guest as virtio-net; repeat for more interfaces
    ///
    /// One of: tap=NAME (a TAP or macvtap of the host), tap=,host-ip=192.0.2.1/24 (a TAP that skiff creates, with the host's
    /// address on it, and that ends with skiff; tap=NAME,host-ip=... gives it a name), fd=N (an open TAP), passt (the host's
    /// network without root, by the program passt; forward=tcp:2222:22 leads from port 2222 of the host to port 22 of the
    /// guest, udp:5353:53 and tcp:127.0.0.1:8000-8010:8000 too, and may be repeated), socket=PATH (a Unix socket on which
    /// passt listens). Further keys: id=NAME, mac=ADDRESS [default: one derived from the machine, the same each time],
    /// mtu=68..65535 (told to the guest, which does not go beyond) [default: that of tap=NAME, unless it is Ethernet's 1500],
    /// queues=N (pairs of queues of a TAP, each with a thread) [default: 1],
    /// queue-size=N (entries, a power of two up to 1024) [default: 256], vhost=on|off|auto (of a TAP: whether the kernel
    /// moves its frames, by vhost-net) [default: off; auto is where that is to be had], ioeventfd=on|off, rx-bps=SIZE, tx-bps=SIZE
    /// (at most so many bytes a second to and from the guest), pps=N (at most so many frames a second).
    #[arg(long, value_name = "tap=NAME|passt|socket=PATH[,KEY=VALUE]...")]
    net: Vec<String>,
    /// What COM1 is connected to [default: stdio]
    #[arg(long, value_name = "stdio|file=PATH|pty|socket=PATH|none")]
    serial: Option<String>,
    /// Let the guest end the machine by a write to this port, as QEMU's isa-debug-exit does [default port: 0x501]
    #[arg(long, value_name = "PORT|off", num_args = 0..=1, require_equals = true, default_missing_value = "0x501")]
    debug_exit: Option<String>,
    /// End, with exit code 0, where a reset by the guest would start the machine again
    #[arg(long, value_name = "on|off", num_args = 0..=1, require_equals = true, default_missing_value = "on")]
    no_reboot: Option<String>,
    /// Seconds between the power button and a stop by force [default: 30]
    #[arg(long, value_name = "SECONDS", allow_hyphen_values = true)]
    grace: Option<String>,
    /// Print what disks and networks did when the machine ends, as text or as one line of JSON, to stderr or the log file
    ///
    /// SIGUSR1 prints the same at any time, as text without this flag. Latencies are recorded with it only.
    #[arg(long, value_name = "text|json|off", num_args = 0..=1, require_equals = true, default_missing_value = "text")]
    stats: Option<String>,
    /// Take the settings of this TOML file, which has the names of these flags
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    config: Option<PathBuf>,
    /// Print the machine as a file for --config, and start nothing
    #[arg(long)]
    dry_run: bool,
}

/// Starts the machine and waits for its end.
fn start(vm: &VmConfig) -> anyhow::Result<ExitReason> {
    skiff::vm::run(vm, &super::log::block)
}

impl RunArgs {
    pub(super) fn run(&self) -> Result<u8, Failure> {
        let vm = self.machine()?;
        if self.dry_run {
            super::print(&config::to_toml(&vm.absolute()?)?)?;
            return Ok(0);
        }
        let reason = start(&vm)?;
        match (reason, reason.code()) {
            (ExitReason::DebugExit(_), code) | (_, code @ 0) => tracing::info!("{reason}; exit code {code}"),
            (_, code) => tracing::warn!("{reason}; exit code {code}"),
        }
        Ok(reason.code())
    }

    /// The machine of the flags over the file.
    fn machine(&self) -> Result<VmConfig, ConfigError> {
        let file = self.config.as_deref().map(Request::from_file).transpose()?;
        self.request()?.over(file.unwrap_or_default()).resolve()
    }

    fn request(&self) -> Result<Request, ConfigError> {
        let flags = [
            ("kernel", &self.kernel),
            ("initrd", &self.initrd),
            ("cmdline", &self.cmdline),
            ("boot-protocol", &self.boot_protocol),
            ("cpus", &self.cpus),
            ("memory", &self.memory),
            ("serial", &self.serial),
            ("debug-exit", &self.debug_exit),
            ("no-reboot", &self.no_reboot),
            ("grace", &self.grace),
            ("stats", &self.stats),
        ];
        let given = flags.iter().filter_map(|(key, text)| Some((*key, text.as_ref()?)));
        let mut request = Request::default();
        let disks = self.disk.iter().map(|text| ("disk", text));
        let nets = self.net.iter().map(|text| ("net", text));
        for (key, text) in given.chain(disks).chain(nets) {
            request.set(&Place::flag(&format!("--{key}"), text), key, text)?;
        }
        Ok(request)
    }
}

fn after_help() -> String {
    let mut text = EXAMPLES.to_owned();
    for (code, meaning) in exit::CODES {
        let _ = write!(text, "\n  {code:<4} {meaning}");
    }
    text
}

const EXAMPLES: &str = "\
Examples:
  A Linux distribution with its root filesystem on a disk:
    skiff run --kernel vmlinuz --initrd initrd.img --disk path=root.img \\
        --cmdline \"console=ttyS0 root=/dev/vda rw\" --cpus 2 --memory 1G
  Two disks, the second read-only; the console goes to a file:
    skiff run --kernel vmlinuz --disk root.img --disk path=data.img,readonly=on,serial=DATA1 \\
        --cmdline \"console=ttyS0 root=/dev/vda\" --serial file=console.log
  See what a configuration file and a flag make together, then run it:
    skiff run --config vm.toml --memory 4G --dry-run
    skiff run --config vm.toml --memory 4G

Exit codes:";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;
    use skiff::config::SerialConfig;
    use std::path::Path;

    fn machine(args: &[&str]) -> Result<VmConfig, String> {
        let cli = Cli::try_parse_from(["skiff", "run"].iter().chain(args)).map_err(|error| error.to_string())?;
        let Command::Run(run) = cli.command else { panic!("{cli:?}") };
        run.machine().map_err(|error| error.to_string())
    }

    #[test]
    fn the_example_of_the_help() {
        let vm = machine(&[
            "--kernel",
            "vmlinuz",
            "--initrd",
            "initrd.img",
            "--disk",
            "path=root.img",
            "--cmdline",
            "console=ttyS0 root=/dev/vda rw",
            "--cpus",
            "2",
            "--memory",
            "1G",
        ])
        .unwrap();
        assert_eq!((vm.cpus, vm.memory.size, vm.disks[0].path.to_str()), (2, 1 << 30, Some("root.img")));
        assert_eq!(vm.cmdline, "console=ttyS0 root=/dev/vda rw");
    }

    #[test]
    fn flags_with_an_optional_value() {
        let vm = machine(&["--kernel", "k", "--debug-exit", "--no-reboot"]).unwrap();
        assert_eq!((vm.debug_exit, vm.on_reboot), (Some(0x501), config::OnReboot::Exit));
        let vm = machine(&["--kernel", "k", "--debug-exit=0xf4", "--no-reboot=off"]).unwrap();
        assert_eq!((vm.debug_exit, vm.on_reboot), (Some(0xf4), config::OnReboot::Restart));
    }

    #[test]
    fn a_command_line_may_start_with_a_dash() {
        assert_eq!(machine(&["--kernel", "k", "--cmdline", "-- single"]).unwrap().cmdline, "-- single");
    }

    #[test]
    fn flags_win_over_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("vm.toml");
        std::fs::write(&file, "kernel = \"k\"\ncpus = 4\n[[disk]]\npath = \"a.img\"\n").unwrap();
        let config = file.to_str().unwrap();
        let vm = machine(&["--config", config, "--cpus", "2"]).unwrap();
        assert_eq!((vm.kernel, vm.cpus), (folder.path().join("k"), 2));
        assert_eq!(vm.disks[0].path, folder.path().join("a.img"));
        let vm = machine(&["--config", config, "--disk", "b.img", "--disk", "c.img"]).unwrap();
        let paths: Vec<_> = vm.disks.iter().map(|disk| disk.path.to_str().unwrap()).collect();
        assert_eq!(paths, ["b.img", "c.img"]);
    }

    #[test]
    fn every_flag_of_the_machine_is_a_key_of_the_file() {
        let run = <Cli as clap::CommandFactory>::command();
        let run = run.find_subcommand("run").unwrap().clone();
        let flags = run.get_arguments().filter_map(|flag| flag.get_long());
        let flags: Vec<_> = flags.filter(|flag| !["config", "dry-run"].contains(flag)).collect();
        assert_eq!(flags, config::KEYS);
    }

    #[test]
    fn a_dry_run_means_the_same_from_every_folder() {
        let vm = machine(&["--kernel", "k", "--disk", "d.img", "--serial", "file=log"]).unwrap();
        let vm = vm.absolute().unwrap();
        let here = std::env::current_dir().unwrap();
        assert_eq!((vm.kernel.clone(), vm.serial.clone()), (here.join("k"), SerialConfig::File(here.join("log"))));
        let text = config::to_toml(&vm).unwrap();
        let again = Request::from_toml(Path::new("/elsewhere/vm.toml"), &text).unwrap().resolve();
        assert_eq!(again, Ok(vm));
    }
}
