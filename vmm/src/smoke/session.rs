//! One test: a machine is started, the steps are done one after the other, and whatever else happens is noticed. On a thread
//! of its own, with which the machine ends.

mod limits;
mod step;
mod trouble;

use std::collections::VecDeque;
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::checks::Complaint;
use super::disks::Prepared;
use super::end::End;
use super::observer::{Event, Observer};
use super::process::{Heard, Process};
use super::result::{Failure, Measure, Outcome, StepState, TestId, TimedStep, Verdict, Warning};
use super::scenario::{Action, Cell, Ending, Scenario, Step};
use super::shell::Shell;
use super::trouble::Trouble;
use super::watcher::{BITE, Watcher};
use crate::vm::RESTART;

/// Between two looks at whether the user wants to stop.
const TICK: Duration = Duration::from_millis(100);
/// What comes this soon belongs to what came before.
const SETTLED: Duration = Duration::from_millis(100);
/// How much longer a console is read when something went wrong, so that the report has what follows; and how long what was
/// written before a reset may take to arrive after it.
const AFTERMATH: Duration = Duration::from_secs(1);
/// Between two lines that observers are told.
const LINES: Duration = Duration::from_millis(100);
/// Letters of such a line.
const WIDTH: usize = 200;
/// Kept of what skiff says.
const MESSAGES: usize = 64 << 10;
/// Resets that are remembered until a step asks for them.
const RESETS: usize = 16;
/// Warnings of one test; more say no more.
const WARNINGS: usize = 20;

/// What all tests of a run have in common.
pub(super) struct Surroundings<'a> {
    pub(super) observer: &'a dyn Observer,
    /// The user wants to stop.
    pub(super) stop: &'a AtomicBool,
    /// When the run began.
    pub(super) began: Instant,
}

/// A test that runs.
pub(super) struct Session<'a> {
    surroundings: &'a Surroundings<'a>,
    scenario: &'a Scenario,
    cell: &'a Cell,
    prepared: &'a Prepared,
    test: &'a TestId,
    process: Process,
    watcher: Watcher,
    start: Instant,
    steps: Vec<TimedStep>,
    /// The step that is done, and when it began.
    at: usize,
    step_began: Instant,
    /// Of a `run` step.
    shell: Option<Shell>,
    /// The last output, and the last line that observers were told.
    heard: Instant,
    told: (Instant, u64, usize),
    /// When the guest reset the machine, as far as no step has asked for it.
    resets: VecDeque<Instant>,
    trouble: Option<(Trouble, Instant)>,
    /// The number of the line that the last `wait` step found, and where in it what it found ends.
    forgiven: Option<(u64, usize)>,
    end: Option<End>,
    messages: Vec<u8>,
    warnings: Vec<Warning>,
    measures: Vec<Measure>,
}

/// Why a test is over before its last step was passed.
pub(super) enum Stop {
    Failed(String),
    Host(String),
    User,
}

impl From<Complaint> for Stop {
    fn from(complaint: Complaint) -> Self {
        match complaint {
            Complaint::Wrong(what) => Self::Failed(what),
            Complaint::Host(what) => Self::Host(what),
            Complaint::Stopped => Self::User,
        }
    }
}

impl<'a> Session<'a> {
    /// Starts the machine: `command` has its console on standard input and output, and its messages as `skiff run -v` has them
    /// on standard error.
    pub(super) fn start(
        surroundings: &'a Surroundings<'a>,
        scenario: &'a Scenario,
        cell: &'a Cell,
        test: &'a TestId,
        prepared: &'a Prepared,
        command: Command,
    ) -> std::io::Result<Self> {
        let process = Process::start(command)?;
        let start = Instant::now();
        let steps = scenario.steps.iter().map(|step| timed(step, scenario)).collect();
        surroundings.observer.event(Event::Started { test, steps: scenario.steps.len(), limit: scenario.timeout });
        Ok(Self {
            surroundings,
            scenario,
            cell,
            prepared,
            test,
            process,
            watcher: Watcher::new(scenario.rules.clone()),
            start,
            steps,
            at: 0,
            step_began: start,
            shell: None,
            heard: start,
            told: (start, 0, 0),
            resets: VecDeque::new(),
            trouble: None,
            forgiven: None,
            end: None,
            messages: Vec::new(),
            warnings: Vec::new(),
            measures: Vec::new(),
        })
    }

    /// Does all steps, and ends the machine.
    pub(super) fn run(mut self) -> Outcome {
        self.begin_step();
        let stopped = self.steps_to_the_end().err();
        let end = self.end_machine();
        let (verdict, summary) = match stopped {
            None => (Verdict::Passed, None),
            Some(Stop::Failed(what)) => (Verdict::Failed, Some(what)),
            Some(Stop::Host(what)) => (Verdict::Error, Some(what)),
            Some(Stop::User) => (Verdict::Skipped, Some("interrupted".to_owned())),
        };
        if verdict != Verdict::Passed
            && let Some(step) = self.steps.get_mut(self.at)
        {
            step.state = StepState::Failed;
            step.took = self.step_began.elapsed();
        }
        let failure = summary.map(|summary| Failure {
            summary,
            step: (self.at < self.steps.len()).then_some(self.at),
            place: self.steps.get(self.at).map(|step| step.place.clone()),
            quotes: self.watcher.quotes(),
            last_lines: self.watcher.last_lines(),
        });
        Outcome {
            test: self.test.clone(),
            verdict,
            failure,
            began: self.start - self.surroundings.began,
            took: self.start.elapsed(),
            steps: self.steps,
            warnings: self.warnings,
            measures: self.measures,
            console: self.watcher.transcript,
            messages: String::from_utf8_lossy(&self.messages).into_owned(),
            end: Some(end),
            kept: None,
        }
    }

    fn steps_to_the_end(&mut self) -> Result<(), Stop> {
        let mut settled = false;
        loop {
            self.advance(settled)?;
            self.look_for_trouble()?;
            if self.at == self.scenario.steps.len() {
                return self.last_breath();
            }
            self.check_limits()?;
            let patience = self.patience(settled);
            match self.process.hear(patience) {
                Heard::Output(bytes) => {
                    settled = false;
                    self.heard = Instant::now();
                    let at = self.start.elapsed();
                    // Line by line: what a step passes does not depend on how many came at a time.
                    for line in bytes.split_inclusive(|&byte| byte == b'\n') {
                        for bite in line.chunks(BITE) {
                            self.watcher.feed(at, bite);
                            self.advance(false)?;
                            // A panic that is expected is looked at when all of this is read.
                            if !self.is_panic_expected() {
                                self.look_for_trouble()?;
                            }
                        }
                    }
                    self.tell_line(false);
                }
                Heard::Message(bytes) => self.take_message(&bytes),
                Heard::Silence => {
                    settled = self.heard.elapsed() >= SETTLED;
                    self.tell_line(true);
                }
                Heard::End => self.take_end()?,
            }
        }
    }

    /// All steps are passed. What the machine says and does just now still counts, and so does a reset that no step asked
    /// for; it may well end, but not in trouble.
    fn last_breath(&mut self) -> Result<(), Stop> {
        let running = self.end.is_none();
        let until = Instant::now() + AFTERMATH;
        while self.end.is_none() && Instant::now() < until {
            match self.process.hear(SETTLED) {
                Heard::Output(bytes) => self.feed(&bytes),
                Heard::Message(bytes) => self.take_message(&bytes),
                Heard::Silence => break,
                Heard::End => self.take_end()?,
            }
        }
        self.watcher.finish();
        self.look_for_trouble()?;
        if self.trouble.is_some() {
            return Err(self.trouble_failure());
        }
        let reboots = self.scenario.steps.last().is_some_and(|step| is_reboot(&step.action));
        if !self.resets.is_empty() && !reboots {
            return Err(Stop::Failed("the guest reset the machine, and no step expects it".to_owned()));
        }
        match &self.end {
            Some(end) if running && !end.is_peaceful() => Err(end.unexpected(None)),
            _ => Ok(()),
        }
    }

    fn feed(&mut self, bytes: &[u8]) {
        let at = self.start.elapsed();
        bytes.chunks(BITE).for_each(|bite| self.watcher.feed(at, bite));
    }

    fn take_message(&mut self, bytes: &[u8]) {
        // A line may come in two parts; it is looked for in both.
        let from = self.messages.len().saturating_sub(RESTART.len());
        let before = count(&self.messages[from..], RESTART);
        let excess = (self.messages.len() + bytes.len()).saturating_sub(MESSAGES);
        self.messages.extend_from_slice(bytes);
        for _ in before..count(&self.messages[from..], RESTART).min(before + RESETS - self.resets.len()) {
            self.resets.push_back(Instant::now());
        }
        self.messages.drain(..excess.min(self.messages.len()));
    }

    fn take_end(&mut self) -> Result<(), Stop> {
        if self.end.is_none() {
            self.process.ends_within(AFTERMATH);
            let status = self.process.end().map_err(|error| Stop::Host(format!("the machine's process: {error}")))?;
            self.watcher.finish();
            self.end = Some(End::of(status, &self.messages));
        }
        Ok(())
    }

    fn end_machine(&mut self) -> String {
        let ended = self.end.is_some();
        // Whatever it does now, it is gone when this returns.
        let _ = self.process.end();
        let until = Instant::now() + AFTERMATH;
        while Instant::now() < until {
            match self.process.hear(SETTLED) {
                Heard::Output(bytes) => self.feed(&bytes),
                Heard::Message(bytes) => self.take_message(&bytes),
                Heard::Silence => {}
                Heard::End => break,
            }
        }
        match &self.end {
            Some(end) if ended => end.to_string(),
            _ => "stopped by the end of the test".to_owned(),
        }
    }

    fn warn(&mut self, warning: Warning) {
        if self.warnings.len() < WARNINGS {
            self.warnings.push(warning);
        }
    }

    /// Tells observers the last line, unless they know it or were told one just now.
    fn tell_line(&mut self, quiet: bool) {
        if !quiet && self.told.0.elapsed() < LINES {
            return;
        }
        let Some(line) = self.watcher.last_line() else { return };
        if (line.number, line.text.len()) != (self.told.1, self.told.2) {
            self.told = (Instant::now(), line.number, line.text.len());
            let text: String = line.text.chars().take(WIDTH).collect();
            self.surroundings.observer.event(Event::Line { test: self.test, at: line.at, text: &text });
        }
    }
}

fn is_reboot(action: &Action) -> bool {
    matches!(action, Action::Expect(Ending::Reboot))
}

fn timed(step: &Step, scenario: &Scenario) -> TimedStep {
    TimedStep {
        title: step.title.clone(),
        place: step.place.clone(),
        state: StepState::NotReached,
        began: None,
        took: Duration::ZERO,
        limit: step.timeout.unwrap_or(scenario.timeout).min(scenario.timeout),
    }
}

/// A time for a person.
pub(super) fn seconds(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds < 1.0 {
        format!("{} ms", time.as_millis())
    } else if time.subsec_millis() == 0 || seconds >= 100.0 {
        format!("{seconds:.0} s")
    } else {
        format!("{seconds:.1} s")
    }
}

fn count(bytes: &[u8], text: &str) -> usize {
    bytes.windows(text.len()).filter(|window| *window == text.as_bytes()).count()
}

#[cfg(test)]
mod tests;
