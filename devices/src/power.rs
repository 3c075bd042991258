//! How devices ask the machine to change its power state. Raised on vCPU threads, answered by the main thread.

use std::sync::Arc;

/// What a guest asked of the whole machine through one of its devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerRequest {
    /// ACPI S5.
    Poweroff,
    /// Reset line of the i8042 or the ACPI reset register.
    Reset,
    /// The guest kernel says through pvpanic that it panicked.
    Panic,
    /// A value written to the debug exit port.
    DebugExit(u32),
}

/// Delivers a [`PowerRequest`]. Callable from any thread, returns at once; the first request decides.
pub type PowerLine = Arc<dyn Fn(PowerRequest) + Send + Sync>;
