//! What came out of a run. Plain data: made by the runner, read by whoever writes results.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use super::transcript::Transcript;

/// All tests of one `skiff smoke`.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// When it began.
    pub started: SystemTime,
    /// From begin to end.
    pub took: Duration,
    /// One a test, in the order of the command line: scenarios, in each its cells, in each its repetitions.
    pub outcomes: Vec<Outcome>,
    /// The user stopped it: some tests were not run to their end.
    pub interrupted: bool,
}

/// Which test.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TestId {
    /// The scenario's name.
    pub scenario: String,
    /// Its file, as named on the command line.
    pub file: PathBuf,
    /// The cell of its matrix: keys and values as they are written, in the order of the file; empty without a matrix.
    pub cell: Vec<(String, String)>,
    /// Which repetition, from 1; 0 if it is not repeated.
    pub repetition: u32,
}

/// One test.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Which.
    pub test: TestId,
    /// How it went.
    pub verdict: Verdict,
    /// Why it did not pass; for [`Verdict::Skipped`] why it was not run. `None` only if it passed.
    pub failure: Option<Failure>,
    /// When its machine was started, from the begin of the run.
    pub began: Duration,
    /// From the start of the machine to the last check after its end.
    pub took: Duration,
    /// All steps of the scenario, also those that were not reached.
    pub steps: Vec<TimedStep>,
    /// What does not make it fail.
    pub warnings: Vec<Warning>,
    /// What was measured.
    pub measures: Vec<Measure>,
    /// What the machine wrote to its console.
    pub console: Transcript,
    /// What skiff said about the machine (its standard error), whole lines; at most the last 64 KiB.
    pub messages: String,
    /// How the machine ended, in a few words; `None` if it did not start.
    pub end: Option<String>,
    /// The folder in which `--keep` left the console and the disks.
    pub kept: Option<PathBuf>,
}

impl Outcome {
    /// One of which nothing more is known.
    pub(super) fn new(test: TestId, verdict: Verdict) -> Self {
        Self {
            test,
            verdict,
            failure: None,
            began: Duration::ZERO,
            took: Duration::ZERO,
            steps: Vec::new(),
            warnings: Vec::new(),
            measures: Vec::new(),
            console: Transcript::default(),
            messages: String::new(),
            end: None,
            kept: None,
        }
    }
}

/// How a test went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As the scenario wants it.
    Passed,
    /// Not so: the guest is to blame, or the scenario.
    Failed,
    /// The host could not run it: no KVM, no memory, a file that vanished.
    Error,
    /// It was not run, or not to its end, because the user stopped the run.
    Skipped,
}

impl Verdict {
    /// One word in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::Error => "error",
            Self::Skipped => "skipped",
        }
    }
}

/// Why a test did not pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// One line for a person: what was waited for and how long, or what was seen, such as `no "login: " within 20 s`, or
    /// `kernel panic while waiting for "login: "`.
    pub summary: String,
    /// The step during which it happened: an index of [`Outcome::steps`].
    pub step: Option<usize>,
    /// File and line of that step, as `boot.toml:12`, or of what else in the scenario is to blame.
    pub place: Option<String>,
    /// The lines of the console that show it; at most 20.
    pub quotes: Vec<Quote>,
    /// What the console ended with; at most 10 lines that are not empty.
    pub last_lines: Vec<Quote>,
}

/// A line of the console, or a part of one that is very long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quote {
    /// The number of the line, from 1, counted from the machine's start (a reboot does not begin anew).
    pub number: u64,
    /// When its first byte came, from the machine's start.
    pub at: Duration,
    /// Without its end, printable: no control characters. At most 1000 characters.
    pub text: String,
}

/// One step of the scenario in this test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimedStep {
    /// What it does, in a few words: `wait for "login: "`, `run "uname -r"`, `expect poweroff`.
    pub title: String,
    /// File and line: `boot.toml:12`.
    pub place: String,
    /// How far it came.
    pub state: StepState,
    /// When it began, from the machine's start; `None` if it was not reached.
    pub began: Option<Duration>,
    /// How long it took, or took until it failed.
    pub took: Duration,
    /// How long it might have taken.
    pub limit: Duration,
}

/// How far a step came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepState {
    /// It was passed.
    Passed,
    /// The test failed in it, or was stopped in it.
    Failed,
    /// The test was over before.
    NotReached,
}

/// Something to look at in a test that may have passed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// One line.
    pub text: String,
    /// The line of the console it is about.
    pub quote: Option<Quote>,
}

/// A time that was measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Measure {
    /// Its name in the scenario.
    pub name: String,
    /// The time.
    pub value: Duration,
    /// What it should not exceed. If it does, there is a warning too.
    pub max: Option<Duration>,
}

/// How many tests went how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// [`Verdict::Passed`].
    pub passed: usize,
    /// [`Verdict::Failed`].
    pub failed: usize,
    /// [`Verdict::Error`].
    pub errors: usize,
    /// [`Verdict::Skipped`].
    pub skipped: usize,
}

/// The repetitions of one scenario in one cell, summed up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flake {
    /// Which; its `repetition` is 0.
    pub test: TestId,
    /// How often it was run to its end: passed or failed.
    pub runs: usize,
    /// How often it failed.
    pub failed: usize,
}

impl Run {
    /// How many tests went how.
    pub fn counts(&self) -> Counts {
        let count = |verdict| self.outcomes.iter().filter(|outcome| outcome.verdict == verdict).count();
        Counts {
            passed: count(Verdict::Passed),
            failed: count(Verdict::Failed),
            errors: count(Verdict::Error),
            skipped: count(Verdict::Skipped),
        }
    }

    /// What the process ends with: 0 if all passed, 1 if one failed, else 3: the host could not run them all.
    pub fn exit_code(&self) -> u8 {
        match self.counts() {
            Counts { failed: 1.., .. } => 1,
            Counts { errors: 0, skipped: 0, .. } if !self.interrupted => 0,
            _ => 3,
        }
    }

    /// How often each repeated test failed, in the order of the tests; empty without `--repeat`.
    pub fn flakes(&self) -> Vec<Flake> {
        let mut flakes: Vec<Flake> = Vec::new();
        for outcome in self.outcomes.iter().filter(|outcome| outcome.test.repetition > 0) {
            let test = TestId { repetition: 0, ..outcome.test.clone() };
            // The repetitions of one test stand next to each other.
            if flakes.last().is_none_or(|last| last.test != test) {
                flakes.push(Flake { test, runs: 0, failed: 0 });
            }
            if let Some(flake) = flakes.last_mut() {
                flake.runs += usize::from(matches!(outcome.verdict, Verdict::Passed | Verdict::Failed));
                flake.failed += usize::from(outcome.verdict == Verdict::Failed);
            }
        }
        flakes
    }
}

/// `boot [cpus=2, cache=none] #3`.
impl fmt::Display for TestId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.scenario)?;
        if !self.cell.is_empty() {
            let cell: Vec<_> = self.cell.iter().map(|(key, value)| format!("{key}={value}")).collect();
            write!(out, " [{}]", cell.join(", "))?;
        }
        if self.repetition > 0 {
            write!(out, " #{}", self.repetition)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(scenario: &str, repetition: u32, verdict: Verdict) -> Outcome {
        let test = TestId { scenario: scenario.into(), file: "a.toml".into(), cell: Vec::new(), repetition };
        Outcome::new(test, verdict)
    }

    fn run(outcomes: Vec<Outcome>) -> Run {
        Run { started: SystemTime::UNIX_EPOCH, took: Duration::ZERO, outcomes, interrupted: false }
    }

    #[test]
    fn exit_codes() {
        use Verdict::{Error, Failed, Passed, Skipped};
        for (verdicts, code) in [
            (&[Passed, Passed][..], 0),
            (&[Passed, Failed, Error], 1),
            (&[Passed, Error], 3),
            (&[Skipped, Passed], 3),
            (&[Skipped, Failed], 1),
        ] {
            let run = run(verdicts.iter().map(|verdict| outcome("a", 0, *verdict)).collect());
            assert_eq!(run.exit_code(), code, "{verdicts:?}");
            assert_eq!(Run { interrupted: true, ..run }.exit_code(), code.max(if code == 0 { 3 } else { 0 }));
        }
    }

    #[test]
    fn rates_of_repetitions() {
        use Verdict::{Error, Failed, Passed, Skipped};
        let verdicts = [("a", Passed), ("a", Failed), ("a", Error), ("b", Failed), ("b", Failed), ("b", Skipped)];
        let outcomes = verdicts.iter().zip(1..).map(|((name, verdict), number)| outcome(name, number, *verdict));
        let flakes = run(outcomes.collect()).flakes();
        let rates: Vec<_> = flakes.iter().map(|flake| (&*flake.test.scenario, flake.failed, flake.runs)).collect();
        assert_eq!(rates, [("a", 1, 2), ("b", 2, 2)]);
        assert_eq!(run(vec![outcome("a", 0, Failed)]).flakes(), []);
    }

    #[test]
    fn names_of_tests() {
        let mut test = outcome("boot", 0, Verdict::Passed).test;
        assert_eq!(test.to_string(), "boot");
        test.cell = vec![("cpus".into(), "2".into()), ("cache".into(), "none".into())];
        test.repetition = 3;
        assert_eq!(test.to_string(), "boot [cpus=2, cache=none] #3");
    }
}
