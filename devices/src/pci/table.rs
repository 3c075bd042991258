//! An [`MsiRouter`] over a table, for tests: it shows what is attached, counts calls, and receives interrupts.

use std::collections::BTreeMap;
use std::io;
use std::sync::Mutex;

use vmm_sys_util::eventfd::EventFd;

use super::msix::{MsiMessage, MsiRouter};

#[derive(Default)]
pub(crate) struct MsiTable {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    attached: BTreeMap<u32, (MsiMessage, EventFd)>,
    calls: usize,
    failing: bool,
}

impl MsiTable {
    /// The interrupts raised since the last call, in the order of their GSIs.
    pub(crate) fn raised(&self) -> Vec<(u32, MsiMessage)> {
        let state = self.state.lock().unwrap();
        let raised = state.attached.iter().filter(|(_, (_, event))| event.read().is_ok());
        raised.map(|(&gsi, &(message, _))| (gsi, message)).collect()
    }

    /// What is attached now.
    pub(crate) fn attached(&self) -> Vec<(u32, MsiMessage)> {
        self.state.lock().unwrap().attached.iter().map(|(&gsi, &(message, _))| (gsi, message)).collect()
    }

    /// Calls since the last time this was asked.
    pub(crate) fn calls(&self) -> usize {
        std::mem::take(&mut self.state.lock().unwrap().calls)
    }

    /// From now on every call fails, or no longer.
    pub(crate) fn fail(&self, failing: bool) {
        self.state.lock().unwrap().failing = failing;
    }
}

impl MsiRouter for MsiTable {
    fn set(&self, gsi: u32, message: MsiMessage, event: &EventFd) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        state.calls += 1;
        if state.failing {
            return Err(io::Error::other("the table is told to fail"));
        }
        state.attached.insert(gsi, (message, event.try_clone()?));
        Ok(())
    }

    fn clear(&self, gsi: u32, _event: &EventFd) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        state.calls += 1;
        if state.failing {
            return Err(io::Error::other("the table is told to fail"));
        }
        state.attached.remove(&gsi);
        Ok(())
    }
}
