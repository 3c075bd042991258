//! The disks of a test. What is a snapshot vanishes with its machine; where a step or the user wants to look at it after
//! that, the machine gets a copy in its place, which vanishes with the test. Owned by the thread of the test.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, ensure};
use block::choose::Access;
use block::overlay::default_folder;
use vmm_sys_util::seek_hole::SeekHole;

use super::scenario::{Cell, Scenario};
use crate::bench::Nameless;
use crate::config::{VmConfig, to_toml};

/// Copied between two looks at whether the user wants to stop.
const PIECE: u64 = 64 << 20;

/// A machine with its disks, as `skiff run` gets it.
#[derive(Debug)]
pub(super) struct Prepared {
    /// The images that the machine has, in the order of its disks.
    pub(super) images: Vec<PathBuf>,
    /// Files that live as long as this.
    copies: Vec<Option<Nameless>>,
    config: Nameless,
}

impl Prepared {
    /// `keep`: all that the machine writes may be looked at after its end.
    ///
    /// # Errors
    /// When the host has no room for the copies: one line. Or when `stop` became true.
    pub(super) fn new(scenario: &Scenario, cell: &Cell, keep: bool, stop: &AtomicBool) -> anyhow::Result<Self> {
        let mut machine = cell.machine.clone().absolute()?;
        let mut copies = Vec::new();
        for (at, disk) in machine.disks.iter_mut().enumerate() {
            // A block device is not kept, which is no reason not to run the test.
            let wanted = disk.access == Access::Snapshot && (scenario.checks_disk(at) || keep && disk.path.is_file());
            let copy = if wanted { Some(copy(&disk.path, disk.snapshot_dir.take().as_deref(), stop)?) } else { None };
            if let Some(copy) = &copy {
                disk.path = copy.path();
                disk.access = Access::Write;
            }
            copies.push(copy);
        }
        let images = machine.disks.iter().map(|disk| disk.path.clone()).collect();
        let config = write_config(&machine).with_context(|| scenario.file.display().to_string())?;
        Ok(Self { images, copies, config })
    }

    /// What starts the machine.
    pub(super) fn command(&self) -> Command {
        let mut command = Command::new("/proc/self/exe");
        // With -v it says when it starts again, and how it ended.
        command.args(["run", "-v", "--config"]).arg(self.config.path());
        command
    }

    /// Leaves the disks that the machine wrote to in `folder`, as `disk0.img` and so on by their ids.
    pub(super) fn keep(&self, cell: &Cell, folder: &Path, stop: &AtomicBool) -> io::Result<()> {
        for (disk, copy) in cell.machine.disks.iter().zip(&self.copies) {
            if let Some(copy) = copy {
                let mut kept = File::create(folder.join(format!("{}.img", disk.id)))?;
                copy_sparse(&mut File::open(copy.path())?, &mut kept, stop)?;
            }
        }
        Ok(())
    }
}

fn write_config(machine: &VmConfig) -> anyhow::Result<Nameless> {
    let file = Nameless::make(&std::env::temp_dir()).context("no temporary file")?;
    file.write_all(to_toml(machine)?.as_bytes()).context("no room for a temporary file")?;
    Ok(file)
}

/// A copy of an image: in `folder` or beside it, where a filesystem that can shares its blocks, or else where snapshots are.
fn copy(image: &Path, folder: Option<&Path>, stop: &AtomicBool) -> anyhow::Result<Nameless> {
    let shown = image.display();
    let mut original = File::open(image).with_context(|| format!("disk {shown}"))?;
    ensure!(
        original.metadata()?.is_file(),
        "disk {shown}: only an image in a file can be copied; make one, or readonly = true"
    );
    let copy = match folder {
        Some(folder) => Nameless::make(folder),
        None => Nameless::make(image.parent().unwrap_or(Path::new("/"))).or_else(|_| Nameless::make(&default_folder())),
    };
    let copy = copy.with_context(|| format!("disk {shown}: no file for its copy; name a folder with snapshot-dir"))?;
    let mut file = File::options().write(true).open(copy.path())?;
    copy_sparse(&mut original, &mut file, stop).with_context(|| format!("disk {shown} cannot be copied"))?;
    Ok(copy)
}

/// Copies what is not a hole; `to` is empty. Fails when `stop` becomes true.
fn copy_sparse(from: &mut File, to: &mut File, stop: &AtomicBool) -> io::Result<()> {
    let size = from.seek(SeekFrom::End(0))?;
    to.set_len(size)?;
    let mut at = 0;
    while let Some(data) = from.seek_data(at)? {
        let hole = from.seek_hole(data)?.unwrap_or(size);
        from.seek(SeekFrom::Start(data))?;
        to.seek(SeekFrom::Start(data))?;
        at = data;
        while at < hole {
            if stop.load(Ordering::Relaxed) {
                return Err(io::Error::other("interrupted"));
            }
            // copy_file_range(2): blocks are shared where the filesystem can.
            match io::copy(&mut Read::by_ref(from).take(PIECE.min(hole - at)), to)? {
                // It has become shorter meanwhile.
                0 => return Ok(()),
                copied => at += copied,
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    /// A character device in its place.
    #[test]
    fn a_block_device_is_not_kept() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("k"), "").unwrap();
        let text = "machine = { kernel = 'k', disk = [{ path = '/dev/null' }] }\n[[step]]\nwait = 'x'\n";
        let scenario = Scenario::parse(&folder.path().join("a.toml"), text).unwrap();
        let prepared = Prepared::new(&scenario, &scenario.cells[0], true, &AtomicBool::new(false)).unwrap();
        assert!(prepared.copies[0].is_none() && prepared.images == [Path::new("/dev/null")]);
    }

    #[test]
    fn a_copy_has_the_content_and_the_holes() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("root.img");
        let original = File::create(&image).unwrap();
        original.set_len(64 << 20).unwrap();
        original.write_all_at(b"begin", 0).unwrap();
        original.write_all_at(&vec![7; 100_000], 32 << 20).unwrap();
        let copied = copy(&image, None, &AtomicBool::new(false)).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "the copy has no name");
        assert!(std::fs::read(copied.path()).unwrap() == std::fs::read(&image).unwrap());
        assert!(std::fs::metadata(copied.path()).unwrap().blocks() <= original.metadata().unwrap().blocks() + 16);
        let error = copy(Path::new("/dev/null"), None, &AtomicBool::new(false)).unwrap_err().to_string();
        assert!(error.starts_with("disk /dev/null: only an image in a file"), "{error}");
    }
}
