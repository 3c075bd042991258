//! What goes wrong in a session though no step asks: signs on the console are weighed, and forgiven where a step waited for
//! them.

use std::time::Instant;

use super::{AFTERMATH, Session, Stop};
use crate::smoke::end::End;
use crate::smoke::process::Heard;
use crate::smoke::result::Warning;
use crate::smoke::scenario::{Action, Ending};
use crate::smoke::trouble::{Trouble, Weight};

impl Session<'_> {
    /// Weighs what the console's watcher noticed.
    pub(super) fn look_for_trouble(&mut self) -> Result<(), Stop> {
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

    pub(super) fn trouble_failure(&self) -> Stop {
        let words = self.trouble.as_ref().map_or("", |trouble| &trouble.0.words);
        Stop::Failed(match self.steps.get(self.at) {
            Some(step) => format!("{words} (step: {})", step.title),
            None => format!("{words} after the last step"),
        })
    }

    pub(super) fn is_panic_expected(&self) -> bool {
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
    pub(super) fn forgive(&mut self, line: u64) {
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
}
