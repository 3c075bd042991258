//! One test: a machine is started, the steps are done one after the other, and whatever else happens is noticed. On a thread
//! of its own, with which the machine ends.

use std::collections::VecDeque;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::checks::{self, Complaint};
use super::disks::Prepared;
use super::end::End;
use super::observer::{Event, Observer};
use super::pattern::Pattern;
use super::process::{Heard, Process};
use super::result::{Failure, Measure, Outcome, StepState, TestId, TimedStep, Verdict, Warning};
use super::scenario::{Action, Cell, Ending, Scenario, Step};
use super::shell::Shell;
use super::trouble::{Trouble, Weight};
use super::watcher::{BITE, Found, Watcher};
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
        }
    }
}

/// What a step came to for now.
enum Progress {
    Passed,
    Waiting,
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
            Some(end) if running && !end.is_peaceful() => Err(end.unexpected("none, all were passed")),
            _ => Ok(()),
        }
    }

    fn feed(&mut self, bytes: &[u8]) {
        let at = self.start.elapsed();
        bytes.chunks(BITE).for_each(|bite| self.watcher.feed(at, bite));
    }

    /// Does steps until one has to wait.
    fn advance(&mut self, settled: bool) -> Result<(), Stop> {
        while let Some(step) = self.scenario.steps.get(self.at) {
            // After trouble nothing is done any more.
            if self.trouble.is_some() {
                return Ok(());
            }
            match self.attempt(step, settled)? {
                Progress::Passed => self.pass_step(step),
                Progress::Waiting => return Ok(()),
            }
        }
        Ok(())
    }

    fn attempt(&mut self, step: &Step, settled: bool) -> Result<Progress, Stop> {
        let passed = |passed| Ok(if passed { Progress::Passed } else { Progress::Waiting });
        match &step.action {
            Action::Wait(pattern) => self.attempt_wait(pattern, settled),
            Action::Send(bytes) => self.send(bytes).map(|()| Progress::Passed),
            Action::Run { command, status, output } => self.attempt_run(command, *status, output.as_ref()),
            Action::Pause(time) => {
                self.must_run()?;
                passed(self.step_began.elapsed() >= *time)
            }
            Action::PowerButton => {
                self.must_run()?;
                self.process.terminate().map_err(|error| Stop::Host(format!("no signal to the machine: {error}")))?;
                Ok(Progress::Passed)
            }
            Action::Expect(Ending::Reboot) if self.resets.pop_front().is_some() => Ok(Progress::Passed),
            Action::Expect(ending) => match &self.end {
                None => Ok(Progress::Waiting),
                Some(end) if end.is(*ending) => Ok(Progress::Passed),
                Some(end) => Err(end.unexpected(&step.title)),
            },
            Action::CheckFile { path, content } => Ok(checks::file(path, content).map(|()| Progress::Passed)?),
            Action::CheckDisk { disk, check } => {
                let deadline = self.step_began + self.limit(step);
                let (image, id) = (&self.prepared.images[*disk], &self.cell.machine.disks[*disk].id);
                Ok(checks::disk(image, id, check, deadline).map(|()| Progress::Passed)?)
            }
        }
    }

    fn attempt_wait(&mut self, pattern: &Pattern, settled: bool) -> Result<Progress, Stop> {
        match self.watcher.find(pattern, settled || self.end.is_some()) {
            Found::Here(line) => {
                self.forgive(line);
                Ok(Progress::Passed)
            }
            Found::Perhaps => Ok(Progress::Waiting),
            Found::Nowhere => self.must_run().map(|()| Progress::Waiting),
        }
    }

    fn attempt_run(&mut self, command: &str, status: Option<u8>, output: Option<&Pattern>) -> Result<Progress, Stop> {
        let Some(shell) = &mut self.shell else {
            let shell = Shell::new(command);
            self.send(shell.input().as_bytes())?;
            self.shell = Some(shell);
            return self.attempt_run(command, status, output);
        };
        while let Some(line) = self.watcher.next_line() {
            let Some(ended) = shell.take(&line.text) else { continue };
            let text = shell.output();
            self.shell = None;
            return match (status, output) {
                (Some(wanted), _) if wanted != ended => {
                    Err(Stop::Failed(format!("{command:?} ended with {ended}, not {wanted}; it said {text:?}")))
                }
                (_, Some(pattern)) if !pattern.is_in(&text) => {
                    Err(Stop::Failed(format!("{command:?} said {text:?}, and no {pattern}")))
                }
                _ => Ok(Progress::Passed),
            };
        }
        self.must_run().map(|()| Progress::Waiting)
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), Stop> {
        self.must_run()?;
        let left = self.deadline().saturating_duration_since(Instant::now());
        match self.process.send(bytes, left) {
            // If it is gone, its end is heard next.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            Err(_) => Err(Stop::Failed("the machine takes no input".to_owned())),
            Ok(()) => Ok(()),
        }
    }

    /// The machine has ended, and the step needs one that runs.
    fn must_run(&self) -> Result<(), Stop> {
        let Some(end) = &self.end else { return Ok(()) };
        Err(end.unexpected(&self.steps[self.at].title))
    }

    fn begin_step(&mut self) {
        self.step_began = Instant::now();
        if let Some(step) = self.steps.get_mut(self.at) {
            step.began = Some(self.step_began - self.start);
            let event = Event::StepBegan { test: self.test, step: self.at, title: &step.title };
            self.surroundings.observer.event(event);
        }
    }

    fn pass_step(&mut self, step: &Step) {
        let took = self.step_began.elapsed();
        self.steps[self.at].state = StepState::Passed;
        self.steps[self.at].took = took;
        if let Some(measuring) = &step.measure {
            let value = if measuring.since_step { took } else { self.start.elapsed() };
            if let Some(max) = measuring.max.filter(|max| value > *max) {
                let text = format!("{} took {}, more than {}", measuring.name, seconds(value), seconds(max));
                self.warn(Warning { text, quote: None });
            }
            self.measures.push(Measure { name: measuring.name.clone(), value, max: measuring.max });
        }
        self.surroundings.observer.event(Event::StepEnded { test: self.test, step: self.at, took });
        self.at += 1;
        self.begin_step();
    }

    /// Weighs what the console's watcher noticed.
    fn look_for_trouble(&mut self) -> Result<(), Stop> {
        while let Some((trouble, line)) = self.watcher.next_trouble() {
            if trouble.weight == Weight::Warn {
                self.warn(Warning { text: trouble.words, quote: Some(line) });
            } else if self.is_panic_expected() && !trouble.denied {
                self.watcher.forgive();
                if trouble.panic {
                    self.pass_panic();
                }
            } else if self.is_forgiven(&trouble, line.number) {
                // The step looked at its begin, and now the rest is there.
                self.watcher.forgive();
            } else if self.trouble.is_none() {
                self.trouble = Some((trouble, Instant::now() + AFTERMATH));
            }
        }
        match &self.trouble {
            Some((_, until)) if *until <= Instant::now() || self.end.is_some() => Err(self.trouble_failure()),
            _ => Ok(()),
        }
    }

    fn trouble_failure(&self) -> Stop {
        let words = self.trouble.as_ref().map_or("", |trouble| &trouble.0.words);
        Stop::Failed(match self.steps.get(self.at) {
            Some(step) => format!("{words} (step: {})", step.title),
            None => words.to_owned(),
        })
    }

    fn is_panic_expected(&self) -> bool {
        let step = self.scenario.steps.get(self.at);
        step.is_some_and(|step| matches!(step.action, Action::Expect(Ending::Panic)))
    }

    /// The console says that the kernel panicked, and that is what is expected. It may say more, but it will not go on.
    fn pass_panic(&mut self) {
        let until = Instant::now() + AFTERMATH;
        while self.end.is_none() && self.resets.is_empty() && Instant::now() < until {
            let left = until.saturating_duration_since(Instant::now());
            match self.process.hear(left) {
                Heard::Output(bytes) => self.feed(&bytes),
                Heard::Message(bytes) => self.take_message(&bytes),
                Heard::End | Heard::Silence => break,
            }
        }
        self.resets.clear();
        self.end = Some(End::Stopped("stopped after the kernel's panic".to_owned()));
        // What a dying kernel says belongs to it.
        let mut others = Vec::new();
        while let Some(other) = self.watcher.next_trouble() {
            others.extend(other.0.denied.then_some(other));
        }
        self.watcher.remember(others);
        // It is looked at when all of its memory is gone.
        let _ = self.process.end();
        if let Some(step) = self.scenario.steps.get(self.at) {
            self.pass_step(step);
        }
    }

    /// Whether a step waited for this sign of trouble, or for what follows it in its line. What comes behind a prompt is none
    /// of that, though it is in its line.
    fn is_forgiven(&self, trouble: &Trouble, number: u64) -> bool {
        self.forgiven.is_some_and(|(line, end)| number == line && trouble.at < end)
    }

    /// The step waited for this line, so it is no trouble, unless a panic is what comes next.
    fn forgive(&mut self, line: u64) {
        self.forgiven = Some((line, self.watcher.found_end()));
        let mut others = Vec::new();
        while let Some((trouble, at)) = self.watcher.next_trouble() {
            let next = self.scenario.steps.get(self.at + 1);
            let is_next = next.is_some_and(|step| matches!(step.action, Action::Expect(Ending::Panic)));
            if !self.is_forgiven(&trouble, at.number) || trouble.panic && is_next {
                others.push((trouble, at));
            } else {
                self.watcher.forgive();
            }
        }
        self.watcher.remember(others);
    }

    fn check_limits(&self) -> Result<(), Stop> {
        if self.surroundings.stop.load(Ordering::Relaxed) {
            return Err(Stop::User);
        }
        let (now, step) = (Instant::now(), &self.scenario.steps[self.at]);
        if now >= self.deadline() {
            let limit = seconds(self.limit(step));
            return Err(match &self.trouble {
                Some(_) => self.trouble_failure(),
                None => Stop::Failed(format!("{} within {limit}", nothing(step))),
            });
        }
        let paused = matches!(step.action, Action::Pause(_));
        if self.resets.front().is_some_and(|reset| !paused && now >= *reset + AFTERMATH) {
            return Err(Stop::Failed(format!("the guest reset the machine (step: {})", step.title)));
        }
        match self.scenario.silence {
            Some(silence) if !paused && now >= self.heard.max(self.step_began) + silence => {
                let silence = seconds(silence);
                Err(Stop::Failed(format!("the console was silent for {silence} (step: {})", step.title)))
            }
            _ => Ok(()),
        }
    }

    /// How long the step may take: what is left of the scenario's time, and of its own.
    fn limit(&self, step: &Step) -> Duration {
        let left = (self.start + self.scenario.timeout).saturating_duration_since(self.step_began);
        step.timeout.map_or(left, |timeout| timeout.min(left))
    }

    fn deadline(&self) -> Instant {
        self.step_began + self.limit(&self.scenario.steps[self.at])
    }

    /// How long to listen before looking at the limits again.
    fn patience(&self, settled: bool) -> Duration {
        let now = Instant::now();
        let mut until = self.deadline().min(now + TICK);
        if !settled {
            until = until.min(self.heard.max(now) + SETTLED);
        }
        if let Action::Pause(time) = self.scenario.steps[self.at].action {
            until = until.min(self.step_began + time);
        }
        until.saturating_duration_since(now).max(Duration::from_millis(1))
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

fn is_reboot(action: &Action) -> bool {
    matches!(action, Action::Expect(Ending::Reboot))
}

/// What did not happen in time.
fn nothing(step: &Step) -> String {
    match &step.action {
        Action::Wait(pattern) => format!("no {pattern}"),
        Action::Run { command, .. } => format!("{command:?} did not end"),
        Action::Expect(Ending::Poweroff) => "no poweroff".to_owned(),
        Action::Expect(Ending::Reboot) => "no reboot".to_owned(),
        Action::Expect(Ending::Panic) => "no panic".to_owned(),
        Action::Expect(Ending::TripleFault) => "no triple fault".to_owned(),
        Action::Expect(Ending::Code(code)) => format!("no end with exit code {code}"),
        _ => format!("no end of step {}", step.title),
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
