//! The thread of one virtio-blk queue: it alone takes requests, hands them to the engine, and answers them.

use std::fmt::Display;
use std::io;
use std::mem;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use block::disk::Disk;
use block::engine::{Completion, Engine, Op, OpKind};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::Broken;
use super::errors::{Errors, Held, Verdict};
use super::gate::{Gate, Limited};
use super::polling::{Awaited, Polling};
use super::request::{Action, Request, Rules, Serial, Status};
use super::statistics::{Kind, Recorder, Statistics};
use crate::log_limit::LogLimit;
use crate::virtio::device::{ActiveQueue, Interrupt};
use crate::virtio::queue::{Chain, Virtqueue};

/// Rounds with work after which the worker looks whether it is to stop, however busy the driver keeps it.
const BUSY_ROUNDS: u32 = 64;

/// Why the worker wakes: the driver notified.
const KICK: u64 = 0;
/// Why the worker wakes: something completed.
const COMPLETION: u64 = 1;
/// Why the worker wakes: it is to stop.
const STOP: u64 = 2;
/// Why the worker wakes: a paused machine goes on.
const RELEASE: u64 = 3;

/// What a worker needs besides its queue and its engine; the same for all queues of a disk.
#[derive(Clone)]
pub(super) struct Context {
    pub(super) disk: Arc<Disk>,
    pub(super) rules: Rules,
    pub(super) serial: Serial,
    pub(super) memory: Arc<GuestMemoryMmap>,
    pub(super) interrupt: Arc<dyn Interrupt>,
    pub(super) log: Arc<Mutex<LogLimit>>,
    pub(super) poll: Duration,
    /// Readable when one queue is broken: all queues of the device stop then.
    pub(super) halt: Arc<EventFd>,
    pub(super) statistics: Arc<Statistics>,
    pub(super) errors: Option<Errors>,
    pub(super) limited: Limited,
    /// What is in flight when the worker stops need not be done: nobody will ask for it.
    pub(super) abandon: Arc<AtomicBool>,
}

/// One queue at work.
pub(super) struct QueueWorker {
    pub(super) context: Context,
    index: u16,
    queue: Virtqueue,
    /// Registered in `epoll`, so it stays open as long.
    _kick: EventFd,
    engine: Box<dyn Engine>,
    pub(super) polling: Polling,
    epoll: Epoll,
    /// The requests in the engine, by descriptor head.
    slots: Vec<Option<Request>>,
    /// Scratch space and ops at rest, for their allocations to be used again.
    chain: Chain,
    completions: Vec<Completion>,
    spare: Vec<Op>,
    /// The guest wrote to the disk.
    wrote: bool,
    record: Recorder,
    held: Held,
    gate: Gate,
}

impl QueueWorker {
    /// # Errors
    /// When the host gives no epoll instance.
    pub(super) fn new(context: Context, queue: ActiveQueue, engine: Box<dyn Engine>) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        // Edge-triggered, so nobody need read the two: every write of them wakes, and waking is all they are for.
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        watch(&epoll, &queue.kick, edge, KICK)?;
        watch(&epoll, engine.completion_event(), edge, COMPLETION)?;
        let size = queue.queue.size();
        let held = Held::new(context.errors.clone());
        if let Some(released) = held.released() {
            watch(&epoll, released, edge, RELEASE)?;
        }
        let record = Recorder::new(context.statistics.queue(queue.index), size);
        Ok(Self {
            polling: Polling::new(context.poll),
            gate: Gate::new(context.limited.clone()),
            context,
            index: queue.index,
            queue: queue.queue,
            _kick: queue.kick,
            engine,
            epoll,
            slots: (0..size).map(|_| None).collect(),
            chain: Chain::default(),
            completions: Vec::with_capacity(size.into()),
            spare: Vec::with_capacity(size.into()),
            wrote: false,
            record,
            held,
        })
    }

    /// The body of the thread. Ends when `stop` is readable or the driver breaks a queue of the device. What is in flight
    /// then is waited for, but not answered: the rings are the driver's again. If the disk is abandoned only what the host has
    /// begun is. What the guest wrote, and was told so, is flushed.
    pub(super) fn run(mut self, stop: &EventFd) {
        if let Err(broken) = self.serve(stop) {
            self.log(format_args!("queue {}: {broken}; the disk stops until the driver resets it", self.index));
            self.context.interrupt.needs_reset();
            // Full only if it is readable already.
            let _ = self.context.halt.write(1);
        }
        if self.context.abandon.load(Ordering::Acquire) {
            self.abandon();
        } else {
            self.drain();
        }
        if self.wrote && self.context.rules.cache.flushes() {
            let flush = self.new_op();
            self.engine.push(flush, 0);
            self.drain();
        }
    }

    fn drain(&mut self) {
        let mut completions = mem::take(&mut self.completions);
        self.engine.drain(&mut completions);
        for Completion { op, result, .. } in completions.drain(..) {
            if let Err(error) = result {
                self.log(describe(&op, &error));
            }
        }
        self.completions = completions;
    }

    /// As `drain`, without what the host has not begun.
    fn abandon(&mut self) {
        let mut completions = mem::take(&mut self.completions);
        self.engine.abandon(&mut completions);
        let mut ended = 0;
        for Completion { op, result, .. } in completions.drain(..) {
            match result {
                Err(error) if error.raw_os_error() == Some(libc::ECANCELED) => continue,
                Err(error) => self.log(describe(&op, &error)),
                Ok(()) => {}
            }
            ended += 1;
        }
        // Limits, or a pause, kept some of them from the engine.
        let not_done = self.slots.iter().flatten().count() - ended;
        if not_done > 0 {
            self.log(format_args!(
                "queue {}: {not_done} requests were not done: the machine is stopped by force",
                self.index
            ));
        }
        self.completions = completions;
    }

    fn serve(&mut self, stop: &EventFd) -> Result<(), Broken> {
        watch(&self.epoll, stop, EventSet::IN, STOP)?;
        watch(&self.epoll, &self.context.halt, EventSet::IN, STOP)?;
        self.queue.disable_notification();
        loop {
            let mut busy = true;
            for _ in 0..BUSY_ROUNDS {
                busy = self.round()? || self.look();
                if !busy {
                    break;
                }
            }
            // What became available before notifications were on will not be announced.
            let awake = busy || self.queue.enable_notification();
            if self.sleep(awake)? {
                return Ok(());
            }
            self.queue.disable_notification();
        }
    }

    /// There was nothing to do: looks for a while. Returns whether there is something now.
    fn look(&mut self) -> bool {
        self.polling.look(|| self.queue.is_available() || self.engine.has_completed())
    }

    /// Answers what is completed, starts what is available; `false` if there was neither.
    fn round(&mut self) -> Result<bool, Broken> {
        let completed = self.complete()?;
        // Before anything is started: meanwhile the driver goes on with what it has.
        self.tell();
        let taken = self.take()? | self.start_waiting();
        self.record.submitting(&*self.engine);
        self.engine.submit();
        self.tell();
        let busy = completed || taken;
        if busy {
            self.polling.worked(if completed { Awaited::Driver } else { Awaited::Host });
        }
        Ok(busy)
    }

    /// Starts what waited for the limits of the disk, or for a paused machine to go on, and waits no longer; `false` if
    /// there was nothing.
    fn start_waiting(&mut self) -> bool {
        let mut any = false;
        while let Some((op, head)) = self.gate.due().or_else(|| self.held.due()) {
            self.start(op, head);
            any = true;
        }
        any
    }

    fn start(&mut self, op: Op, head: u16) {
        self.engine.push(op, head);
        self.record.handed(head, &*self.engine);
    }

    /// Shows the driver what was answered since the last time, with one interrupt if it wants one.
    fn tell(&mut self) {
        if self.queue.publish() {
            self.context.interrupt.queue(self.index);
            self.record.interrupted();
        }
    }

    fn complete(&mut self) -> Result<bool, Broken> {
        let mut completions = mem::take(&mut self.completions);
        self.engine.reap(&mut completions);
        let any = !completions.is_empty();
        for Completion { tag, mut op, result } in completions.drain(..) {
            if result.is_ok() && self.is_late(&op) {
                op.kind = OpKind::Flush;
                self.engine.push(op, tag);
                continue;
            }
            let Some((op, status)) = self.judge(op, tag, result) else { continue };
            self.spare.push(op);
            let request = self.slots.get_mut(usize::from(tag)).and_then(Option::take);
            self.answer(request.expect("an engine completes each op once"), status)?;
        }
        self.completions = completions;
        self.record.reaped();
        Ok(any)
    }

    /// Whether the driver switched the write cache off since this was given to the engine: then what was written must be
    /// flushed before it is answered.
    fn is_late(&self, op: &Op) -> bool {
        let (OpKind::Write { durable } | OpKind::Discard { durable } | OpKind::WriteZeroes { durable, .. }) = op.kind
        else {
            return false;
        };
        !durable && self.context.rules.cache.is_durable()
    }

    /// Takes at most one ring's length of requests. Returns whether there were any.
    fn take(&mut self) -> Result<bool, Broken> {
        let mut taken = false;
        for _ in 0..self.queue.size() {
            if !self.queue.pop(&mut self.chain)? {
                break;
            }
            taken = true;
            let head = self.chain.head;
            if self.slots.get(usize::from(head)).is_none_or(Option::is_some) {
                return Err(Broken::Repeated(head));
            }
            let mut op = self.spare.pop().unwrap_or_else(|| self.new_op());
            let (mut request, action) =
                Request::parse(&self.chain, &self.context.memory, &self.context.rules, &mut op)?;
            let status = match action {
                Action::Transfer(kind, offset) => {
                    (op.kind, op.offset) = (kind, offset);
                    self.wrote |= !matches!(kind, OpKind::Read | OpKind::Flush);
                    self.slots[usize::from(head)] = Some(request);
                    self.record.taken(head, Kind::of(action), length(&op));
                    if let Some((op, head)) = self.gate.admit(op, head) {
                        self.start(op, head);
                    }
                    continue;
                }
                Action::Identify => request.identify(&self.context.serial, &op.segments, &self.context.memory),
                Action::Answer(status) => status,
            };
            self.spare.push(op);
            self.record.answered(Kind::of(action), status);
            self.answer(request, status)?;
        }
        Ok(taken)
    }

    /// A flush, unless the caller makes something else of it.
    fn new_op(&self) -> Op {
        Op {
            kind: OpKind::Flush,
            offset: 0,
            segments: Vec::new(),
            ranges: Vec::new(),
            memory: self.context.memory.clone(),
        }
    }

    fn answer(&mut self, request: Request, status: Status) -> Result<(), Broken> {
        let (head, written) = request.finish(status, &self.context.memory)?;
        self.queue.push(head, written);
        Ok(())
    }

    /// The status of what completed; none if it is kept until the machine goes on.
    fn judge(&mut self, op: Op, tag: u16, result: io::Result<()>) -> Option<(Op, Status)> {
        let Err(error) = result else {
            self.record.completed(tag, true);
            return Some((op, Status::Ok));
        };
        self.record.failed(tag);
        let verdict = self.held.verdict(op.kind, &error);
        if verdict == Verdict::Retry {
            let reason = format!("disk {}: {}", self.context.disk.id(), describe(&op, &error));
            self.held.keep(op, tag, reason);
            return None;
        }
        self.log(describe(&op, &error));
        self.record.completed(tag, false);
        Some((op, if verdict == Verdict::Ignore { Status::Ok } else { Status::IoError }))
    }

    pub(super) fn log(&self, line: impl Display) {
        let mut limit = self.context.log.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(suppressed) = limit.allow(Instant::now()) {
            let disk = self.context.disk.id();
            tracing::warn!("disk {disk}: {line}{suppressed}");
        }
    }

    /// Sleeps until there may be something to do, or not at all if `awake`; `true` if it is to stop.
    fn sleep(&mut self, awake: bool) -> Result<bool, Broken> {
        let mut events = [EpollEvent::default(); 5];
        match self.epoll.wait(if awake { 0 } else { self.gate.patience() }, &mut events) {
            Ok(count) => {
                let woke = |why| events.iter().take(count).any(|event| event.data() == why);
                if woke(KICK) {
                    self.record.kicked();
                }
                Ok(woke(STOP))
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

fn watch(epoll: &Epoll, event: &EventFd, set: EventSet, why: u64) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(set, why))
}

/// What failed, and why.
fn describe(op: &Op, error: &io::Error) -> String {
    let name = match op.kind {
        OpKind::Read => "reading",
        OpKind::Write { .. } => "writing",
        OpKind::Flush => return format!("flushing failed: {error}"),
        OpKind::Discard { .. } => "discarding",
        OpKind::WriteZeroes { .. } => "zeroing",
    };
    format!("{name} at byte {} failed: {error}", op.offset)
}

/// Bytes of the disk that `op` is about.
fn length(op: &Op) -> u64 {
    let data: u64 = op.segments.iter().map(|segment| u64::from(segment.1)).sum();
    op.ranges.iter().fold(data, |sum, range| sum + (range.end - range.start))
}
