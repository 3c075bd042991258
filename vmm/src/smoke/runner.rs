//! All tests of a run: as many machines at a time as the host has room for, each on a thread of its own, which takes one test
//! after the other.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Instant, SystemTime};

use anyhow::Context;

use super::disks::Prepared;
use super::observer::{Event, Observer};
use super::queue::Queue;
use super::result::{Failure, Outcome, Run, TestId, Verdict};
use super::room;
use super::scenario::{Cell, Scenario};
use super::session::{Session, Surroundings};

/// Besides a machine's memory, what it and its test take.
const OVERHEAD: u64 = 32 << 20;
/// Bytes of a test's name that become the name of a folder; filesystems take 255.
const LONGEST_NAME: usize = 200;

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
    /// Of `--keep`: no other test's.
    folder: String,
}

impl Job<'_> {
    /// What it takes: bytes, CPUs.
    fn need(&self) -> (u64, usize) {
        (self.cell.machine.memory.size + OVERHEAD, self.cell.machine.cpus as usize)
    }
}

impl Plan {
    /// The tests, in the order of the results.
    pub fn tests(&self) -> Vec<TestId> {
        self.select().into_iter().map(|job| job.test).collect()
    }

    fn select(&self) -> Vec<Job<'_>> {
        let (mut selected, mut given) = (Vec::new(), HashMap::new());
        for scenario in &self.scenarios {
            for cell in &scenario.cells {
                for number in 1..=self.repeat {
                    let repetition = if self.repeat == 1 { 0 } else { number };
                    let (name, file) = (scenario.name.clone(), scenario.file.clone());
                    let test = TestId { scenario: name, file, cell: cell.keys.clone(), repetition };
                    let name = test.to_string();
                    // Of those that are left out too: the names do not depend on the filters.
                    let folder = distinct(folder_name(&name), &mut given);
                    if self.filters.is_empty() || self.filters.iter().any(|filter| name.contains(filter)) {
                        selected.push(Job { test, scenario, cell, folder });
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
    let cpus = room::cpus();
    let jobs = plan.jobs.unwrap_or(cpus).clamp(1, selected.len().max(1));
    observer.event(Event::Planned { tests: &tests, jobs });
    let surroundings = Surroundings { observer, stop, began };
    let queue =
        Queue::new(selected.iter().map(Job::need).collect(), room::memory(), plan.jobs.is_none().then_some(cpus));
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
    let error = |error: &anyhow::Error| {
        let is_stopped = surroundings.stop.load(Ordering::Relaxed);
        let verdict = if is_stopped { Verdict::Skipped } else { Verdict::Error };
        Outcome { began, ..not_run(&job.test, verdict, format!("{error:#}")) }
    };
    let prepared = match Prepared::new(job.scenario, job.cell, keep.is_some(), surroundings.stop) {
        Ok(prepared) => prepared,
        Err(what) => return error(&what),
    };
    let started = Session::start(surroundings, job.scenario, job.cell, &job.test, &prepared, prepared.command());
    let mut outcome = match started.context("skiff itself cannot be started") {
        Ok(session) => session.run(),
        Err(what) => return error(&what),
    };
    if let Some(folder) = keep.filter(|_| matches!(outcome.verdict, Verdict::Failed | Verdict::Error)) {
        match keep_all(&folder.join(&job.folder), &outcome, job.cell, &prepared, surroundings.stop) {
            Ok(()) => outcome.kept = Some(folder.join(&job.folder)),
            Err(error) => tracing::warn!("--keep {}: {}: {error}", folder.display(), job.test),
        }
    }
    outcome
}

/// Leaves what a failure needs to be looked into.
fn keep_all(
    folder: &Path,
    outcome: &Outcome,
    cell: &Cell,
    prepared: &Prepared,
    stop: &AtomicBool,
) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let (begin, rest) = outcome.console.bytes();
    let dropped = outcome.console.dropped();
    let gap = if dropped == 0 { String::new() } else { format!("\n[... {dropped} bytes ...]\n") };
    std::fs::write(folder.join("console.log"), [&begin, gap.as_bytes(), &rest].concat())?;
    std::fs::write(folder.join("messages.log"), &outcome.messages)?;
    prepared.keep(cell, folder, stop)
}

/// What the folder of a test is called: letters that no shell minds, and no more of them than a file's name may have.
fn folder_name(test: &str) -> String {
    let plain = |letter: char| if letter.is_alphanumeric() || "=._-#".contains(letter) { letter } else { '_' };
    let mut name: String = test.chars().map(plain).collect();
    name.truncate((0..=LONGEST_NAME.min(name.len())).rev().find(|at| name.is_char_boundary(*at)).unwrap_or(0));
    // Neither hidden nor a folder that is there already.
    if name.starts_with('.') { format!("_{name}") } else { name }
}

/// `name`, with a number behind it if it was given before: tests may have the same name, or differ in what a folder's has no
/// room or no letters for.
fn distinct(name: String, given: &mut HashMap<String, u32>) -> String {
    let times = given.entry(name.clone()).or_default();
    *times += 1;
    if *times == 1 {
        return name;
    }
    let numbered = format!("{name}-{times}");
    distinct(numbered, given)
}

fn not_run(test: &TestId, verdict: Verdict, summary: String) -> Outcome {
    let failure = Failure { summary, step: None, place: None, quotes: Vec::new(), last_lines: Vec::new() };
    Outcome { failure: Some(failure), ..Outcome::new(test.clone(), verdict) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_tests_have_names_that_fit() {
        assert_eq!(folder_name("boot [cpus=2] #3"), "boot__cpus=2__#3");
        let parent = tempfile::tempdir().unwrap();
        let (long, wide) = ("x".repeat(300), "\u{4e2d}".repeat(300));
        let same = ["a b", "a_b", "a:b", "a_b", "a_b-2", "..", ".", "_.", &long, &(long.clone() + "y"), &wide, &wide];
        let mut given = HashMap::new();
        let names = same.map(|test| distinct(folder_name(test), &mut given));
        assert_eq!(names[..5], ["a_b", "a_b-2", "a_b-3", "a_b-4", "a_b-2-2"]);
        for name in names {
            std::fs::create_dir(parent.path().join(name)).unwrap();
        }
    }
}
