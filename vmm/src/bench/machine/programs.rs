//! How each program is told to do the work of a cell with the guest: its command line, and Firecracker's configuration.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use anyhow::Context;
use block::cache::CacheMode;
use block::engine::Aio;
use block::engine::threads::DEFAULT_THREADS;
use serde_json::json;

use super::Machines;
use crate::bench::cell::Cell;
use crate::bench::image::Nameless;
use crate::bench::subject::Subject;

/// QEMU's program.
const QEMU: &str = "qemu-system-x86_64";

/// QEMU's machine without firmware that a software KVM would interpret for seconds.
const MICROVM: &str = "microvm,rtc=on,pcie=on,acpi=on";
/// Where that machine has its configuration space and its window for BARs: its tables do not say the one, its firmware does
/// not use the other (QEMU, include/hw/i386/microvm.h).
const MICROVM_PCI: &str = "ecam=0xe0000000 bars=0xc0000000";

/// A program and its words.
pub(super) struct Program {
    pub(super) command: Command,
    /// It takes console input from a terminal only.
    pub(super) on_terminal: bool,
    /// What it is configured by, as long as this lives.
    pub(super) config: Option<Nameless>,
}

impl From<Command> for Program {
    fn from(command: Command) -> Self {
        Self { command, on_terminal: false, config: None }
    }
}

/// Entries of each queue: QEMU's and our default, or more if more are to be in flight.
fn queue_size(cell: &Cell) -> u16 {
    cell.work.depth.next_power_of_two().max(256)
}

fn switch(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

/// A path as a value in a list of options, where a comma is written twice.
fn in_options(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

impl Machines<'_> {
    /// What measures `cell` under `subject`, which is not the host.
    pub(super) fn program(&self, subject: Subject, cell: &Cell, aio: Aio, disk: &Path) -> anyhow::Result<Program> {
        Ok(match subject {
            Subject::Skiff | Subject::Host => self.skiff(cell, disk)?.into(),
            Subject::Qemu => self.qemu(cell, aio, disk).into(),
            Subject::CloudHypervisor => {
                let command = self.cloud_hypervisor(cell, aio, disk, knows_image_type());
                Program { command, on_terminal: true, config: None }
            }
            Subject::Firecracker => {
                let config = Nameless::make(self.folder).context("a file for its configuration")?;
                config.write_all(self.firecracker_config(cell, disk).as_bytes())?;
                Program { command: firecracker(&config.path()), on_terminal: false, config: Some(config) }
            }
        })
    }

    fn skiff(&self, cell: &Cell, disk: &Path) -> anyhow::Result<Command> {
        let way = &cell.way;
        let option = format!(
            "path={},readonly={},aio={},cache={},ioeventfd={},poll-us={},merge={},thread-pool-max={},queues={},queue-size={}",
            in_options(disk),
            switch(!cell.work.rw.writes()),
            way.aio_name(),
            way.cache.name(),
            switch(way.ioeventfd),
            way.poll_us,
            switch(way.merge),
            way.thread_pool_max,
            cell.work.queues,
            queue_size(cell),
        );
        let mut command = Command::new(std::env::current_exe().context("the path of skiff itself")?);
        command.arg("run").arg("--kernel").arg(&self.guest).args(["--cmdline", &self.words(cell)]);
        command.args(["--memory", &format!("{}M", Self::memory(cell)), "--disk", &option]);
        command.args(["--debug-exit", "--serial", "stdio"]);
        Ok(command)
    }

    /// With an I/O thread, its fastest way. It merges always, and polls as it likes.
    fn qemu(&self, cell: &Cell, aio: Aio, disk: &Path) -> Command {
        let (work, way) = (&cell.work, &cell.way);
        let drive = format!(
            "if=none,id=disk,format=raw,file={},read-only={},aio={},cache={}",
            in_options(disk),
            switch(!work.rw.writes()),
            aio.name(),
            way.cache.name(),
        );
        let device = format!(
            "virtio-blk-pci,disable-legacy=on,drive=disk,iothread=io0,num-queues={},queue-size={},ioeventfd={}",
            work.queues,
            queue_size(cell),
            switch(way.ioeventfd),
        );
        let mut iothread = "iothread,id=io0".to_owned();
        if way.thread_pool_max != DEFAULT_THREADS {
            let _ = write!(iothread, ",thread-pool-max={}", way.thread_pool_max);
        }
        let mut command = Command::new(QEMU);
        command.args(["-M", MICROVM, "-bios", "qboot.rom", "-accel", "kvm", "-cpu", "host,-arch-capabilities"]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]);
        command.args(["-name", "bench,debug-threads=on", "-m", &Self::memory(cell).to_string()]);
        command.args(["-device", "isa-debug-exit,iobase=0x501,iosize=2", "-object", &iothread]);
        command.args(["-drive", &drive, "-device", &device, "-kernel"]).arg(&self.guest);
        command.args(["-append", &format!("{} {MICROVM_PCI}", self.words(cell))]);
        command
    }

    /// It prefers io_uring to Linux AIO, and that to blocking calls, unless a preference is switched off. Where it
    /// recognises an image as raw by itself it refuses writes to the first sector, so it is told if it `knows_image_type`.
    fn cloud_hypervisor(&self, cell: &Cell, aio: Aio, disk: &Path, knows_image_type: bool) -> Command {
        let mut option = format!(
            "path={},readonly={},direct={},num_queues={},queue_size={}",
            disk.display(),
            switch(!cell.work.rw.writes()),
            switch(cell.way.cache.is_direct()),
            cell.work.queues,
            queue_size(cell),
        );
        option.push_str(if knows_image_type { ",image_type=raw" } else { "" });
        option.push_str(if aio == Aio::Native { ",_disable_io_uring=on" } else { "" });
        let mut command = Command::new("cloud-hypervisor");
        command.args(["--cpus", "boot=1", "--memory", &format!("size={}M", Self::memory(cell))]);
        command.args(["--kernel"]).arg(&self.guest).args(["--cmdline", &self.words(cell), "--disk", &option]);
        command.args(["--serial", "tty", "--console", "off"]);
        command
    }

    /// The file that `--config-file` names. Its Async engine is io_uring.
    fn firecracker_config(&self, cell: &Cell, disk: &Path) -> String {
        let drive = json!({
            "drive_id": "disk",
            "path_on_host": disk,
            "is_root_device": false,
            "is_read_only": !cell.work.rw.writes(),
            "cache_type": if cell.way.cache == CacheMode::Unsafe { "Unsafe" } else { "Writeback" },
            "io_engine": "Async",
        });
        let config = json!({
            "boot-source": { "kernel_image_path": self.guest, "boot_args": self.words(cell) },
            "drives": [drive],
            "machine-config": { "vcpu_count": 1, "mem_size_mib": Self::memory(cell) },
        });
        config.to_string()
    }
}

/// Its disks are on a PCI bus only where that is asked for.
fn firecracker(config: &Path) -> Command {
    let mut command = Command::new("firecracker");
    command.args(["--no-api", "--enable-pci", "--level", "Error", "--config-file"]).arg(config);
    command
}

/// Whether this Cloud Hypervisor can be told what a disk's image is. Older ones do not know the word.
fn knows_image_type() -> bool {
    static KNOWS: OnceLock<bool> = OnceLock::new();
    *KNOWS.get_or_init(|| {
        let help = Command::new("cloud-hypervisor").arg("--help").output();
        help.is_ok_and(|help| String::from_utf8_lossy(&help.stdout).contains("image_type="))
    })
}

#[cfg(test)]
mod tests;
