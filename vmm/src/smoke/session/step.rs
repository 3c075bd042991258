//! The steps of a session: what each does, and when it is passed.

use std::time::Instant;

use super::{Session, Stop, seconds};
use crate::smoke::checks::{self, Limits};
use crate::smoke::observer::Event;
use crate::smoke::pattern::Pattern;
use crate::smoke::result::{Measure, StepState, Warning};
use crate::smoke::scenario::{Action, Ending, Step};
use crate::smoke::shell::Shell;
use crate::smoke::watcher::Found;

/// What a step came to for now.
enum Progress {
    Passed,
    Waiting,
}

impl Session<'_> {
    /// Does steps until one has to wait.
    pub(super) fn advance(&mut self, settled: bool) -> Result<(), Stop> {
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
                Some(end) => Err(end.unexpected(Some(&step.title))),
            },
            Action::CheckFile { path, content } => Ok(checks::file(path, content).map(|()| Progress::Passed)?),
            Action::CheckDisk { disk, partition, check } => {
                let limits = Limits { deadline: self.step_began + self.limit(step), stop: self.surroundings.stop };
                let (image, id) = (&self.prepared.images[*disk], &self.cell.machine.disks[*disk].id);
                Ok(checks::disk(image, id, *partition, check, limits).map(|()| Progress::Passed)?)
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
        Err(end.unexpected(Some(&self.steps[self.at].title)))
    }

    pub(super) fn begin_step(&mut self) {
        self.step_began = Instant::now();
        if let Some(step) = self.steps.get_mut(self.at) {
            step.began = Some(self.step_began - self.start);
            let event = Event::StepBegan { test: self.test, step: self.at, title: &step.title };
            self.surroundings.observer.event(event);
        }
    }

    pub(super) fn pass_step(&mut self, step: &Step) {
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
}
