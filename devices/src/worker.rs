//! A thread with an owner: it can be stopped, and gives back what it was lent.

use std::io;
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A running thread that ends when its stop eventfd becomes readable, and returns a `T`: what it owned meanwhile.
///
/// Dropping a worker stops it too, so no thread outlives its device.
#[derive(Debug)]
pub struct Worker<T> {
    stop: EventFd,
    thread: Option<JoinHandle<T>>,
}

/// A stack below 2 MiB: a larger one may start with a transparent huge page, which is 2 MiB of host memory for each thread.
const STACK_BYTES: usize = 256 << 10;

impl<T: Send + 'static> Worker<T> {
    /// Starts a thread called `name` (at most 15 bytes are visible to the host) that runs `body` with its stop eventfd.
    ///
    /// # Errors
    /// When the host gives no eventfd or no thread.
    pub fn spawn(name: &str, body: impl FnOnce(EventFd) -> T + Send + 'static) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let stopped = stop.try_clone()?;
        let thread =
            thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES).spawn(move || body(stopped))?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Asks the thread to end, waits until it did, and returns what it owned. A panic of the thread goes on in the caller.
    pub fn stop(mut self) -> T {
        match self.join() {
            Some(Ok(owned)) => owned,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => unreachable!("only stop() and drop() take the handle, and both consume the worker"),
        }
    }
}

impl<T> Worker<T> {
    /// Asks the thread to end and does not wait for it: for several that are to stop together.
    pub fn ask(&self) {
        // The counter of an eventfd that only we write cannot overflow.
        let _ = self.stop.write(1);
    }

    /// Whether the thread has ended by itself.
    #[cfg(test)]
    pub(crate) fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    fn join(&mut self) -> Option<thread::Result<T>> {
        let thread = self.thread.take()?;
        self.ask();
        Some(thread.join())
    }
}

impl<T> Drop for Worker<T> {
    fn drop(&mut self) {
        let _ = self.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn wait(stop: &EventFd) {
        while stop.read().is_err() {
            thread::yield_now();
        }
    }

    #[test]
    fn stop_returns_what_the_thread_owned() {
        let lent = vec![1, 2, 3];
        let worker = Worker::spawn("lender", move |stop| {
            wait(&stop);
            lent
        })
        .unwrap();
        assert_eq!(worker.stop(), vec![1, 2, 3]);
    }

    #[test]
    fn drop_stops_the_thread() {
        let ended = Arc::new(AtomicBool::new(false));
        let seen = ended.clone();
        drop(Worker::spawn("dropped", move |stop| {
            wait(&stop);
            seen.store(true, Ordering::SeqCst);
        }));
        assert!(ended.load(Ordering::SeqCst));
    }
}
