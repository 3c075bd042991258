//! What repeated measurements come to.

use serde::Serialize;

/// The middle of some values, and how far they lie apart.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Middle {
    /// Half of the values are at most this.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Middle {
    /// Of some values; `None` of none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let half = values.len() / 2;
        let median = if values.len() % 2 == 1 { values[half] } else { f64::midpoint(values[half - 1], values[half]) };
        Some(Self { median, min, max })
    }

    /// How far apart the values are, as a part of the median.
    pub fn spread(self) -> f64 {
        if self.median == 0.0 { 0.0 } else { (self.max - self.min) / self.median }
    }

    /// Whether the values are too far apart to say anything.
    pub fn is_noise(self) -> bool {
        self.spread() > NOISE
    }
}

/// A spread above this makes a cell worthless.
pub const NOISE: f64 = 0.2;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn medians() {
        let of = |values: &[f64]| Middle::of(values.iter().copied());
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[f64::NAN]), None);
        assert_eq!(of(&[3.0]), Some(Middle { median: 3.0, min: 3.0, max: 3.0 }));
        assert_eq!(of(&[4.0, 1.0, 2.0]), Some(Middle { median: 2.0, min: 1.0, max: 4.0 }));
        assert_eq!(of(&[4.0, 1.0, 2.0, 3.0]), Some(Middle { median: 2.5, min: 1.0, max: 4.0 }));
    }

    #[test]
    fn noise_is_what_lies_far_apart() {
        let middle = |min, max| Middle { median: 100.0, min, max };
        assert!(!middle(90.0, 110.0).is_noise() && middle(89.0, 110.0).is_noise());
        assert!(!Middle { median: 0.0, min: 0.0, max: 0.0 }.is_noise());
    }

    proptest! {
        /// The definition: no more than half of the values are on either side, whatever their order; and it scales.
        #[test]
        fn the_median_halves(values in prop::collection::vec(0.0..1e9_f64, 1..50), factor in 0.001..1000.0_f64) {
            let middle = Middle::of(values.iter().copied()).unwrap();
            let below = values.iter().filter(|value| **value < middle.median).count();
            let above = values.iter().filter(|value| **value > middle.median).count();
            prop_assert!(2 * below <= values.len() && 2 * above <= values.len());
            prop_assert!(middle.min <= middle.median && middle.median <= middle.max);
            let reversed = Middle::of(values.iter().rev().copied()).unwrap();
            prop_assert_eq!(reversed, middle);
            let scaled = Middle::of(values.iter().map(|value| value * factor)).unwrap();
            prop_assert!((scaled.spread() - middle.spread()).abs() < 1e-6);
        }
    }
}
