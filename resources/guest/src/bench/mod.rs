//! `bench`: how fast the disk is. Requests of one kind are kept in flight until time or their number is up; the report is
//! one line, `bench ` and a JSON object. README.md lists the words of the command line and the fields of the report.

mod lane;

use core::fmt;

use lane::{Done, End, Lane, PARTS};

use crate::Machine;
use crate::blk::{F_FLUSH, F_READ_ONLY};
use crate::boot::CommandLine;
use crate::checks::msix;
use crate::cpu::{self, Mmio};
use crate::memory;
use crate::report::{self, Failure, Outcome, equal, holds, println};
use crate::virtio::{Device, Options};
use crate::virtqueue::{F_EVENT_IDX, F_INDIRECT_DESC};
use crate::workload::{BUCKETS, Mix, Workload, bucket};

const F_MQ: u64 = 1 << 12;
/// Offset of `num_queues` in the disk's configuration (virtio 1.2, 5.2.4).
const NUM_QUEUES: u64 = 34;
const MAX_QUEUES: usize = 16;

/// A disk from which nothing comes for so long is stuck: between 27 and 137 seconds.
const STUCK: u64 = 1 << 37;

/// What the command line asks for.
struct Plan {
    mix: Mix,
    block: u32,
    depth: u16,
    queues: u16,
    /// In ticks; without, `count` says when it is over.
    runtime: Option<u64>,
    /// Ticks before the first that counts.
    warm_up: u64,
    count: u64,
    seed: u64,
    polled: bool,
    verify: bool,
    /// The host says when to start, and when to report.
    paced: bool,
}

impl Plan {
    fn new(words: &CommandLine) -> Outcome<Self> {
        let name = words.value("rw").unwrap_or("randread");
        let Some(mix) = Mix::ALL.into_iter().find(|mix| mix.name() == name) else {
            return Err(Failure::Wrong("rw= is randread, randwrite, read, write or randrw"));
        };
        let ticks = |milliseconds: u64| milliseconds * words.number("tsc_khz", 0);
        let runtime = words.value("runtime").map(|_| ticks(words.number("runtime", 0)));
        holds("runtime= comes with tsc_khz=", runtime != Some(0))?;
        holds("runtime= or count= says when it is over", runtime.is_some() != words.value("count").is_some())?;
        let plan = Self {
            mix,
            block: words.number("bs", 4096) as u32,
            depth: words.number("depth", 1) as u16,
            queues: words.number("queues", 1) as u16,
            runtime,
            warm_up: ticks(words.number("warmup", 0)),
            count: words.number("count", u64::MAX),
            seed: words.number("seed", 1),
            polled: words.switch("poll", true),
            verify: words.switch("verify", false),
            paced: words.switch("pace", false),
        };
        holds("bs= is a multiple of 512", plan.block > 0 && plan.block.is_multiple_of(512))?;
        holds("depth= is at least 1", plan.depth > 0)?;
        holds("queues= is 1 to 16", (1..=MAX_QUEUES).contains(&plan.queues.into()))?;
        Ok(plan)
    }
}

/// Measures, reports, and ends the machine.
pub(crate) fn run(machine: &Machine) -> ! {
    let outcome = Plan::new(&machine.command_line).and_then(|plan| {
        let mut bench = Bench::new(machine, plan)?;
        bench.pause("ready")?;
        let outcome = bench.drive();
        bench.pause("done")?;
        println!("bench {}", bench.tally);
        outcome?;
        equal("the number of failed requests", bench.tally.errors, 0_u64)?;
        equal("the number of reads with wrong content", bench.tally.mismatches, 0_u64)
    });
    match outcome {
        Ok(()) => report::exit(report::PASSED),
        Err(failure) => {
            println!("not ok bench: {failure}");
            report::exit(report::FAILED)
        }
    }
}

struct Bench {
    plan: Plan,
    work: Workload,
    lanes: [Option<Lane>; MAX_QUEUES],
    tally: Tally,
    in_flight: u64,
    /// When it started to count.
    begin: u64,
    /// When it stops counting and starting.
    end: u64,
}

impl Bench {
    fn new(machine: &Machine, plan: Plan) -> Outcome<Self> {
        let function = machine.disk()?;
        if machine.command_line.value("bars").is_some() {
            function.place_bars(machine.command_line.number("bars", 0));
        }
        let device = Device::find(function)?;
        let features = F_EVENT_IDX | F_INDIRECT_DESC | F_READ_ONLY | F_FLUSH | if plan.queues > 1 { F_MQ } else { 0 };
        let vectors = if plan.polled { None } else { Some(msix::direct_both(machine)?) };
        let options = Options { features, vectors, queue_size: 0 };
        let features = device.begin(&options)?;
        // Without indirect descriptors a request takes one for each of its parts.
        let entries = plan.depth.saturating_mul(if features & F_INDIRECT_DESC == 0 { PARTS } else { 1 });
        let options = Options { queue_size: entries.checked_next_power_of_two().unwrap_or(1 << 15), ..options };
        let queues = if features & F_MQ == 0 { 1 } else { device.config.read::<u16>(NUM_QUEUES) };
        holds("the disk has as many queues", plan.queues <= queues)?;
        holds("a disk to be written is not read-only", !plan.mix.writes() || features & F_READ_ONLY == 0)?;
        let mut lanes = [const { None }; MAX_QUEUES];
        for (index, lane) in (0..plan.queues).zip(&mut lanes) {
            let queue = device.queue(index, features, &options)?;
            holds("the queue has room for as many requests", entries <= queue.size)?;
            *lane = Some(Lane::new(queue, plan.depth, plan.block, plan.verify.then_some(plan.seed)));
        }
        device.start()?;
        let capacity = u64::from(device.config.read::<u32>(0)) | u64::from(device.config.read::<u32>(4)) << 32;
        let Some(work) = Workload::new(plan.mix, plan.block.into(), capacity.saturating_mul(512), plan.seed) else {
            return Err(Failure::Skip("a disk with room for one block"));
        };
        let tally = Tally::new(plan.block);
        Ok(Self { plan, work, lanes, tally, in_flight: 0, begin: 0, end: u64::MAX })
    }

    /// Says where it is, and lets the host look at the counters of its threads.
    fn pause(&self, where_: &str) -> Outcome {
        if !self.plan.paced {
            return Ok(());
        }
        println!("# bench {where_}");
        holds("the host answers on COM1", report::wait_for_line())
    }

    /// Keeps all lanes full until it is over, then waits for what is in flight.
    fn drive(&mut self) -> Outcome {
        let mut lanes = core::mem::replace(&mut self.lanes, [const { None }; MAX_QUEUES]);
        let mut last = cpu::ticks();
        self.begin = last + self.plan.warm_up;
        self.end = self.plan.runtime.map_or(u64::MAX, |runtime| self.begin + runtime);
        for lane in lanes.iter_mut().flatten() {
            for number in 0..lane.depth() {
                self.start(lane, number);
            }
            lane.queue.kick();
        }
        while self.in_flight > 0 {
            let seen = cpu::interrupts_seen();
            let mut any = false;
            for lane in lanes.iter_mut().flatten() {
                any |= self.serve(lane)?;
            }
            if any {
                last = cpu::ticks();
            } else {
                holds("requests complete", cpu::ticks() - last < STUCK)?;
                self.idle(&mut lanes, seen);
            }
        }
        self.tally.kicks = lanes.iter().flatten().map(|lane| lane.queue.kicks).sum();
        self.tally.interrupts = cpu::interrupt_count(msix::QUEUE_VECTOR);
        Ok(())
    }

    /// Waits for an interrupt, or not at all if there are none or something is completed already.
    fn idle(&self, lanes: &mut [Option<Lane>], seen: u64) {
        if self.plan.polled {
            return core::hint::spin_loop();
        }
        for lane in lanes.iter_mut().flatten() {
            if !lane.queue.arm() {
                return;
            }
        }
        cpu::sleep(seen);
    }

    /// Takes what has completed, at most one round of the lane, and starts as much anew. `false` if there was nothing.
    fn serve(&mut self, lane: &mut Lane) -> Outcome<bool> {
        let mut any = false;
        for _ in 0..lane.depth() {
            let Some(done) = lane.take()? else { break };
            any = true;
            self.in_flight -= 1;
            self.count(&done);
            if self.plan.verify && done.write && done.end == End::Good {
                lane.read_back(done.number);
                self.in_flight += 1;
            } else {
                self.start(lane, done.number);
            }
        }
        if any {
            lane.queue.kick();
        }
        Ok(any)
    }

    fn start(&mut self, lane: &mut Lane, number: u16) {
        if self.tally.started == self.plan.count || self.plan.runtime.is_some() && cpu::ticks() >= self.end {
            return;
        }
        self.tally.started += 1;
        self.in_flight += 1;
        lane.start(number, self.work.advance());
    }

    fn count(&mut self, done: &Done) {
        if !done.again && (self.begin..=self.end).contains(&done.ended) {
            self.tally.add(done);
            self.tally.ticks = self.plan.runtime.unwrap_or(done.ended - self.begin);
        }
        match done.end {
            End::Good => {}
            End::Failed => self.tally.errors += 1,
            End::Mismatch => self.tally.mismatches += 1,
        }
    }
}

/// The report.
struct Tally {
    block: u32,
    /// All requests, before and after the time that counts too; `kicks` and `interrupts` are for these.
    started: u64,
    ticks: u64,
    requests: u64,
    writes: u64,
    errors: u64,
    mismatches: u64,
    kicks: u64,
    interrupts: u64,
    latency_sum: u64,
    latency_min: u64,
    latency_max: u64,
    /// `BUCKETS` counts of 8 bytes.
    histogram: Mmio,
}

impl Tally {
    fn new(block: u32) -> Self {
        Self {
            block,
            started: 0,
            ticks: 0,
            requests: 0,
            writes: 0,
            errors: 0,
            mismatches: 0,
            kicks: 0,
            interrupts: 0,
            latency_sum: 0,
            latency_min: u64::MAX,
            latency_max: 0,
            histogram: memory::allocate(8 * BUCKETS as u64),
        }
    }

    fn add(&mut self, done: &Done) {
        let latency = done.ended - done.started;
        self.requests += 1;
        self.writes += u64::from(done.write);
        self.latency_sum += latency;
        self.latency_min = self.latency_min.min(latency);
        self.latency_max = self.latency_max.max(latency);
        let place = 8 * bucket(latency) as u64;
        self.histogram.write(place, self.histogram.read::<u64>(place) + 1);
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { block, started, ticks, requests, writes, errors, mismatches, kicks, interrupts, .. } = self;
        write!(f, r#"{{"block":{block},"ticks":{ticks},"requests":{requests},"writes":{writes},"#)?;
        write!(
            f,
            r#""started":{started},"errors":{errors},"mismatches":{mismatches},"kicks":{kicks},"interrupts":{interrupts},"#
        )?;
        let min = if self.requests == 0 { 0 } else { self.latency_min };
        write!(f, r#""latency_sum":{},"latency_min":{min},"latency_max":{},"#, self.latency_sum, self.latency_max)?;
        f.write_str(r#""histogram":["#)?;
        let counts = (0..BUCKETS).map(|index| (index, self.histogram.read::<u64>(8 * index as u64)));
        let mut comma = "";
        for (index, count) in counts.filter(|(_, count)| *count > 0) {
            write!(f, "{comma}[{index},{count}]")?;
            comma = ",";
        }
        f.write_str("]}")
    }
}
