//! `skiff smoke`: scenarios that boot a machine, talk to its console and judge what it did.
//!
//! Whoever shows or writes results needs only [`Run`] (what came out, complete in itself: nothing refers to a file or to a
//! machine that may be gone) and [`Observer`] (what happens meanwhile).

mod observer;
pub mod report;
mod result;
mod transcript;

pub use observer::{Event, Observer};
pub use result::{
    Counts, Failure, Flake, Measure, Outcome, Quote, Run, StepState, TestId, TimedStep, Verdict, Warning,
};
pub use transcript::{Transcript, TranscriptLine};
