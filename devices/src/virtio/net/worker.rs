//! The thread of one pair of queues: it alone moves frames between them and their port.

use std::fmt::Display;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{io, mem};

use block::throttle::Direction;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::Broken;
use super::backend::{Backend, Failure, Port};
use super::control::Control;
use super::gate::{Gate, Limited};
use super::link::Link;
use super::rx::{Received, Receiver};
use super::schedule::Schedule;
use super::settings::{Copy, Shared};
use super::side::Side;
use super::statistics::PairCounts;
use super::tx::{Sender, Sent};
use super::vhost::Running;
use super::wakeups::{self, Wakeups};
use crate::log_limit::LogLimit;
use crate::virtio::device::{ActiveQueue, Interrupt};

use self::host::{LOOK, WATCH};

mod host;

/// Rounds with work after which the worker looks whether it is to stop, however busy it is kept.
const BUSY_ROUNDS: u32 = 16;

/// Frames of one direction after which the other has its turn, and the driver is interrupted.
const BATCH: usize = 64;

/// Bytes of one direction after which the same happens.
const BATCH_BYTES: usize = 256 << 10;

/// Received bytes that the driver is shown at once: if it is awake, it works on them while the next are received, and gives room
/// for more.
const SHOWN: usize = 16 << 10;

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
    wakeups: Wakeups,
    /// Bytes both ways since it slept.
    moved: usize,
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
    /// When to look whether it is, or still is.
    next_look: Instant,
    /// The kernel can do nothing with a ring, and it is not known why.
    stuck: bool,
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
        let wakeups = Wakeups::new()?;
        let (copy, memory, features) = (Copy::new(&context.shared), &context.memory, context.features);
        let gate = |direction| Gate::new(context.limited.clone(), direction);
        let (kernel, [rx, tx]) = match context.backend.kernel(pair) {
            Some(vhost) => {
                let running = Running::new(vhost, memory, features, queues, context.interrupt.as_ref())?;
                wakeups.while_readable(running.broken(), wakeups::BROKEN)?;
                for (index, call) in running.relayed() {
                    wakeups.at_each_write(call, wakeups::RELAY + u64::from(index))?;
                }
                (Some(running), [None, None])
            }
            None => (None, queues),
        };
        let receiver = |queue| Receiver::new(queue, memory.clone(), copy.settings.rules);
        let rx =
            rx.map(|queue| Side::new(&wakeups, queue, wakeups::ROOM, gate(Direction::Read), receiver)).transpose()?;
        let sender = |queue| Sender::new(queue, memory.clone());
        let tx =
            tx.map(|queue| Side::new(&wakeups, queue, wakeups::FRAMES, gate(Direction::Write), sender)).transpose()?;
        let commands = |queue| Control::new(queue, memory.clone(), features);
        let unlimited = Gate::new(None, Direction::Write);
        let control =
            control.map(|queue| Side::new(&wakeups, queue, wakeups::SETTINGS, unlimited, commands)).transpose()?;
        wakeups.at_each_write(context.shared.changed(), wakeups::SETTINGS)?;
        wakeups.at_each_write(context.shared.seen(), wakeups::SETTINGS)?;
        let next_look = Instant::now();
        Ok(Self {
            context,
            pair,
            wakeups,
            moved: 0,
            counts,
            rx,
            tx,
            control,
            kernel,
            copy,
            has_frames: true,
            lost: false,
            next_look,
            stuck: false,
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
        self.wakeups.while_readable(stop, wakeups::STOP)?;
        self.wakeups.while_readable(&self.context.halt, wakeups::STOP)?;
        self.set_up(port);
        let mut schedule = Schedule::of_this_thread();
        loop {
            let busy = self.work(port)?;
            if !busy {
                self.interrupt();
                schedule.moved(mem::take(&mut self.moved));
            }
            // What became available before notifications were on will not be announced.
            let awake = busy || self.enable_notification();
            self.watch_port(port)?;
            self.wakeups.wait(if awake { 0 } else { self.patience() })?;
            self.disable_notification();
            if self.awaken() {
                return Ok(());
            }
            self.look_at(port)?;
        }
    }

    /// Moves frames as long as there are any, but not for ever; whether there may be more.
    fn work(&mut self, port: &mut dyn Port) -> Result<bool, Broken> {
        for _ in 0..BUSY_ROUNDS {
            if !self.round(port)? {
                return Ok(false);
            }
            self.interrupt();
        }
        Ok(true)
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
        let (mut more, mut lost, mut bytes, mut shown) = (false, None, 0, 0);
        for left in (0..BATCH).rev() {
            if !rx.gate.is_open() {
                break;
            }
            match rx.frames.receive(port, &self.copy.settings, &self.counts.rx)? {
                Received::Frame(len) => {
                    rx.gate.passed(len);
                    bytes += len;
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
            if bytes - shown >= SHOWN {
                rx.due |= rx.frames.queue.publish();
                shown = bytes;
            }
            more = left == 0 || bytes >= BATCH_BYTES;
            if more {
                break;
            }
        }
        rx.due |= rx.frames.queue.publish();
        self.moved += bytes;
        if let Some(error) = lost {
            self.lose(error);
        }
        Ok(more)
    }

    fn send(&mut self, port: &mut dyn Port) -> Result<bool, Broken> {
        let Some(tx) = &mut self.tx else { return Ok(false) };
        let (mut more, mut lost, mut bytes) = (false, None, 0);
        tx.blocked = false;
        for left in (0..BATCH).rev() {
            if !tx.gate.is_open() {
                break;
            }
            let port: Option<&mut dyn Port> = if self.lost { None } else { Some(&mut *port) };
            match tx.frames.send(port, &self.counts.tx)? {
                Sent::Frame(len) => {
                    tx.gate.passed(len);
                    bytes += len;
                }
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
            more = left == 0 || bytes >= BATCH_BYTES;
            if more {
                break;
            }
        }
        if !self.lost && lost.is_none() {
            match port.flush() {
                Ok(done) => tx.blocked |= !done,
                Err(Failure::Lost(error)) => lost = Some(error),
                Err(Failure::NotNow | Failure::Frame(_)) => tx.blocked = true,
            }
        }
        tx.due |= tx.frames.queue.publish();
        self.moved += bytes;
        if let Some(error) = lost {
            // What waits is dropped in the next round.
            self.lose(error);
            more = true;
        }
        Ok(more)
    }

    /// Interrupts the driver for what it was shown since the last time.
    fn interrupt(&mut self) {
        let interrupt = self.context.interrupt.as_ref();
        if let Some(rx) = &mut self.rx {
            rx.interrupt(interrupt, &self.counts.rx);
        }
        if let Some(tx) = &mut self.tx {
            tx.interrupt(interrupt, &self.counts.tx);
        }
    }

    /// Whether notifications of something that is there already were switched on too late.
    fn enable_notification(&mut self) -> bool {
        // What the driver gives is of no use while the port or a limit blocks it, or there is enough.
        let receives = self.receives();
        let lacks = |rx: &&mut Side<Receiver>| receives && rx.frames.lacks_room() && rx.gate.patience().is_none();
        let room = self.rx.as_mut().filter(lacks);
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
        let mut wanted = EventSet::empty();
        let active = self.pair < self.copy.settings.pairs;
        let receives = |rx: &Side<Receiver>| active && !rx.frames.lacks_room() && rx.gate.patience().is_none();
        wanted.set(EventSet::IN, self.rx.as_ref().is_some_and(receives));
        wanted.set(EventSet::OUT, self.tx.as_ref().is_some_and(|tx| tx.blocked));
        self.wakeups.watch_port(port.file(), Some(wanted).filter(|_| !self.lost))
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

    /// Milliseconds until a limit lets a frame pass, or the port is looked at.
    fn patience(&self) -> i32 {
        // A gate that nobody comes to stays as it is, however long it has been due.
        let rx = self.rx.as_ref().filter(|_| self.receives());
        let gates = [rx.map(|rx| &rx.gate), self.tx.as_ref().map(|tx| &tx.gate)];
        let gates = gates.into_iter().flatten().filter_map(Gate::patience);
        millis(gates.fold(if self.lost { LOOK } else { WATCH }, Duration::min))
    }

    /// Notes what woke the worker; `true` if it is to stop.
    fn awaken(&mut self) -> bool {
        if self.wakeups.port_is_gone() && !self.lost {
            // It may take a moment until the port itself notices, and this is said once.
            self.lose("it is gone");
        }
        self.has_frames |= self.wakeups.woke(wakeups::PORT);
        if self.wakeups.woke(wakeups::ROOM) {
            self.counts.rx.kicked();
        }
        if self.wakeups.woke(wakeups::FRAMES) {
            self.counts.tx.kicked();
        }
        for queue in self.wakeups.relayed() {
            self.context.interrupt.queue(queue);
        }
        // A port that is gone is no ring that is broken.
        self.stuck = self.wakeups.woke(wakeups::BROKEN) && !self.lost;
        self.wakeups.woke(wakeups::STOP)
    }
}

/// Milliseconds, rounded up.
fn millis(duration: Duration) -> i32 {
    i32::try_from(duration.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
}
