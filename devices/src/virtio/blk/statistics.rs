//! What is counted of a disk. Each queue's worker records through its own [`Recorder`]; any thread takes a snapshot.

use std::array;
use std::mem;
use std::ops::AddAssign;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use block::engine::{Engine, OpKind};

use super::request::{Action, Status};
use crate::statistics::{Counter, Durations, SIZES, Sizes};

/// What requests are told apart by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// VIRTIO_BLK_T_IN.
    Read,
    /// VIRTIO_BLK_T_OUT.
    Write,
    /// VIRTIO_BLK_T_FLUSH.
    Flush,
    /// VIRTIO_BLK_T_DISCARD.
    Discard,
    /// VIRTIO_BLK_T_WRITE_ZEROES.
    WriteZeroes,
    /// VIRTIO_BLK_T_GET_ID.
    Identify,
    /// What is not valid, or not offered; never given to the engine. All of them are errors.
    Refused,
}

impl Kind {
    /// All of them, in the order of a snapshot's arrays.
    pub const ALL: [Self; KINDS] =
        [Self::Read, Self::Write, Self::Flush, Self::Discard, Self::WriteZeroes, Self::Identify, Self::Refused];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write-zeroes",
            Self::Identify => "identify",
            Self::Refused => "refused",
        }
    }

    pub(super) fn of(action: Action) -> Self {
        match action {
            Action::Transfer(OpKind::Read, _) => Self::Read,
            Action::Transfer(OpKind::Write { .. }, _) => Self::Write,
            Action::Transfer(OpKind::Flush, _) | Action::Answer(Status::Ok) => Self::Flush,
            Action::Transfer(OpKind::Discard { .. }, _) => Self::Discard,
            Action::Transfer(OpKind::WriteZeroes { .. }, _) => Self::WriteZeroes,
            Action::Identify => Self::Identify,
            Action::Answer(_) => Self::Refused,
        }
    }
}

/// How many kinds there are.
pub const KINDS: usize = 7;

/// Where a request spends its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// From the available ring to the engine.
    Queue,
    /// In the engine and the host.
    Engine,
    /// From the available ring to the used ring.
    Total,
}

impl Stage {
    /// All of them, in the order of a snapshot's array.
    pub const ALL: [Self; 3] = [Self::Queue, Self::Engine, Self::Total];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Engine => "engine",
            Self::Total => "total",
        }
    }
}

/// The statistics of one disk, over all activations of its device and all machines that have it.
#[derive(Debug, Default)]
pub struct Statistics {
    latencies: bool,
    queues: Mutex<Vec<Arc<Queue>>>,
}

impl Statistics {
    /// Nothing counted yet. Reading the clock for `latencies` costs the worker a little for every batch; without, it never
    /// does.
    pub fn new(latencies: bool) -> Self {
        Self { latencies, queues: Mutex::default() }
    }

    /// What was counted until now, for each queue that ever ran. From any thread.
    pub fn snapshot(&self) -> Vec<Snapshot> {
        self.queues().iter().map(|queue| queue.snapshot()).collect()
    }

    /// Where the worker of the queue `index` counts. There is at most one at a time.
    pub(super) fn queue(&self, index: u16) -> Arc<Queue> {
        let (index, mut queues) = (usize::from(index), self.queues());
        while queues.len() <= index {
            queues.push(Arc::new(Queue::new(self.latencies)));
        }
        queues[index].clone()
    }

    fn queues(&self) -> MutexGuard<'_, Vec<Arc<Queue>>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Stages = [Durations; Stage::ALL.len()];

/// One queue's numbers.
#[derive(Debug)]
pub(super) struct Queue {
    requests: [Counter; KINDS],
    bytes: [Counter; KINDS],
    errors: [Counter; KINDS],
    kicks: Counter,
    interrupts: Counter,
    merged: Counter,
    submissions: Counter,
    batches: Sizes,
    /// Locked by the worker once a batch, and only if nobody copies them just then.
    latencies: Option<Mutex<Stages>>,
}

impl Queue {
    fn new(latencies: bool) -> Self {
        Self {
            requests: Default::default(),
            bytes: Default::default(),
            errors: Default::default(),
            kicks: Counter::default(),
            interrupts: Counter::default(),
            merged: Counter::default(),
            submissions: Counter::default(),
            batches: Sizes::default(),
            latencies: latencies.then(Mutex::default),
        }
    }

    fn snapshot(&self) -> Snapshot {
        let read = |counters: &[Counter; KINDS]| array::from_fn(|kind| counters[kind].get());
        let latencies = self.latencies.as_ref();
        Snapshot {
            requests: read(&self.requests),
            bytes: read(&self.bytes),
            errors: read(&self.errors),
            kicks: self.kicks.get(),
            interrupts: self.interrupts.get(),
            merged: self.merged.get(),
            submissions: self.submissions.get(),
            batches: self.batches.get(),
            latencies: latencies.map(|stages| stages.lock().unwrap_or_else(PoisonError::into_inner).clone()),
        }
    }

    fn count(&self, kind: Kind, bytes: u64) {
        self.requests[kind as usize].add(1);
        self.bytes[kind as usize].add(bytes);
    }
}

/// The numbers of one queue, or of several added up. Arrays are in the order of [`Kind::ALL`] and [`Stage::ALL`].
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Requests that were answered.
    pub requests: [u64; KINDS],
    /// Bytes of data of those that succeeded.
    pub bytes: [u64; KINDS],
    /// Failures: of those that were refused or failed, and of those that were ignored or tried again.
    pub errors: [u64; KINDS],
    /// Notifications by the driver that woke the worker; what arrives while it is awake wakes nobody.
    pub kicks: u64,
    /// Interrupts raised for used buffers.
    pub interrupts: u64,
    /// Requests that went to the host together with a neighbour before them, in one transfer.
    pub merged: u64,
    /// System calls that gave requests to the kernel: io_submit, io_uring_enter. None of a pool of threads.
    pub submissions: u64,
    /// How many requests went to the engine at once, in the classes of [`Sizes`].
    pub batches: [u64; SIZES],
    /// How long the requests that went to the engine took, if that is recorded.
    pub latencies: Option<Stages>,
}

impl AddAssign<&Self> for Snapshot {
    fn add_assign(&mut self, other: &Self) {
        let add = |to: &mut [u64], from: &[u64]| to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
        add(&mut self.requests, &other.requests);
        add(&mut self.bytes, &other.bytes);
        add(&mut self.errors, &other.errors);
        add(&mut self.batches, &other.batches);
        self.kicks += other.kicks;
        self.interrupts += other.interrupts;
        self.merged += other.merged;
        self.submissions += other.submissions;
        if let Some(from) = &other.latencies {
            let to = self.latencies.get_or_insert_default();
            to.iter_mut().zip(from).for_each(|(to, from)| to.merge(from));
        }
    }
}

/// What is known of a request between taking and answering it.
#[derive(Clone, Copy)]
struct Stamp {
    kind: Kind,
    bytes: u64,
    /// When it was taken, and given to the engine; meaningless without latencies.
    taken: Instant,
    handed: Instant,
}

/// One worker's hand in the statistics of its queue. Allocates at the start only. With latencies it reads the clock up to
/// three times a round, and when the engine hands over early, not for each request; without, only at the start.
pub(super) struct Recorder {
    queue: Arc<Queue>,
    /// By descriptor head.
    stamps: Vec<Stamp>,
    /// The heads given to the engine since the last submission.
    batch: Vec<u16>,
    /// How many of these it has handed over already, and how often it had called the kernel then.
    early: usize,
    entered: u64,
    /// Latencies that are not in the histograms yet.
    samples: Vec<[Duration; Stage::ALL.len()]>,
    /// The time, as far as this part of the round is concerned.
    now: Option<Instant>,
    started: Instant,
    /// How many the engine had merged when last asked, and how often it had called the kernel.
    merged: u64,
    submissions: u64,
}

impl Recorder {
    /// For the worker of `queue`, which has `size` descriptors.
    pub(super) fn new(queue: Arc<Queue>, size: u16) -> Self {
        let (size, started) = (usize::from(size), Instant::now());
        Self {
            queue,
            stamps: vec![Stamp { kind: Kind::Refused, bytes: 0, taken: started, handed: started }; size],
            batch: Vec::with_capacity(size),
            early: 0,
            entered: 0,
            samples: Vec::with_capacity(2 * size),
            now: None,
            started,
            merged: 0,
            submissions: 0,
        }
    }

    /// The request at `head`, for `bytes` of data, was taken from the ring and is for the engine.
    pub(super) fn taken(&mut self, head: u16, kind: Kind, bytes: u64) {
        let now = self.now();
        self.stamps[usize::from(head)] = Stamp { kind, bytes, taken: now, handed: now };
    }

    /// `engine` has it now: it counts for the batch of the next submission.
    pub(super) fn handed(&mut self, head: u16, engine: &dyn Engine) {
        let first = self.batch.is_empty();
        self.batch.push(head);
        if self.queue.latencies.is_some() {
            let entered = engine.submissions();
            let early = mem::replace(&mut self.entered, entered) != entered;
            if early && !first {
                self.stamp();
            }
        }
    }

    /// What was handed since the last time goes to the host now.
    fn stamp(&mut self) {
        let now = Instant::now();
        for head in &self.batch[self.early..] {
            self.stamps[usize::from(*head)].handed = now;
        }
        self.early = self.batch.len();
    }

    /// What was handed is about to be submitted to `engine`, which has done what was submitted before.
    pub(super) fn submitting(&mut self, engine: &dyn Engine) {
        let (merged, submissions) = (engine.merged(), engine.submissions());
        self.queue.merged.add(merged - mem::replace(&mut self.merged, merged));
        self.queue.submissions.add(submissions - mem::replace(&mut self.submissions, submissions));
        self.queue.batches.record(self.batch.len());
        if self.queue.latencies.is_some() && self.early < self.batch.len() {
            self.stamp();
        }
        self.batch.clear();
        self.early = 0;
        self.now = None;
    }

    /// The engine failed at what `head` asked for. It is answered, or handed to the engine again.
    pub(super) fn failed(&mut self, head: u16) {
        self.queue.errors[self.stamps[usize::from(head)].kind as usize].add(1);
    }

    /// What `head` asked for is answered, with its data moved if `done`.
    pub(super) fn completed(&mut self, head: u16, done: bool) {
        let stamp = self.stamps[usize::from(head)];
        self.queue.count(stamp.kind, if done { stamp.bytes } else { 0 });
        if self.queue.latencies.is_some() {
            let now = self.now();
            self.samples.push([stamp.handed - stamp.taken, now - stamp.handed, now - stamp.taken]);
        }
    }

    /// All that the engine had done is answered.
    pub(super) fn reaped(&mut self) {
        self.now = None;
        // There is room for the samples of one more round, which adds at most one a descriptor.
        self.store(self.samples.len() > self.samples.capacity() / 2);
    }

    /// Moves the samples to the histograms; unless `wait`, only if nobody copies those just now.
    fn store(&mut self, wait: bool) {
        let Some(stages) = &self.queue.latencies else { return };
        let locked = if wait { stages.lock().ok() } else { stages.try_lock().ok() };
        let Some(mut stages) = locked else { return };
        for sample in self.samples.drain(..) {
            stages.iter_mut().zip(sample).for_each(|(stage, duration)| stage.record(duration));
        }
    }

    /// A request was answered without the engine.
    pub(super) fn answered(&mut self, kind: Kind, status: Status) {
        self.queue.count(kind, 0);
        self.queue.errors[kind as usize].add(u64::from(status != Status::Ok));
    }

    /// A notification of the driver woke the worker.
    pub(super) fn kicked(&mut self) {
        self.queue.kicks.add(1);
    }

    /// An interrupt was raised for used buffers.
    pub(super) fn interrupted(&mut self) {
        self.queue.interrupts.add(1);
    }

    /// The time at which this part of the round began.
    fn now(&mut self) -> Instant {
        if self.queue.latencies.is_none() {
            return self.started;
        }
        *self.now.get_or_insert_with(Instant::now)
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.store(true);
    }
}
