//! What a benchmark does to a disk and how it counts latencies. The guest compiles this file into itself, the host uses it
//! for its yardstick: both do the same operations in the same order. Plain arithmetic, no thread of its own.
#![allow(unreachable_pub, reason = "public in the library, and in the guest's program everything is private")]

/// Word `offset / 8` of the disk's content: SplitMix64's output for the state `seed + offset`.
pub fn pattern(seed: u64, offset: u64) -> u64 {
    let mut word = seed.wrapping_add(offset).wrapping_add(0x9e37_79b9_7f4a_7c15);
    word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}

/// Which operations, in which order. The names are fio's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mix {
    /// Reads anywhere.
    RandRead,
    /// Writes anywhere.
    RandWrite,
    /// Reads from start to end, again and again.
    Read,
    /// Writes from start to end, again and again.
    Write,
    /// Anywhere, half of them reads.
    RandRw,
}

impl Mix {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::RandRead, Self::RandWrite, Self::Read, Self::Write, Self::RandRw];

    /// The name that users write.
    pub fn name(self) -> &'static str {
        match self {
            Self::RandRead => "randread",
            Self::RandWrite => "randwrite",
            Self::Read => "read",
            Self::Write => "write",
            Self::RandRw => "randrw",
        }
    }

    /// Whether it changes the disk.
    pub fn writes(self) -> bool {
        !matches!(self, Self::RandRead | Self::Read)
    }
}

/// One operation on a whole block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// Where, in bytes.
    pub offset: u64,
    /// A write; else a read.
    pub write: bool,
}

/// An endless stream of operations: the same for the same arguments.
#[derive(Clone, Debug)]
pub struct Workload {
    mix: Mix,
    block: u64,
    blocks: u64,
    seed: u64,
    count: u64,
}

impl Workload {
    /// Operations on blocks of `block` bytes, a multiple of 512, of a disk with `bytes`; `None` if not one fits.
    pub fn new(mix: Mix, block: u64, bytes: u64, seed: u64) -> Option<Self> {
        let blocks = bytes.checked_div(block)?;
        (blocks > 0).then_some(Self { mix, block, blocks, seed, count: 0 })
    }

    /// The next one.
    pub fn advance(&mut self) -> Operation {
        let random = pattern(self.seed, self.count);
        let block = match self.mix {
            Mix::Read | Mix::Write => self.count % self.blocks,
            // The high bits choose the block, the lowest one the direction.
            _ => ((u128::from(random) * u128::from(self.blocks)) >> 64) as u64,
        };
        self.count = self.count.wrapping_add(1);
        let write = if self.mix == Mix::RandRw { random & 1 != 0 } else { self.mix.writes() };
        Operation { offset: block * self.block, write }
    }
}

/// Buckets of a histogram: values below 64 have one each, above there are 32 to each power of two (3 % wide or less).
pub const BUCKETS: usize = 1920;

/// The bucket of `value`.
pub fn bucket(value: u64) -> usize {
    let shift = (u64::BITS - value.leading_zeros()).saturating_sub(6);
    32 * shift as usize + (value >> shift) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    /// The first outputs of SplitMix64 for the state 0 (its reference implementation, splitmix64.c, adds the constant to
    /// the state before each).
    #[test]
    fn the_pattern_is_splitmix64() {
        assert_eq!(pattern(0, 0), 0xe220_a839_7b1d_cdaf);
        assert_eq!(pattern(0x9e37_79b9_7f4a_7c15, 0), 0x6e78_9e6a_a1b9_65f4);
    }

    #[test]
    fn sequential_work_goes_round() {
        let mut work = Workload::new(Mix::Write, 4096, 4 * 4096 + 512, 7).unwrap();
        let done: Vec<_> = (0..6).map(|_| work.advance()).collect();
        let expected = [0, 4096, 8192, 12288, 0, 4096].map(|offset| Operation { offset, write: true });
        assert_eq!(done, expected);
    }

    #[test]
    fn random_work_is_everywhere_and_the_same_again() {
        for mix in [Mix::RandRead, Mix::RandWrite, Mix::RandRw] {
            let mut work = Workload::new(mix, 512, 64 * 512, 1).unwrap();
            let mut again = work.clone();
            let done: Vec<_> = (0..1000).map(|_| work.advance()).collect();
            assert!(done.iter().all(|one| *one == again.advance()));
            assert!(done.iter().all(|one| one.offset % 512 == 0 && one.offset < 64 * 512));
            assert_eq!(done.iter().map(|one| one.offset).collect::<HashSet<_>>().len(), 64);
            let writes = done.iter().filter(|one| one.write).count();
            assert!(if mix == Mix::RandRw {
                (400..600).contains(&writes)
            } else {
                writes == 1000 * usize::from(mix.writes())
            });
            let mut other = Workload::new(mix, 512, 64 * 512, 2).unwrap();
            assert!(done.iter().any(|one| *one != other.advance()));
        }
    }

    #[test]
    fn a_disk_without_room_for_a_block_has_no_work() {
        assert!(Workload::new(Mix::Read, 4096, 4095, 1).is_none());
        assert!(Workload::new(Mix::Read, 0, 4095, 1).is_none());
    }

    #[test]
    fn buckets_are_in_order_without_gaps() {
        assert_eq!([0, 1, 63, 64, 65, 66, 127, 128, 131, 132].map(bucket), [0, 1, 63, 64, 64, 65, 95, 96, 96, 97]);
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
        for value in (0..64).flat_map(|shift| [1 << shift, (1_u64 << shift) - 1, 3 << shift >> 1]) {
            assert!(bucket(value + 1) - bucket(value) <= 1, "{value}");
        }
    }
}
