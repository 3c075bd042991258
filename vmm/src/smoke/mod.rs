//! `skiff smoke`: scenarios that boot a machine, talk to its console and judge what it did.
//!
//! Whoever shows or writes results needs only [`Run`] (what came out, complete in itself: nothing refers to a file or to a
//! machine that may be gone) and [`Observer`] (what happens meanwhile).

mod checks;
mod disks;
mod end;
mod keys;
pub mod new;
mod observer;
mod parse;
mod partitions;
mod pattern;
mod process;
mod queue;
pub mod report;
mod result;
mod room;
mod runner;
mod scenario;
#[cfg(test)]
mod schema;
mod session;
mod shell;
mod transcript;
mod trouble;
mod watcher;

pub use observer::{Event, Observer};
pub use result::{
    Counts, Failure, Flake, Measure, Outcome, Quote, Run, StepState, TestId, TimedStep, Verdict, Warning,
};
pub use runner::{Plan, run};
pub use scenario::{Cell, Scenario};
pub use transcript::{Transcript, TranscriptLine};
