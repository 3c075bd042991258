//! The thread pool: blocking system calls on a few threads, which take their work from one FIFO at the last moment, so
//! that a sequential stream stays sequential. The worker owns the [`ThreadPool`]; its threads see only the shared part.

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::transfer::{Image, Scratch, transfer};
use super::{Completion, Engine, Op};
use crate::disk::Disk;

/// The most threads of one pool, if nothing else is said. See [`FEW`] for how many of them work.
pub const DEFAULT_THREADS: NonZeroUsize = NonZeroUsize::new(64).unwrap();

/// So many threads come as soon as there is work for them. More come only while twice as much waits as is worked on, or the
/// host is slow: a thread that finds the next job when it has done one needs no waking, which costs as much as the job.
const FEW: usize = 16;

/// A job that takes this long is one of a slow host. Beside that waking is nothing, so all the threads may wait for it.
const SLOW: Duration = Duration::from_millis(1);

/// The most threads of a pool that helps another engine.
const HELPERS: NonZeroUsize = NonZeroUsize::new(4).unwrap();

/// A thread without work for this long ends, except the last.
const IDLE: Duration = Duration::from_secs(5);

/// A thread needs little: `transfer` is shallow and its buffers are on the heap.
const STACK_BYTES: usize = 128 * 1024;

/// Said once: a guest can have pools started as often as it likes.
static TOO_FEW: Once = Once::new();

/// The engine `threads`. One thread always waits for work; more are started while work waits, and end when idle.
pub struct ThreadPool {
    shared: Arc<Shared>,
    pushed: Vec<Job>,
}

struct Job {
    op: Op,
    tag: u16,
}

struct Shared {
    image: Arc<dyn Image>,
    /// What the threads are called.
    name: String,
    idle: Duration,
    completed: EventFd,
    /// `done` is not empty.
    any_done: AtomicBool,
    state: Mutex<State>,
    /// There is work in the FIFO, or the pool closes.
    work: Condvar,
    /// Nothing is in flight.
    drained: Condvar,
}

#[derive(Default)]
struct State {
    fifo: VecDeque<Job>,
    done: Vec<Completion>,
    /// Jobs taken from `fifo` and not yet in `done`.
    running: usize,
    /// Threads that have not ended, at most `limit`.
    alive: usize,
    limit: usize,
    /// Threads of these that wait for work.
    idle: usize,
    /// A thread was woken or started and has not looked at the FIFO yet; it wakes the next one if it must.
    waking: bool,
    /// The last job took [`SLOW`] or longer.
    slow: bool,
    owner: Owner,
    closing: bool,
    handles: Vec<JoinHandle<()>>,
}

/// What the owner does, and so what it must be told.
#[derive(Default, PartialEq, Eq)]
enum Owner {
    /// It comes to reap by itself.
    Reaping,
    /// It found nothing to reap: the next completion is signalled.
    #[default]
    Waiting,
    /// It waits until nothing is in flight.
    Draining,
}

impl ThreadPool {
    /// A pool of at most `threads` for `disk`, all called `name` (at most 15 bytes are visible to the host).
    ///
    /// # Errors
    /// When the host gives no eventfd or no thread at all; later only fewer threads than wanted.
    pub fn new(disk: Arc<Disk>, threads: NonZeroUsize, name: &str) -> io::Result<Self> {
        Self::announcing(disk, threads, name, EventFd::new(EFD_NONBLOCK)?)
    }

    /// As [`ThreadPool::new`]; its completions are announced on `completed`.
    ///
    /// # Errors
    /// When the host gives no thread at all.
    pub(super) fn announcing(
        disk: Arc<Disk>,
        threads: NonZeroUsize,
        name: &str,
        completed: EventFd,
    ) -> io::Result<Self> {
        Self::start(disk, threads, name, IDLE, completed)
    }

    /// The helper of another engine: does what that cannot. Its completions are announced on `completed`, a clone of
    /// that engine's event.
    pub(super) fn helper(image: Arc<dyn Image>, name: &str, completed: EventFd) -> io::Result<Self> {
        Self::start(image, HELPERS, name, IDLE, completed)
    }

    fn start(
        image: Arc<dyn Image>,
        threads: NonZeroUsize,
        name: &str,
        idle: Duration,
        completed: EventFd,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            image,
            name: name.to_owned(),
            idle,
            completed,
            any_done: AtomicBool::new(false),
            state: Mutex::new(State { limit: threads.get(), ..State::default() }),
            work: Condvar::new(),
            drained: Condvar::new(),
        });
        shared.start_thread(&mut shared.lock())?;
        Ok(Self { shared, pushed: Vec::new() })
    }

    /// Gives up what no thread has begun. Waits for nothing.
    pub(super) fn cancel(&mut self, completions: &mut Vec<Completion>) {
        let waiting = mem::take(&mut self.shared.lock().fifo);
        let dropped = waiting.into_iter().chain(self.pushed.drain(..));
        completions.extend(dropped.map(|Job { op, tag }| Completion::canceled(op, tag)));
    }
}

impl Engine for ThreadPool {
    fn push(&mut self, op: Op, tag: u16) {
        self.pushed.push(Job { op, tag });
    }

    fn submit(&mut self) {
        if !self.pushed.is_empty() {
            let mut state = self.shared.lock();
            state.fifo.extend(self.pushed.drain(..));
            self.shared.wake(&mut state);
        }
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) {
        let mut state = self.shared.lock();
        if state.done.is_empty() {
            state.owner = Owner::Waiting;
        } else {
            state.owner = Owner::Reaping;
            completions.append(&mut state.done);
            self.shared.any_done.store(false, Ordering::Relaxed);
        }
    }

    fn has_completed(&mut self) -> bool {
        self.shared.any_done.load(Ordering::Relaxed)
    }

    fn completion_event(&self) -> &EventFd {
        &self.shared.completed
    }

    fn drain(&mut self, completions: &mut Vec<Completion>) {
        self.submit();
        let mut state = self.shared.lock();
        while state.in_flight() {
            state.owner = Owner::Draining;
            state = self.shared.drained.wait(state).expect(POISONED);
        }
        state.owner = Owner::Reaping;
        completions.append(&mut state.done);
        self.shared.any_done.store(false, Ordering::Relaxed);
    }

    fn abandon(&mut self, completions: &mut Vec<Completion>) {
        self.cancel(completions);
        self.drain(completions);
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.work.notify_all();
        loop {
            let handles = mem::take(&mut self.shared.lock().handles);
            if handles.is_empty() {
                return;
            }
            for handle in handles {
                // A thread that panicked has said so itself.
                let _ = handle.join();
            }
        }
    }
}

const POISONED: &str = "no thread of the pool panics while it holds the lock";

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect(POISONED)
    }

    /// Brings one more thread to the FIFO if that pays, unless one is on its way. Each that comes does the same, so the owner
    /// pays for one wake-up however long its batch is.
    fn wake(self: &Arc<Self>, state: &mut State) {
        if state.waking || !state.needs_more() {
            return;
        }
        if state.idle > 0 {
            state.waking = true;
            self.work.notify_one();
        } else if state.alive < state.limit
            && let Err(error) = self.start_thread(state)
        {
            state.limit = state.alive;
            TOO_FEW.call_once(|| {
                tracing::warn!("{}: the host gives no more than {} threads: {error}", self.name, state.limit);
            });
        }
    }

    fn start_thread(self: &Arc<Self>, state: &mut State) -> io::Result<()> {
        let shared = self.clone();
        let thread = thread::Builder::new().name(self.name.clone()).stack_size(STACK_BYTES);
        let handle = thread.spawn(move || shared.serve())?;
        state.handles.retain(|handle| !handle.is_finished());
        state.handles.push(handle);
        state.alive += 1;
        state.waking = true;
        Ok(())
    }

    /// The life of a thread.
    fn serve(self: &Arc<Self>) {
        let mut scratch = Scratch::default();
        self.lock().waking = false;
        let mut finished = None;
        loop {
            let (job, tell) = self.exchange(finished.take());
            if tell {
                // Only full if nobody waits for it: the owner then comes back to reap anyway.
                let _ = self.completed.write(1);
            }
            let Some(job) = job.or_else(|| self.wait()) else { return };
            let begun = Instant::now();
            let result = transfer(&*self.image, &job.op, &mut scratch);
            finished = Some((Completion { tag: job.tag, op: job.op, result }, begun.elapsed()));
        }
    }

    /// Hands in what was finished, with the time it took, and takes the next job; also returns whether the owner must be told.
    fn exchange(self: &Arc<Self>, finished: Option<(Completion, Duration)>) -> (Option<Job>, bool) {
        let mut state = self.lock();
        let mut tell = false;
        if let Some((completion, time)) = finished {
            state.done.push(completion);
            state.slow = time >= SLOW;
            self.any_done.store(true, Ordering::Relaxed);
            state.running -= 1;
            match state.owner {
                Owner::Waiting => {
                    state.owner = Owner::Reaping;
                    tell = true;
                }
                Owner::Draining if !state.in_flight() => self.drained.notify_one(),
                Owner::Draining | Owner::Reaping => {}
            }
        }
        (self.take(&mut state), tell)
    }

    fn take(self: &Arc<Self>, state: &mut State) -> Option<Job> {
        let job = state.fifo.pop_front()?;
        state.running += 1;
        self.wake(state);
        Some(job)
    }

    /// Waits for a job; `None` when the thread is to end.
    fn wait(self: &Arc<Self>) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if let Some(job) = self.take(&mut state) {
                return Some(job);
            }
            if state.closing {
                state.alive -= 1;
                return None;
            }
            state.idle += 1;
            let patience = if state.alive > 1 { self.idle } else { Duration::MAX };
            let waited = self.work.wait_timeout(state, patience).expect(POISONED);
            state = waited.0;
            state.idle -= 1;
            state.waking = false;
            if waited.1.timed_out() && state.fifo.is_empty() && state.alive > 1 {
                state.alive -= 1;
                return None;
            }
        }
    }
}

impl State {
    /// Whether one more thread would pay.
    fn needs_more(&self) -> bool {
        let waiting = self.fifo.len();
        waiting > 0 && (self.slow || self.running < FEW || waiting >= 2 * self.running)
    }

    fn in_flight(&self) -> bool {
        self.running > 0 || !self.fifo.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use tempfile::TempDir;
    use vm_memory::GuestMemoryMmap;

    use crate::engine::OpKind;
    use crate::engine::conformance::{self, Bed, await_completions, disk, memory, op};
    use crate::engine::faulty::{Call, Faulty};

    fn limit(threads: usize) -> NonZeroUsize {
        NonZeroUsize::new(threads).unwrap()
    }

    /// A pool of up to `threads`, each of which waits `idle` for more work, over an image that notes what it is asked for.
    fn noting(threads: usize, idle: Duration) -> (TempDir, Arc<Faulty>, Arc<GuestMemoryMmap>, ThreadPool) {
        let (dir, _path, disk) = disk(1 << 20);
        let image = Faulty::new(disk, &[]);
        let completed = EventFd::new(EFD_NONBLOCK).unwrap();
        let pool = ThreadPool::start(image.clone(), limit(threads), "test-io", idle, completed).unwrap();
        (dir, image, memory(4096), pool)
    }

    fn pool(threads: usize) -> impl Fn(Arc<Disk>) -> Box<dyn Engine> {
        move |disk| Box::new(ThreadPool::new(disk, limit(threads), "test-io").unwrap())
    }

    #[test]
    fn moves_the_right_bytes() {
        conformance::bytes(&Bed::default(), pool(1));
        conformance::bytes(&Bed::default(), pool(4));
    }

    #[test]
    fn completes_exactly_once() {
        conformance::exactly_once(&Bed::default(), pool(1));
        conformance::exactly_once(&Bed::default(), pool(16));
    }

    #[test]
    fn refuses_bad_buffers() {
        conformance::bad_buffers(&Bed::default(), pool(4));
    }

    #[test]
    fn drains() {
        conformance::drain(&Bed::default(), pool(1));
        conformance::drain(&Bed::default(), pool(4));
    }

    #[test]
    fn takes_requests_in_the_order_they_came() {
        let (_dir, image, memory, mut pool) = noting(1, IDLE);
        for tag in 0..200 {
            pool.push(op(OpKind::Read, u64::from(tag) * 512, &[(0, 512)], &memory), tag);
            pool.submit();
        }
        await_completions(&mut pool, 200);
        let expected: Vec<_> = (0..200).map(|n| Call::Read { offset: n * 512, buffers: 1 }).collect();
        assert_eq!(image.calls(), expected);
    }

    #[test]
    fn works_on_as_many_as_it_has_threads_and_then_lets_them_end() {
        let (_dir, image, memory, mut pool) = noting(5, Duration::ZERO);
        image.hold(true);
        for tag in 0..20 {
            pool.push(op(OpKind::Read, 0, &[(0, 512)], &memory), tag);
        }
        pool.submit();
        while image.calls().len() < 5 {
            thread::yield_now();
        }
        assert_eq!(pool.shared.lock().running, 5);
        image.hold(false);
        await_completions(&mut pool, 20);
        // The last may have ended its job, and not wait yet: another would be started then.
        let counts = |state: &State| (state.alive, state.idle);
        while counts(&pool.shared.lock()) != (1, 1) {
            thread::yield_now();
        }
        pool.push(op(OpKind::Read, 0, &[(0, 512)], &memory), 0);
        pool.submit();
        await_completions(&mut pool, 1);
        let alive = pool.shared.lock().alive;
        assert_eq!(alive, 1);
    }

    /// Reads of a disk that is held, as many as `jobs`: how many a pool of up to `threads` works on.
    fn begun(threads: usize, jobs: u16, slow: bool) -> usize {
        let (_dir, image, memory, mut pool) = noting(threads, IDLE);
        // The first thread takes a job when it comes, whether that pays or not.
        while pool.shared.lock().idle == 0 {
            thread::yield_now();
        }
        pool.shared.lock().slow = slow;
        image.hold(true);
        for tag in 0..jobs {
            pool.push(op(OpKind::Read, 0, &[(0, 512)], &memory), tag);
        }
        pool.submit();
        let begun = loop {
            let state = pool.shared.lock();
            // Who was woken takes a job, and then wakes the next or nobody.
            let settled = !state.waking && state.running + state.idle == state.alive;
            if settled && image.calls().len() == state.running {
                break state.running;
            }
            drop(state);
            thread::yield_now();
        };
        image.hold(false);
        await_completions(&mut pool, jobs.into());
        begun
    }

    #[test]
    fn more_than_a_few_threads_work_only_where_that_pays() {
        for (jobs, expected) in
            [(1, 1), (4, 4), (16, 16), (32, 16), (47, 16), (48, 17), (128, 43), (192, 64), (600, 64)]
        {
            assert_eq!(begun(64, jobs, false), expected, "{jobs} jobs");
        }
        assert_eq!(begun(64, 40, true), 40, "a slow host");
        assert_eq!(begun(5, 600, true), 5, "no more than allowed");
    }

    /// The host is slow while the last job took long.
    #[test]
    fn a_slow_host_is_noticed() {
        let (_dir, image, memory, mut pool) = noting(1, IDLE);
        image.hold(true);
        pool.push(op(OpKind::Read, 0, &[(0, 512)], &memory), 0);
        pool.submit();
        while image.calls().is_empty() {
            thread::yield_now();
        }
        thread::sleep(SLOW);
        image.hold(false);
        await_completions(&mut pool, 1);
        assert!(pool.shared.lock().slow);
        // A host this busy may take that long for any of them, but not for all.
        loop {
            pool.push(op(OpKind::Read, 0, &[(0, 512)], &memory), 0);
            pool.submit();
            await_completions(&mut pool, 1);
            if !pool.shared.lock().slow {
                return;
            }
        }
    }

    #[test]
    fn an_owner_who_has_work_is_told_once() {
        let (_dir, _path, disk) = disk(1 << 20);
        let memory = memory(4096);
        let mut pool = ThreadPool::new(disk, limit(4), "test-io").unwrap();
        for tag in 0..100 {
            pool.push(op(OpKind::Read, 0, &[(0, 512)], &memory), tag);
        }
        pool.submit();
        while pool.shared.lock().done.len() < 100 {
            thread::yield_now();
        }
        // The thread that tells does so after it has handed in its job, and the pool waits for it here.
        let event = pool.completion_event().try_clone().unwrap();
        drop(pool);
        assert_eq!(event.read().unwrap(), 1);
    }

    /// A disk that hangs: what its threads have begun is all that an abandoned pool waits for.
    #[test]
    fn what_no_thread_has_begun_can_be_abandoned() {
        let (_dir, image, memory, mut pool) = noting(2, IDLE);
        image.hold(true);
        for tag in 0..10 {
            pool.push(op(OpKind::Read, 0, &[(0, 512)], &memory), tag);
            if tag == 7 {
                pool.submit();
            }
        }
        while image.calls().len() < 2 {
            thread::yield_now();
        }
        let shared = pool.shared.clone();
        let completions = thread::scope(|scope| {
            let abandoning = scope.spawn(|| {
                let mut completions = Vec::new();
                pool.abandon(&mut completions);
                completions
            });
            while shared.lock().owner != Owner::Draining {
                thread::yield_now();
            }
            image.hold(false);
            abandoning.join().unwrap()
        });
        assert_eq!(image.calls().len(), 2);
        let (done, dropped): (Vec<_>, Vec<_>) = completions.into_iter().partition(|one| one.result.is_ok());
        assert_eq!((done.len(), dropped.len()), (2, 8));
        pool.push(op(OpKind::Flush, 0, &[], &memory), 0);
        pool.drain(&mut Vec::new());
        assert_eq!(image.calls().last(), Some(&Call::Flush), "it works on");
    }

    #[test]
    fn dropping_waits_for_what_is_in_flight() {
        let (_dir, image, memory, mut pool) = noting(2, IDLE);
        image.hold(true);
        for tag in 0..10 {
            pool.push(op(OpKind::Flush, 0, &[], &memory), tag);
        }
        pool.submit();
        while image.calls().len() < 2 {
            thread::yield_now();
        }
        thread::scope(|scope| {
            let dropping = scope.spawn(move || drop(pool));
            assert_eq!(image.calls().len(), 2);
            assert!(!dropping.is_finished());
            image.hold(false);
        });
        assert_eq!(image.calls(), vec![Call::Flush; 10]);
        assert_eq!(Arc::strong_count(&memory), 1);
    }
}
