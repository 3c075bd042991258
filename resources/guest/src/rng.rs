//! A virtio entropy driver (virtio 1.2, 5.4).

use crate::cpu;
use crate::cpu::Mmio;
use crate::memory;
use crate::pci::Function;
use crate::report::{Outcome, equal, holds};
use crate::virtio::{Device, Options};
use crate::virtqueue::{Buffer, Virtqueue};

/// An entropy device that runs.
pub(crate) struct Rng {
    queue: Virtqueue,
}

impl Rng {
    /// Resets and starts the device behind `function`.
    pub(crate) fn open(function: Function, options: &Options) -> Outcome<Self> {
        let device = Device::find(function)?;
        let features = device.begin(options)?;
        let queue = device.queue(0, features, options)?;
        device.start()?;
        Ok(Self { queue })
    }

    /// Asks for `bytes` bytes; how many came, and where they are.
    pub(crate) fn bytes(&mut self, bytes: u32) -> Outcome<(Mmio, u32)> {
        let buffer = memory::allocate(bytes.into());
        let head = self.queue.add(&[Buffer { address: buffer.0, bytes, writable: true }]);
        self.queue.kick();
        let mut used = None;
        cpu::wait_until(|| {
            used = self.queue.pop();
            used.is_some()
        });
        let Some((used, written)) = used else { return holds("a request completes", false).map(|()| (buffer, 0)) };
        equal("the completed head", used, head.unwrap_or(u16::MAX))?;
        Ok((buffer, written))
    }
}
