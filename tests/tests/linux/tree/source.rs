//! A tree of files like the source of a kernel, made up: as many files as that of Linux 6, about as large, in as many
//! folders, and some links and programs among them. The same each time.

use std::fmt::{self, Display, Formatter};
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

/// Files in a folder.
const FOLDER: u32 = 16;

/// The folders at the top.
pub(super) const TOP: u32 = 25;

/// How large files are: of 1000 of them, so many have at most so many bytes. Their mean is 15 KiB.
const SIZES: [(u64, u64); 8] =
    [(0, 0), (50, 200), (200, 1000), (500, 5000), (800, 16_000), (950, 46_000), (990, 110_000), (1000, 600_000)];

/// One file in so many is much larger, as the tables of some drivers are.
const LARGE: (u32, usize) = (20_000, 12 << 20);

/// Bytes that files are pieces of. Its length is a prime, so that no two of them begin at the same place.
const PERIOD: usize = 1_000_003;

/// A tree of so many files.
#[derive(Clone, Copy, Debug)]
pub(super) struct Source {
    pub(super) files: u32,
}

impl Source {
    /// Of the whole: a bit more than a GiB.
    pub(super) const WHOLE: Self = Self { files: 80_000 };

    /// Bytes of all files.
    pub(super) fn bytes(self) -> u64 {
        (0..self.files).map(|number| size(number) as u64).sum()
    }

    /// Makes it in the folder `root`.
    pub(super) fn make(self, root: &Path) -> io::Result<()> {
        let content = content();
        let mut folder = root.to_owned();
        for number in 0..self.files {
            if number % FOLDER == 0 {
                folder = root.join(place(number / FOLDER));
                fs::create_dir_all(&folder)?;
            }
            let file = folder.join(format!("file-{number}.c"));
            let mut rest = size(number);
            let start = number as usize * 7919 % PERIOD;
            let mut bytes = Vec::with_capacity(rest);
            while rest > 0 {
                let piece = &content[(start + bytes.len()) % PERIOD..];
                let count = piece.len().min(rest);
                bytes.extend_from_slice(&piece[..count]);
                rest -= count;
            }
            fs::write(&file, bytes)?;
            match number % 1000 {
                // Modes that a copy must keep, and targets near, far, and too long for an inode.
                1 => fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?,
                2 => symlink(format!("file-{number}.c"), folder.join("near"))?,
                3 => symlink(format!("../../../{}/{}", place(0).display(), "long/".repeat(20)), folder.join("far"))?,
                _ => {}
            }
        }
        Ok(())
    }
}

impl Display for Source {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (files, folders) = (self.files, self.files.div_ceil(FOLDER));
        write!(f, "{files} files in {folders} folders, {} MB", self.bytes() / 1_000_000)
    }
}

/// The folder of that number, three deep.
fn place(number: u32) -> std::path::PathBuf {
    let (top, middle) = (number % TOP, number / TOP % 12);
    format!("folder-{top}/part-{middle}/unit-{number}").into()
}

/// Bytes of a file.
fn size(number: u32) -> usize {
    if number % LARGE.0 == LARGE.0 / 2 {
        return LARGE.1;
    }
    // Spreads what follows one another (Knuth's multiplicative hash); the thousandths, and what is between them.
    let spread = (u64::from(number.wrapping_mul(2_654_435_761)) * 1_000_000) >> 32;
    let after = SIZES.iter().position(|&(below, _)| spread < below * 1000).expect("a thousand thousandths are all");
    let ((from, least), (to, most)) = (SIZES[after - 1], SIZES[after]);
    (least + (most - least) * (spread - from * 1000) / ((to - from) * 1000)) as usize
}

/// Pseudo-random bytes (Marsaglia's xorshift64).
fn content() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(PERIOD + 8);
    while bytes.len() < PERIOD {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(PERIOD);
    bytes
}
