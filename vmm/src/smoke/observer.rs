//! What is told while machines run. Each event comes on the thread of the machine that it is about, those about the whole
//! run on the main thread.

use std::time::Duration;

use super::result::{Outcome, TestId};

/// Is told of what happens: progress on a terminal, lines in a log. Called by several threads at once, and each machine
/// waits until the call returns.
pub trait Observer: Sync {
    /// Something happened.
    fn event(&self, event: Event<'_>);
}

/// What happened. For one test in this order: `Started`; `StepBegan`, `StepEnded` and `Line` many times; `Ended`. A test
/// that was not begun has `Ended` only.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// Before the first machine: all tests, in the order in which they stand in [`Run`](super::Run), and how many may run at
    /// a time.
    Planned {
        /// Every scenario in every cell, every repetition.
        tests: &'a [TestId],
        /// At most so many machines at a time.
        jobs: usize,
    },
    /// The machine of a test was started.
    Started {
        /// Which.
        test: &'a TestId,
        /// How many steps it has.
        steps: usize,
        /// After so long it is killed.
        limit: Duration,
    },
    /// A step began.
    StepBegan {
        /// Of which test.
        test: &'a TestId,
        /// Which, from 0.
        step: usize,
        /// What it does, in a few words.
        title: &'a str,
    },
    /// A step was passed.
    StepEnded {
        /// Of which test.
        test: &'a TestId,
        /// Which, from 0.
        step: usize,
        /// How long it took.
        took: Duration,
    },
    /// The last line on the console changed: at most ten times a second for one test. It may be only the begin of a line.
    Line {
        /// Of which test.
        test: &'a TestId,
        /// Since its machine was started.
        at: Duration,
        /// Printable: what is no text is shown as `\u{fffd}` or left out. At most 200 characters.
        text: &'a str,
    },
    /// A test is over, or will not be run.
    Ended {
        /// What came out.
        outcome: &'a Outcome,
    },
    /// The user wants to stop: running machines are killed, no more are started.
    Stopping,
}
