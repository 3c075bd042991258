//! What the worker of a pair does about its port, other than moving frames: it prepares it, and sees it go and come back.

use std::fmt::Display;
use std::mem;
use std::time::{Duration, Instant};

use super::PairWorker;
use crate::virtio::net::Broken;
use crate::virtio::net::backend::Port;
use crate::virtio::net::vhost::Running;

/// How often to look whether a lost port is back.
pub(super) const LOOK: Duration = Duration::from_millis(250);

/// How often to look whether a port is still there.
pub(super) const WATCH: Duration = Duration::from_secs(1);

impl PairWorker {
    /// Tells the host what the driver begins with: no other thread does, for the host may take its time.
    pub(super) fn set_up(&mut self, port: &mut dyn Port) {
        if self.pair == 0 {
            let backend = self.context.backend.clone();
            for idle in self.context.shared.workers()..backend.pairs() {
                self.take_part(backend.port(idle).as_mut(), false);
            }
            if let Err(error) = port.set_offloads(self.copy.settings.rules.offloads) {
                // What the driver did not agree to does not reach it.
                self.log(format_args!("the host does not change its offloads: {error}"));
            }
        }
        self.take_part(port, self.pair < self.copy.settings.pairs);
        if port.is_up() { self.connect(port) } else { self.lose("it is down") }
    }

    /// Lets the kernel move frames through the port as it is now, if that does.
    fn connect(&mut self, port: &mut dyn Port) {
        if let Some(Err(error)) = self.kernel.as_ref().map(|kernel| kernel.connect(port.file())) {
            self.lose(format_args!("the kernel does not move its frames: {error}"));
        }
    }

    pub(super) fn take_part(&self, port: &mut dyn Port, enabled: bool) {
        if let Err(error) = port.set_enabled(enabled) {
            let what = if enabled { "does not take part" } else { "takes part though it should not" };
            self.log(format_args!("a queue of the host {what}: {error}"));
        }
    }

    /// The port is lost.
    pub(super) fn lose(&mut self, why: impl Display) {
        self.lost = true;
        self.next_look = Instant::now() + LOOK;
        // Of all pairs that are lost the first one says so.
        if self.context.link.set_lost(self.pair, true) {
            self.log(format_args!("the host's side is lost: {why}; the link is down until it is back"));
            self.context.interrupt.config();
        }
        match self.kernel.as_mut().map(Running::disconnect) {
            None | Some(Ok(0)) => {}
            Some(Ok(lost)) => {
                self.log(format_args!("{lost} buffers are lost to the driver until it resets the interface"));
            }
            Some(Err(error)) => self.log(format_args!("the kernel does not stop: {error}")),
        }
    }

    /// Looks whether a lost port is back, or another one still there, if it is time to.
    pub(super) fn look_at(&mut self, port: &mut dyn Port) -> Result<(), Broken> {
        let stuck = mem::take(&mut self.stuck);
        let now = Instant::now();
        if !stuck && now < self.next_look {
            return Ok(());
        }
        self.next_look = now + if self.lost { LOOK } else { WATCH };
        if self.lost {
            self.look_for(port);
        } else if !port.is_still_up() {
            self.lose("it is gone or down");
        } else if stuck {
            return Err(Broken::Kernel);
        } else if let Some(kernel) = &mut self.kernel {
            kernel.watch();
        }
        Ok(())
    }

    /// Looks whether a lost port is back.
    fn look_for(&mut self, port: &mut dyn Port) {
        if port.is_up() {
            (self.lost, self.has_frames) = (false, true);
            self.connect(port);
            if !self.lost && self.context.link.set_lost(self.pair, false) {
                self.log(format_args!("the host's side is back; the link is up"));
                self.context.interrupt.config();
            }
        }
    }
}
