//! How a machine can end, and the exit code that tells. Decided on the main thread.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Why a machine that had started stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest powered itself off.
    Poweroff,
    /// The guest reset the machine, and `--no-reboot` was given.
    Reset,
    /// `Ctrl-A x` on the console.
    Quit,
    /// The guest kernel reported a panic through pvpanic.
    Panic,
    /// A vCPU could not deliver an exception, nor the double fault.
    TripleFault,
    /// KVM_EXIT_INTERNAL_ERROR or KVM_EXIT_FAIL_ENTRY: KVM cannot go on with this guest.
    KvmError,
    /// A second signal, or the end of the grace period after the first.
    Forced,
    /// The guest wrote this value to the debug exit port.
    DebugExit(u32),
}

/// The exit code when the machine did not start.
pub const FAILED_START: u8 = 1;

/// The exit code for flags or a configuration file that make no machine.
pub const USAGE: u8 = 2;

/// Every exit code of `skiff run` and what it means; the help and the man page are made from this. All but 1 are even,
/// so that none is one of the debug exit port's, which are odd.
pub const CODES: [(&str, &str); 9] = [
    ("0", "the guest powered off, or reset with --no-reboot, or Ctrl-A x was typed"),
    ("1", "the machine did not start"),
    ("2", "usage: the flags or the configuration file make no machine"),
    ("4", "the guest kernel panicked (it said so through pvpanic)"),
    ("6", "triple fault"),
    ("8", "KVM cannot go on: an internal error or a failed entry"),
    ("10", "stopped by force: a second signal, or the grace period ran out"),
    ("odd", "(v << 1) | 1 for a value v written to the debug exit port, modulo 256"),
    ("134", "a bug in skiff: it aborted with a message"),
];

impl ExitReason {
    /// The exit code of the process.
    pub fn code(self) -> u8 {
        match self {
            Self::Poweroff | Self::Reset | Self::Quit => 0,
            Self::Panic => 4,
            Self::TripleFault => 6,
            Self::KvmError => 8,
            Self::Forced => 10,
            Self::DebugExit(value) => devices::debug_exit::exit_status(value),
        }
    }
}

impl std::fmt::Display for ExitReason {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Poweroff => out.write_str("the guest powered off"),
            Self::Reset => out.write_str("the guest reset the machine"),
            Self::Quit => out.write_str("ended from the console"),
            Self::Panic => out.write_str("the guest kernel panicked"),
            Self::TripleFault => out.write_str("triple fault"),
            Self::KvmError => out.write_str("KVM cannot go on with this guest"),
            Self::Forced => out.write_str("stopped by force"),
            Self::DebugExit(value) => write!(out, "the guest wrote {value:#x} to the debug exit port"),
        }
    }
}

/// Where any thread announces that the machine has ended. The first reason counts; the main thread waits on the eventfd.
#[derive(Debug)]
pub struct ExitLine {
    reason: Mutex<Option<ExitReason>>,
    raised: AtomicBool,
    forced: Arc<AtomicBool>,
    event: EventFd,
}

impl ExitLine {
    /// A line on which nothing was announced.
    ///
    /// # Errors
    /// If the host gives no eventfd.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        Ok(Self { reason: Mutex::default(), raised: AtomicBool::new(false), forced: Arc::default(), event })
    }

    /// Announces the end. Returns at once. If another reason was announced before, that counts; but who wants the end at once is
    /// heard all the same, and no machine is started again for a guest that was to end from the console.
    pub fn raise(&self, reason: ExitReason) {
        let mut first = self.lock();
        if reason == ExitReason::Quit && *first == Some(ExitReason::Reset) {
            *first = Some(reason);
        }
        first.get_or_insert(reason);
        drop(first);
        if matches!(reason, ExitReason::Forced | ExitReason::Quit) {
            self.forced.store(true, Ordering::Release);
        }
        self.raised.store(true, Ordering::Release);
        // Fails only if the counter is full, and then it is readable.
        let _ = self.event.write(1);
    }

    /// Whether the end was announced. One load: asked before every entry into the guest.
    pub fn is_raised(&self) -> bool {
        self.raised.load(Ordering::Acquire)
    }

    /// Whether somebody wants the machine to end at once ([`ExitReason::Forced`], [`ExitReason::Quit`]): for devices that could
    /// still finish something. There is no machine after that.
    pub fn forced(&self) -> &Arc<AtomicBool> {
        &self.forced
    }

    /// The reason, and the line is as new: for the next machine, when all threads of this one are gone.
    pub fn take(&self) -> Option<ExitReason> {
        let _ = self.event.read();
        self.raised.store(false, Ordering::Release);
        self.lock().take()
    }

    /// Readable when the end was announced.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    fn lock(&self) -> MutexGuard<'_, Option<ExitReason>> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_of_the_table() {
        let all = [
            (ExitReason::Poweroff, "0"),
            (ExitReason::Reset, "0"),
            (ExitReason::Quit, "0"),
            (ExitReason::Panic, "4"),
            (ExitReason::TripleFault, "6"),
            (ExitReason::KvmError, "8"),
            (ExitReason::Forced, "10"),
        ];
        for (reason, code) in all {
            assert_eq!(reason.code().to_string(), code, "{reason}");
            assert!(CODES.iter().any(|row| row.0 == code), "{reason} is not in the table");
        }
    }

    #[test]
    fn the_first_reason_counts_and_haste_is_heard() {
        use ExitReason::{Forced, Poweroff, Quit, Reset};
        for (reasons, told, forced) in [
            ([Poweroff, Reset], Poweroff, false),
            ([Poweroff, Forced], Poweroff, true),
            ([Reset, Forced], Reset, true),
            ([Forced, Poweroff], Forced, true),
            ([Poweroff, Quit], Poweroff, true),
            ([Reset, Quit], Quit, true),
            ([Quit, Reset], Quit, true),
        ] {
            let line = ExitLine::new().unwrap();
            for reason in reasons {
                line.raise(reason);
            }
            assert_eq!((line.take(), line.forced().load(Ordering::Acquire)), (Some(told), forced), "{reasons:?}");
        }
    }

    #[test]
    fn the_debug_exit_port_has_the_odd_codes() {
        // QEMU, hw/misc/debugexit.c: exit((val << 1) | 1).
        for (value, code) in [(0, 1), (0x10, 33), (0x31, 99), (0x7f, 255), (0x80, 1), (u32::MAX, 255)] {
            assert_eq!(ExitReason::DebugExit(value).code(), code);
        }
    }
}
