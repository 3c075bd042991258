//! How long a worker looks for work before it goes to sleep. Sleeping and being woken costs microseconds and, for the
//! driver, a notification; looking costs a CPU. So a worker looks only as long as that has paid lately, and never longer
//! than it was told. Owned by the worker.

use std::hint;
use std::thread;
use std::time::{Duration, Instant};

/// What the first look that may pay takes.
const FIRST: Duration = Duration::from_micros(4);

/// Looks, of some ten nanoseconds each, between two at the clock.
const LOOKS: u32 = 16;

/// Who works for the disk gives the CPU back sooner. Whoever keeps it that long has something else to do.
const LOST: Duration = Duration::from_micros(500);

/// Waits without a look once the CPU was lost; twice as many each time that it is lost again, up to the last.
const WITHOUT: [u32; 2] = [16, 4096];

/// Whom the worker waits for. A driver that got answers soon has the next requests, a disk takes its time: one does not tell
/// how long the other will take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Awaited {
    /// What it was asked to do is done, and said.
    Driver,
    /// It has handed over what there was.
    Host,
}

/// The time spent on looking adapts, for each of the two: work that came soon after the worker fell asleep doubles it, work
/// that kept it waiting longer than the maximum ends it.
#[derive(Debug)]
pub(super) struct Polling {
    max: Duration,
    /// A yield that takes longer has lost the CPU: [`LOST`].
    lost: Duration,
    /// By [`Awaited`].
    budgets: [Duration; 2],
    awaited: Awaited,
    /// Since when there has been no work.
    idle: Option<Instant>,
    /// Waits that go without a look, for the CPU is not idle; asleep, the worker is given it at once when there is work.
    without: u32,
    /// How many it were the last time.
    penalty: u32,
}

impl Polling {
    /// Never looks longer than `max`; zero: not at all.
    pub(super) fn new(max: Duration) -> Self {
        let budgets = [Duration::ZERO; 2];
        Self { max, lost: LOST, budgets, awaited: Awaited::Driver, idle: None, without: 0, penalty: 0 }
    }

    /// As if `budget` had been learnt, on a host where nobody else needs the CPU however busy this one is.
    #[cfg(test)]
    pub(super) fn learnt(budget: Duration) -> Self {
        Self { budgets: [budget; 2], lost: Duration::MAX, ..Self::new(budget) }
    }

    /// There was no work: looks for some with `found`, if that pays. Returns whether there is some.
    pub(super) fn look(&mut self, mut found: impl FnMut() -> bool) -> bool {
        if self.max.is_zero() {
            return false;
        }
        let budget = if self.without > 0 { Duration::ZERO } else { self.budgets[self.awaited as usize] };
        // Awake for nothing, it has looked already.
        let idle = *self.idle.get_or_insert_with(Instant::now);
        let mut looked = idle.elapsed();
        while looked < budget {
            for _ in 0..LOOKS {
                if found() {
                    return true;
                }
                hint::spin_loop();
            }
            // Whoever is waited for may need this CPU: a vCPU, a thread of a pool, the kernel's own (linux-aio completes
            // writes on one that is bound to the CPU from which they were submitted).
            thread::yield_now();
            let now = idle.elapsed();
            if now.saturating_sub(looked) > self.lost {
                self.lose();
                break;
            }
            looked = now;
        }
        false
    }

    /// Somebody else needs the CPU.
    fn lose(&mut self) {
        self.penalty = (self.penalty * 2).clamp(WITHOUT[0], WITHOUT[1]);
        self.without = self.penalty;
    }

    /// There was work; from now on `awaited` is waited for.
    pub(super) fn worked(&mut self, awaited: Awaited) {
        if let Some(idle) = self.idle.take() {
            self.adapt(idle.elapsed());
            if self.without > 0 {
                self.without -= 1;
            } else {
                self.penalty = self.penalty.saturating_sub(1);
            }
        }
        self.awaited = awaited;
    }

    /// Learns that work came after `waited`.
    fn adapt(&mut self, waited: Duration) {
        let budget = &mut self.budgets[self.awaited as usize];
        if waited > self.max {
            *budget = Duration::ZERO;
        } else if waited > *budget {
            *budget = (*budget * 2).clamp(FIRST.min(self.max), self.max);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Awaited::{Driver, Host};
    use proptest::prelude::*;

    const MAX: Duration = Duration::from_micros(32);

    fn after(max: Duration, waits: &[u64]) -> Duration {
        let mut polling = Polling::new(max);
        for &wait in waits {
            polling.adapt(Duration::from_micros(wait));
        }
        polling.budgets[Driver as usize]
    }

    #[test]
    fn the_budget_grows_while_it_pays_and_ends_when_it_does_not() {
        for (waits, budget) in [
            (&[][..], 0),
            (&[3], 4),
            (&[30], 4),
            (&[3, 3, 4], 4),
            (&[3, 5], 8),
            (&[30, 30, 30], 16),
            (&[30, 30, 30, 30], 32),
            (&[32, 32, 32, 32, 32, 32], 32),
            (&[30, 30, 30, 33], 0),
            (&[30, 30, 30, 1000, 20], 4),
        ] {
            assert_eq!(after(MAX, waits), Duration::from_micros(budget), "{waits:?}");
        }
        assert_eq!(after(Duration::from_micros(3), &[2]), Duration::from_micros(3), "less than the first step");
        assert_eq!(after(Duration::from_micros(5), &[5, 5]), Duration::from_micros(5), "no power of two");
    }

    proptest! {
        /// Against what the maximum means: the budget is one of few steps, and whatever was learnt, a run of waits within
        /// the maximum leads to a budget that covers them.
        #[test]
        fn covers_what_comes_within_the_maximum(
            max in 1_u64..1000, before in prop::collection::vec(0_u64..3000, 0..50), share in 0_u64..=100,
        ) {
            let limit = Duration::from_micros(max);
            let budget = after(limit, &before);
            let steps: Vec<_> = (0..9).map(|step| 4 << step).take_while(|step| *step < max).chain([0, max]).collect();
            prop_assert!(steps.contains(&(budget.as_micros() as u64)), "{budget:?}");
            let wait = max * share / 100;
            let waits: Vec<_> = before.iter().copied().chain([wait; 10]).collect();
            prop_assert!(after(limit, &waits) >= Duration::from_micros(wait));
            let late: Vec<_> = waits.iter().copied().chain([max + 1]).collect();
            prop_assert_eq!(after(limit, &late), Duration::ZERO);
        }
    }

    #[test]
    fn looks_as_long_as_the_budget_and_only_once() {
        let mut looks = 0;
        assert!(!Polling::new(Duration::ZERO).look(|| panic!("told not to look")));
        let mut polling = Polling::new(Duration::from_secs(3600));
        assert!(!polling.look(|| panic!("nothing is learnt yet")));
        polling.worked(Driver);
        assert_eq!(polling.budgets, [FIRST, Duration::ZERO], "it came soon");
        polling.budgets = [Duration::from_secs(3600); 2];
        let found = polling.look(|| {
            looks += 1;
            looks == 5
        });
        assert!(found);
        polling.worked(Driver);
        assert_eq!((looks, polling.budgets), (5, [Duration::from_secs(3600); 2]));
        // A wake-up for nothing is no new wait.
        polling.budgets[Driver as usize] = Duration::from_nanos(1);
        while polling.look(|| false) {}
        let idle = polling.idle;
        assert!(idle.is_some() && !polling.look(|| panic!("the budget is used")));
        assert_eq!(polling.idle, idle);
    }

    #[test]
    fn a_cpu_that_others_need_is_left_to_them() {
        let mut polling = Polling::learnt(Duration::from_secs(3600));
        for expected in [16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 4096] {
            polling.lose();
            for _ in 0..expected {
                assert!(!polling.look(|| panic!("it goes without")));
                polling.worked(Host);
            }
            assert!(polling.look(|| true), "after {expected} waits");
        }
        for _ in 0..WITHOUT[1] {
            assert!(polling.look(|| true));
            polling.worked(Host);
        }
        polling.lose();
        assert_eq!(polling.without, WITHOUT[0], "after as many good ones it is as at first");
    }

    #[test]
    fn a_slow_disk_does_not_keep_it_from_looking_for_a_quick_driver() {
        let mut polling = Polling::new(MAX);
        // In turn: the driver's next requests come soon after the answers, what the host does takes longer than the maximum.
        for _ in 0..8 {
            polling.awaited = Driver;
            polling.adapt(Duration::from_micros(3));
            polling.awaited = Host;
            polling.adapt(2 * MAX);
        }
        assert_eq!(polling.budgets, [FIRST, Duration::ZERO]);
        let mut polling = Polling { budgets: [Duration::from_secs(3600), Duration::ZERO], ..Polling::new(MAX) };
        assert!(polling.look(|| true), "the driver's turn");
        polling.awaited = Host;
        assert!(!polling.look(|| panic!("that has not paid")));
    }
}
