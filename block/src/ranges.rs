//! Keeps a write of a part of a block apart from other writes to that block. Shared by everyone who writes to one disk:
//! workers and the threads of pools.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard};

/// The places of a disk that are being written. Only used where a block of the host is larger than a sector of the guest.
#[derive(Debug, Default)]
pub(crate) struct Ranges {
    claims: Mutex<Vec<Claim>>,
    released: Condvar,
}

/// A write that goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    /// Bytes of the image.
    pub(crate) range: Range<u64>,
    /// It reads blocks and writes them back, so that no other write may come between. Writes of whole blocks do not mind
    /// each other.
    pub(crate) exclusive: bool,
}

impl Claim {
    fn excludes(&self, other: &Self) -> bool {
        let overlap = self.range.start < other.range.end && other.range.start < self.range.end;
        overlap && (self.exclusive || other.exclusive)
    }
}

impl Ranges {
    /// Makes `claim` unless it must wait; `false` if so.
    pub(crate) fn try_claim(&self, claim: &Claim) -> bool {
        insert(&mut self.lock(), claim)
    }

    /// Makes `claim`, and waits for those that stand against it. The caller holds no other.
    pub(crate) fn claim(&self, claim: &Claim) {
        let mut claims = self.lock();
        while !insert(&mut claims, claim) {
            claims = self.released.wait(claims).expect(POISONED);
        }
    }

    /// Ends a claim that was made.
    pub(crate) fn release(&self, claim: &Claim) {
        let mut claims = self.lock();
        let at = claims.iter().position(|held| held == claim).expect("only what was claimed is released");
        claims.swap_remove(at);
        drop(claims);
        self.released.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Claim>> {
        self.claims.lock().expect(POISONED)
    }
}

const POISONED: &str = "nobody panics while holding this lock";

fn insert(claims: &mut Vec<Claim>, claim: &Claim) -> bool {
    let free = !claims.iter().any(|held| held.excludes(claim));
    if free {
        claims.push(claim.clone());
    }
    free
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_part_of_a_block_excludes_others() {
        let claim = |range, exclusive| Claim { range, exclusive };
        let ranges = Ranges::default();
        assert!(ranges.try_claim(&claim(0..8192, false)));
        assert!(ranges.try_claim(&claim(4096..8192, false)), "whole blocks");
        assert!(!ranges.try_claim(&claim(4096..8192, true)));
        assert!(ranges.try_claim(&claim(8192..12288, true)), "beside them");
        assert!(!ranges.try_claim(&claim(0..16384, false)));
        ranges.release(&claim(4096..8192, false));
        assert!(!ranges.try_claim(&claim(4096..8192, true)), "the first is still there");
        ranges.release(&claim(0..8192, false));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| ranges.claim(&claim(8192..12288, true)));
            ranges.release(&claim(8192..12288, true));
            waiting.join().unwrap();
        });
        assert!(ranges.try_claim(&claim(4096..8192, true)));
    }
}
