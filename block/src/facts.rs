//! What speaks for one engine or cache mode and against another: facts about an image and its host, gathered without
//! changing either. Gathered once on the thread that opens a disk; plain values afterwards, which tests make up.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::direct::{self, Alignment};
use crate::disk::{self, DiskError};
use crate::engine::{Aio, Unusable, native};
use crate::extents::Blocks;
use crate::filesystem::Filesystem;

/// Everything [`choose`](crate::choose::choose) looks at.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The image, for messages.
    pub path: PathBuf,
    /// What it is.
    pub kind: Kind,
    /// In bytes.
    pub size: u64,
    /// Whether O_DIRECT works.
    pub direct: Direct,
    /// Whether reads can be asked not to wait (RWF_NOWAIT of preadv2(2)). Where they cannot, io_uring gives every transfer
    /// to a thread of the kernel.
    pub nowait: bool,
    /// What the host offers.
    pub host: Host,
}

/// What an image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File {
        /// Where it is.
        filesystem: Filesystem,
        /// Which blocks it has.
        blocks: Blocks,
    },
    /// A block device.
    Device {
        /// Its medium turns, or it says so.
        rotational: bool,
        /// The file it shows, if it is a loop device.
        backing: Option<String>,
    },
}

/// Whether the page cache can be passed by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Direct {
    /// With these demands.
    Works(Alignment),
    /// The filesystem does not offer it.
    Missing,
    /// It should work and does not: what the host said.
    Failed(String),
}

/// What the host offers.
#[derive(Clone, Debug)]
pub struct Host {
    /// The release of the kernel, as uname(2) tells it.
    pub kernel: String,
    /// linux-aio for every queue of the disk, or why not.
    pub native: Result<(), Unusable>,
    /// io_uring for every queue of the disk, or why not.
    pub io_uring: Result<(), Unusable>,
    /// Requests that linux-aio has left for the whole host: fs.aio-max-nr less fs.aio-nr.
    pub native_room: Option<u64>,
}

impl Facts {
    /// Whether the image has a size that a disk can have. It may yet get one as long as it is not locked, so it is not looked
    /// at before.
    ///
    /// # Errors
    /// [`DiskError`] says what is wrong.
    pub fn check_size(&self) -> Result<(), DiskError> {
        disk::check_size(&self.path, self.size)
    }

    /// Those of the image at `path`, for a disk of that many `queues`. Opens it read-only, takes no lock and reads a page
    /// or two.
    ///
    /// # Errors
    /// As for [`Disk::open`](crate::disk::Disk::open), when it cannot even be read.
    pub fn gather(path: &Path, queues: u16) -> Result<Self, DiskError> {
        let failed = |error| DiskError::Io { path: path.into(), error };
        let file = disk::open_file(path, true, false)?;
        // What has no size is no image, which opening it as a disk says.
        let size = disk::image_size(&file).unwrap_or(0);
        let stat = file.metadata().map_err(failed)?;
        let kind = if stat.file_type().is_block_device() {
            device(stat.rdev())
        } else {
            Kind::File { filesystem: Filesystem::of(&file), blocks: Blocks::of(&file, size) }
        };
        let nowait = direct::can_refuse_to_wait(&file);
        Ok(Self { path: path.into(), kind, size, direct: direct(path), nowait, host: Host::gather(queues) })
    }
}

impl Host {
    /// What this host offers to a disk of that many `queues`. What it takes to find out is given back.
    pub fn gather(queues: u16) -> Self {
        Self {
            kernel: read("/proc/sys/kernel/osrelease"),
            native: Aio::Native.probe(queues),
            io_uring: Aio::IoUring.probe(queues),
            native_room: native::room(),
        }
    }

    /// Whether it offers `aio`, or why not.
    pub fn offers(&self, aio: Aio) -> &Result<(), Unusable> {
        match aio {
            Aio::Threads => &Ok(()),
            Aio::Native => &self.native,
            Aio::IoUring => &self.io_uring,
        }
    }
}

fn direct(path: &Path) -> Direct {
    let found = match disk::open_file(path, true, true) {
        Ok(file) => direct::alignment(&file),
        Err(DiskError::NotDirect { .. }) => return Direct::Missing,
        Err(DiskError::Io { error, .. }) => Err(error),
        Err(other) => Err(io::Error::other(other)),
    };
    match found {
        Ok(Some(alignment)) => Direct::Works(alignment),
        Ok(None) => Direct::Missing,
        Err(error) => Direct::Failed(error.to_string()),
    }
}

/// The block device with this number, as sysfs describes it.
fn device(number: u64) -> Kind {
    let folder = PathBuf::from(format!("/sys/dev/block/{}:{}", libc::major(number), libc::minor(number)));
    // A partition has the queue of its disk.
    let queue = ["queue", "../queue"].map(|queue| folder.join(queue)).into_iter().find(|queue| queue.is_dir());
    let rotational = queue.is_some_and(|queue| read(queue.join("rotational")) == "1");
    let backing = Some(read(folder.join("loop/backing_file"))).filter(|file| !file.is_empty());
    Kind::Device { rotational, backing }
}

/// The text of a file of the host, empty if it cannot be read.
fn read(file: impl AsRef<Path>) -> String {
    fs::read_to_string(file).unwrap_or_default().trim().to_owned()
}
