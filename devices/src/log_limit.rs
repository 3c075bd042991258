//! Keeps a guest from filling the log: the first few lines of a kind are shown, then one now and then. Owned by whoever
//! writes those lines.

use std::fmt::{self, Display, Formatter};
use std::time::{Duration, Instant};

/// Lines shown before the limit sets in.
const FIRST: u32 = 5;

/// Then the least time between two.
const INTERVAL: Duration = Duration::from_secs(10);

/// Decides which lines of one kind are logged.
#[derive(Debug, Default)]
pub struct LogLimit {
    shown: u32,
    last: Option<Instant>,
    suppressed: u64,
}

impl LogLimit {
    /// Whether a line may be logged at `now`; if so, how many were suppressed since the last one.
    pub fn allow(&mut self, now: Instant) -> Option<Suppressed> {
        let waited = self.last.is_none_or(|last| now.saturating_duration_since(last) >= INTERVAL);
        if self.shown >= FIRST && !waited {
            self.suppressed += 1;
            return None;
        }
        self.shown = self.shown.saturating_add(1);
        self.last = Some(now);
        Some(Suppressed(std::mem::take(&mut self.suppressed)))
    }

    /// How many lines were logged.
    #[cfg(test)]
    pub(crate) fn shown(&self) -> u32 {
        self.shown
    }
}

/// So many lines were not logged. Displayed behind the line that is: nothing, or a remark in parentheses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suppressed(u64);

impl Display for Suppressed {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        if self.0 == 0 { Ok(()) } else { write!(out, " ({} such lines not shown)", self.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_a_few_then_one_per_interval_with_the_count() {
        let mut limit = LogLimit::default();
        let start = Instant::now();
        for _ in 0..FIRST {
            assert_eq!(limit.allow(start), Some(Suppressed(0)));
        }
        for _ in 0..1000 {
            assert_eq!(limit.allow(start + INTERVAL / 2), None);
        }
        assert_eq!(limit.allow(start + INTERVAL), Some(Suppressed(1000)));
        assert_eq!(limit.allow(start + INTERVAL), None);
        assert_eq!(limit.allow(start + 3 * INTERVAL), Some(Suppressed(1)));
        assert_eq!(
            (Suppressed(0).to_string().as_str(), Suppressed(7).to_string().as_str()),
            ("", " (7 such lines not shown)")
        );
    }
}
