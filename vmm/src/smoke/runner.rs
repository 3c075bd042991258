//! All tests of a run: as many machines at a time as the host has room for, each on a thread of its own, which takes one test
//! after the other.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;

use super::disks::Prepared;
use super::observer::{Event, Observer};
use super::result::{Failure, Outcome, Run, TestId, Verdict};
use super::scenario::{Cell, Scenario};
use super::session::{Session, Surroundings};
use super::transcript::Transcript;

/// Besides a machine's memory, what it and its test take.
const OVERHEAD: u64 = 32 << 20;
/// Bytes of consoles that are kept of a run, as they are; of tests that end after that only the last [`END`] are.
const CONSOLES: usize = 256 << 20;
const END: usize = 4 << 10;
/// How long to sleep between looks at whether the user wants to stop.
const TICK: Duration = Duration::from_millis(100);

/// What to run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// In this order.
    pub scenarios: Vec<Scenario>,
    /// Machines at a time; `None`: as many as the host has CPUs for. Never more than it has memory for.
    pub jobs: Option<usize>,
    /// How often each; 1 is once, and then repetitions have no numbers.
    pub repeat: u32,
    /// Only tests whose name has one of these in it, if there are any.
    pub filters: Vec<String>,
    /// Where failures leave their console, disks and machine.
    pub keep: Option<PathBuf>,
}

/// A test that is to be run.
struct Job<'a> {
    test: TestId,
    scenario: &'a Scenario,
    cell: &'a Cell,
}

impl Plan {
    /// The tests, in the order of the results.
    pub fn tests(&self) -> Vec<TestId> {
        self.select().into_iter().map(|job| job.test).collect()
    }

    fn select(&self) -> Vec<Job<'_>> {
        let mut selected = Vec::new();
        for scenario in &self.scenarios {
            for cell in &scenario.cells {
                for number in 1..=self.repeat {
                    let repetition = if self.repeat == 1 { 0 } else { number };
                    let (name, file) = (scenario.name.clone(), scenario.file.clone());
                    let test = TestId { scenario: name, file, cell: cell.keys.clone(), repetition };
                    let name = test.to_string();
                    if self.filters.is_empty() || self.filters.iter().any(|filter| name.contains(filter)) {
                        selected.push(Job { test, scenario, cell });
                    }
                }
            }
        }
        selected
    }
}

/// Runs the tests of `plan` until all are over, or until `stop` becomes true: then running machines are killed, and what
/// came out so far is returned. `observer` is told of everything.
pub fn run(plan: &Plan, stop: &AtomicBool, observer: &dyn Observer) -> Run {
    let (started, began) = (SystemTime::now(), Instant::now());
    let selected = plan.select();
    let tests: Vec<TestId> = selected.iter().map(|job| job.test.clone()).collect();
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let jobs = plan.jobs.unwrap_or(cpus).clamp(1, selected.len().max(1));
    observer.event(Event::Planned { tests: &tests, jobs });
    let surroundings = Surroundings { observer, stop, began };
    let queue = Queue::new(&selected, memory_available(), plan.jobs.is_none().then_some(cpus));
    thread::scope(|scope| {
        let mut workers = Vec::new();
        for number in 0..jobs {
            let work = || {
                while let Some(at) = queue.take(stop) {
                    let outcome = test(&surroundings, &selected[at], plan.keep.as_deref());
                    observer.event(Event::Ended { outcome: &outcome });
                    queue.finish(at, outcome);
                }
            };
            match thread::Builder::new().name(format!("smoke-{number}")).spawn_scoped(scope, work) {
                Ok(worker) => workers.push(worker),
                Err(error) if number == 0 => tracing::error!("no thread for the tests: {error}"),
                // Those that there are do it.
                Err(_) => break,
            }
        }
        // The workers look for themselves; this one says it, once, while they end.
        while !workers.iter().all(thread::ScopedJoinHandle::is_finished) && !stop.load(Ordering::Relaxed) {
            queue.wait();
        }
        if !queue.is_over() {
            observer.event(Event::Stopping);
        }
    });
    let outcomes = queue.into_outcomes();
    let outcomes = outcomes.into_iter().zip(&selected).map(|(outcome, job)| {
        outcome.unwrap_or_else(|| {
            let (verdict, why) = if stop.load(Ordering::Relaxed) {
                (Verdict::Skipped, "interrupted before it began")
            } else {
                (Verdict::Error, "there was no thread to run it")
            };
            let outcome = not_run(&job.test, verdict, why.to_owned());
            observer.event(Event::Ended { outcome: &outcome });
            outcome
        })
    });
    let outcomes = outcomes.collect();
    Run { started, took: began.elapsed(), outcomes, interrupted: stop.load(Ordering::Relaxed) }
}

fn test(surroundings: &Surroundings<'_>, job: &Job<'_>, keep: Option<&Path>) -> Outcome {
    let began = surroundings.began.elapsed();
    let error = |error: &anyhow::Error| Outcome { began, ..not_run(&job.test, Verdict::Error, format!("{error:#}")) };
    let prepared = match Prepared::new(job.scenario, job.cell, keep.is_some()) {
        Ok(prepared) => prepared,
        Err(what) => return error(&what),
    };
    let started = Session::start(surroundings, job.scenario, job.cell, &job.test, &prepared, prepared.command());
    let mut outcome = match started.context("skiff itself cannot be started") {
        Ok(session) => session.run(),
        Err(what) => return error(&what),
    };
    if let Some(folder) = keep.filter(|_| matches!(outcome.verdict, Verdict::Failed | Verdict::Error)) {
        match keep_all(folder, &outcome, job.cell, &prepared) {
            Ok(kept) => outcome.kept = Some(kept),
            Err(error) => tracing::warn!("--keep {}: {}: {error}", folder.display(), job.test),
        }
    }
    outcome
}

/// Leaves what a failure needs to be looked into.
fn keep_all(folder: &Path, outcome: &Outcome, cell: &Cell, prepared: &Prepared) -> std::io::Result<PathBuf> {
    let plain = |letter: char| if letter.is_alphanumeric() || "=._-#".contains(letter) { letter } else { '_' };
    let name: String = outcome.test.to_string().chars().map(plain).collect();
    let folder = folder.join(name);
    std::fs::create_dir_all(&folder)?;
    let (begin, rest) = outcome.console.bytes();
    let dropped = outcome.console.dropped();
    let gap = if dropped == 0 { String::new() } else { format!("\n[... {dropped} bytes ...]\n") };
    std::fs::write(folder.join("console.log"), [&begin, gap.as_bytes(), &rest].concat())?;
    std::fs::write(folder.join("messages.log"), &outcome.messages)?;
    prepared.keep(cell, &folder)?;
    Ok(folder)
}

fn not_run(test: &TestId, verdict: Verdict, summary: String) -> Outcome {
    let failure = Failure { summary, step: None, place: None, quotes: Vec::new(), last_lines: Vec::new() };
    Outcome {
        test: test.clone(),
        verdict,
        failure: Some(failure),
        began: Duration::ZERO,
        took: Duration::ZERO,
        steps: Vec::new(),
        warnings: Vec::new(),
        measures: Vec::new(),
        console: Transcript::default(),
        messages: String::new(),
        end: None,
        kept: None,
    }
}

/// Which test is next, and whether there is room for it.
struct Queue {
    /// What each machine takes: bytes, CPUs.
    needs: Vec<(u64, usize)>,
    /// What there is: bytes, and CPUs if they count.
    room: (u64, Option<usize>),
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    next: usize,
    running: usize,
    taken: (u64, usize),
    /// Bytes of consoles in the outcomes.
    consoles: usize,
    outcomes: Vec<Option<Outcome>>,
}

impl Queue {
    fn new(jobs: &[Job<'_>], memory: u64, cpus: Option<usize>) -> Self {
        let need = |job: &Job<'_>| (job.cell.machine.memory.size + OVERHEAD, job.cell.machine.cpus as usize);
        let outcomes = jobs.iter().map(|_| None).collect();
        let state = Mutex::new(State { next: 0, running: 0, taken: (0, 0), consoles: 0, outcomes });
        Self { needs: jobs.iter().map(need).collect(), room: (memory, cpus), state, changed: Condvar::new() }
    }

    /// The next test, when there is room for it: at least one runs always. `None`: there is no more, or it is to stop.
    fn take(&self, stop: &AtomicBool) -> Option<usize> {
        let mut state = self.lock();
        loop {
            if stop.load(Ordering::Relaxed) {
                return None;
            }
            let at = state.next;
            let &(memory, cpus) = self.needs.get(at)?;
            let (bytes, vcpus) = (state.taken.0 + memory, state.taken.1 + cpus);
            let fits = bytes <= self.room.0 && self.room.1.is_none_or(|room| vcpus <= room);
            if fits || state.running == 0 {
                state.next += 1;
                state.running += 1;
                state.taken = (bytes, vcpus);
                return Some(at);
            }
            state = self.changed.wait_timeout(state, TICK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn finish(&self, at: usize, mut outcome: Outcome) {
        let mut state = self.lock();
        if state.consoles + outcome.console.kept() > CONSOLES {
            outcome.console.keep_end(END);
        }
        state.consoles += outcome.console.kept();
        let (memory, cpus) = self.needs[at];
        state.running -= 1;
        state.taken = (state.taken.0 - memory, state.taken.1 - cpus);
        state.outcomes[at] = Some(outcome);
        self.changed.notify_all();
    }

    fn is_over(&self) -> bool {
        let state = self.lock();
        state.running == 0 && state.next == self.needs.len()
    }

    fn wait(&self) {
        let state = self.lock();
        drop(self.changed.wait_timeout(state, TICK).unwrap_or_else(PoisonError::into_inner));
    }

    fn into_outcomes(self) -> Vec<Option<Outcome>> {
        self.state.into_inner().unwrap_or_else(PoisonError::into_inner).outcomes
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes that programs may take without others being swapped out (MemAvailable in proc_meminfo(5)), less a tenth.
fn memory_available() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: Option<u64> = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse().ok());
    // A kernel that does not say it is older than any with this KVM.
    kib.map_or(u64::MAX, |kib| (kib << 10) / 10 * 9)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn queue(needs: &[(u64, usize)], room: (u64, Option<usize>)) -> Queue {
        let outcomes = needs.iter().map(|_| None).collect();
        let state = Mutex::new(State { next: 0, running: 0, taken: (0, 0), consoles: 0, outcomes });
        Queue { needs: needs.to_vec(), room, state, changed: Condvar::new() }
    }

    fn test_id(number: usize) -> TestId {
        TestId { scenario: number.to_string(), file: "a.toml".into(), cell: Vec::new(), repetition: 0 }
    }

    /// As many as fit are taken from the front.
    fn fit(queue: &Queue) -> usize {
        let stop = AtomicBool::new(false);
        let mut taken = 0;
        loop {
            let state = queue.lock();
            let Some(&(memory, cpus)) = queue.needs.get(state.next) else { return taken };
            let (bytes, vcpus) = (state.taken.0 + memory, state.taken.1 + cpus);
            let waits = bytes > queue.room.0 || queue.room.1.is_some_and(|room| vcpus > room);
            if waits && state.running > 0 {
                return taken;
            }
            drop(state);
            queue.take(&stop).unwrap();
            taken += 1;
        }
    }

    #[test]
    fn machines_wait_for_memory_and_cpus() {
        for (needs, room, fits) in [
            (&[(100 * MIB, 1); 4][..], (1000 * MIB, None), 4),
            (&[(100 * MIB, 1); 4], (250 * MIB, None), 2),
            (&[(100 * MIB, 1); 4], (1000 * MIB, Some(3)), 3),
            (&[(5000 * MIB, 64), (MIB, 1)], (1000 * MIB, Some(2)), 1),
        ] {
            let queue = queue(needs, room);
            assert_eq!(fit(&queue), fits, "{needs:?} {room:?}");
            queue.finish(0, not_run(&test_id(0), Verdict::Skipped, String::new()));
            assert!(fit(&queue) >= usize::from(needs.len() > fits), "one ended, another begins");
        }
    }

    #[test]
    fn consoles_of_a_long_run_are_bounded() {
        let queue = queue(&[(MIB, 1); 3], (MIB, None));
        let stop = AtomicBool::new(false);
        for at in 0..3 {
            assert_eq!(queue.take(&stop), Some(at));
            queue.lock().consoles = if at == 1 { CONSOLES - (10 << 10) } else { 0 };
            let mut outcome = not_run(&test_id(at), Verdict::Passed, String::new());
            outcome.console.push(Duration::ZERO, &vec![b'x'; 20 << 10]);
            queue.finish(at, outcome);
        }
        let kept: Vec<_> = queue.into_outcomes().into_iter().map(|outcome| outcome.unwrap().console.kept()).collect();
        assert_eq!(kept, [20 << 10, END, 20 << 10]);
    }

    #[test]
    fn nothing_is_taken_when_it_is_to_stop() {
        let queue = queue(&[(MIB, 1)], (MIB, None));
        assert_eq!(queue.take(&AtomicBool::new(true)), None);
        assert!(!queue.is_over());
        assert_eq!(queue.take(&AtomicBool::new(false)), Some(0));
        queue.finish(0, not_run(&test_id(0), Verdict::Skipped, String::new()));
        assert!(queue.is_over());
        assert_eq!(queue.take(&AtomicBool::new(false)), None);
    }

    #[test]
    fn this_host_has_memory() {
        assert!((MIB..u64::MAX).contains(&memory_available()));
    }
}
