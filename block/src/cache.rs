//! The cache modes of a disk, with QEMU's names and meaning. Plain values: whoever opens a disk chooses one, and it holds
//! for all its workers.

/// What stands between a guest's write and stable storage.
///
/// | mode | opened with | the guest sees a write cache | a flush | a write completes |
/// |---|---|---|---|---|
/// | `writeback` | the page cache | yes | `fdatasync` | when in the page cache |
/// | `none` | O_DIRECT | yes | `fdatasync` | when the device accepted it |
/// | `writethrough` | the page cache | no | nothing to do | when stable (RWF_DSYNC) |
/// | `directsync` | O_DIRECT | no | nothing to do | when stable (RWF_DSYNC) |
/// | `unsafe` | the page cache | yes | is ignored | when in the page cache |
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// Safe for a guest that flushes, as every usual one does.
    #[default]
    Writeback,
    /// As `Writeback`, past the host's page cache.
    None,
    /// Safe for a guest that cannot flush.
    Writethrough,
    /// As `Writethrough`, past the host's page cache.
    Directsync,
    /// For a disk nobody will miss: what the guest flushed may be lost with the host.
    Unsafe,
}

impl CacheMode {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Writeback, Self::None, Self::Writethrough, Self::Directsync, Self::Unsafe];

    /// The name that users write.
    pub fn name(self) -> &'static str {
        match self {
            Self::Writeback => "writeback",
            Self::None => "none",
            Self::Writethrough => "writethrough",
            Self::Directsync => "directsync",
            Self::Unsafe => "unsafe",
        }
    }

    /// Whether the image is opened with O_DIRECT.
    pub fn is_direct(self) -> bool {
        matches!(self, Self::None | Self::Directsync)
    }

    /// Whether the guest is told of a write cache, and so may flush it. Without one every write is durable.
    pub fn has_write_cache(self) -> bool {
        matches!(self, Self::Writeback | Self::None | Self::Unsafe)
    }

    /// The mode that promises the guest the same through the page cache.
    #[must_use]
    pub fn buffered(self) -> Self {
        match self {
            Self::None => Self::Writeback,
            Self::Directsync => Self::Writethrough,
            mode => mode,
        }
    }
}
