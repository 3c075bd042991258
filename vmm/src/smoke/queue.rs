//! Which test is next, and whether there is room for its machine; what came out of those that are over. Shared by the threads
//! that take tests.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::result::Outcome;

/// Bytes of consoles that are kept of a run, as they are; of tests that end after that only the last [`END`] are.
const CONSOLES: usize = 256 << 20;
const END: usize = 4 << 10;
/// How long to sleep between looks at whether the user wants to stop.
const TICK: Duration = Duration::from_millis(100);

/// The tests of a run, by their numbers.
pub(super) struct Queue {
    /// What each machine takes: bytes, CPUs.
    needs: Vec<(u64, usize)>,
    /// What there is: bytes, and CPUs if they count.
    room: (u64, Option<usize>),
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    next: usize,
    running: usize,
    taken: (u64, usize),
    /// Bytes of consoles in the outcomes.
    consoles: usize,
    outcomes: Vec<Option<Outcome>>,
}

/// What there is for a thread that asks for a test.
enum Next {
    /// This one, which counts as running from now on.
    Test(usize),
    /// One for which there is no room yet.
    Later,
    /// There is none any more.
    Over,
}

impl Queue {
    /// `needs` of the tests in their order; `memory`, and `cpus` if they count.
    pub(super) fn new(needs: Vec<(u64, usize)>, memory: u64, cpus: Option<usize>) -> Self {
        let outcomes = needs.iter().map(|_| None).collect();
        let state = Mutex::new(State { next: 0, running: 0, taken: (0, 0), consoles: 0, outcomes });
        Self { needs, room: (memory, cpus), state, changed: Condvar::new() }
    }

    /// The next test, when there is room for it: at least one runs always. `None`: there is no more, or it is to stop.
    pub(super) fn take(&self, stop: &AtomicBool) -> Option<usize> {
        let mut state = self.lock();
        while !stop.load(Ordering::Relaxed) {
            match self.next(&mut state) {
                Next::Test(at) => return Some(at),
                Next::Over => return None,
                Next::Later => state = self.changed.wait_timeout(state, TICK).unwrap_or_else(PoisonError::into_inner).0,
            }
        }
        None
    }

    fn next(&self, state: &mut State) -> Next {
        let at = state.next;
        let Some(&(memory, cpus)) = self.needs.get(at) else { return Next::Over };
        let (bytes, vcpus) = (state.taken.0 + memory, state.taken.1 + cpus);
        let fits = bytes <= self.room.0 && self.room.1.is_none_or(|room| vcpus <= room);
        if !fits && state.running > 0 {
            return Next::Later;
        }
        state.next += 1;
        state.running += 1;
        state.taken = (bytes, vcpus);
        Next::Test(at)
    }

    /// The test is over, and its machine gone.
    pub(super) fn finish(&self, at: usize, mut outcome: Outcome) {
        let mut state = self.lock();
        if state.consoles + outcome.console.kept() > CONSOLES {
            outcome.console.keep_end(END);
        }
        state.consoles += outcome.console.kept();
        let (memory, cpus) = self.needs[at];
        state.running -= 1;
        state.taken = (state.taken.0 - memory, state.taken.1 - cpus);
        state.outcomes[at] = Some(outcome);
        self.changed.notify_all();
    }

    /// Whether no test is left, nor running.
    pub(super) fn is_over(&self) -> bool {
        let state = self.lock();
        state.running == 0 && state.next == self.needs.len()
    }

    /// Until something changed, or for a moment.
    pub(super) fn wait(&self) {
        let state = self.lock();
        drop(self.changed.wait_timeout(state, TICK).unwrap_or_else(PoisonError::into_inner));
    }

    /// In the order of the tests; `None`: was never taken.
    pub(super) fn into_outcomes(self) -> Vec<Option<Outcome>> {
        self.state.into_inner().unwrap_or_else(PoisonError::into_inner).outcomes
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::smoke::result::{TestId, Verdict};

    const MIB: u64 = 1 << 20;

    fn test_id(number: usize) -> TestId {
        TestId { scenario: number.to_string(), file: "a.toml".into(), cell: Vec::new(), repetition: 0 }
    }

    fn outcome(number: usize, verdict: Verdict) -> Outcome {
        Outcome::new(test_id(number), verdict)
    }

    /// As many as fit are taken from the front.
    fn fit(queue: &Queue) -> usize {
        let mut state = queue.lock();
        std::iter::from_fn(|| matches!(queue.next(&mut state), Next::Test(_)).then_some(())).count()
    }

    #[test]
    fn machines_wait_for_memory_and_cpus() {
        for (needs, room, fits) in [
            (&[(100 * MIB, 1); 4][..], (1000 * MIB, None), 4),
            (&[(100 * MIB, 1); 4], (250 * MIB, None), 2),
            (&[(100 * MIB, 1); 4], (1000 * MIB, Some(3)), 3),
            (&[(5000 * MIB, 64), (MIB, 1)], (1000 * MIB, Some(2)), 1),
        ] {
            let queue = Queue::new(needs.to_vec(), room.0, room.1);
            assert_eq!(fit(&queue), fits, "{needs:?} {room:?}");
            queue.finish(0, outcome(0, Verdict::Skipped));
            assert!(fit(&queue) >= usize::from(needs.len() > fits), "one ended, another begins");
        }
    }

    #[test]
    fn consoles_of_a_long_run_are_bounded() {
        let queue = Queue::new(vec![(MIB, 1); 3], MIB, None);
        let stop = AtomicBool::new(false);
        for at in 0..3 {
            assert_eq!(queue.take(&stop), Some(at));
            queue.lock().consoles = if at == 1 { CONSOLES - (10 << 10) } else { 0 };
            let mut outcome = outcome(at, Verdict::Passed);
            outcome.console.push(Duration::ZERO, &vec![b'x'; 20 << 10]);
            queue.finish(at, outcome);
        }
        let kept: Vec<_> = queue.into_outcomes().into_iter().map(|outcome| outcome.unwrap().console.kept()).collect();
        assert_eq!(kept, [20 << 10, END, 20 << 10]);
    }

    #[test]
    fn nothing_is_taken_when_it_is_to_stop() {
        let queue = Queue::new(vec![(MIB, 1)], MIB, None);
        assert_eq!(queue.take(&AtomicBool::new(true)), None);
        assert!(!queue.is_over());
        assert_eq!(queue.take(&AtomicBool::new(false)), Some(0));
        queue.finish(0, outcome(0, Verdict::Skipped));
        assert!(queue.is_over());
        assert_eq!(queue.take(&AtomicBool::new(false)), None);
    }
}
