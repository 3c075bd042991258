//! What COM1 is connected to: for now standard output, byte by byte.

use std::io::{self, Write};
use std::sync::Arc;

use devices::serial::{Serial, SerialOutput};
use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use crate::config::SerialConfig;

/// What a key asks for.
pub enum ConsoleAction {
    /// End the machine.
    Quit,
    /// Press the power button.
    PowerButton,
}

/// The host's end of COM1.
pub struct Console;

struct Output;

impl SerialOutput for Output {
    fn put(&self, byte: u8) {
        let mut out = io::stdout().lock();
        let _ = out.write_all(&[byte]).and_then(|()| out.flush());
    }

    fn release(&self) {}
}

struct NoInput;

impl MutEventSubscriber for NoInput {
    fn init(&mut self, _: &mut EventOps) {}

    fn process(&mut self, _: Events, _: &mut EventOps) {}
}

impl Console {
    /// Opens what `_config` names.
    pub fn open(_config: &SerialConfig) -> io::Result<Self> {
        Ok(Self)
    }

    /// Where the port's bytes go.
    pub fn output(&self) -> Arc<dyn SerialOutput> {
        Arc::new(Output)
    }

    /// Told when the port can receive again.
    pub fn room(&self) -> io::Result<EventFd> {
        EventFd::new(0)
    }

    /// Connects the port of a machine.
    pub fn connect(&self, _serial: Arc<Serial>) {}

    /// Disconnects it.
    pub fn disconnect(&self) {}

    /// The handler of keys.
    pub fn input(&self, _on_key: impl Fn(ConsoleAction) + 'static) -> Box<dyn MutEventSubscriber> {
        Box::new(NoInput)
    }
}
