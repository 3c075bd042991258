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
    /// What was raised through vectors that are no longer attached.
    raised: Vec<(u32, MsiMessage)>,
    calls: usize,
    failing: bool,
}

impl MsiTable {
    /// The interrupts raised since the last call: those of vectors detached meanwhile, then by GSI.
    pub(crate) fn raised(&self) -> Vec<(u32, MsiMessage)> {
        let mut state = self.state.lock().unwrap();
        let mut raised = std::mem::take(&mut state.raised);
        let attached = state.attached.iter().filter(|(_, (_, event))| event.read().is_ok());
        raised.extend(attached.map(|(&gsi, &(message, _))| (gsi, message)));
        raised
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
        if let Some((message, event)) = state.attached.remove(&gsi)
            && event.read().is_ok()
        {
            state.raised.push((gsi, message));
        }
        Ok(())
    }
}
