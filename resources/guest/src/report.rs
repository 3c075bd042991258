//! What the guest says: lines on COM1, a verdict on the debug exit port.

use core::fmt::{self, Display, Write};
use core::sync::atomic::{AtomicU16, Ordering};

use crate::cpu::{port_in, port_out};

/// Written to the exit port when every check passed: 33 as exit code. lib.rs has the same numbers for the host.
pub(crate) const PASSED: u32 = 0x10;
/// Written to the exit port when not: 35 as exit code.
pub(crate) const FAILED: u32 = 0x11;

const COM1: u16 = 0x3f8;
const FIFO_BYTES: usize = 16;
static EXIT_PORT: AtomicU16 = AtomicU16::new(0x501);

/// Why a check did not pass.
pub(crate) enum Failure {
    /// Something has another value than it must have.
    Unequal { what: &'static str, got: u64, wanted: u64 },
    /// Something is not as it must be.
    Wrong(&'static str),
    /// The machine has not got what the check needs.
    Skip(&'static str),
}

/// What a check, or a step of it, comes to.
pub(crate) type Outcome<T = ()> = Result<T, Failure>;

/// `what` must be `wanted`.
pub(crate) fn equal(what: &'static str, got: impl Into<u64>, wanted: impl Into<u64>) -> Outcome {
    let (got, wanted) = (got.into(), wanted.into());
    if got == wanted { Ok(()) } else { Err(Failure::Unequal { what, got, wanted }) }
}

/// `what`, an assertion in words, must hold.
pub(crate) fn holds(what: &'static str, so: bool) -> Outcome {
    if so { Ok(()) } else { Err(Failure::Wrong(what)) }
}

impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unequal { what, got, wanted } => write!(f, "{what} is {got:#x}, not {wanted:#x}"),
            Self::Wrong(what) => write!(f, "not so: {what}"),
            Self::Skip(why) => write!(f, "needs {why}"),
        }
    }
}

struct Com1;

impl Write for Com1 {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for chunk in text.as_bytes().chunks(FIFO_BYTES) {
            // Line status: the transmitter holding register and with it the FIFO is empty.
            while port_in::<u8>(COM1 + 5) & 0x20 == 0 {}
            for byte in chunk {
                port_out(COM1, *byte);
            }
        }
        Ok(())
    }
}

/// Sets COM1 to 115200 baud, 8 bits, FIFO on, no interrupts; asks for input (DTR, RTS).
pub(crate) fn init() {
    for (register, value) in [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 3), (2, 7), (4, 3)] {
        port_out::<u8>(COM1 + register, value);
    }
}

/// Prints on COM1.
pub(crate) fn print(arguments: fmt::Arguments<'_>) {
    // COM1 itself cannot fail, and an argument whose Display fails has printed what it could.
    let _ = Com1.write_fmt(arguments);
}

/// Waits until the host has sent a line to COM1; `false` if that takes too long.
pub(crate) fn wait_for_line() -> bool {
    crate::cpu::wait_until(|| {
        // Line status: data is ready.
        port_in::<u8>(COM1 + 5) & 1 != 0 && port_in::<u8>(COM1) == b'\n'
    })
}

/// Waits, for ever, until the host has sent a line to COM1: its first letters, as many as fit.
pub(crate) fn read_line(line: &mut [u8]) -> &str {
    let mut length = 0;
    loop {
        while port_in::<u8>(COM1 + 5) & 1 == 0 {}
        let byte = port_in::<u8>(COM1);
        if byte == b'\n' {
            return core::str::from_utf8(&line[..length]).unwrap_or("");
        }
        if length < line.len() {
            line[length] = byte;
            length += 1;
        }
    }
}

macro_rules! println {
    ($($argument:tt)*) => { $crate::report::print(format_args!("{}\n", format_args!($($argument)*))) };
}
pub(crate) use println;

/// Where the verdict goes.
pub(crate) fn set_exit_port(port: u16) {
    EXIT_PORT.store(port, Ordering::Relaxed);
}

/// Ends the machine with `value` on the exit port.
pub(crate) fn exit(value: u32) -> ! {
    port_out(EXIT_PORT.load(Ordering::Relaxed), value);
    println!("# nothing answers at the exit port");
    loop {
        crate::cpu::sleep(crate::cpu::interrupts_seen());
    }
}
