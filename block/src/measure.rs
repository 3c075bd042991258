//! A short look at how fast an engine reads an image: random reads, a steady number of them under way. Runs on the thread
//! that asks. It reads and never writes.

use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::disk::Disk;
use crate::engine::{Aio, Completion, Engine, Op, OpKind};

/// Bytes of one read, if the image has as many.
pub const READ_BYTES: u64 = 4096;

/// What one engine did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figures {
    /// Reads that were done.
    pub reads: u64,
    /// The time they took.
    pub time: Duration,
}

/// Reads from random places of `disk` through `aio` for about `time`, at least 1 and at most `depth` at a time, into
/// memory of its own.
///
/// # Errors
/// When the engine cannot be started, or a read fails.
pub fn measure(disk: &Arc<Disk>, aio: Aio, depth: u16, time: Duration) -> io::Result<Figures> {
    let depth = depth.max(1);
    let size = usize::from(depth) * READ_BYTES as usize;
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).map_err(io::Error::other)?;
    let memory = Arc::new(memory);
    let mut engine = aio.start(disk.clone(), "probe-io")?;
    let epoll = Epoll::new()?;
    let edge = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
    epoll.ctl(ControlOperation::Add, engine.completion_event().as_raw_fd(), edge)?;
    let mut places = Places::of(disk);
    let start = Instant::now();
    for tag in 0..depth {
        let segments = vec![(GuestAddress(u64::from(tag) * READ_BYTES), places.length as u32)];
        engine.push(
            Op { kind: OpKind::Read, offset: places.next(), segments, ranges: Vec::new(), memory: memory.clone() },
            tag,
        );
    }
    engine.submit();
    let (mut reads, mut completions) = (0, Vec::with_capacity(depth.into()));
    while start.elapsed() < time {
        await_completions(&mut *engine, &epoll, &mut completions)?;
        for Completion { tag, mut op, result } in completions.drain(..) {
            result?;
            reads += 1;
            op.offset = places.next();
            engine.push(op, tag);
        }
        engine.submit();
    }
    let time = start.elapsed();
    engine.drain(&mut completions);
    Ok(Figures { reads, time })
}

/// Appends at least one completion.
fn await_completions(engine: &mut dyn Engine, epoll: &Epoll, completions: &mut Vec<Completion>) -> io::Result<()> {
    loop {
        engine.reap(completions);
        if !completions.is_empty() {
            return Ok(());
        }
        match epoll.wait(-1, &mut [EpollEvent::default()]) {
            Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
    }
}

/// Where to read: an endless row of places, the same for each measurement. George Marsaglia's xorshift64.
struct Places {
    state: u64,
    count: u64,
    length: u64,
}

impl Places {
    fn of(disk: &Disk) -> Self {
        let length = READ_BYTES.min(disk.size());
        Self { state: 0x9e37_79b9_7f4a_7c15, count: disk.size() / length, length }
    }

    fn next(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % self.count * self.length
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    use crate::cache::CacheMode;

    #[test]
    fn every_engine_reads_and_writes_nothing() {
        for size in [512, 8192 + 512, 1 << 20] {
            let path = tempfile::NamedTempFile::new_in(".").unwrap().into_temp_path();
            std::fs::write(&path, vec![3; size]).unwrap();
            for (aio, cache) in Aio::ALL.into_iter().flat_map(|aio| CacheMode::ALL.map(|cache| (aio, cache))) {
                if !aio.goes_with(cache) {
                    continue;
                }
                let disk = Arc::new(Disk::look(&path, cache, "disk0").unwrap());
                for depth in [0, 1, 32] {
                    let figures = measure(&disk, aio, depth, Duration::from_millis(1)).unwrap();
                    assert!(figures.time >= Duration::from_millis(1), "{figures:?}");
                }
            }
            assert!(std::fs::read(&path).unwrap() == vec![3; size]);
        }
    }

    #[test]
    fn places_are_all_over_the_image() {
        let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        File::options().write(true).open(&path).unwrap().set_len(64 * READ_BYTES + 512).unwrap();
        let mut places = Places::of(&Disk::look(&path, CacheMode::Writeback, "disk0").unwrap());
        let seen: std::collections::HashSet<_> = (0..2000).map(|_| places.next()).collect();
        assert!(seen.len() == 64 && seen.iter().all(|place| place % READ_BYTES == 0 && *place < 64 * READ_BYTES));
    }
}
