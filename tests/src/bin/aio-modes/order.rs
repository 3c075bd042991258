//! The order in which sequential requests of a guest reach the file, as the kernel sees it: its event `iomap_dio_rw_begin`
//! (ext4, xfs and others) tells the place of each transfer past the page cache when it begins.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::{Value, json};

pub(crate) const EXPECTED: Duration = Duration::from_secs(10);

const TRACING: &str = "/sys/kernel/tracing";
const BYTES: usize = 256 << 20;
const BLOCK: u64 = 4096;

/// An instance of the kernel's trace of our own; removed when dropped.
struct Trace(PathBuf);

impl Trace {
    fn start(inode: u64) -> anyhow::Result<Self> {
        let folder = Path::new(TRACING).join(format!("instances/aio-modes-{}", std::process::id()));
        fs::create_dir(&folder).with_context(|| format!("{}: needs root rights and tracefs", folder.display()))?;
        let trace = Self(folder);
        trace.write("trace_clock", "global")?;
        trace.write("buffer_size_kb", "65536")?;
        trace.write("events/iomap/iomap_dio_rw_begin/filter", &format!("ino == {inode}"))?;
        trace.write("events/iomap/iomap_dio_rw_begin/enable", "1")?;
        Ok(trace)
    }

    fn write(&self, file: &str, text: &str) -> anyhow::Result<()> {
        fs::write(self.0.join(file), text).with_context(|| self.0.join(file).display().to_string())
    }

    /// The places, in order.
    fn offsets(&self) -> anyhow::Result<Vec<u64>> {
        self.write("events/iomap/iomap_dio_rw_begin/enable", "0")?;
        let text = fs::read_to_string(self.0.join("trace"))?;
        ensure!(!text.contains("[LOST "), "the kernel's trace lost events");
        Ok(text.lines().filter_map(offset).collect())
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// The place in a line of the event.
fn offset(line: &str) -> Option<u64> {
    let (_, rest) = line.split_once("iomap_dio_rw_begin:")?.1.split_once(" offset 0x")?;
    u64::from_str_radix(rest.split(' ').next()?, 16).ok()
}

/// How many transfers begin before where the one in front of them ended: none if all come in the order of the file. The
/// end of the file is followed by its start, which is no disorder.
fn backwards(offsets: &[u64], bytes: u64) -> u64 {
    let far = bytes / 2;
    let is_back = |pair: &&[u64]| pair[1] < pair[0] && pair[0] - pair[1] < far;
    offsets.windows(2).filter(is_back).count() as u64
}

/// Sequential reads of 4 KiB through each engine, not merged, with 1 and 32 in flight.
pub(crate) fn measure(skiff: &Path, folder: &Path) -> anyhow::Result<Value> {
    let image = tempfile::NamedTempFile::new_in(folder)?;
    fs::write(image.path(), vec![7; BYTES])?;
    image.as_file().sync_all()?;
    let inode = fs::metadata(image.path())?.ino();
    let mut rows = Vec::new();
    for engine in ["threads", "native", "io_uring"] {
        for depth in [1, 32] {
            let trace = Trace::start(inode)?;
            let output = Command::new(skiff)
                .args([
                    "bench",
                    "--rw",
                    "read",
                    "--cache",
                    "none",
                    "--merge",
                    "off",
                    "--vs",
                    "none",
                    "--runtime",
                    "0.3",
                ])
                .args(["--repeat", "1", "--engines", engine, "--depths", &depth.to_string(), "--disk"])
                .arg(image.path())
                .output()?;
            ensure!(output.status.success(), "skiff bench: {}", String::from_utf8_lossy(&output.stderr));
            let offsets = trace.offsets()?;
            ensure!(offsets.len() > 100, "{engine}: only {} transfers were seen", offsets.len());
            // What opening the disk reads is not the guest's.
            let first =
                offsets.windows(3).position(|three| three[1] == three[0] + BLOCK && three[2] == three[1] + BLOCK);
            let offsets = &offsets[first.unwrap_or_default()..];
            let back = backwards(offsets, BYTES as u64);
            rows.push(json!({ "aio": engine, "depth": depth, "requests": offsets.len(), "backwards": back }));
        }
    }
    Ok(json!({ "rows": rows }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_in_the_trace() {
        let line = "  vcpu0-123 [001] ..... 12.5: iomap_dio_rw_begin: dev 254:0 ino 0xd size 0x100000 offset 0x3000 length \
                    0x1000 done_before 0x0 flags DIRECT dio_flags  aio 1";
        assert_eq!(offset(line), Some(0x3000));
        assert_eq!(offset("# tracer: nop"), None);
    }

    #[test]
    fn only_steps_back_are_disorder() {
        for (offsets, expected) in [
            (&[0, 1, 2, 3][..], 0),
            (&[0, 2, 1, 3], 1),
            (&[3, 2, 1, 0], 3),
            (&[98, 99, 0, 1], 0),
            (&[98, 0, 99, 1], 0),
            (&[], 0),
        ] {
            assert_eq!(backwards(offsets, 100), expected, "{offsets:?}");
        }
    }
}
