//! What devices count with. A worker counts, one at a time; whoever prints reads at any moment, and the worker never waits
//! for it.

use std::array;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hdrhistogram::Histogram;

/// The longest duration that is told apart, in nanoseconds (137 s). What takes longer counts as this long.
const LONGEST: u64 = 1 << 37;

/// Significant decimal digits of a duration.
const DIGITS: u8 = 2;

/// A number that only grows. One thread at a time may add to it; any may read it.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `count`. No locked instruction: there is one writer.
    pub fn add(&self, count: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
    }

    /// What was added so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Powers of two that sizes are told apart by.
pub const SIZES: usize = 16;

/// How often a size occurred, in classes: 1, 2 to 3, 4 to 7, and so on; what is larger than all counts in the last.
#[derive(Debug, Default)]
pub struct Sizes([Counter; SIZES]);

impl Sizes {
    /// Counts one `size`; nothing if it is 0.
    pub fn record(&self, size: usize) {
        if let Some(class) = size.checked_ilog2() {
            self.0[(class as usize).min(SIZES - 1)].add(1);
        }
    }

    /// How many of each class, the smallest first.
    pub fn get(&self) -> [u64; SIZES] {
        array::from_fn(|class| self.0[class].get())
    }
}

/// The distribution of a duration, to two digits from 1 ns to 137 s, in about 30 KB. Recording allocates nothing.
#[derive(Clone, Debug)]
pub struct Durations(Histogram<u64>);

impl Default for Durations {
    fn default() -> Self {
        Self(Histogram::new_with_max(LONGEST, DIGITS).expect("two digits up to a minute or two are a valid histogram"))
    }
}

impl Durations {
    /// Counts one duration.
    pub fn record(&mut self, duration: Duration) {
        self.0.saturating_record(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Counts all of `other` too.
    #[expect(clippy::missing_panics_doc, reason = "it cannot")]
    pub fn merge(&mut self, other: &Self) {
        self.0.add(&other.0).expect("all have the same range");
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    /// The mean in nanoseconds, rounded; 0 if none was counted.
    #[expect(clippy::cast_sign_loss, reason = "no duration is negative")]
    pub fn mean(&self) -> u64 {
        self.0.mean().round() as u64
    }

    /// The longest in nanoseconds, to two digits; 0 if none was counted.
    pub fn max(&self) -> u64 {
        self.0.max()
    }

    /// What the fraction `part` of all did not exceed, in nanoseconds; 0 if none was counted.
    pub fn quantile(&self, part: f64) -> u64 {
        self.0.value_at_quantile(part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_fall_into_powers_of_two() {
        let sizes = Sizes::default();
        for size in [0, 1, 2, 3, 4, 7, 8, 1024, 1 << 15, 1 << 16, usize::MAX] {
            sizes.record(size);
        }
        assert_eq!(sizes.get(), [1, 2, 2, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 3]);
    }

    #[test]
    fn durations_are_known_to_two_digits_and_bounded() {
        let mut durations = Durations::default();
        assert_eq!((durations.count(), durations.mean(), durations.max(), durations.quantile(0.5)), (0, 0, 0, 0));
        for micros in 1..=1000 {
            durations.record(Duration::from_micros(micros));
        }
        let near =
            |found: u64, expected: u64| assert!(found.abs_diff(expected) * 100 <= expected, "{found} {expected}");
        near(durations.mean(), 500_500);
        near(durations.quantile(0.5), 500_000);
        near(durations.quantile(0.99), 990_000);
        near(durations.max(), 1_000_000);
        let mut long = Durations::default();
        long.record(Duration::from_secs(1 << 40));
        long.merge(&durations);
        assert_eq!(long.count(), 1001);
        near(long.max(), LONGEST);
    }
}
