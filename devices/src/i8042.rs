//! The i8042 keyboard controller, as far as a machine without keyboard needs one: it resets the machine, holds gate A20
//! open, and answers its own commands, so that whoever probes it gets on at once. Accessed on vCPU threads.

use std::sync::{Mutex, PoisonError};

use crate::bus::BusDevice;
use crate::power::{PowerLine, PowerRequest};

/// Number of consecutive ports, from the data port 0x60 to the command and status port 0x64. The ports between them
/// belong to other chips and float.
pub const PORTS: u64 = 5;

const DATA: u64 = 0;
const COMMAND: u64 = 4;

// Status register.
const OUTPUT_FULL: u8 = 1 << 0;
const SYSTEM_FLAG: u8 = 1 << 2;
const LAST_WAS_COMMAND: u8 = 1 << 3;
const NOT_INHIBITED: u8 = 1 << 4;

// Commands.
const READ_COMMAND_BYTE: u8 = 0x20;
const WRITE_COMMAND_BYTE: u8 = 0x60;
const TEST_AUXILIARY: u8 = 0xa9;
const SELF_TEST: u8 = 0xaa;
const TEST_KEYBOARD: u8 = 0xab;
const READ_OUTPUT_PORT: u8 = 0xd0;
const WRITE_OUTPUT_PORT: u8 = 0xd1;
/// 0xf0 to 0xff pull those of the output port's low four lines low for 6 us whose bit is 0 in the command.
const PULSE_OUTPUT_PORT: u8 = 0xf0;

// Output port.
const NO_RESET: u8 = 1 << 0;
const GATE_A20: u8 = 1 << 1;

/// Self-test passed; a port test answers 0 for passed, and 0xff here: nothing is connected.
const SELF_TEST_PASSED: u8 = 0x55;
const NOT_CONNECTED: u8 = 0xff;

/// The controller at ports 0x60 and 0x64, without keyboard and mouse. Command 0xFE is the machine's reset, which is
/// also what the ACPI reset register writes.
pub struct I8042 {
    power: PowerLine,
    state: Mutex<State>,
}

struct State {
    /// The byte that waits to be read from the data port.
    output: Option<u8>,
    command_byte: u8,
    /// The command whose parameter the data port expects.
    parameter_of: Option<u8>,
    last_was_command: bool,
    self_tested: bool,
}

impl I8042 {
    /// A controller whose reset line is `power`.
    pub fn new(power: PowerLine) -> Self {
        let state =
            State { output: None, command_byte: 0, parameter_of: None, last_was_command: false, self_tested: false };
        Self { power, state: Mutex::new(state) }
    }

    fn reset_if_low(&self, output_port: u8) {
        if output_port & NO_RESET == 0 {
            (self.power)(PowerRequest::Reset);
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn command(&self, command: u8) {
        let mut state = self.state();
        state.last_was_command = true;
        state.parameter_of = None;
        match command {
            READ_COMMAND_BYTE => state.output = Some(state.command_byte),
            SELF_TEST => {
                state.self_tested = true;
                state.output = Some(SELF_TEST_PASSED);
            }
            TEST_KEYBOARD | TEST_AUXILIARY => state.output = Some(NOT_CONNECTED),
            READ_OUTPUT_PORT => state.output = Some(NO_RESET | GATE_A20),
            WRITE_COMMAND_BYTE | WRITE_OUTPUT_PORT => state.parameter_of = Some(command),
            PULSE_OUTPUT_PORT.. => self.reset_if_low(command),
            _ => {}
        }
    }

    /// A byte without a command before it is meant for the keyboard, which is not there.
    fn data(&self, byte: u8) {
        let mut state = self.state();
        state.last_was_command = false;
        match state.parameter_of.take() {
            Some(WRITE_COMMAND_BYTE) => state.command_byte = byte,
            Some(WRITE_OUTPUT_PORT) => self.reset_if_low(byte),
            _ => {}
        }
    }
}

impl State {
    /// The input buffer is always empty: a command is done when its write returns.
    fn status(&self) -> u8 {
        let flag = |set, bit| if set { bit } else { 0 };
        NOT_INHIBITED
            | flag(self.output.is_some(), OUTPUT_FULL)
            | flag(self.self_tested, SYSTEM_FLAG)
            | flag(self.last_was_command, LAST_WAS_COMMAND)
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let Some(byte) = data.first_mut() else { return };
        match offset {
            DATA => *byte = self.state().output.take().unwrap_or(0),
            COMMAND => *byte = self.state().status(),
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data.first()) {
            (DATA, Some(byte)) => self.data(*byte),
            (COMMAND, Some(byte)) => self.command(*byte),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;

    fn controller() -> (I8042, Arc<Mutex<Vec<PowerRequest>>>) {
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = requests.clone();
        (I8042::new(Arc::new(move |request| seen.lock().unwrap().push(request))), requests)
    }

    fn get(device: &I8042, offset: u64) -> u8 {
        let mut data = [0xee];
        device.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn command_fe_resets() {
        let (device, requests) = controller();
        for harmless in [0xae, 0xd1, 0xff, 0xf1] {
            device.write(COMMAND, &[harmless]);
        }
        device.write(DATA, &[0xfe]);
        assert!(requests.lock().unwrap().is_empty());
        device.write(COMMAND, &[0xfe]);
        assert_eq!(*requests.lock().unwrap(), [PowerRequest::Reset]);
    }

    #[test]
    fn the_output_port_resets_when_bit_0_goes_low() {
        let (device, requests) = controller();
        device.write(COMMAND, &[0xd1]);
        device.write(DATA, &[0xdf]); // A20 on
        device.write(COMMAND, &[0xd1]);
        assert!(requests.lock().unwrap().is_empty());
        device.write(DATA, &[0xfe]);
        assert_eq!(*requests.lock().unwrap(), [PowerRequest::Reset]);
    }

    #[test]
    fn the_status_never_makes_anyone_wait() {
        let (device, _) = controller();
        for command in 0..=0xfd {
            device.write(COMMAND, &[command]);
            assert_eq!(get(&device, COMMAND) & 0x02, 0, "input buffer empty after {command:#x}");
            get(&device, DATA);
            assert_eq!(get(&device, COMMAND) & 0x01, 0, "output buffer empty after {command:#x}");
        }
    }

    #[test]
    fn self_test_and_command_byte_answer() {
        let (device, _) = controller();
        device.write(COMMAND, &[0xaa]);
        assert_eq!(get(&device, COMMAND) & 0x05, 0x05);
        assert_eq!(get(&device, DATA), 0x55);
        device.write(COMMAND, &[0x60]);
        device.write(DATA, &[0x65]);
        device.write(COMMAND, &[0x20]);
        assert_eq!(get(&device, DATA), 0x65);
    }

    proptest! {
        #[test]
        fn any_access_is_survived(accesses: Vec<(bool, u8, u64)>) {
            let (device, _) = controller();
            for (read, width, value) in accesses {
                let width = usize::from(width % 9);
                let offset = value % PORTS;
                if read {
                    device.read(offset, &mut [0; 8][..width]);
                } else {
                    device.write(offset, &value.to_le_bytes()[..width]);
                }
            }
        }
    }
}
