//! Which sectors of a disk were written since it was opened. Shared by the engines of all its queues.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use crate::SECTOR_SIZE;

/// Sectors in a word of the map.
const WORD: u64 = u64::BITS as u64;

/// Words in a piece of the map, which is 4 KiB of memory.
const WORDS: usize = 512;

/// Sectors in a piece of the map: 16 MiB of the disk.
const PIECE: u64 = WORDS as u64 * WORD;

/// One bit for each sector, in pieces that are made when something is written there: memory is 4 KiB for each 16 MiB of the
/// disk that the guest has written to, so at most a 4096th of the disk. Bits are only ever set.
#[derive(Debug, Default)]
pub(crate) struct Written {
    pieces: RwLock<BTreeMap<u64, Box<Piece>>>,
}

#[derive(Debug)]
struct Piece([AtomicU64; WORDS]);

impl Piece {
    fn new() -> Box<Self> {
        Box::new(Self([const { AtomicU64::new(0) }; WORDS]))
    }
}

impl Written {
    /// These bytes were written: whole sectors. Whoever is told so afterwards finds them written.
    pub(crate) fn insert(&self, bytes: &Range<u64>) {
        let (mut sector, end) = (bytes.start / SECTOR_SIZE, bytes.end / SECTOR_SIZE);
        while sector < end {
            let stop = end.min((sector / PIECE + 1) * PIECE);
            self.insert_in_piece(sector / PIECE, sector..stop);
            sector = stop;
        }
    }

    fn insert_in_piece(&self, number: u64, sectors: Range<u64>) {
        let set = |piece: &Piece| {
            let mut sector = sectors.start;
            while sector < sectors.end {
                let (bit, count) = (sector % WORD, (WORD - sector % WORD).min(sectors.end - sector));
                let bits = (u64::MAX >> (WORD - count)) << bit;
                piece.0[(sector % PIECE / WORD) as usize].fetch_or(bits, Ordering::Release);
                sector += count;
            }
        };
        if let Some(piece) = self.pieces.read().unwrap_or_else(PoisonError::into_inner).get(&number) {
            return set(piece);
        }
        let mut pieces = self.pieces.write().unwrap_or_else(PoisonError::into_inner);
        set(pieces.entry(number).or_insert_with(Piece::new));
    }

    /// Whether the sector at the beginning of `bytes` was written, and up to which byte that is so for those after it. The
    /// range is not empty; it may begin and end anywhere.
    pub(crate) fn run(&self, bytes: &Range<u64>) -> (bool, u64) {
        let (mut sector, end) = (bytes.start / SECTOR_SIZE, bytes.end.div_ceil(SECTOR_SIZE));
        let pieces = self.pieces.read().unwrap_or_else(PoisonError::into_inner);
        let (mut first, mut piece, mut number) = (None, None, None);
        while sector < end {
            if number != Some(sector / PIECE) {
                number = Some(sector / PIECE);
                piece = pieces.get(&(sector / PIECE));
            }
            let (written, count) = match piece {
                None => (false, PIECE - sector % PIECE),
                Some(piece) => {
                    let word = piece.0[(sector % PIECE / WORD) as usize].load(Ordering::Acquire) >> (sector % WORD);
                    let written = word & 1 == 1;
                    let same = if written { word.trailing_ones() } else { word.trailing_zeros() };
                    (written, u64::from(same).min(WORD - sector % WORD))
                }
            };
            if written != *first.get_or_insert(written) {
                break;
            }
            sector += count;
        }
        (first.unwrap_or(false), bytes.end.min(sector * SECTOR_SIZE))
    }

    /// Pieces of the map.
    #[cfg(test)]
    fn pieces(&self) -> usize {
        self.pieces.read().unwrap().len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The runs of a range, each with its end.
    fn runs(map: &Written, bytes: Range<u64>) -> Vec<(bool, u64)> {
        let (mut at, mut runs) = (bytes.start, Vec::new());
        while at < bytes.end {
            let run = map.run(&(at..bytes.end));
            assert!(run.1 > at && run.1 <= bytes.end);
            at = run.1;
            runs.push(run);
        }
        runs
    }

    #[test]
    fn memory_is_for_what_was_written() {
        let map = Written::default();
        let far = 1 << 60;
        assert_eq!(runs(&map, 0..1 << 30), [(false, 1 << 30)]);
        assert_eq!(map.pieces(), 0);
        map.insert(&(far..far + 512));
        map.insert(&((16 << 20) - 512..(16 << 20) + 512));
        assert_eq!(map.pieces(), 3);
        assert_eq!(runs(&map, far - 1..far + 513), [(false, far), (true, far + 512), (false, far + 513)]);
        assert_eq!(runs(&map, 0..32 << 20), [(false, (16 << 20) - 512), (true, (16 << 20) + 512), (false, 32 << 20)]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Across the border of two pieces; beside a vector of sectors.
        #[test]
        fn is_what_was_inserted(
            inserted in prop::collection::vec((0..400_u64, 0..200_u64), 0..12), from in 0..250_000_u64, len in 1..60_000_u64,
        ) {
            let base = (16 << 20) - 256 * 512;
            let (map, mut model) = (Written::default(), vec![false; 700]);
            for (start, count) in inserted {
                map.insert(&(base + start * 512..base + (start + count) * 512));
                model[start as usize..(start + count) as usize].fill(true);
            }
            let mut at = base + from;
            for (written, end) in runs(&map, base + from..base + from + len) {
                for byte in at..end {
                    prop_assert_eq!(model[((byte - base) / 512) as usize], written);
                }
                at = end;
            }
            prop_assert_eq!(at, base + from + len);
        }
    }
}
