//! A disk over an image that stays as it is: two engines as one. Reads are split among them by what was written, all else
//! goes to the overlay. The worker owns it, and both of them.

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::sync::Arc;

use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::transfer::length;
use super::{Completion, Engine, Op, OpKind};
use crate::SECTOR_SIZE;
use crate::disk::Disk;
use crate::overlay::Backing;

/// The bit of a tag that says it is ours, of a part of a read. Those of the owner, descriptor heads, are below it.
const PART: u16 = 1 << 15;

/// The most parts of reads that the two engines have at a time; more wait.
const PARTS: u16 = 256;

/// Two engines as one: of the image, which is only read, and of the overlay, which has every sector that was written, at
/// the same place. Ops are of whole sectors, so no part of one ever has to be copied, and a map of sectors tells where each
/// is now. A sector counts as written when its write has succeeded, and before that is reported: whoever then reads it,
/// through whatever queue, finds it. What is zeroed is zero in the overlay. What is discarded stays where it is.
pub(super) struct Snapshot {
    image: Box<dyn Engine>,
    overlay: Box<dyn Engine>,
    disk: Arc<Disk>,
    /// By tag of the owner: its read, if that goes to both engines.
    reads: Vec<Option<Read>>,
    /// By part: the tag of its read.
    parts: Vec<u16>,
    /// Parts that are not in flight.
    free: Vec<u16>,
    /// Reads of which some has not been given to an engine, by tag.
    waiting: VecDeque<u16>,
    /// Ops at rest, for parts.
    spare: Vec<Op>,
    found: Vec<Completion>,
}

/// A read in parts.
struct Read {
    op: Op,
    /// Where in the disk the next part begins, in bytes.
    at: u64,
    end: u64,
    in_flight: u32,
    result: io::Result<()>,
}

impl Snapshot {
    /// `image` and `overlay` are the engines of `disk` and of what it is over; they share one completion event.
    pub(super) fn new(image: Box<dyn Engine>, overlay: Box<dyn Engine>, disk: Arc<Disk>) -> Self {
        Self {
            image,
            overlay,
            disk,
            reads: Vec::new(),
            parts: vec![0; PARTS.into()],
            free: (0..PARTS).collect(),
            waiting: VecDeque::new(),
            spare: Vec::new(),
            found: Vec::new(),
        }
    }

    fn backing(&self) -> &Backing {
        self.disk.backing().expect("a snapshot is over an image")
    }

    /// The engine that has what was written, or what was not.
    fn side(&mut self, written: bool) -> &mut dyn Engine {
        if written { &mut *self.overlay } else { &mut *self.image }
    }

    fn read(&mut self, op: Op, tag: u16) {
        let bytes = op.offset..op.offset.saturating_add(length(&op));
        let (written, to) = if bytes.is_empty() { (false, bytes.end) } else { self.backing().written.run(&bytes) };
        if to == bytes.end {
            return self.side(written).push(op, tag);
        }
        if self.reads.len() <= usize::from(tag) {
            self.reads.resize_with(usize::from(tag) + 1, || None);
        }
        self.reads[usize::from(tag)] = Some(Read { op, at: bytes.start, end: bytes.end, in_flight: 0, result: Ok(()) });
        self.waiting.push_back(tag);
        self.part();
    }

    /// Gives parts of the reads that wait to the engines, as long as there are any free. Returns whether it gave some.
    fn part(&mut self) -> bool {
        let mut any = false;
        while let Some(&tag) = self.waiting.front() {
            let Some(number) = self.free.pop() else { break };
            let spare = self.spare.pop();
            let (written, part, last) = {
                let written = &self.disk.backing().expect("a snapshot is over an image").written;
                let read = self.reads[usize::from(tag)].as_mut().expect("a read that waits has not ended");
                read.next(written.run(&(read.at..read.end)), spare)
            };
            if last {
                self.waiting.pop_front();
            }
            self.parts[usize::from(number)] = tag;
            self.side(written).push(part, PART | number);
            any = true;
        }
        any
    }

    /// Takes what the engines completed: what was written is noted, parts make up their reads again. Returns whether the
    /// engines got something new.
    fn take(&mut self, found: &mut Vec<Completion>, completions: &mut Vec<Completion>) -> bool {
        for completion in found.drain(..) {
            if completion.tag & PART != 0 {
                completions.extend(self.join(completion));
                continue;
            }
            if completion.result.is_ok() {
                self.note(&completion.op);
            }
            completions.push(completion);
        }
        let any = self.part();
        if any {
            self.submit();
        }
        any
    }

    /// Notes what `op` has written.
    fn note(&self, op: &Op) {
        let written = &self.backing().written;
        match op.kind {
            OpKind::Write { .. } => written.insert(&(op.offset..op.offset + length(op))),
            OpKind::WriteZeroes { .. } => op.ranges.iter().for_each(|range| written.insert(range)),
            OpKind::Read | OpKind::Flush | OpKind::Discard { .. } => {}
        }
    }

    /// The end of a part, and of its read if it was the last.
    fn join(&mut self, part: Completion) -> Option<Completion> {
        let number = part.tag & !PART;
        let tag = self.parts[usize::from(number)];
        self.free.push(number);
        self.spare.push(part.op);
        let slot = &mut self.reads[usize::from(tag)];
        let read = slot.as_mut().expect("a read ends after its parts");
        read.in_flight -= 1;
        if part.result.is_err() {
            read.result = part.result;
        }
        let ended = read.in_flight == 0 && read.at == read.end;
        let Read { op, result, .. } = slot.take_if(|_| ended)?;
        Some(Completion { tag, op, result })
    }
}

impl Read {
    /// The next part, all `written` or all not up to byte `to` of the disk, in `spare` if there is one; and whether it is
    /// the last.
    fn next(&mut self, (written, to): (bool, u64), spare: Option<Op>) -> (bool, Op, bool) {
        let mut part = spare.unwrap_or_else(|| Op {
            kind: OpKind::Read,
            offset: 0,
            segments: Vec::new(),
            ranges: Vec::new(),
            memory: self.op.memory.clone(),
        });
        part.memory.clone_from(&self.op.memory);
        part.offset = self.at;
        part.segments.clear();
        part.segments.extend(cut(&self.op.segments, self.at - self.op.offset, to - self.at));
        (self.at, self.in_flight) = (to, self.in_flight + 1);
        (written, part, to == self.end)
    }
}

/// The memory of `len` bytes after the first `skip` of those that `segments` hold.
fn cut(segments: &[(GuestAddress, u32)], mut skip: u64, mut len: u64) -> impl Iterator<Item = (GuestAddress, u32)> {
    segments.iter().filter_map(move |&(address, segment)| {
        let before = skip.min(segment.into());
        let count = len.min(u64::from(segment) - before);
        (skip, len) = (skip - before, len - count);
        // An address that wraps is outside of memory, wherever it is cut.
        (count > 0).then_some((GuestAddress(address.0.wrapping_add(before)), count as u32))
    })
}

fn is_whole(bytes: u64) -> bool {
    bytes.is_multiple_of(SECTOR_SIZE)
}

impl Engine for Snapshot {
    fn push(&mut self, op: Op, tag: u16) {
        assert!(tag < PART, "tags of owners are descriptor heads");
        match op.kind {
            OpKind::Read => return self.read(op, tag),
            OpKind::Write { .. } => assert!(is_whole(op.offset) && is_whole(length(&op)), "guests write whole sectors"),
            OpKind::WriteZeroes { .. } => {
                assert!(op.ranges.iter().all(|range| is_whole(range.start) && is_whole(range.end)), "and zero them");
            }
            OpKind::Flush | OpKind::Discard { .. } => {}
        }
        self.overlay.push(op, tag);
    }

    fn submit(&mut self) {
        self.image.submit();
        self.overlay.submit();
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) {
        let before = completions.len();
        let mut found = mem::take(&mut self.found);
        loop {
            self.image.reap(&mut found);
            self.overlay.reap(&mut found);
            // Who is given nothing waits for the event, which is written only after both engines gave nothing.
            let nothing = found.is_empty();
            self.take(&mut found, completions);
            if nothing || completions.len() > before {
                break;
            }
        }
        self.found = found;
    }

    fn has_completed(&mut self) -> bool {
        self.image.has_completed() || self.overlay.has_completed()
    }

    fn completion_event(&self) -> &EventFd {
        self.overlay.completion_event()
    }

    fn drain(&mut self, completions: &mut Vec<Completion>) {
        let mut found = mem::take(&mut self.found);
        loop {
            self.image.drain(&mut found);
            self.overlay.drain(&mut found);
            if !self.take(&mut found, completions) {
                break;
            }
        }
        self.found = found;
        // They would keep guest memory alive.
        self.spare.clear();
    }

    fn abandon(&mut self, completions: &mut Vec<Completion>) {
        for tag in self.waiting.drain(..) {
            let slot = &mut self.reads[usize::from(tag)];
            let read = slot.as_mut().expect("a read that waits has not ended");
            (read.end, read.result) = (read.at, Err(io::Error::from_raw_os_error(libc::ECANCELED)));
            // Else it ends with its last part.
            let ended = slot.take_if(|read| read.in_flight == 0);
            completions.extend(ended.map(|Read { op, .. }| Completion::canceled(op, tag)));
        }
        let mut found = mem::take(&mut self.found);
        self.image.abandon(&mut found);
        self.overlay.abandon(&mut found);
        self.take(&mut found, completions);
        self.found = found;
        self.spare.clear();
    }

    fn submissions(&self) -> u64 {
        self.image.submissions() + self.overlay.submissions()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    use vm_memory::{Bytes, GuestMemoryMmap};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use crate::cache::CacheMode;
    use crate::engine::Aio;
    use crate::engine::conformance::{Bed, Kind, at, await_completions, memory, op};
    use crate::engine::faulty::{Fault, Faulty};
    use crate::engine::threads::ThreadPool;

    const BED: Bed =
        Bed { kind: Kind::Written, cache: CacheMode::Writeback, alignment: None, snapshot: true, cases: 4 };
    const WRITE: OpKind = OpKind::Write { durable: false };

    fn sectors(memory: &GuestMemoryMmap, from: usize, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count * 512];
        memory.read_slice(&mut bytes, GuestAddress(at(from))).unwrap();
        bytes
    }

    /// Every other sector is written: more parts than there may be, of two reads at once.
    #[test]
    fn reads_of_many_parts_wait_for_each_other() {
        const SECTORS: usize = 2 * PARTS as usize + 100;
        for aio in Aio::ALL.into_iter().filter(|aio| aio.goes_with(BED.cache)) {
            let (_dir, path, disk, mut content) = BED.disk(SECTORS * 512);
            let memory = memory(2 * SECTORS * 512);
            let mut engine = aio.start(disk, "test-io").unwrap();
            for sector in (0..SECTORS).step_by(2) {
                let byte = (sector % 100) as u8 + 1;
                content[sector * 512..][..512].fill(byte);
                memory.write_slice(&[byte; 512], GuestAddress(at(sector * 512))).unwrap();
                engine.push(op(WRITE, sector as u64 * 512, &[(sector * 512, 512)], &memory), (sector / 2) as u16);
            }
            engine.submit();
            for done in await_completions(&mut *engine, SECTORS / 2) {
                done.result.unwrap();
            }
            for way in ["reaped", "drained", "abandoned"] {
                memory.write_slice(&vec![0; 2 * SECTORS * 512], GuestAddress(at(0))).unwrap();
                for tag in 0..2 {
                    // Buffers end within sectors.
                    let start = usize::from(tag) * SECTORS * 512;
                    let buffers = [(start, 700), (start + 700, SECTORS * 512 - 700)];
                    engine.push(op(OpKind::Read, 0, &buffers, &memory), tag);
                }
                let mut completions = Vec::new();
                match way {
                    "drained" => engine.drain(&mut completions),
                    "abandoned" => engine.abandon(&mut completions),
                    _ => {
                        engine.submit();
                        completions = await_completions(&mut *engine, 2);
                    }
                }
                assert_eq!(completions.len(), 2);
                for Completion { tag, op, result } in completions {
                    if way == "abandoned" {
                        // Neither was given to the engines whole, and one not at all.
                        assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::ECANCELED));
                        continue;
                    }
                    result.unwrap();
                    assert_eq!((op.offset, length(&op)), (0, SECTORS as u64 * 512));
                    let seen = sectors(&memory, usize::from(tag) * SECTORS * 512, SECTORS);
                    assert!(seen == content, "{aio:?}, {way}");
                }
            }
            assert!(fs::read(path).unwrap() != content);
        }
    }

    /// Whoever counts what the kernel is asked counts both engines.
    #[test]
    fn submissions_are_those_of_both() {
        let (_dir, _path, disk, _) = Bed { cache: CacheMode::None, ..BED }.disk(8192);
        let memory = memory(8192);
        let mut engine = Aio::IoUring.start(disk, "test-io").unwrap();
        for (kind, submissions) in [(OpKind::Read, 1), (WRITE, 2), (OpKind::Read, 4)] {
            let len = if kind == WRITE { 4096 } else { 8192 };
            engine.push(op(kind, 0, &[(0, len)], &memory), 0);
            engine.submit();
            await_completions(&mut *engine, 1).remove(0).result.unwrap();
            assert_eq!(engine.submissions(), submissions, "{kind:?}");
        }
    }

    /// Of a write that failed nothing is seen, and of a read of which a part failed nothing is said to be well.
    #[test]
    fn what_failed_was_not_written() {
        let (_dir, _path, disk, content) = BED.disk(8192);
        let memory = memory(16384);
        memory.write_slice(&[9; 4096], GuestAddress(at(0))).unwrap();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let pool = |image, event| Box::new(ThreadPool::helper(image, "test-io", event).unwrap());
        let image = pool(Faulty::new(disk.backing().unwrap().image.clone(), &[]), event.try_clone().unwrap());
        let full = [Fault::Short(1024), Fault::Fail(libc::ENOSPC), Fault::Short(4096), Fault::Fail(libc::EIO)];
        let mut snapshot = Snapshot::new(image, pool(Faulty::new(disk.clone(), &full), event), disk);
        let mut run = |kind, offset, piece| {
            snapshot.push(op(kind, offset, &[piece], &memory), 3);
            snapshot.submit();
            await_completions(&mut snapshot, 1).remove(0).result.map_err(|error| error.raw_os_error())
        };
        assert_eq!(run(WRITE, 2048, (0, 4096)), Err(Some(libc::ENOSPC)));
        run(OpKind::Read, 0, (4096, 8192)).unwrap();
        assert!(sectors(&memory, 4096, 16) == content);
        run(WRITE, 2048, (0, 4096)).unwrap();
        assert_eq!(run(OpKind::Read, 0, (4096, 8192)), Err(Some(libc::EIO)));
        run(OpKind::Read, 0, (4096, 8192)).unwrap();
        let expected = [&content[..2048], &[9; 4096], &content[6144..]].concat();
        assert!(sectors(&memory, 4096, 16) == expected);
    }
}
