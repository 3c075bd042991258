//! How long a session waits: for its steps, for a console that says nothing, for a user who wants to stop.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{AFTERMATH, SETTLED, Session, Stop, TICK, seconds};
use crate::smoke::scenario::{Action, Ending, Step};

impl Session<'_> {
    pub(super) fn check_limits(&self) -> Result<(), Stop> {
        if self.surroundings.stop.load(Ordering::Relaxed) {
            return Err(Stop::User);
        }
        let (now, step) = (Instant::now(), &self.scenario.steps[self.at]);
        if now >= self.deadline() {
            let limit = match step.timeout {
                Some(timeout) if timeout <= self.limit(step) => seconds(timeout),
                _ => format!("the scenario's {}", seconds(self.scenario.timeout)),
            };
            return Err(match &self.trouble {
                Some(_) => self.trouble_failure(),
                None => Stop::Failed(format!("{} within {limit}{}", nothing(step), self.unheard())),
            });
        }
        let paused = matches!(step.action, Action::Pause(_));
        if self.resets.front().is_some_and(|reset| !paused && now >= *reset + AFTERMATH) {
            return Err(Stop::Failed(format!("the guest reset the machine (step: {})", step.title)));
        }
        match step.silence {
            Some(silence) if now >= self.heard.max(self.step_began) + silence.limit => {
                let (limit, unheard) = (seconds(silence.limit), self.unheard());
                let (why, remedy) = if silence.is_said {
                    ("", "")
                } else {
                    (", half of the scenario's timeout", "; if it may be, write silence = \"off\"")
                };
                let title = &step.title;
                Err(Stop::Failed(format!("the console was silent for {limit}{why}{unheard}{remedy} (step: {title})")))
            }
            _ => Ok(()),
        }
    }

    /// Why nobody hears a guest that may well run.
    fn unheard(&self) -> &'static str {
        if !self.watcher.transcript.is_empty() {
            ""
        } else if self.cell.machine.cmdline.contains("console=ttyS0") {
            "; nothing ever came from the machine"
        } else {
            "; nothing ever came from the machine, whose cmdline has no console=ttyS0"
        }
    }

    /// How long the step may take: what is left of the scenario's time, and of its own.
    pub(super) fn limit(&self, step: &Step) -> Duration {
        let left = (self.start + self.scenario.timeout).saturating_duration_since(self.step_began);
        step.timeout.map_or(left, |timeout| timeout.min(left))
    }

    pub(super) fn deadline(&self) -> Instant {
        self.step_began + self.limit(&self.scenario.steps[self.at])
    }

    /// How long to listen before looking at the limits again.
    pub(super) fn patience(&self, settled: bool) -> Duration {
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
