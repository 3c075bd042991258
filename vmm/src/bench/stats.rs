#![expect(clippy::cast_precision_loss, reason = "chances become figures for a report")]
//! What repeated measurements come to.

use serde::Serialize;

/// The middle of some values, where the middle of all values there could be is likely to lie, and how far they lie apart.
///
/// The interval is one of order statistics: a value of its own on either side, the nearest pair that holds the true median
/// with a chance of [`WANTED`], and the outermost pair where that is too few values. It assumes of them only that they are
/// independent; no random number has a part in it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Middle {
    /// Half of the values are at most this.
    pub median: f64,
    /// The lower end of the interval.
    pub low: f64,
    /// The upper end of the interval.
    pub high: f64,
    /// The chance that the true median is in it: 0 of a single value.
    pub confidence: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

/// The chance that an interval should have.
const WANTED: f64 = 0.95;

impl Middle {
    /// Of some values; `None` of none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let half = values.len() / 2;
        let median = if values.len() % 2 == 1 { values[half] } else { f64::midpoint(values[half - 1], values[half]) };
        let (rank, confidence) = interval(values.len());
        let (low, high) = (values[rank], values[values.len() - 1 - rank]);
        Some(Self { median, low, high, confidence, min, max })
    }

    /// How wide the interval is, as a part of the median.
    pub fn width(self) -> f64 {
        if self.median == 0.0 { 0.0 } else { (self.high - self.low) / self.median }
    }

    /// Whether the interval is too wide to say anything.
    pub fn is_noise(self) -> bool {
        self.width() > NOISE
    }

    /// Whether there is nothing to tell a difference from noise by.
    pub fn is_single(self) -> bool {
        self.confidence == 0.0
    }
}

/// How many values are outside of the interval on either side when there are `count`, and the chance that the true median
/// is inside: it is not when all values but so many are on the same side of it, which is tossing coins.
pub(super) fn interval(count: usize) -> (usize, f64) {
    let mut best = (0, 0.0);
    // The chance of exactly `outside` heads, and of at most so many.
    let (mut exactly, mut most) = (0.5_f64.powi(count.try_into().unwrap_or(i32::MAX)), 0.0);
    for outside in 0..count.div_ceil(2) {
        most += exactly;
        let confidence = 1.0 - 2.0 * most;
        if outside > 0 && confidence < WANTED {
            break;
        }
        best = (outside, confidence.max(0.0));
        exactly *= (count - outside) as f64 / (outside + 1) as f64;
    }
    best
}

/// An interval wider than this, as a part of the median, makes a cell worthless.
pub const NOISE: f64 = 0.2;

#[cfg(test)]
mod tests {
    use super::*;
    use guest::workload::pattern;
    use proptest::prelude::*;

    fn of(values: &[f64]) -> Middle {
        Middle::of(values.iter().copied()).unwrap()
    }

    #[test]
    fn medians() {
        assert_eq!((Middle::of([]), Middle::of([f64::NAN])), (None, None));
        for (values, median, min, max) in
            [(&[3.0][..], 3.0, 3.0, 3.0), (&[4.0, 1.0, 2.0], 2.0, 1.0, 4.0), (&[4.0, 1.0, 2.0, 3.0], 2.5, 1.0, 4.0)]
        {
            let middle = of(values);
            assert_eq!((middle.median, middle.min, middle.max), (median, min, max));
        }
    }

    /// Against a table of such intervals (Conover, Practical Nonparametric Statistics, table A3 for p = 0.5).
    #[test]
    fn intervals_are_those_of_the_tables() {
        for (count, outside, confidence) in [
            (1, 0, 0.0),
            (2, 0, 0.5),
            (3, 0, 0.75),
            (5, 0, 0.9375),
            (6, 0, 0.9688),
            (8, 0, 0.9922),
            (9, 1, 0.9609),
            (12, 2, 0.9614),
            (20, 5, 0.9586),
        ] {
            let (found, chance) = interval(count);
            assert_eq!((found, (chance * 1e4).round() / 1e4), (outside, confidence), "{count}");
        }
    }

    /// Against the definition: each value is as likely below the true median, here 0, as above it.
    #[test]
    fn the_confidence_is_the_share_of_all_cases() {
        for count in 1..=14_u32 {
            let cases = 1_u32 << count;
            let holds = |case: &u32| {
                let middle = Middle::of((0..count).map(|bit| if case >> bit & 1 == 0 { -1.0 } else { 1.0 })).unwrap();
                middle.low < 0.0 && middle.high > 0.0
            };
            let share = (0..cases).filter(holds).count() as f64 / f64::from(cases);
            assert!((share - interval(count as usize).1).abs() < 1e-9, "{count}: {share}");
        }
    }

    #[test]
    fn noise_is_what_lies_far_apart() {
        let middle = |low, high| Middle { median: 100.0, low, high, ..of(&[1.0]) };
        assert!(!middle(90.0, 110.0).is_noise() && middle(89.0, 110.0).is_noise());
        assert!(!of(&[0.0, 0.0]).is_noise());
        assert!(of(&[7.0]).is_single() && !of(&[7.0, 7.0]).is_single());
    }

    proptest! {
        /// The definition: no more than half of the values are on either side, whatever their order; and it scales.
        #[test]
        fn the_median_halves(values in prop::collection::vec(0.0..1e9_f64, 1..50), factor in 0.001..1000.0_f64) {
            let middle = of(&values);
            let below = values.iter().filter(|value| **value < middle.median).count();
            let above = values.iter().filter(|value| **value > middle.median).count();
            prop_assert!(2 * below <= values.len() && 2 * above <= values.len());
            let ends = [middle.min, middle.low, middle.median, middle.high, middle.max];
            prop_assert!(ends.is_sorted(), "{ends:?}");
            prop_assert!(values.contains(&middle.low) && values.contains(&middle.high));
            let outside = |value: &&f64| **value < middle.low || **value > middle.high;
            prop_assert!(values.iter().filter(outside).count() <= 2 * interval(values.len()).0);
            let reversed = Middle::of(values.iter().rev().copied()).unwrap();
            prop_assert_eq!(reversed, middle);
            let scaled = Middle::of(values.iter().map(|value| value * factor)).unwrap();
            prop_assert!((scaled.width() - middle.width()).abs() < 1e-6);
        }

        /// A crooked distribution whose median is known: of 400 intervals about as many hold it as they promise.
        #[test]
        fn the_interval_holds_the_true_median_as_often_as_it_says(count in 2..30_usize, seed: u64) {
            let value = |at: usize| (pattern(seed, at as u64) >> 11) as f64 / (1_u64 << 53) as f64;
            let median = 0.125;
            let holds = (0..400).filter(|run| {
                let middle = Middle::of((0..count).map(|at| value(run * count + at).powi(3))).unwrap();
                (middle.low..=middle.high).contains(&median)
            });
            let (share, confidence) = (holds.count() as f64 / 400.0, interval(count).1);
            // Six standard deviations of such a share.
            let slack = 6.0 * (confidence * (1.0 - confidence) / 400.0).sqrt();
            prop_assert!((share - confidence).abs() <= slack, "{share} of {confidence}");
        }
    }
}
