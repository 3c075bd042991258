//! Neighbours go together: reads, or writes, that were pushed one after the other and lie one after the other on the image
//! become one transfer of the engine inside. Owned by the worker.

use std::mem;

use vmm_sys_util::eventfd::EventFd;

use super::transfer::{MAX_IOVECS, length};
use super::{Completion, Engine, Op, OpKind};

/// The most bytes of a transfer made of several: enough for a host to be at its best, and short enough that the first
/// does not wait long for the last.
const MOST_BYTES: u64 = 256 << 10;

/// Addresses and lengths in guest memory are multiples of this, or an op goes alone: it may have to bounce, and would take
/// the others with it.
const ALIGNMENT: u64 = 512;

/// An engine that hands neighbours to `inner` as one op. Each still completes for itself: if their transfer fails, they are
/// done again one by one, and only those that fail then have failed.
pub struct Merge {
    inner: Box<dyn Engine>,
    /// What was pushed last and may grow. Its tag is that of its first op.
    last: Option<Last>,
    /// By tag of the first: what a transfer in flight is made of. Empty for an op that went alone.
    parts: Vec<Vec<(Op, u16)>>,
    /// Ops at rest, for transfers made of several.
    spare: Vec<Op>,
    found: Vec<Completion>,
    merged: u64,
}

struct Last {
    op: Op,
    tag: u16,
    bytes: u64,
}

impl Merge {
    /// Puts itself before `inner`.
    pub fn new(inner: Box<dyn Engine>) -> Self {
        Self { inner, last: None, parts: Vec::new(), spare: Vec::new(), found: Vec::new(), merged: 0 }
    }

    /// Hands over what was pushed last: nothing more goes with it.
    fn close(&mut self) {
        if let Some(Last { op, tag, .. }) = self.last.take() {
            self.inner.push(op, tag);
        }
    }

    /// Makes `op` a part of what was pushed last. The first time, that becomes a part too, of a transfer of their own.
    fn join(&mut self, op: Op, tag: u16, bytes: u64) {
        let Some(last) = &mut self.last else { unreachable!("there is something it can go with") };
        let parts = &mut self.parts[usize::from(last.tag)];
        if parts.is_empty() {
            let mut whole = self.spare.pop().unwrap_or_else(|| Op {
                kind: op.kind,
                offset: 0,
                segments: Vec::new(),
                ranges: Vec::new(),
                memory: op.memory.clone(),
            });
            (whole.kind, whole.offset) = (last.op.kind, last.op.offset);
            whole.segments.clone_from(&last.op.segments);
            parts.push((mem::replace(&mut last.op, whole), last.tag));
        }
        last.op.segments.extend_from_slice(&op.segments);
        last.bytes += bytes;
        parts.push((op, tag));
        self.merged += 1;
    }

    /// Takes a completion of the inner engine apart. If it failed its parts are pushed `again`, or else were not done. Returns
    /// whether some was pushed.
    fn split(&mut self, completion: Completion, again: bool, completions: &mut Vec<Completion>) -> bool {
        let parts = &mut self.parts[usize::from(completion.tag)];
        if parts.is_empty() {
            completions.push(completion);
            return false;
        }
        let failed = completion.result.is_err();
        for (op, tag) in parts.drain(..) {
            match (failed, again) {
                (false, _) => completions.push(Completion { tag, op, result: Ok(()) }),
                (true, true) => self.inner.push(op, tag),
                (true, false) => completions.push(Completion::canceled(op, tag)),
            }
        }
        self.spare.push(completion.op);
        failed && again
    }

    /// Takes what `found` has apart; returns whether some of it was handed to the inner engine again.
    fn split_all(&mut self, found: &mut Vec<Completion>, completions: &mut Vec<Completion>) -> bool {
        let mut again = false;
        for completion in found.drain(..) {
            again |= self.split(completion, true, completions);
        }
        if again {
            self.inner.submit();
        }
        again
    }
}

impl Last {
    /// Whether `op`, which has so many bytes, goes on where this ends, and there is room for it.
    fn takes(&self, op: &Op, bytes: u64) -> bool {
        self.op.kind == op.kind
            && self.op.offset + self.bytes == op.offset
            && self.bytes + bytes <= MOST_BYTES
            && self.op.segments.len() + op.segments.len() <= MAX_IOVECS
            && is_aligned(&self.op)
            && is_aligned(op)
    }
}

fn is_aligned(op: &Op) -> bool {
    op.segments.iter().all(|&(address, len)| (address.0 | u64::from(len)).is_multiple_of(ALIGNMENT))
}

impl Engine for Merge {
    fn push(&mut self, op: Op, tag: u16) {
        if self.parts.len() <= usize::from(tag) {
            self.parts.resize_with(usize::from(tag) + 1, Vec::new);
        }
        if !matches!(op.kind, OpKind::Read | OpKind::Write { .. }) {
            self.close();
            return self.inner.push(op, tag);
        }
        let bytes = length(&op);
        if self.last.as_ref().is_some_and(|last| last.takes(&op, bytes)) {
            return self.join(op, tag, bytes);
        }
        self.close();
        self.last = Some(Last { op, tag, bytes });
    }

    fn submit(&mut self) {
        self.close();
        self.inner.submit();
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) {
        let before = completions.len();
        let mut found = mem::take(&mut self.found);
        loop {
            self.inner.reap(&mut found);
            // Who is given nothing waits for the event, which is written only after the inner engine gave nothing.
            let nothing = found.is_empty();
            self.split_all(&mut found, completions);
            if nothing || completions.len() > before {
                break;
            }
        }
        self.found = found;
    }

    fn has_completed(&mut self) -> bool {
        self.inner.has_completed()
    }

    fn completion_event(&self) -> &EventFd {
        self.inner.completion_event()
    }

    fn drain(&mut self, completions: &mut Vec<Completion>) {
        self.close();
        let mut found = mem::take(&mut self.found);
        loop {
            self.inner.drain(&mut found);
            if !self.split_all(&mut found, completions) {
                break;
            }
        }
        self.found = found;
        // They would keep guest memory alive.
        self.spare.clear();
    }

    fn abandon(&mut self, completions: &mut Vec<Completion>) {
        let mut found = mem::take(&mut self.found);
        found.extend(self.last.take().map(|Last { op, tag, .. }| Completion::canceled(op, tag)));
        self.inner.abandon(&mut found);
        for completion in found.drain(..) {
            self.split(completion, false, completions);
        }
        self.found = found;
        self.spare.clear();
    }

    fn merged(&self) -> u64 {
        self.merged
    }

    fn submissions(&self) -> u64 {
        self.inner.submissions()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::ops::Range;
    use std::sync::{Arc, Mutex};

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;
    use crate::disk::Disk;
    use crate::engine::conformance::{self, Bed, at, await_completions, memory, op};
    use crate::engine::{Aio, threads};

    const READ: OpKind = OpKind::Read;
    const WRITE: OpKind = OpKind::Write { durable: false };
    const DURABLE: OpKind = OpKind::Write { durable: true };

    type Seen = Arc<Mutex<Vec<(OpKind, u64, u64)>>>;

    /// Does all it is given when asked to reap, except what touches `bad`; notes each op. Announces as little as the
    /// contract allows.
    struct Scripted {
        bad: Range<u64>,
        seen: Seen,
        queue: Vec<(Op, u16)>,
        submitted: usize,
        idle: bool,
        event: EventFd,
    }

    impl Scripted {
        fn merging(bad: Range<u64>) -> (Merge, Seen) {
            let seen = Seen::default();
            let event = EventFd::new(EFD_NONBLOCK).unwrap();
            let inner = Self { bad, seen: seen.clone(), queue: Vec::new(), submitted: 0, idle: true, event };
            (Merge::new(Box::new(inner)), seen)
        }
    }

    impl Engine for Scripted {
        fn push(&mut self, op: Op, tag: u16) {
            assert!(self.queue.iter().all(|queued| queued.1 != tag), "tag {tag} is in flight");
            self.seen.lock().unwrap().push((op.kind, op.offset, length(&op)));
            self.queue.push((op, tag));
        }
        fn submit(&mut self) {
            self.submitted = self.queue.len();
            if self.submitted > 0 && self.idle {
                self.event.write(1).unwrap();
            }
        }
        fn reap(&mut self, completions: &mut Vec<Completion>) {
            self.idle = self.submitted == 0;
            for (op, tag) in self.queue.drain(..mem::take(&mut self.submitted)) {
                let touches = op.offset < self.bad.end && op.offset + length(&op) > self.bad.start;
                let result = if touches { Err(std::io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) };
                completions.push(Completion { tag, op, result });
            }
        }
        fn has_completed(&mut self) -> bool {
            self.submitted > 0
        }
        fn completion_event(&self) -> &EventFd {
            &self.event
        }
        fn drain(&mut self, completions: &mut Vec<Completion>) {
            self.submit();
            self.reap(completions);
        }
    }

    /// What the engine inside is given for ops of these kinds, offsets and lengths, pushed in one batch.
    fn given(ops: &[(OpKind, u64, usize)]) -> Vec<(OpKind, u64, u64)> {
        let memory = memory(1 << 20);
        let (mut merge, seen) = Scripted::merging(0..0);
        for (tag, &(kind, offset, len)) in (0..).zip(ops) {
            merge.push(op(kind, offset, &[(usize::from(tag) * 8192, len)], &memory), tag);
        }
        merge.submit();
        let mut tags: Vec<_> = await_completions(&mut merge, ops.len()).iter().map(|done| done.tag).collect();
        tags.sort_unstable();
        assert!(tags.into_iter().eq(0..ops.len() as u16));
        seen.lock().unwrap().clone()
    }

    #[test]
    fn neighbours_go_together_and_nothing_else() {
        let k = 1024;
        for (what, ops, expected) in [
            ("in a row", vec![(READ, 0, 4 * k), (READ, 4096, 512), (READ, 4608, 8 * k)], vec![(READ, 0, 12800)]),
            ("a gap", vec![(READ, 0, 512), (READ, 1024, 512)], vec![(READ, 0, 512), (READ, 1024, 512)]),
            ("backwards", vec![(READ, 512, 512), (READ, 0, 512)], vec![(READ, 512, 512), (READ, 0, 512)]),
            ("two ways", vec![(READ, 0, 512), (WRITE, 512, 512)], vec![(READ, 0, 512), (WRITE, 512, 512)]),
            ("durable", vec![(DURABLE, 0, 512), (DURABLE, 512, 512)], vec![(DURABLE, 0, 1024)]),
            ("durable or not", vec![(WRITE, 0, 512), (DURABLE, 512, 512)], vec![(WRITE, 0, 512), (DURABLE, 512, 512)]),
            (
                "a flush between",
                vec![(WRITE, 0, 512), (OpKind::Flush, 0, 0), (WRITE, 512, 512)],
                vec![(WRITE, 0, 512), (OpKind::Flush, 0, 0), (WRITE, 512, 512)],
            ),
            ("no whole sectors", vec![(READ, 0, 511), (READ, 511, 513)], vec![(READ, 0, 511), (READ, 511, 513)]),
            (
                "two rows",
                vec![(READ, 0, 512), (READ, 512, 512), (READ, 8192, 512), (READ, 8704, 512)],
                vec![(READ, 0, 1024), (READ, 8192, 1024)],
            ),
        ] {
            assert_eq!(given(&ops), expected, "{what}");
        }
        let row: Vec<_> = (0..70).map(|n| (READ, n * 4096, 4096)).collect();
        assert_eq!(given(&row), [(READ, 0, 256 << 10), (READ, 256 << 10, 6 * 4096)], "there is an end to it");
    }

    #[test]
    fn only_what_is_bad_fails() {
        for drained in [false, true] {
            let memory = memory(1 << 20);
            let (mut merge, seen) = Scripted::merging(5000..5001);
            for tag in 0..8 {
                let n = u64::from(tag);
                merge.push(op(WRITE, n * 4096, &[(usize::from(tag) * 4096, 4096)], &memory), tag);
            }
            let mut completions = Vec::new();
            if drained {
                merge.drain(&mut completions);
            } else {
                merge.submit();
                completions = await_completions(&mut merge, 8);
            }
            assert_eq!(completions.len(), 8);
            for Completion { tag, op, result } in completions {
                assert_eq!((op.offset, length(&op)), (u64::from(tag) * 4096, 4096));
                assert_eq!(result.is_err(), tag == 1, "op {tag}");
            }
            let alone = (0..8).map(|n| (WRITE, n * 4096, 4096));
            let expected: Vec<_> = [(WRITE, 0, 8 * 4096)].into_iter().chain(alone).collect();
            assert_eq!(*seen.lock().unwrap(), expected);
            assert_eq!(merge.merged(), 7);
        }
    }

    #[test]
    fn what_failed_is_not_done_again_when_nobody_waits() {
        let memory = memory(1 << 20);
        let (mut merge, seen) = Scripted::merging(0..512);
        // The last may still grow, and is not with the engine inside.
        for (tag, offset) in [(0, 0), (1, 4096), (2, 16384), (3, 65536)] {
            merge.push(op(WRITE, offset, &[(usize::from(tag) * 4096, 4096)], &memory), tag);
        }
        let mut completions = Vec::new();
        merge.abandon(&mut completions);
        completions.sort_unstable_by_key(|completion| completion.tag);
        let results: Vec<_> = completions.iter().map(|one| (one.tag, one.result.is_ok())).collect();
        assert_eq!(results, [(0, false), (1, false), (2, true), (3, false)]);
        assert_eq!(*seen.lock().unwrap(), [(WRITE, 0, 8192), (WRITE, 16384, 4096)]);
    }

    fn merging(disk: Arc<Disk>) -> Box<dyn Engine> {
        Box::new(Merge::new(Aio::Threads.start(disk, "test-io").unwrap()))
    }

    #[test]
    fn keeps_the_contract() {
        conformance::bytes(&Bed::default(), merging);
        conformance::exactly_once(&Bed::default(), merging);
        conformance::bad_buffers(&Bed::default(), merging);
        conformance::drain(&Bed::default(), merging);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whole sectors, many of them neighbours, through a pool: the image and the memory are as if each went alone.
        #[test]
        fn moves_the_right_bytes(
            batches in prop::collection::vec(prop::collection::vec((any::<bool>(), 1_usize..9, 0_usize..3), 1..20), 1..6),
        ) {
            const SIZE: usize = 1 << 20;
            let (_dir, path, disk, mut content) = Bed::default().disk(SIZE);
            let pool = threads::ThreadPool::new(disk, threads::DEFAULT_THREADS, "test-io").unwrap();
            let mut merge = Merge::new(Box::new(pool));
            let memory = memory(SIZE);
            let mut seed = 0_usize;
            for batch in batches {
                let (mut sector, mut expected) = (0, Vec::new());
                for (tag, (write, sectors, gap)) in (0..).zip(batch) {
                    let (start, len) = (sector * 512, sectors * 512);
                    // Memory is used from the end down, in the other order than the image.
                    let place = SIZE - start - len;
                    seed += 1;
                    let bytes: Vec<u8> = (0..len).map(|n| ((n + seed * 31) % 251) as u8).collect();
                    memory.write_slice(&bytes, GuestAddress(at(place))).unwrap();
                    if write {
                        content[start..start + len].copy_from_slice(&bytes);
                    }
                    expected.push((place, content[start..start + len].to_vec()));
                    let kind = if write { WRITE } else { READ };
                    merge.push(op(kind, start as u64, &[(place, len)], &memory), tag);
                    sector += sectors + if gap == 2 { 3 } else { 0 };
                }
                merge.submit();
                for completion in await_completions(&mut merge, expected.len()) {
                    completion.result.unwrap();
                }
                for (place, bytes) in expected {
                    let mut seen = vec![0; bytes.len()];
                    memory.read_slice(&mut seen, GuestAddress(at(place))).unwrap();
                    prop_assert!(seen == bytes);
                }
            }
            prop_assert!(fs::read(path).unwrap() == content);
        }
    }
}
