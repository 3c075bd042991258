//! Keeps a guest from filling the log: the first few lines of a kind are shown, then one now and then. Owned by whoever
//! writes those lines.

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
    pub fn allow(&mut self, now: Instant) -> Option<u64> {
        let waited = self.last.is_none_or(|last| now.saturating_duration_since(last) >= INTERVAL);
        if self.shown >= FIRST && !waited {
            self.suppressed += 1;
            return None;
        }
        self.shown = self.shown.saturating_add(1);
        self.last = Some(now);
        Some(std::mem::take(&mut self.suppressed))
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
            assert_eq!(limit.allow(start), Some(0));
        }
        for _ in 0..1000 {
            assert_eq!(limit.allow(start + INTERVAL / 2), None);
        }
        assert_eq!(limit.allow(start + INTERVAL), Some(1000));
        assert_eq!(limit.allow(start + INTERVAL), None);
        assert_eq!(limit.allow(start + 3 * INTERVAL), Some(1));
    }
}
