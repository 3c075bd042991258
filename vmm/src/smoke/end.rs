//! How a machine's process ended, understood from its exit code and its last message. Any thread.

use std::fmt;
use std::process::ExitStatus;

use super::scenario::Ending;
use super::session::Stop;
use crate::exit::{self, ExitReason};

/// The end of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// With a reason of the machine's own: skiff's words, and its exit code.
    Ended { reason: String, code: u8 },
    /// The host could not run it, or not any longer.
    Broken(String),
    /// By us.
    Stopped(String),
}

impl End {
    /// What `status` and the `messages` say.
    pub(super) fn of(status: ExitStatus, messages: &[u8]) -> Self {
        let messages = String::from_utf8_lossy(messages);
        let last = messages.lines().rev().find(|line| !line.is_empty()).unwrap_or("it said nothing");
        let Some(code) = status.code() else { return Self::Broken(format!("skiff was killed ({status}); {last}")) };
        // "skiff: warning: the guest kernel panicked; exit code 4", as `skiff run` has it.
        let said = last.strip_suffix(&format!("; exit code {code}"));
        let Some(said) = said else { return Self::Broken(without_prefix(last).to_owned()) };
        let code = u8::try_from(code).unwrap_or(exit::FAILED_START);
        let reason = without_prefix(said).to_owned();
        if reason == ExitReason::KvmError.to_string() {
            Self::kvm(&messages, &reason)
        } else {
            Self::Ended { reason, code }
        }
    }

    /// KVM gave up: what it could not do is in an error before.
    fn kvm(messages: &str, reason: &str) -> Self {
        let error = messages.lines().rev().find(|line| line.contains("error: "));
        Self::Broken(error.map_or(reason, without_prefix).to_owned())
    }

    /// Whether it is what was wanted.
    pub(super) fn is(&self, ending: Ending) -> bool {
        let wanted =
            |reason: ExitReason| matches!(self, Self::Ended { reason: said, .. } if *said == reason.to_string());
        match ending {
            Ending::Poweroff => wanted(ExitReason::Poweroff),
            Ending::Reboot => wanted(ExitReason::Reset),
            Ending::Panic => wanted(ExitReason::Panic),
            Ending::TripleFault => wanted(ExitReason::TripleFault),
            Ending::Code(code) => match self {
                Self::Ended { code: other, .. } => *other == code,
                Self::Broken(_) | Self::Stopped(_) => false,
            },
        }
    }

    /// Whether a guest that has done all it should may end so: it powered off, or wrote to the debug exit port.
    pub(super) fn is_peaceful(&self) -> bool {
        let bad = [Ending::Reboot, Ending::Panic, Ending::TripleFault];
        matches!(self, Self::Ended { .. }) && !bad.iter().any(|ending| self.is(*ending))
    }

    /// It came during `step`, which does not want it; `None`: after all of them.
    pub(super) fn unexpected(&self, step: Option<&str>) -> Stop {
        match (self, step) {
            (Self::Broken(what), _) => Stop::Host(what.clone()),
            (_, Some(step)) => Stop::Failed(format!("{self} (step: {step})")),
            (_, None) => Stop::Failed(format!("{self} after the last step")),
        }
    }
}

fn without_prefix(line: &str) -> &str {
    let line = line.strip_prefix("skiff: ").unwrap_or(line);
    ["warning: ", "error: "].iter().find_map(|level| line.strip_prefix(level)).unwrap_or(line)
}

impl fmt::Display for End {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ended { reason, code: 0 } => out.write_str(reason),
            Self::Ended { reason, code } => write!(out, "{reason} (exit code {code})"),
            Self::Broken(what) | Self::Stopped(what) => out.write_str(what),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    fn end(code: i32, messages: &str) -> End {
        End::of(ExitStatus::from_raw(code << 8), messages.as_bytes())
    }

    #[test]
    fn ends_are_told_apart() {
        let poweroff = end(0, "skiff: disk disk0: aio=threads\nskiff: the guest powered off; exit code 0\n");
        let reset = end(0, "skiff: the guest reset the machine; exit code 0\n");
        let panic = end(4, "skiff: warning: the guest kernel panicked; exit code 4\n");
        let fault = end(6, "skiff: warning: triple fault; exit code 6\n");
        let exit = end(33, "skiff: the guest wrote 0x10 to the debug exit port; exit code 33\n");
        let zero = end(1, "skiff: the guest wrote 0x0 to the debug exit port; exit code 1\n");
        let endings =
            [Ending::Poweroff, Ending::Reboot, Ending::Panic, Ending::TripleFault, Ending::Code(33), Ending::Code(1)];
        for (at, end) in [poweroff, reset, panic, fault, exit, zero].iter().enumerate() {
            for (other, ending) in endings.iter().enumerate() {
                assert_eq!(end.is(*ending), at == other, "{end} {ending:?}");
            }
        }
        assert!(end(0, "skiff: the guest powered off; exit code 0\n").is(Ending::Code(0)));
    }

    #[test]
    fn what_the_host_could_not() {
        for (code, messages, what) in [
            (1, "skiff: /dev/kvm: no such file; load the module\n", "/dev/kvm: no such file; load the module"),
            (134, "a bug\n", "a bug"),
            (
                8,
                "skiff: error: vCPU 0: KVM stopped on x\nskiff: warning: KVM cannot go on with this guest; exit code 8\n",
                "vCPU 0: KVM stopped on x",
            ),
        ] {
            assert_eq!(end(code, messages), End::Broken(what.to_owned()));
        }
        let killed = End::of(ExitStatus::from_raw(9), b"");
        assert_eq!(killed.to_string(), "skiff was killed (signal: 9 (SIGKILL)); it said nothing");
    }
}
