//! The thread of one pair of queues: it alone moves frames between them and their port.

use std::fmt::Display;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use block::throttle::Direction;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::Broken;
use super::backend::{Backend, Failure, Port};
use super::control::Control;
use super::gate::{Gate, Limited};
use super::link::Link;
use super::rx::{Received, Receiver};
use super::settings::{Copy, Shared};
use super::statistics::{Counts, PairCounts};
use super::tx::{Sender, Sent};
use super::vhost::Running;
use crate::log_limit::LogLimit;
use crate::virtio::device::{ActiveQueue, Interrupt};
use crate::virtio::queue::Virtqueue;

/// Rounds with work after which the worker looks whether it is to stop, however busy it is kept.
const BUSY_ROUNDS: u32 = 16;

/// Frames of one direction after which the other has its turn, and the driver is told.
const BATCH: usize = 64;

/// Received bytes of which the driver is told before the end of a batch: it works on them while the next are received, and
/// gives room for more.
const TELL: usize = 16 << 10;

/// How often to look whether a lost port is back.
const LOOK: Duration = Duration::from_millis(250);

/// Why the worker wakes: the driver gave room for frames.
const ROOM: u64 = 0;
/// Why the worker wakes: the driver has frames to send.
const FRAMES: u64 = 1;
/// Why the worker wakes: the port has a frame, or takes some.
const PORT: u64 = 2;
/// Why the worker wakes: it is to stop.
const STOP: u64 = 3;
/// Why the worker wakes: the driver has a command, or settings changed.
const SETTINGS: u64 = 4;
/// Why the worker wakes: the kernel found a ring broken.
const BROKEN: u64 = 5;
/// Why the worker wakes, plus the number of a queue: the kernel used buffers of it, and nobody else tells the driver.
const RELAY: u64 = 1 << 32;

/// What a worker needs besides its queues and its port; the same for all pairs of an interface.
#[derive(Clone)]
pub(super) struct Context {
    pub(super) id: String,
    pub(super) memory: Arc<GuestMemoryMmap>,
    pub(super) interrupt: Arc<dyn Interrupt>,
    pub(super) log: Arc<Mutex<LogLimit>>,
    pub(super) backend: Arc<Backend>,
    /// What the driver accepted.
    pub(super) features: u64,
    pub(super) shared: Arc<Shared>,
    pub(super) link: Arc<Link>,
    pub(super) limited: Limited,
    /// Readable when one queue is broken: all queues of the device stop then.
    pub(super) halt: Arc<EventFd>,
}

/// One pair at work. A driver may have enabled only one of the two queues.
pub(super) struct PairWorker {
    context: Context,
    pair: u16,
    epoll: Epoll,
    counts: Arc<PairCounts>,
    rx: Option<Side<Receiver>>,
    tx: Option<Side<Sender>>,
    control: Option<Side<Control>>,
    /// The kernel moves the frames: there is neither `rx` nor `tx` then.
    kernel: Option<Running>,
    copy: Copy,
    /// The port may have a frame: it said so, and has not said otherwise since.
    has_frames: bool,
    /// The port passes nothing until it is back.
    lost: bool,
    /// When to look whether it is.
    next_look: Instant,
    /// What the port's file is watched for, if it is.
    watched: Option<EventSet>,
}

/// One of the two queues.
struct Side<T> {
    index: u16,
    frames: T,
    gate: Gate,
    /// Registered in the epoll instance, so it stays open as long.
    _kick: EventFd,
    /// The port took nothing when last asked.
    blocked: bool,
}

impl PairWorker {
    /// For the queues of `pair` that the driver enabled, receiving first.
    ///
    /// # Errors
    /// When the host gives no epoll instance.
    pub(super) fn new(
        context: Context,
        pair: u16,
        queues: [Option<ActiveQueue>; 2],
        control: Option<ActiveQueue>,
        counts: Arc<PairCounts>,
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let (copy, memory, features) = (Copy::new(&context.shared), &context.memory, context.features);
        let gate = |direction| Gate::new(context.limited.clone(), direction);
        let (kernel, [rx, tx]) = match context.backend.kernel(pair) {
            Some(vhost) => {
                let running = Running::new(vhost, memory, features, queues, context.interrupt.as_ref())?;
                watch(&epoll, running.broken(), EventSet::IN, BROKEN)?;
                for (index, call) in running.relayed() {
                    watch(&epoll, call, EventSet::IN | EventSet::EDGE_TRIGGERED, RELAY + u64::from(index))?;
                }
                (Some(running), [None, None])
            }
            None => (None, queues),
        };
        let receiver = |queue| Receiver::new(queue, memory.clone(), copy.settings.rules);
        let rx = rx.map(|queue| Side::new(&epoll, queue, ROOM, gate(Direction::Read), receiver)).transpose()?;
        let sender = |queue| Sender::new(queue, memory.clone());
        let tx = tx.map(|queue| Side::new(&epoll, queue, FRAMES, gate(Direction::Write), sender)).transpose()?;
        let commands = |queue| Control::new(queue, memory.clone(), features);
        let unlimited = Gate::new(None, Direction::Write);
        let control = control.map(|queue| Side::new(&epoll, queue, SETTINGS, unlimited, commands)).transpose()?;
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        watch(&epoll, context.shared.changed(), edge, SETTINGS)?;
        watch(&epoll, context.shared.seen(), edge, SETTINGS)?;
        let next_look = Instant::now();
        Ok(Self {
            context,
            pair,
            epoll,
            counts,
            rx,
            tx,
            control,
            kernel,
            copy,
            has_frames: true,
            lost: false,
            next_look,
            watched: None,
        })
    }

    /// The body of the thread. Ends when `stop` is readable or the driver breaks a queue of the device. Nothing is in flight
    /// then but what the port keeps, and that is ours.
    pub(super) fn run(mut self, port: &mut dyn Port, stop: &EventFd) {
        if let Err(broken) = self.serve(port, stop) {
            let pair = self.pair;
            self.log(format_args!("pair {pair}: {broken}; the interface stops until the driver resets it"));
            self.context.interrupt.needs_reset();
            // Full only if it is readable already.
            let _ = self.context.halt.write(1);
        }
    }

    fn serve(&mut self, port: &mut dyn Port, stop: &EventFd) -> Result<(), Broken> {
        watch(&self.epoll, stop, EventSet::IN, STOP)?;
        watch(&self.epoll, &self.context.halt, EventSet::IN, STOP)?;
        self.set_up(port);
        loop {
            let mut busy = true;
            for _ in 0..BUSY_ROUNDS {
                busy = self.round(port)?;
                if !busy {
                    break;
                }
            }
            // What became available before notifications were on will not be announced.
            let awake = busy || self.enable_notification();
            self.watch_port(port)?;
            if self.sleep(awake)? {
                return Ok(());
            }
            self.disable_notification();
            self.look_for(port);
        }
    }

    /// Tells the host what the driver begins with: no other thread does, for the host may take its time.
    fn set_up(&mut self, port: &mut dyn Port) {
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
        if let Some(Err(error)) = self.kernel.as_ref().map(|kernel| kernel.connect(Some(port.file()))) {
            self.lose(format_args!("the kernel does not move its frames: {error}"));
        }
    }

    fn take_part(&self, port: &mut dyn Port, enabled: bool) {
        if let Err(error) = port.set_enabled(enabled) {
            let what = if enabled { "does not take part" } else { "takes part though it should not" };
            self.log(format_args!("a queue of the host {what}: {error}"));
        }
    }

    /// Moves a batch of frames each way and carries a command out; whether there may be more. Nobody is asked twice for what he
    /// did not have: he tells when he has.
    fn round(&mut self, port: &mut dyn Port) -> Result<bool, Broken> {
        if self.copy.renew(&self.context.shared) {
            self.take_part(port, self.pair < self.copy.settings.pairs);
            if self.control.is_none() {
                self.context.shared.acknowledge();
            }
        }
        let more = self.receive(port)? | self.send(port)? | self.obey(port)?;
        // As long as there is no time to listen to it.
        self.has_frames |= more;
        Ok(more)
    }

    /// Carries out the next command of the driver.
    fn obey(&mut self, port: &mut dyn Port) -> Result<bool, Broken> {
        let Some(control) = &mut self.control else { return Ok(false) };
        let any = control.frames.serve(port, &self.context.shared)?;
        if control.frames.queue.publish() {
            self.context.interrupt.queue(control.index);
        }
        Ok(any)
    }

    fn receive(&mut self, port: &mut dyn Port) -> Result<bool, Broken> {
        let active = self.has_frames && self.receives();
        let Some(rx) = self.rx.as_mut().filter(|_| active) else { return Ok(false) };
        let (mut more, mut lost, mut untold) = (false, None, 0);
        for left in (0..BATCH).rev() {
            if !rx.gate.is_open() {
                break;
            }
            match rx.frames.receive(port, &self.copy.settings, &self.counts.rx)? {
                Received::Frame(bytes) => {
                    rx.gate.passed(bytes);
                    untold += bytes;
                }
                Received::Dropped => {}
                Received::Nothing => {
                    self.has_frames = false;
                    break;
                }
                Received::NoRoom => break,
                Received::Lost(error) => {
                    lost = Some(error);
                    break;
                }
            }
            if untold >= TELL {
                tell(&mut rx.frames.queue, rx.index, &self.counts.rx, &self.context);
                untold = 0;
            }
            more = left == 0;
        }
        tell(&mut rx.frames.queue, rx.index, &self.counts.rx, &self.context);
        if let Some(error) = lost {
            self.lose(error);
        }
        Ok(more)
    }

    fn send(&mut self, port: &mut dyn Port) -> Result<bool, Broken> {
        let Some(tx) = &mut self.tx else { return Ok(false) };
        let (mut more, mut lost) = (false, None);
        tx.blocked = false;
        for left in (0..BATCH).rev() {
            if !tx.gate.is_open() {
                break;
            }
            let port: Option<&mut dyn Port> = if self.lost { None } else { Some(&mut *port) };
            match tx.frames.send(port, &self.counts.tx)? {
                Sent::Frame(bytes) => tx.gate.passed(bytes),
                Sent::Dropped => {}
                Sent::Nothing => break,
                Sent::Blocked => {
                    tx.blocked = true;
                    break;
                }
                Sent::Lost(error) => {
                    lost = Some(error);
                    break;
                }
            }
            more = left == 0;
        }
        if !self.lost && lost.is_none() {
            match port.flush() {
                Ok(done) => tx.blocked |= !done,
                Err(Failure::Lost(error)) => lost = Some(error),
                Err(Failure::NotNow | Failure::Frame(_)) => tx.blocked = true,
            }
        }
        tell(&mut tx.frames.queue, tx.index, &self.counts.tx, &self.context);
        if let Some(error) = lost {
            // What waits is dropped in the next round.
            self.lose(error);
            more = true;
        }
        Ok(more)
    }

    /// Whether notifications of something that is there already were switched on too late.
    fn enable_notification(&mut self) -> bool {
        // What the driver gives is of no use while the port blocks it, or there is enough.
        let room = self.rx.as_mut().filter(|rx| rx.frames.lacks_room());
        let room = room.is_some_and(|rx| rx.frames.queue.enable_notification());
        let frames = self.tx.as_mut().filter(|tx| !tx.blocked && tx.gate.patience().is_none());
        let frames = frames.is_some_and(|tx| tx.frames.queue.enable_notification());
        // A command that waits for the other workers is answered before the next one is looked at.
        let control = self.control.as_mut().filter(|control| !control.frames.is_waiting());
        let commands = control.is_some_and(|control| control.frames.queue.enable_notification());
        room | frames | commands
    }

    fn disable_notification(&mut self) {
        if let Some(rx) = &mut self.rx {
            rx.frames.queue.disable_notification();
        }
        if let Some(tx) = &mut self.tx {
            tx.frames.queue.disable_notification();
        }
        if let Some(control) = &mut self.control {
            control.frames.queue.disable_notification();
        }
    }

    /// Watches the port for what there is a use for.
    fn watch_port(&mut self, port: &mut dyn Port) -> io::Result<()> {
        let mut set = EventSet::EDGE_TRIGGERED;
        let active = self.pair < self.copy.settings.pairs;
        let receives = |rx: &Side<Receiver>| active && !rx.frames.lacks_room() && rx.gate.patience().is_none();
        set.set(EventSet::IN, self.rx.as_ref().is_some_and(receives));
        set.set(EventSet::OUT, self.tx.as_ref().is_some_and(|tx| tx.blocked));
        let wanted = Some(set).filter(|_| !self.lost);
        if wanted == self.watched {
            return Ok(());
        }
        let operation = match (self.watched, wanted) {
            (None, _) => ControlOperation::Add,
            (_, None) => ControlOperation::Delete,
            _ => ControlOperation::Modify,
        };
        self.watched = wanted;
        self.epoll.ctl(operation, port.file().as_raw_fd(), EpollEvent::new(wanted.unwrap_or(EventSet::empty()), PORT))
    }

    /// The port is lost.
    fn lose(&mut self, why: impl Display) {
        self.lost = true;
        self.next_look = Instant::now() + LOOK;
        self.log(format_args!("the host's side is lost: {why}; the link is down until it is back"));
        if let Some(Err(error)) = self.kernel.as_ref().map(|kernel| kernel.connect(None)) {
            self.log(format_args!("the kernel does not stop: {error}"));
        }
        self.set_link(true);
    }

    /// Looks whether a lost port is back, if it is time to.
    fn look_for(&mut self, port: &mut dyn Port) {
        if !self.lost || Instant::now() < self.next_look {
            return;
        }
        self.next_look = Instant::now() + LOOK;
        if port.is_up() {
            (self.lost, self.has_frames) = (false, true);
            self.connect(port);
            if !self.lost {
                self.log(format_args!("the host's side is back; the link is up"));
                self.set_link(false);
            }
        }
    }

    fn set_link(&self, lost: bool) {
        if self.context.link.set_lost(self.pair, lost) {
            self.context.interrupt.config();
        }
    }

    fn log(&self, line: impl Display) {
        let mut limit = self.context.log.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(suppressed) = limit.allow(Instant::now()) {
            tracing::warn!("net {}: {line}{suppressed}", self.context.id);
        }
    }

    /// Whether frames of the port may go to the driver.
    fn receives(&self) -> bool {
        !self.lost && self.pair < self.copy.settings.pairs
    }

    /// Milliseconds until a limit lets a frame pass, or a lost port is looked for; -1 if neither.
    fn patience(&self) -> i32 {
        // A gate that nobody comes to stays as it is, however long it has been due.
        let rx = self.rx.as_ref().filter(|_| self.receives());
        let gates = [rx.map(|rx| &rx.gate), self.tx.as_ref().map(|tx| &tx.gate)];
        let gates = gates.into_iter().flatten().filter_map(Gate::patience);
        gates.chain(self.lost.then_some(LOOK)).min().map_or(-1, millis)
    }

    /// Sleeps until there may be something to do, or not at all if `awake`; `true` if it is to stop.
    fn sleep(&mut self, awake: bool) -> Result<bool, Broken> {
        let patience = if awake { 0 } else { self.patience() };
        let mut events = [EpollEvent::default(); 8];
        match self.epoll.wait(patience, &mut events) {
            Ok(count) => {
                let woke = |why| events.iter().take(count).any(|event| event.data() == why);
                let gone = EventSet::ERROR | EventSet::HANG_UP;
                let ports = events.iter().take(count).filter(|event| event.data() == PORT);
                if ports.into_iter().any(|event| event.event_set().intersects(gone)) && !self.lost {
                    // It may take a moment until the port itself notices, and this is said once.
                    self.lose("it is gone");
                }
                self.has_frames |= woke(PORT);
                if woke(ROOM) {
                    self.counts.rx.kicked();
                }
                if woke(FRAMES) {
                    self.counts.tx.kicked();
                }
                for event in events.iter().take(count).filter(|event| event.data() >= RELAY) {
                    self.context.interrupt.queue((event.data() - RELAY) as u16);
                }
                if woke(BROKEN) { Err(Broken::Kernel) } else { Ok(woke(STOP)) }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// Milliseconds, rounded up.
fn millis(duration: Duration) -> i32 {
    i32::try_from(duration.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
}

/// Shows the driver what was used since the last time, with one interrupt if it wants one.
fn tell(queue: &mut Virtqueue, index: u16, counts: &Counts, context: &Context) {
    if queue.publish() {
        context.interrupt.queue(index);
        counts.interrupted();
    }
}

fn watch(epoll: &Epoll, event: &EventFd, set: EventSet, why: u64) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(set, why))
}

impl<T> Side<T> {
    fn new(
        epoll: &Epoll,
        active: ActiveQueue,
        why: u64,
        gate: Gate,
        frames: impl FnOnce(Virtqueue) -> T,
    ) -> io::Result<Self> {
        let ActiveQueue { index, queue, kick } = active;
        // Edge-triggered, so nobody need read it: every write of it wakes, and waking is all it is for.
        watch(epoll, &kick, EventSet::IN | EventSet::EDGE_TRIGGERED, why)?;
        Ok(Self { index, frames: frames(queue), gate, _kick: kick, blocked: false })
    }
}
