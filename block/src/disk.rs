//! An opened disk image: a raw file or a block device, checked and locked. Opened by the main thread before the machine
//! is built; shared by the disk's workers, and kept when the guest restarts.

use std::fs::{File, FileType, OpenOptions};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use thiserror::Error;

use crate::SECTOR_SIZE;
use crate::cache::CacheMode;
use crate::direct::{self, Alignment};
use crate::lock;
use crate::overlay::Backing;
use crate::ranges::Ranges;
use crate::topology::Topology;
use crate::witness::Witnesses;

/// How long the kernel may keep the lock of a process that was killed, in milliseconds: an io_uring of it is taken apart
/// later than its descriptors. Nobody can be named as the holder then.
const LINGERING: u32 = 1000;

/// Milliseconds between two attempts to take such a lock.
const PAUSE: u32 = 5;

/// Why an image cannot be used. Each is one line that names the file and a remedy.
#[derive(Debug, Error)]
pub enum DiskError {
    /// Nothing has this name.
    #[error("disk image {0:?} does not exist: check the path, or create it with: truncate -s 8G {0:?}")]
    Missing(PathBuf),
    /// The host lets us not even read.
    #[error("disk image {path:?} cannot be read ({error}): check its permissions and those of its directories")]
    Unreadable {
        /// The image.
        path: PathBuf,
        /// What the host said.
        error: io::Error,
    },
    /// Reading is allowed, writing is not.
    #[error("disk image {path:?} can be read but not written ({error}): add readonly=on, or permit writing to it")]
    Unwritable {
        /// The image.
        path: PathBuf,
        /// What the host said.
        error: io::Error,
    },
    /// A directory, a pipe, a character device, a socket.
    #[error("disk image {path:?} is a {found}: name a raw image file or a block device")]
    Kind {
        /// The image.
        path: PathBuf,
        /// What it is instead.
        found: &'static str,
    },
    /// There is not one sector.
    #[error("disk image {0:?} is empty: give it a size, for example with: truncate -s 8G {0:?}")]
    Empty(PathBuf),
    /// The filesystem does not do O_DIRECT.
    #[error(
        "disk image {path:?} cannot be opened with O_DIRECT, which cache={} needs: its filesystem does not offer it; use \
         cache={}, or move the image to one that does, such as ext4 or xfs", .cache.name(), .cache.buffered().name()
    )]
    NotDirect {
        /// The image.
        path: PathBuf,
        /// The mode that was asked for.
        cache: CacheMode,
    },
    /// The last block is not whole, and O_DIRECT cannot write a part of one.
    #[error(
        "disk image {path:?} has {size} bytes, which is not a multiple of {block}, as O_DIRECT needs it here: pad it with: \
         truncate -s {} {path:?}, or use cache={}", .size.next_multiple_of(*.block), .cache.buffered().name()
    )]
    Block {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The unit of direct transfers, in bytes.
        block: u64,
        /// The mode that was asked for.
        cache: CacheMode,
    },
    /// The last sector is not whole.
    #[error(
        "disk image {path:?} has {size} bytes, which is not a multiple of 512: if it is a raw image, pad it with: \
         truncate -s {padded} {path:?}"
    )]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The next multiple of 512.
        padded: u64,
    },
    /// Someone else uses it, at least one of the two for writing.
    #[error("disk image {path:?} is locked by {holder}: {remedy}")]
    Locked {
        /// The image.
        path: PathBuf,
        /// Who, in words.
        holder: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// The filesystem does not do locks.
    #[error("disk image {path:?} cannot be locked ({error}): move it to a filesystem with file locks")]
    Unlockable {
        /// The image.
        path: PathBuf,
        /// What the host said.
        error: io::Error,
    },
    /// There is no place for what the guest writes to a snapshot.
    #[error(
        "disk image {path:?}: with snapshot=on what the guest writes goes to a file in {folder:?}, which cannot be made \
         ({error}): name another folder with snapshot-dir=FOLDER"
    )]
    Overlay {
        /// The image.
        path: PathBuf,
        /// Where that file was to be.
        folder: PathBuf,
        /// What the host said.
        error: io::Error,
    },
    /// That place does not do O_DIRECT.
    #[error(
        "disk image {path:?}: with snapshot=on what the guest writes goes to a file in {folder:?}, which cannot be opened \
         with O_DIRECT, as cache={} needs it: use cache={}, or name another folder with snapshot-dir=FOLDER",
        .cache.name(), .cache.buffered().name()
    )]
    OverlayNotDirect {
        /// The image.
        path: PathBuf,
        /// Where that file is.
        folder: PathBuf,
        /// The mode that was asked for.
        cache: CacheMode,
    },
    /// Any other refusal of the host.
    #[error("disk image {path:?} cannot be opened: {error}")]
    Io {
        /// The image.
        path: PathBuf,
        /// What the host said.
        error: io::Error,
    },
}

/// An opened image. It is locked against other users as long as this lives: shared if read-only, else exclusively.
#[derive(Debug)]
pub struct Disk {
    id: String,
    file: File,
    size: u64,
    readonly: bool,
    cache: CacheMode,
    alignment: Alignment,
    topology: Topology,
    ranges: Ranges,
    /// It is what was written over another image.
    backing: Option<Backing>,
    flush_failed: AtomicBool,
    /// For durable writes through the page cache.
    witnesses: Witnesses,
}

impl Disk {
    /// Opens the raw image or block device at `path`, without changing it. `id` names the disk in messages.
    ///
    /// # Errors
    /// [`DiskError`] says which of its reasons it is.
    pub fn open(path: &Path, readonly: bool, cache: CacheMode, id: &str) -> Result<Self, DiskError> {
        let file = open_for(path, readonly, cache)?;
        // First: whoever holds the lock may still be giving the image its size.
        lock_image(&file, path, readonly)?;
        Self::of(file, path, readonly, cache, id)
    }

    /// Opens the image at `path` to read from it whoever uses it meanwhile: read-only, and without the lock that
    /// [`Disk::open`] takes. For looking at it; what is read may be changing.
    ///
    /// # Errors
    /// As [`Disk::open`], except that it cannot be locked.
    pub fn look(path: &Path, cache: CacheMode, id: &str) -> Result<Self, DiskError> {
        Self::of(open_for(path, true, cache)?, path, true, cache, id)
    }

    fn of(file: File, path: &Path, readonly: bool, cache: CacheMode, id: &str) -> Result<Self, DiskError> {
        let size = image_size(&file).map_err(|error| DiskError::Io { path: path.into(), error })?;
        check_size(path, size)?;
        let alignment = if cache.is_direct() {
            let found = direct::alignment(&file).map_err(|error| DiskError::Io { path: path.into(), error })?;
            found.ok_or_else(|| DiskError::NotDirect { path: path.into(), cache })?
        } else {
            Alignment::NONE
        };
        if !readonly && !size.is_multiple_of(alignment.block) {
            return Err(DiskError::Block { path: path.into(), size, block: alignment.block, cache });
        }
        let topology =
            Topology::of(&file, alignment.block).map_err(|error| DiskError::Io { path: path.into(), error })?;
        let (id, ranges, flush_failed) = (id.to_owned(), Ranges::default(), AtomicBool::new(false));
        let (witnesses, backing) = (Witnesses::default(), None);
        Ok(Self { id, file, size, readonly, cache, alignment, topology, ranges, backing, flush_failed, witnesses })
    }

    /// A disk that shows `backing`, and whose writes go to `file`: as long, all holes, opened as the cache mode of the image
    /// wants it.
    pub(crate) fn backed(file: File, backing: Backing) -> Result<Self, DiskError> {
        let image = &backing.image;
        // Nobody sees the end of this file: that its last block is not whole does not matter.
        let overlay = Self::of(file, Path::new(""), true, image.cache, &image.id)?;
        Ok(Self { readonly: false, backing: Some(backing), ..overlay })
    }

    /// As on a host that demands `alignment`, at least as coarse as that of this one.
    #[cfg(test)]
    pub(crate) fn with_alignment(self, alignment: Alignment) -> Self {
        Self { alignment, ..self }
    }

    /// Its name in messages.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Bytes when it was opened; a multiple of [`SECTOR_SIZE`], not zero.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether writing is refused. The file is then not even open for it.
    pub fn readonly(&self) -> bool {
        self.readonly
    }

    /// What it was opened for.
    pub fn cache(&self) -> CacheMode {
        self.cache
    }

    /// What the host demands of transfers. The engines see to it.
    pub fn alignment(&self) -> Alignment {
        self.alignment
    }

    /// The host's blocks. Advice for the guest; the engines do not need it to be followed.
    pub fn topology(&self) -> Topology {
        self.topology
    }

    /// The writes that go on, where they can disturb each other.
    pub(crate) fn ranges(&self) -> &Ranges {
        &self.ranges
    }

    /// What it shows where nothing was written to it, if that is another image.
    pub(crate) fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    /// The open file, for positioned transfers. Its own position means nothing. Of a disk over another image it holds what
    /// was written.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Puts everything written so far on stable storage (`fdatasync`). Blocks.
    ///
    /// # Errors
    /// What the host says; and through the page cache, once it has said so, for ever.
    pub fn flush(&self) -> io::Result<()> {
        self.flushed(self.file.sync_data())
    }

    /// What an `fdatasync` comes to that the host answered with `result`. After one that failed Linux takes for written
    /// what it could not write from the page cache: the next succeeds, though that is lost (fsync(2)). Nobody may be told
    /// that it is stable, so no flush succeeds any more.
    pub(crate) fn flushed(&self, result: io::Result<()>) -> io::Result<()> {
        if self.cache.is_direct() {
            return result;
        }
        if result.is_err() {
            self.flush_failed.store(true, Ordering::SeqCst);
        } else if self.flush_failed.load(Ordering::SeqCst) {
            return Err(io::Error::other(
                "an earlier flush failed, and the host has dropped what it could not write: end the machine and check what \
                 is on the disk",
            ));
        }
        result
    }
}

impl Disk {
    /// Whether a durable write by way of [`Disk::file`] is told of its own error only, however many there are at a time.
    pub(crate) fn tells_apart(&self) -> bool {
        self.cache.is_direct()
    }

    /// Makes the durable change that `write` makes with the file it is given.
    ///
    /// # Errors
    /// What becomes of it, and of nothing else; and when the host gives no more open files.
    pub(crate) fn write_durably<T>(&self, write: impl FnOnce(&File) -> io::Result<T>) -> io::Result<T> {
        if self.tells_apart() { write(&self.file) } else { self.witnesses.lend(&self.file, write) }
    }

    /// Makes `change`, by way of [`Disk::file`], and puts it on stable storage (`fdatasync`).
    ///
    /// # Errors
    /// As [`Disk::write_durably`]: also where others were told already that it could not be written.
    pub(crate) fn change_durably(&self, change: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        // Whoever tells of it is open before: what is opened later knows only of what nobody was told of.
        self.write_durably(|file| change().and_then(|()| file.sync_data()))
    }
}

/// Who holds a lock on the image at `path`, in words; `None` if nobody does, or nobody that we can see.
pub fn user_of(path: &Path) -> Option<String> {
    let holder = lock::find_holder(&open_file(path, true, false).ok()?)?;
    Some(format!("process {} ({})", holder.pid, holder.command))
}

/// Refuses what is not a whole number of sectors, at least one.
pub(crate) fn check_size(path: &Path, size: u64) -> Result<(), DiskError> {
    if size == 0 {
        return Err(DiskError::Empty(path.into()));
    }
    if !size.is_multiple_of(SECTOR_SIZE) {
        let padded = size.next_multiple_of(SECTOR_SIZE);
        return Err(DiskError::Size { path: path.into(), size, padded });
    }
    Ok(())
}

fn open_for(path: &Path, readonly: bool, cache: CacheMode) -> Result<File, DiskError> {
    open_file(path, readonly, cache.is_direct()).map_err(|error| match error {
        DiskError::NotDirect { path, .. } => DiskError::NotDirect { path, cache },
        error => error,
    })
}

/// Whether a disk that the guest may write could be opened. Not asked of block devices: udev takes the closing of one that was
/// open for writing for a change.
///
/// # Errors
/// As [`Disk::open`].
pub fn check_writable(path: &Path) -> Result<(), DiskError> {
    if path.metadata().is_ok_and(|found| found.is_file()) { open_file(path, false, false).map(drop) } else { Ok(()) }
}

/// Opens what may be an image, past the page cache if `direct`.
pub(crate) fn open_file(path: &Path, readonly: bool, direct: bool) -> Result<File, DiskError> {
    let failed = |error: io::Error| match error.kind() {
        ErrorKind::InvalidInput if direct => DiskError::NotDirect { path: path.into(), cache: CacheMode::None },
        ErrorKind::NotFound => DiskError::Missing(path.into()),
        ErrorKind::PermissionDenied => DiskError::Unreadable { path: path.into(), error },
        _ => DiskError::Io { path: path.into(), error },
    };
    // Before opening: a pipe would wait for its other end, and a character device may act on being opened.
    let kind = path.metadata().map_err(failed)?.file_type();
    if let Some(found) = unusable_kind(kind) {
        return Err(DiskError::Kind { path: path.into(), found });
    }
    let flags = if direct { libc::O_DIRECT } else { 0 };
    match OpenOptions::new().read(true).write(!readonly).custom_flags(flags).open(path) {
        Ok(file) => Ok(file),
        Err(error) if !readonly && File::open(path).is_ok() => match error.kind() {
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
                Err(DiskError::Unwritable { path: path.into(), error })
            }
            _ => Err(failed(error)),
        },
        Err(error) => Err(failed(error)),
    }
}

fn unusable_kind(kind: FileType) -> Option<&'static str> {
    if kind.is_file() || kind.is_block_device() {
        None
    } else if kind.is_dir() {
        Some("directory")
    } else if kind.is_fifo() {
        Some("pipe")
    } else if kind.is_char_device() {
        Some("character device")
    } else {
        Some("socket")
    }
}

/// The end of a file or of a block device, in bytes.
pub(crate) fn image_size(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

fn lock_image(file: &File, path: &Path, readonly: bool) -> Result<(), DiskError> {
    let mut patience = LINGERING / PAUSE;
    let holder = loop {
        match lock::try_lock(file, !readonly) {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(error) => return Err(DiskError::Unlockable { path: path.into(), error }),
        }
        let holder = lock::find_holder(file);
        if holder.is_some() || patience == 0 {
            break holder;
        }
        thread::sleep(Duration::from_millis(PAUSE.into()));
        patience -= 1;
    };
    let (holder, remedy) = match holder {
        Some(holder) if holder.pid == std::process::id() => {
            ("another disk of this VM".to_owned(), "give the image once, or readonly=on to all disks that share it")
        }
        Some(holder) => (
            format!("process {} ({})", holder.pid, holder.command),
            "stop it, copy the image, or use readonly=on or snapshot=on in both",
        ),
        None => (
            "a process that cannot be named (another user's or another container's)".to_owned(),
            "stop it, copy the image, or use readonly=on or snapshot=on in both",
        ),
    };
    Err(DiskError::Locked { path: path.into(), holder, remedy })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    use tempfile::TempDir;

    use crate::lock::tests::FORKING;

    fn image(size: u64) -> (TempDir, PathBuf) {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("root.img");
        File::create(&path).unwrap().set_len(size).unwrap();
        (dir, path)
    }

    fn refusal(path: &Path, readonly: bool) -> String {
        let error = Disk::open(path, readonly, CacheMode::Writeback, "disk0").unwrap_err().to_string();
        assert!(!error.contains('\n'), "one line: {error}");
        assert!(error.contains(&format!("{path:?}")), "names the file: {error}");
        error
    }

    /// Runs `test` as a user whom the permissions of files bind.
    fn as_nobody(test: impl FnOnce() + Send) {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // For a user without rights it does nothing. It only concerns the thread that calls it.
                #[expect(unsafe_code, reason = "root ignores permissions, and tests may run as root")]
                // SAFETY: it takes and changes a number.
                unsafe {
                    libc::setfsuid(65534);
                }
                test();
            });
        });
    }

    #[test]
    fn opens_without_changing_anything() {
        let (_dir, path) = image(4096);
        fs::write(&path, [7; 1024]).unwrap();
        let before = fs::metadata(&path).unwrap();
        let disk = Disk::open(&path, false, CacheMode::Writeback, "disk0").unwrap();
        assert_eq!((disk.size(), disk.readonly(), disk.id()), (1024, false, "disk0"));
        drop(disk);
        let after = fs::metadata(&path).unwrap();
        assert_eq!(before.modified().unwrap(), after.modified().unwrap());
        assert_eq!(fs::read(&path).unwrap(), [7; 1024]);
    }

    #[test]
    fn refuses_what_is_no_image() {
        let _alone = FORKING.lock();
        let (dir, path) = image(0);
        assert!(refusal(&path, false).contains("is empty"));
        assert!(refusal(dir.path(), true).contains("is a directory"));
        assert!(refusal(Path::new("/dev/null"), false).contains("is a character device"));
        let missing = dir.path().join("missing");
        assert!(refusal(&missing, false).contains("does not exist"));
        assert!(!missing.exists());
        let pipe = dir.path().join("pipe");
        assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        assert!(refusal(&pipe, true).contains("is a pipe"));
        assert!(refusal(&path.join("below"), true).contains("cannot be opened"));
    }

    #[test]
    fn a_partial_sector_is_refused_with_the_size_that_would_do() {
        let (_dir, path) = image(1025);
        assert!(refusal(&path, true).contains("truncate -s 1536 "));
        File::options().write(true).open(&path).unwrap().set_len(1536).unwrap();
        assert_eq!(Disk::open(&path, true, CacheMode::Writeback, "disk0").unwrap().size(), 1536);
    }

    #[test]
    fn tells_unreadable_from_unwritable() {
        let (dir, path) = image(512);
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o000)).unwrap();
        as_nobody(|| {
            assert!(refusal(&path, true).contains("cannot be read"));
            assert!(refusal(&path, false).contains("cannot be read"));
        });
        fs::set_permissions(&path, Permissions::from_mode(0o444)).unwrap();
        as_nobody(|| {
            assert!(refusal(&path, false).contains("readonly=on"));
            assert!(Disk::open(&path, true, CacheMode::Writeback, "disk0").is_ok());
        });
    }

    #[test]
    fn the_size_is_that_of_an_image_nobody_else_writes() {
        let _alone = FORKING.lock();
        let (_dir, path) = image(0);
        let creator = File::options().write(true).open(&path).unwrap();
        assert!(lock::try_lock(&creator, true).unwrap());
        assert!(refusal(&path, false).contains("locked"), "not yet empty for good");
        creator.set_len(4096).unwrap();
        drop(creator);
        assert_eq!(Disk::open(&path, false, CacheMode::Writeback, "disk0").unwrap().size(), 4096);
    }

    #[test]
    fn an_image_has_one_writer_or_many_readers() {
        let _alone = FORKING.lock();
        let (_dir, path) = image(512);
        let writer = Disk::open(&path, false, CacheMode::Writeback, "disk0").unwrap();
        assert!(refusal(&path, false).contains("locked by another disk of this VM"));
        assert!(refusal(&path, true).contains("locked by another disk of this VM"));
        drop(writer);
        let readers = [(); 2].map(|()| Disk::open(&path, true, CacheMode::Writeback, "disk0").unwrap());
        assert!(refusal(&path, false).contains("locked"));
        drop(readers);
        Disk::open(&path, false, CacheMode::Writeback, "disk0").unwrap();
    }

    #[test]
    fn an_image_that_ends_within_a_block_is_refused_with_what_would_do() {
        let (path, cache) = (PathBuf::from("root.img"), CacheMode::Directsync);
        let error = DiskError::Block { path, size: 4608, block: 4096, cache }.to_string();
        assert!(error.contains("truncate -s 8192 \"root.img\""), "{error}");
        assert!(error.contains("cache=writethrough"), "{error}");
    }

    /// As after a process with an io_uring was killed: the kernel holds the file a moment longer than anyone.
    #[test]
    fn a_lock_that_only_lingers_is_waited_for() {
        let _alone = FORKING.lock();
        let (_dir, path) = image(4096);
        for _ in 0..20 {
            let disk = Disk::open(&path, false, CacheMode::Writeback, "disk0").unwrap();
            let ring = io_uring::IoUring::new(1).unwrap();
            ring.submitter().register_files(&[disk.file().as_raw_fd()]).unwrap();
        }
    }

    #[test]
    fn cache_modes_that_are_direct_say_so_to_the_host() {
        for cache in CacheMode::ALL {
            // On a disk, not where a temporary directory may be in memory.
            let path = tempfile::NamedTempFile::new_in(".").unwrap().into_temp_path();
            File::options().write(true).open(&path).unwrap().set_len(1 << 20).unwrap();
            let disk = Disk::open(&path, false, cache, "disk0").unwrap();
            let flags = fs::read_to_string(format!("/proc/self/fdinfo/{}", disk.file().as_raw_fd())).unwrap();
            let flags = flags.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
            let direct = i32::from_str_radix(flags, 8).unwrap() & libc::O_DIRECT != 0;
            assert_eq!(direct, [CacheMode::None, CacheMode::Directsync].contains(&cache), "{cache:?}");
            assert_eq!(disk.alignment() == Alignment::NONE, !direct);
        }
    }

    #[test]
    fn a_filesystem_without_direct_transfers_is_named_with_the_mode_that_would_do() {
        // A regular file that cannot be opened with O_DIRECT, on every Linux.
        let path = Path::new("/proc/self/comm");
        for (cache, instead) in [(CacheMode::None, "writeback"), (CacheMode::Directsync, "writethrough")] {
            let error = Disk::open(path, true, cache, "disk0").unwrap_err().to_string();
            assert!(error.contains(&format!("O_DIRECT, which cache={} needs", cache.name())), "{error}");
            assert!(error.contains(&format!("use cache={instead}")), "{error}");
            assert!(!error.contains('\n'));
        }
    }
}
