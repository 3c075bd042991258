//! The disks that are measured: files of our own, which have no name and so go when their last user does, however that
//! ends; or the image of the user's.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail};
use guest::workload::pattern;
use vmm_sys_util::fallocate::{FallocateMode, fallocate};

use super::cell::Content;
use crate::config::format_size;

/// Bytes written at a time.
const CHUNK: u64 = 1 << 20;

/// A file without a name in a folder, which every process of this user can open.
#[derive(Debug)]
pub(crate) struct Nameless(File);

impl Nameless {
    /// An empty one.
    ///
    /// # Errors
    /// What the folder's filesystem says, with the option to change.
    pub(super) fn new(folder: &Path) -> anyhow::Result<Self> {
        let place = folder.display();
        Self::make(folder).with_context(|| format!("--dir {place}: no file can be made there; name another folder"))
    }

    /// The same, with the host's own words.
    pub(crate) fn make(folder: &Path) -> io::Result<Self> {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!(".skiff-{}-{number}", std::process::id()));
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
        fs::remove_file(&path)?;
        Ok(Self(file))
    }

    /// Where other processes find it, as long as this lives.
    pub(crate) fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }

    pub(crate) fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        (&self.0).write_all(bytes)
    }
}

/// One disk.
#[derive(Debug)]
pub(super) enum Image {
    Own { file: Nameless, content: Content, size: u64 },
    Given(PathBuf),
}

impl Image {
    /// A file of our own; its blocks are on the disk when this returns.
    ///
    /// # Errors
    /// When there is no room, or the filesystem cannot; the file is gone then. Or when `stop` became true.
    pub(super) fn make(folder: &Path, size: u64, content: Content, stop: &AtomicBool) -> anyhow::Result<Self> {
        let file = Nameless::new(folder)?;
        let give_content = || match content {
            Content::Written => write_pattern(&file, size, stop),
            Content::Hole | Content::Given => file.0.set_len(size),
            Content::Preallocated => preallocate(&file.0, size),
        };
        let made = give_content().and_then(|()| file.0.sync_all());
        match made {
            Ok(()) => Ok(Self::Own { file, content, size }),
            Err(error) => {
                let remedy = match error.kind() {
                    ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                        "no room; name a smaller --size or another folder".to_owned()
                    }
                    ErrorKind::Unsupported => "the filesystem cannot; leave it out of --content".to_owned(),
                    ErrorKind::Interrupted => "interrupted".to_owned(),
                    _ => format!("{error}"),
                };
                let (size, folder) = (format_size(size), folder.display());
                bail!("--dir {folder}: a {} file of {size}: {remedy}", content.name())
            }
        }
    }

    /// Where the machines find it.
    pub(super) fn path(&self) -> PathBuf {
        match self {
            Self::Own { file, .. } => file.path(),
            Self::Given(path) => path.clone(),
        }
    }

    /// Makes it what it was after it was written to, and leaves nothing for the host to write back during the next
    /// measurement.
    pub(super) fn restore(&self) -> io::Result<()> {
        match self {
            Self::Own { file: Nameless(file), content, size } => {
                match content {
                    Content::Hole => {
                        file.set_len(0)?;
                        file.set_len(*size)?;
                    }
                    Content::Preallocated => {
                        file.set_len(0)?;
                        preallocate(file, *size)?;
                    }
                    Content::Written | Content::Given => {}
                }
                file.sync_all()
            }
            Self::Given(path) => File::open(path)?.sync_all(),
        }
    }
}

fn write_pattern(file: &Nameless, size: u64, stop: &AtomicBool) -> io::Result<()> {
    let mut chunk = Vec::with_capacity(CHUNK as usize);
    for start in (0..size).step_by(CHUNK as usize) {
        if stop.load(Ordering::Relaxed) {
            return Err(ErrorKind::Interrupted.into());
        }
        chunk.clear();
        let end = size.min(start + CHUNK);
        (start..end).step_by(8).for_each(|offset| chunk.extend(pattern(0, offset).to_le_bytes()));
        chunk.truncate((end - start) as usize);
        file.write_all(&chunk)?;
    }
    Ok(())
}

fn preallocate(file: &File, size: u64) -> io::Result<()> {
    fallocate(file, FallocateMode::ZeroRange, false, 0, size).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use std::sync::Arc;

    const SIZE: u64 = 3 << 20;

    fn make(content: Content) -> Image {
        // On a disk, not where a temporary directory may be in memory.
        Image::make(Path::new("."), SIZE, content, &AtomicBool::new(false)).unwrap()
    }

    /// Bytes that are allocated, as du(1) has it.
    fn allocated(image: &Image) -> u64 {
        fs::metadata(image.path()).unwrap().blocks() * 512
    }

    #[test]
    fn contents_are_what_they_are_called_and_come_back() {
        for (content, blocks) in [(Content::Written, SIZE), (Content::Hole, 0), (Content::Preallocated, SIZE)] {
            let image = make(content);
            assert_eq!(fs::metadata(image.path()).unwrap().len(), SIZE);
            assert!(allocated(&image).abs_diff(blocks) < 1 << 16, "{content:?}: {}", allocated(&image));
            let file = OpenOptions::new().write(true).open(image.path()).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, &vec![1; 1 << 20], 0).unwrap();
            image.restore().unwrap();
            assert!(allocated(&image).abs_diff(blocks) < 1 << 16, "{content:?}: {}", allocated(&image));
            assert_eq!(fs::read(image.path()).unwrap().iter().any(|byte| *byte != 0), content == Content::Written);
        }
    }

    #[test]
    fn files_have_no_name_and_end_with_their_owner() {
        let folder = tempfile::tempdir().unwrap();
        let image = Image::make(folder.path(), SIZE, Content::Hole, &AtomicBool::new(false)).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        let path = image.path();
        assert!(path.exists());
        drop(image);
        assert!(!fs::read_link(path).is_ok_and(|target| target.starts_with(folder.path())));
    }

    #[test]
    fn an_interrupted_preparation_says_so() {
        let stop = Arc::new(AtomicBool::new(true));
        let error = Image::make(Path::new("."), SIZE, Content::Written, &stop).unwrap_err().to_string();
        assert!(error.contains("interrupted"), "{error}");
    }

    #[test]
    fn a_folder_that_is_none() {
        let error = Nameless::new(Path::new("/nonexistent")).unwrap_err().to_string();
        assert_eq!(error, "--dir /nonexistent: no file can be made there; name another folder");
    }
}
