//! Disks that leave their image alone: what the guest writes goes to a file of ours without a name, which is gone when its
//! last descriptor is closed, however skiff ends. Opened by the main thread; kept when the guest restarts.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::disk::{Disk, DiskError};
use crate::written::Written;

/// Where overlays are unless the user says: not in /tmp, which is in memory on many hosts.
const FOLDER: &str = "/var/tmp";

/// What a disk shows where nothing was written to it.
#[derive(Debug)]
pub(crate) struct Backing {
    /// Open for reading.
    pub(crate) image: Arc<Disk>,
    /// What is not shown any more.
    pub(crate) written: Written,
}

/// The folder for overlays where none is named: `$TMPDIR`, or `/var/tmp`.
pub fn default_folder() -> PathBuf {
    std::env::var_os("TMPDIR").filter(|folder| !folder.is_empty()).map_or_else(|| FOLDER.into(), PathBuf::from)
}

/// A disk that begins as `image`, found at `path`, and that can be written: into a sparse file without a name in `folder`,
/// in the same cache mode. `image` is open for reading only, and stays locked, shared, as long as the disk lives.
///
/// # Errors
/// When there can be no such file. Each names the folder and a remedy.
pub fn over(image: Disk, path: &Path, folder: &Path) -> Result<Disk, DiskError> {
    let cache = image.cache();
    let failed = |error| DiskError::Overlay { path: path.into(), folder: folder.into(), error };
    let size = image.size();
    let make = || {
        let file = nameless(folder)?;
        file.set_len(size)?;
        Ok(file)
    };
    let mut file = make().map_err(failed)?;
    if cache.is_direct() {
        let again = format!("/proc/self/fd/{}", file.as_raw_fd());
        let direct = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(again);
        file = direct.map_err(|error| match error.kind() {
            ErrorKind::InvalidInput => DiskError::OverlayNotDirect { path: path.into(), folder: folder.into(), cache },
            _ => failed(error),
        })?;
    }
    let backing = Backing { image: Arc::new(image), written: Written::default() };
    Disk::backed(file, backing).map_err(|error| match error {
        DiskError::NotDirect { .. } => DiskError::OverlayNotDirect { path: path.into(), folder: folder.into(), cache },
        DiskError::Io { error, .. } => failed(error),
        error => failed(io::Error::other(error)),
    })
}

/// A file that is open and has no name.
fn nameless(folder: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    match options.clone().custom_flags(libc::O_TMPFILE | libc::O_EXCL).open(folder) {
        // Kernels and filesystems have several words for not knowing O_TMPFILE (open(2)); containers' often do not.
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::ENOENT | libc::EINVAL)) =>
        {
            unlinked(folder, &options)
        }
        opened => opened,
    }
}

/// A file that had a name for a moment.
fn unlinked(folder: &Path, options: &OpenOptions) -> io::Result<File> {
    let mut number = 0;
    loop {
        let path = folder.join(format!(".skiff-snapshot-{}-{number}", std::process::id()));
        match options.clone().create_new(true).open(&path) {
            Ok(file) => return fs::remove_file(&path).map(|()| file),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use tempfile::TempDir;

    use crate::cache::CacheMode;
    use crate::lock::tests::FORKING;

    fn image() -> (TempDir, PathBuf) {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("root.img");
        fs::write(&path, [7; 8192]).unwrap();
        (folder, path)
    }

    fn open(path: &Path, folder: &Path) -> Result<Disk, DiskError> {
        over(Disk::open(path, true, CacheMode::Writeback, "disk0")?, path, folder)
    }

    #[test]
    fn one_image_is_the_beginning_of_many_disks() {
        let _alone = FORKING.lock();
        let (folder, path) = image();
        let disks = [(); 3].map(|()| open(&path, folder.path()).unwrap());
        for disk in &disks {
            assert_eq!((disk.size(), disk.readonly(), disk.id()), (8192, false, "disk0"));
            // As a process that was killed leaves it: there is nothing to clean up.
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "only the image has a name");
        }
        Disk::open(&path, true, CacheMode::Writeback, "disk0").unwrap();
        let writer = Disk::open(&path, false, CacheMode::Writeback, "disk0").unwrap_err().to_string();
        assert!(writer.contains("locked"), "{writer}");
        drop(disks);
        let _writer = Disk::open(&path, false, CacheMode::Writeback, "disk0").unwrap();
        let refused = open(&path, folder.path()).unwrap_err().to_string();
        assert!(refused.contains("locked"), "{refused}");
    }

    /// Not every filesystem makes files without a name.
    #[test]
    fn a_file_that_had_a_name_has_none_left() {
        let folder = TempDir::new().unwrap();
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let taken = folder.path().join(format!(".skiff-snapshot-{}-0", std::process::id()));
        fs::write(&taken, "somebody's").unwrap();
        let file = unlinked(folder.path(), &options).unwrap();
        file.set_len(512).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert_eq!(fs::read(&taken).unwrap(), b"somebody's");
    }

    #[test]
    fn a_folder_that_will_not_do_is_named_with_the_remedy() {
        let (folder, path) = image();
        for folder in [&folder.path().join("missing"), &path, Path::new("/proc")] {
            let error = open(&path, folder).unwrap_err().to_string();
            assert!(error.contains(&format!("{folder:?}")) && error.contains("snapshot-dir=FOLDER"), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }
}
