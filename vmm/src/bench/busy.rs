//! Threads of this process that keep CPUs from what is measured, for what a disk is worth on a busy host.

use std::hint;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::Context;

/// Some of them. Dropping it ends them.
#[derive(Default)]
pub(super) struct Busy {
    enough: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Busy {
    /// So many.
    ///
    /// # Errors
    /// When the host gives no thread.
    pub(super) fn start(count: u16) -> anyhow::Result<Self> {
        let mut busy = Self::default();
        for _ in 0..count {
            let enough = busy.enough.clone();
            let spin = move || {
                while !enough.load(Ordering::Relaxed) {
                    hint::spin_loop();
                }
            };
            let thread: io::Result<_> = thread::Builder::new().name("busy".to_owned()).spawn(spin);
            busy.threads.push(thread.context("--busy")?);
        }
        Ok(busy)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.enough.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // It cannot panic.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::usage::Usage;

    fn used() -> (u64, usize) {
        let usage = Usage::of(std::process::id()).unwrap();
        let busy = |name: &str| name == "busy";
        (usage.since(&Usage::default(), busy).cpu, usage.ids(busy).count())
    }

    #[test]
    fn they_use_cpu_time_until_they_end() {
        let busy = Busy::start(2).unwrap();
        // A thread gives itself its name.
        while used().1 < 2 {
            thread::yield_now();
        }
        let before = used().0;
        while used().0 < before + 1_000_000 {
            thread::yield_now();
        }
        drop(busy);
        assert_eq!(used(), (0, 0));
    }
}
