//! The life of one `skiff run`: open what the user named, build the machine, let it run, build it again when the guest
//! reboots, and put everything down in order. All of it on the main thread.

use std::cell::RefCell;
use std::fs::{File, Metadata};
use std::io::{self, ErrorKind, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use block::choose::{self, Access, Wish};
use block::disk::Disk;
use block::engine::Engines;
use block::overlay;
use devices::acpi::PowerButton;
use devices::pause::PauseLine;
use devices::virtio::blk::statistics::Statistics;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};

use crate::builder::{Machine, VmBuilder};
use crate::config::{DiskConfig, OnReboot, SerialConfig, StatsFormat, VmConfig};
use crate::console::{Console, ConsoleAction};
use crate::exit::{ExitLine, ExitReason};
use crate::kvm;
use crate::net::{self, OpenNet};
use crate::statistics::Report;
use crate::stopping::Stopping;
use crate::vcpu::VcpuThreads;

/// What is logged, at level info, when the guest has reset the machine and it starts again.
pub const RESTART: &str = "the guest reset the machine; starting it again";

/// What the user named, opened and locked once; a reboot of the guest builds a new machine on the same files.
pub struct Resources {
    /// The kernel image.
    pub kernel: File,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// One a `--disk`, in their order. The locks on the images are held until this is dropped.
    pub disks: Vec<OpenDisk>,
    /// What is counted of each disk, in the same order.
    pub statistics: Vec<Arc<Statistics>>,
    /// The network interfaces, in the order of their PCI slots.
    pub nets: Vec<OpenNet>,
}

/// An image, and what will move its bytes.
pub struct OpenDisk {
    /// Opened and locked.
    pub disk: Arc<Disk>,
    /// The engine, and what to fall back to.
    pub engines: Engines,
}

impl Resources {
    /// Opens every image and every network `config` names. Nothing is written to.
    ///
    /// # Errors
    /// One line that names the option, the file and the remedy.
    pub fn open(config: &VmConfig) -> anyhow::Result<Self> {
        let kernel = open("--kernel", &config.kernel)?;
        let initrd = config.initrd.as_deref().map(|path| open("--initrd", path)).transpose()?;
        let disks = config.disks.iter().map(|disk| open_disk(disk).context("--disk")).collect::<anyhow::Result<_>>()?;
        check_console_file(config)?;
        let statistics = config.disks.iter().map(|_| Arc::new(Statistics::new(config.stats.is_some()))).collect();
        let nets = net::open(config)?;
        Ok(Self { kernel, initrd, disks, statistics, nets })
    }
}

fn open_disk(config: &DiskConfig) -> anyhow::Result<OpenDisk> {
    let DiskConfig { path, id, access, snapshot_dir, aio, cache, queues, .. } = config;
    let (mut disk, choice) = choose::open(path, id, Wish { aio: *aio, cache: *cache, access: *access }, *queues)?;
    tracing::info!("disk {id}: {}: {choice}", path.display());
    if *access == Access::Snapshot {
        let folder = snapshot_dir.clone().unwrap_or_else(overlay::default_folder);
        disk = overlay::over(disk, path, &folder)?;
        let folder = folder.display();
        tracing::info!(
            "disk {id}: what the guest writes goes to a file without a name in {folder}, and is gone at the end"
        );
    }
    Ok(OpenDisk { disk: Arc::new(disk), engines: choice.engines })
}

/// The console empties its file, which must not be one that the machine is made of, by whatever name.
fn check_console_file(config: &VmConfig) -> anyhow::Result<()> {
    let SerialConfig::File(console) = &config.serial else { return Ok(()) };
    let identity = |path: &Path| path.metadata().ok().filter(Metadata::is_file).map(|file| (file.dev(), file.ino()));
    let images = [&config.kernel].into_iter().chain(&config.initrd).chain(config.disks.iter().map(|disk| &disk.path));
    for image in images {
        if identity(console).is_some_and(|file| identity(image) == Some(file)) {
            let (console, image) = (console.display(), image.display());
            bail!("--serial file={console}: this is {image}, which the machine is made of; name another file");
        }
    }
    Ok(())
}

fn open(option: &str, path: &Path) -> anyhow::Result<File> {
    File::open(path).map_err(|error| {
        let remedy = match error.kind() {
            ErrorKind::NotFound => "no such file; check the path".to_owned(),
            ErrorKind::PermissionDenied => {
                "permission denied; make the file readable for you (Debian's kernels are root's: copy one, or use sudo)"
                    .to_owned()
            }
            _ => format!("cannot be opened: {error}"),
        };
        anyhow::anyhow!("{option} {}: {remedy}", path.display())
    })
}

/// Runs the machine that `config` describes until it ends for good, and says how it ended. `print` gets the statistics,
/// whole lines, when the machine ends if `config` says so, and on SIGUSR1.
///
/// # Errors
/// When the machine cannot be started: one line that names the option and the remedy.
pub fn run(config: &VmConfig, print: &dyn Fn(&str)) -> anyhow::Result<ExitReason> {
    // Whoever asks before there is a machine to ask about gets nothing, but does not end us, as these would by default.
    for signal in [SIGUSR1, SIGUSR2] {
        signal_hook::flag::register(signal, Arc::default()).context("signals")?;
    }
    let kvm = kvm::open()?;
    let resources = Resources::open(config)?;
    let exit = Arc::new(ExitLine::new().context("no eventfd")?);
    let pause = Arc::new(PauseLine::new().context("no eventfd")?);
    let mut control = None;
    loop {
        let board = VmBuilder { kvm: &kvm, config, resources: &resources, exit: &exit, pause: &pause }.build()?;
        let control = match &mut control {
            Some(control) => control,
            // Not before the first board: until then a signal just ends us, and the console is as it was.
            none => none.insert(Control::new(config, &exit, &pause)?),
        };
        let machine = board.connect(&mut control.console.borrow_mut())?;
        let report = |format| {
            let nets = resources.nets.iter().map(|net| (net.options.id.as_str(), &*net.options.statistics));
            print(&Report::new(&config.disks, &resources.statistics, nets).format(format));
        };
        let reason = run_machine(machine, control, &|| report(config.stats.unwrap_or(StatsFormat::Text)))?;
        let restart = reason == ExitReason::Reset && config.on_reboot == OnReboot::Restart && !control.is_stopping();
        if !restart {
            config.stats.into_iter().for_each(report);
            return Ok(reason);
        }
        tracing::info!("{RESTART}");
    }
}

/// From the first instruction to the last flush; `report` when SIGUSR1 asks for it.
fn run_machine(machine: Machine, control: &mut Control, report: &dyn Fn()) -> anyhow::Result<ExitReason> {
    let Machine { vcpus, serial, power_button, functions, .. } = machine;
    let running = VcpuThreads::start(vcpus, &control.pause).context("no thread for a vCPU");
    crate::text::release();
    let waited = running.and_then(|threads| {
        let waited = control.wait(&threads, &power_button, report);
        // A vCPU that waits for a slow console would never see that it has to stop. The threads end here.
        serial.release();
        waited
    });
    for function in &functions {
        function.reset();
    }
    // What paused it is gone: the next machine starts running.
    control.pause.release();
    let _ = control.pause.take_reason();
    waited?;
    control.exit.take().context("the machine ended without a reason")
}

/// What reaches a running machine from outside: signals, keys, and the announcement of its end.
struct Control {
    events: EventManager<Rc<RefCell<dyn MutEventSubscriber>>>,
    console: Rc<RefCell<Console>>,
    exit: Arc<ExitLine>,
    pause: Arc<PauseLine>,
    grace: Duration,
    /// Requests to stop since they were last looked at.
    stops: Arc<AtomicU32>,
    /// The same, of a terminal that hangs up. The shell and the kernel both say it, so it is no second request.
    hang_ups: Arc<AtomicU32>,
    /// The same, of requests to print the statistics.
    reports: Arc<AtomicU32>,
    /// The same, of requests to let a paused machine go on.
    releases: Arc<AtomicU32>,
    /// Somebody asked the machine to stop.
    stopping: Option<Stopping>,
}

impl Control {
    fn new(config: &VmConfig, exit: &Arc<ExitLine>, pause: &Arc<PauseLine>) -> anyhow::Result<Self> {
        let [stops, hang_ups, reports, releases] = [(); 4].map(|()| Arc::new(AtomicU32::new(0)));
        let stop_signals = Signals::new(&[SIGTERM, SIGINT, SIGQUIT], &stops).context("signals")?;
        // nohup(1) asks us not to mind.
        let minded: &[i32] = if is_ignored(SIGHUP) { &[] } else { &[SIGHUP] };
        let hang_up_signals = Signals::new(minded, &hang_ups).context("signals")?;
        let report_signals = Signals::new(&[SIGUSR1], &reports).context("signals")?;
        // Not SIGCONT: a shell sends that to every job it brings to the foreground.
        let release_signals = Signals::new(&[SIGUSR2], &releases).context("signals")?;
        let (quit, button, go_on) = (exit.clone(), stops.clone(), releases.clone());
        let console = Console::open(&config.serial, move |action| match action {
            ConsoleAction::Quit => quit.raise(ExitReason::Quit),
            ConsoleAction::PowerButton => _ = button.fetch_add(1, Ordering::Relaxed),
            ConsoleAction::Continue => _ = go_on.fetch_add(1, Ordering::Relaxed),
        })?;
        let console = Rc::new(RefCell::new(console));
        let mut events = EventManager::<Rc<RefCell<dyn MutEventSubscriber>>>::new().context("no epoll")?;
        events.add_subscriber(Rc::new(RefCell::new(stop_signals)));
        events.add_subscriber(Rc::new(RefCell::new(hang_up_signals)));
        events.add_subscriber(Rc::new(RefCell::new(report_signals)));
        events.add_subscriber(Rc::new(RefCell::new(release_signals)));
        events.add_subscriber(Rc::new(RefCell::new(Paused(pause.clone()))));
        events.add_subscriber(Rc::new(RefCell::new(Ended(exit.clone()))));
        events.add_subscriber(console.clone());
        let (exit, pause, grace) = (exit.clone(), pause.clone(), config.grace);
        Ok(Self { events, console, exit, pause, grace, stops, hang_ups, reports, releases, stopping: None })
    }

    /// Handles events until the end of the machine is announced.
    fn wait(&mut self, threads: &VcpuThreads, power_button: &PowerButton, report: &dyn Fn()) -> anyhow::Result<()> {
        let start = Instant::now();
        while !self.exit.is_raised() {
            let held = !self.pause.is_paused() || threads.hold();
            self.events.run_with_timeout(self.patience(held)).context("epoll")?;
            if self.reports.swap(0, Ordering::Relaxed) > 0 {
                report();
            }
            self.pause_or_go_on(threads);
            self.stop_if_asked(power_button, start)?;
        }
        Ok(())
    }

    /// Milliseconds to sleep at most, -1 for ever: until a request to stop needs us, or to kick a vCPU again.
    fn patience(&self, held: bool) -> i32 {
        if !held {
            return 1;
        }
        self.stopping.as_ref().map_or(-1, |stopping| {
            let left = stopping.wake().saturating_duration_since(Instant::now());
            i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX)
        })
    }

    /// Says why the machine is paused, once, and lets it go on when somebody asks for it.
    fn pause_or_go_on(&self, threads: &VcpuThreads) {
        if let Some(reason) = self.pause.take_reason() {
            let process = std::process::id();
            tracing::error!(
                "{reason}; the machine is paused: see to it, then press Ctrl-A c or \"kill -USR2 {process}\" to try again"
            );
        }
        if self.releases.swap(0, Ordering::Relaxed) > 0 && self.pause.is_paused() {
            tracing::info!("the machine goes on");
            self.pause.release();
            threads.go_on();
        }
    }

    /// The first request to stop presses the power button; the second, or the end of the grace period, announces the end
    /// itself. A paused machine hears its button when it goes on.
    fn stop_if_asked(&mut self, power_button: &PowerButton, start: Instant) -> anyhow::Result<()> {
        let hung_up = self.hang_ups.swap(0, Ordering::Relaxed) > 0 && self.stopping.is_none();
        for _ in 0..self.stops.swap(0, Ordering::Relaxed).max(hung_up.into()) {
            if self.stopping.is_none() {
                tracing::info!("power button pressed; the guest has {} s to power off", self.grace.as_secs());
                self.stopping = Some(Stopping::new(Instant::now(), start.elapsed(), self.grace));
            } else {
                self.exit.raise(ExitReason::Forced);
            }
        }
        if let Some(stopping) = &mut self.stopping {
            let now = Instant::now();
            stopping.press(now, || power_button.press()).context("the power button")?;
            if stopping.is_over(now) {
                self.exit.raise(ExitReason::Forced);
            }
        }
        Ok(())
    }

    /// Someone asked the machine to stop: a reset by the guest ends it then.
    fn is_stopping(&self) -> bool {
        self.stopping.is_some()
    }
}

/// Signals, as bytes in a socket.
struct Signals {
    receiver: UnixStream,
    /// Open, so that the receiver is not at its end though there may be no signal to send.
    _sender: UnixStream,
    count: Arc<AtomicU32>,
}

impl Signals {
    /// From now on `signals` are added to `count`, for the rest of the life of the process.
    fn new(signals: &[i32], count: &Arc<AtomicU32>) -> io::Result<Self> {
        let (receiver, sender) = UnixStream::pair()?;
        receiver.set_nonblocking(true)?;
        for signal in signals {
            signal_hook::low_level::pipe::register(*signal, sender.try_clone()?)?;
        }
        Ok(Self { receiver, _sender: sender, count: count.clone() })
    }
}

/// Whether whoever started us had `signal` ignored: SigIgn in proc_pid_status(5), bit 0 for signal 1.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

impl MutEventSubscriber for Signals {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, &self.receiver);
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let mut signals = [0; 16];
        if let Ok(count) = self.receiver.read(&mut signals) {
            self.count.fetch_add(count as u32, Ordering::Relaxed);
        }
    }
}

/// Wakes the main thread, which then takes the reason.
struct Paused(Arc<PauseLine>);

impl MutEventSubscriber for Paused {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, self.0.raised());
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {}
}

/// Wakes the main thread; it looks at the line itself.
struct Ended(Arc<ExitLine>);

impl MutEventSubscriber for Ended {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, self.0.event());
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {}
}

fn watch(ops: &mut EventOps, fd: &impl AsRawFd) {
    ops.add(Events::new(fd, EventSet::IN)).expect("a new descriptor can be added to our own epoll");
}
