//! What is seen while tests run. On a terminal: a line a running machine, with its step, its time and what its console
//! wrote last, drawn in place; every test that ended stays above them. Elsewhere: a line when a test begins and when it
//! ends.
//!
//! Threads of machines only say what happened; the thread `progress` writes, so that a terminal that stands still holds up
//! no machine.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::summary::ended;
use super::text::one_line;
use super::{Paint, colours};
use crate::console::terminal;
use crate::smoke::{Event, Observer, TestId, Verdict};

/// The terminal is drawn at most so often.
const FRAME: Duration = Duration::from_millis(100);
/// And at least so often, for the clock.
const CLOCK: Duration = Duration::from_millis(500);
/// Of a terminal that does not tell: rows and columns.
const SIZE: (u16, u16) = (24, 80);

/// Rows and columns of a terminal, as it is now.
type Size = fn() -> Option<(u16, u16)>;

/// The lines of a run in progress. Dropping it, or [`finish`](Self::finish), takes those of running machines away.
pub struct Progress {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Drawn in place.
    is_terminal: bool,
    paint: Paint,
    /// Lines that stay, not yet written.
    lines: Vec<String>,
    running: Vec<Running>,
    total: usize,
    done: usize,
    bad: usize,
    stopping: bool,
    news: News,
    begun: Instant,
}

/// What the thread has to write.
#[derive(Clone, Copy, PartialEq, Eq)]
enum News {
    None,
    Some,
    /// There will be no more.
    Last,
}

/// A machine.
struct Running {
    test: TestId,
    begun: Instant,
    steps: usize,
    /// From 0.
    step: usize,
    title: String,
    said: String,
}

impl Progress {
    /// Writes to `out`; with `size` that is a terminal.
    fn new(out: Box<dyn Write + Send>, size: Option<Size>, colours: bool) -> io::Result<Self> {
        let state = State::new(size.is_some(), Paint(colours));
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let ours = shared.clone();
        let thread = thread::Builder::new().name("progress".into()).spawn(move || ours.write(out, size))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Writes to standard error, in place if that is a terminal.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn on_stderr() -> io::Result<Self> {
        let is_terminal = io::stderr().is_terminal();
        let size: Size = || terminal::size(io::stderr().as_fd());
        Self::new(Box::new(io::stderr()), is_terminal.then_some(size), colours(is_terminal))
    }

    /// Writes what is left to say and takes the lines of running machines away.
    pub fn finish(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.shared.change(|state| state.news = News::Last);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end();
    }
}

impl Observer for Progress {
    fn event(&self, event: Event<'_>) {
        self.shared.change(|state| state.event(event));
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        if state.news == News::None {
            state.news = News::Some;
        }
        change(&mut state);
        self.changed.notify_one();
    }

    /// The thread. Nobody is told if `out` cannot be written: progress is for whoever looks.
    fn write(&self, mut out: Box<dyn Write + Send>, size: Option<Size>) {
        // Rows of running machines that the terminal shows now, the cursor below them.
        let mut drawn = 0;
        loop {
            let (text, is_last) = {
                let mut state = self.lock();
                if state.news == News::None {
                    state = self.changed.wait_timeout(state, CLOCK).unwrap_or_else(PoisonError::into_inner).0;
                }
                let is_last = state.news == News::Last;
                state.news = if is_last { News::Last } else { News::None };
                let (rows, columns) = size.and_then(|size: Size| size()).unwrap_or(SIZE);
                (state.take(&mut drawn, rows.into(), columns.into(), Instant::now()), is_last)
            };
            let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
            if is_last {
                return;
            }
            if size.is_some() {
                thread::sleep(FRAME);
            }
        }
    }
}

impl State {
    /// Before anything happened.
    fn new(is_terminal: bool, paint: Paint) -> Self {
        Self {
            is_terminal,
            paint,
            lines: Vec::new(),
            running: Vec::new(),
            total: 0,
            done: 0,
            bad: 0,
            stopping: false,
            news: News::None,
            begun: Instant::now(),
        }
    }

    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Planned { tests, jobs } => {
                self.total = tests.len();
                if !self.is_terminal {
                    let plural = if tests.len() == 1 { "" } else { "s" };
                    self.lines.push(format!("{} test{plural}, at most {jobs} at a time", tests.len()));
                }
            }
            Event::Started { test, steps, .. } => {
                let begun = Instant::now();
                let (test, title, said) = (test.clone(), String::new(), String::new());
                if !self.is_terminal {
                    self.lines.push(format!("begins  {}", one_line(&test.to_string())));
                }
                self.running.push(Running { test, begun, steps, step: 0, title, said });
            }
            Event::StepBegan { test, step, title } => self.of(test, |it| {
                it.step = step;
                it.title = one_line(title);
            }),
            Event::StepEnded { .. } => {}
            Event::Line { test, text, .. } => self.of(test, |it| it.said = one_line(text)),
            Event::Ended { outcome } => {
                self.running.retain(|running| running.test != outcome.test);
                self.done += 1;
                self.bad += usize::from(matches!(outcome.verdict, Verdict::Failed | Verdict::Error));
                self.lines.push(ended(outcome, self.paint));
            }
            Event::Stopping => {
                self.stopping = true;
                if !self.is_terminal {
                    self.lines.push("stopping".to_owned());
                }
            }
        }
    }

    fn of(&mut self, test: &TestId, change: impl FnOnce(&mut Running)) {
        if let Some(running) = self.running.iter_mut().find(|running| running.test == *test) {
            change(running);
        }
    }

    /// What to write now; `drawn` rows are there already, and are drawn over.
    fn take(&mut self, drawn: &mut usize, rows: usize, columns: usize, now: Instant) -> String {
        let mut text = String::new();
        if *drawn > 0 {
            // Up, to the first column, and clear to the end (ECMA-48, 8.3.22 CUU, 8.3.39 ED).
            text = format!("\x1b[{drawn}A\r\x1b[J");
            *drawn = 0;
        }
        for line in self.lines.drain(..) {
            text += &line;
            text.push('\n');
        }
        if self.is_terminal && self.news != News::Last && self.total > 0 {
            let frame = self.frame(rows, columns, now);
            *drawn = frame.len();
            for line in frame {
                text += &line;
                text.push('\n');
            }
        }
        text
    }

    /// The lines of the running machines, and one about all, none wider than the terminal and all of them not higher.
    fn frame(&self, rows: usize, columns: usize, now: Instant) -> Vec<String> {
        // The last column of a terminal may wrap.
        let columns = columns.saturating_sub(1).max(1);
        let shown = self.running.len().min(rows.saturating_sub(3).max(1));
        let names: Vec<String> = self.running[..shown].iter().map(|it| one_line(&it.test.to_string())).collect();
        let names: Vec<String> = names.iter().map(|name| cut(name, columns / 3)).collect();
        let widest = names.iter().map(|name| width(name)).max().unwrap_or(0);
        let mut frame = Vec::with_capacity(shown + 1);
        for (running, name) in self.running.iter().zip(names) {
            let seconds = now.saturating_duration_since(running.begun).as_secs();
            let pad = " ".repeat(widest - width(&name));
            let (step, steps) = (running.step + 1, running.steps);
            let title = cut(&running.title, columns / 3);
            let plain = cut(&format!("{name}{pad} {seconds:>4} s  {step}/{steps} {title}"), columns);
            let left = columns.saturating_sub(width(&plain) + 3);
            let said = if left > 8 { cut(running.said.trim(), left) } else { String::new() };
            let said = if said.is_empty() { said } else { format!(" | {said}") };
            frame.push(plain + &self.paint.dim(&said));
        }
        let hidden = self.running.len() - shown;
        let hidden = if hidden > 0 { format!(" ({hidden} not shown)") } else { String::new() };
        let failed = if self.bad > 0 { format!(", {} failed", self.bad) } else { String::new() };
        let stopping = if self.stopping { "; stopping" } else { "" };
        let (done, total, running) = (self.done, self.total, self.running.len());
        let seconds = now.saturating_duration_since(self.begun).as_secs();
        let all = format!("{done} of {total} done{failed}, {running} running{hidden}, {seconds} s{stopping}");
        frame.push(cut(&all, columns));
        frame
    }
}

/// Columns that a text takes at most: what is not ASCII may take two.
fn width(text: &str) -> usize {
    text.chars().map(|letter| if letter.is_ascii() { 1 } else { 2 }).sum()
}

/// As much of a text as `columns` take; a tab is one.
fn cut(text: &str, columns: usize) -> String {
    let mut left = columns;
    let fits = |letter: &char| {
        let rest = left.checked_sub(if letter.is_ascii() { 1 } else { 2 });
        rest.inspect(|rest| left = *rest).is_some()
    };
    text.chars().map(|letter| if letter == '\t' { ' ' } else { letter }).take_while(fits).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::smoke::report::sample;

    fn state(is_terminal: bool) -> State {
        State::new(is_terminal, Paint(false))
    }

    /// Both machines of the matrix run, and the first has said something.
    fn begin(state: &mut State) {
        let run = sample::run();
        let tests: Vec<_> = run.outcomes.iter().map(|outcome| outcome.test.clone()).collect();
        state.event(Event::Planned { tests: &tests, jobs: 2 });
        for test in &tests[..2] {
            state.event(Event::Started { test, steps: 3, limit: Duration::from_secs(60) });
        }
        state.event(Event::StepBegan { test: &tests[0], step: 1, title: "wait for \"login: \"" });
        let text = "  [  OK  ] Reached \x1b[31mtarget\0 Caf\u{e9}.";
        state.event(Event::Line { test: &tests[0], at: Duration::ZERO, text });
    }

    #[test]
    fn plain_lines() {
        let mut state = state(false);
        begin(&mut state);
        for outcome in &sample::run().outcomes {
            state.event(Event::Ended { outcome });
        }
        state.event(Event::Stopping);
        let expected = "5 tests, at most 2 at a time\nbegins  boot [cpus=1]\nbegins  boot [cpus=2]\n\
                        ok      boot [cpus=1] (3.2 s)\n\
                        FAILED  boot [cpus=2] (20.1 s): no \"login: \" within 20 s\n\
                        FAILED  panic & co #1 (1.6 s): kernel panic while waiting for \"login: \"\n\
                        ERROR   panic & co #2 (0 s): /dev/kvm: permission denied\n\
                        skipped panic & co #3: the run was stopped\nstopping\n";
        assert_eq!(state.take(&mut 0, 24, 80, Instant::now()), expected);
        assert_eq!(state.take(&mut 0, 24, 80, Instant::now()), "");
    }

    #[test]
    fn lines_of_running_machines_are_drawn_in_place() {
        let mut state = state(true);
        begin(&mut state);
        let (mut drawn, now) = (0, Instant::now());
        let first = "boot [cpus=1]    0 s  2/3 wait for \"login: \" | [  OK  ] Reached target\u{2400} Caf\u{e9}.\n\
                     boot [cpus=2]    0 s  1/3 \n0 of 5 done, 2 running, 0 s\n";
        assert_eq!(state.take(&mut drawn, 24, 80, now), first);
        assert_eq!(drawn, 3);
        state.event(Event::Ended { outcome: &sample::run().outcomes[1] });
        let second = "\x1b[3A\r\x1b[JFAILED  boot [cpus=2] (20.1 s): no \"login: \" within 20 s\n\
                      boot [cpus=1]    0 s  2/3 wait for \"login: \" | [  OK  ] Reached target\u{2400} Caf\u{e9}.\n\
                      1 of 5 done, 1 failed, 1 running, 0 s\n";
        assert_eq!(state.take(&mut drawn, 24, 80, now), second);
        state.news = News::Last;
        assert_eq!(state.take(&mut drawn, 24, 80, now), "\x1b[2A\r\x1b[J");
        assert_eq!(drawn, 0);
    }

    #[test]
    fn no_line_wraps_and_none_scrolls() {
        let mut state = state(true);
        begin(&mut state);
        for number in 0..50 {
            let test = TestId { repetition: number, ..sample::hostile().outcomes[0].test.clone() };
            state.event(Event::Started { test: &test, steps: 3, limit: Duration::from_secs(60) });
            let said = "\u{4e2d}\u{6587}".repeat(100);
            state.event(Event::Line { test: &test, at: Duration::ZERO, text: &said });
        }
        for (rows, columns) in [(24, 80), (10, 200), (4, 20), (1, 1), (0, 0)] {
            let frame = state.frame(rows, columns, Instant::now());
            assert!(frame.len() <= rows.max(2), "{rows}: {}", frame.len());
            assert!(frame.iter().all(|line| width(line) < columns.max(2)), "{columns}: {frame:?}");
        }
        assert!(state.frame(24, 80, Instant::now()).last().unwrap().contains("52 running (31 not shown)"));
    }

    /// The thread writes everything that was said before it ends.
    #[test]
    fn the_last_words_are_written() {
        #[derive(Clone, Default)]
        struct Sink(Arc<Mutex<Vec<u8>>>);
        impl Write for Sink {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        for size in [None, Some((|| Some((24, 80))) as Size)] {
            let sink = Sink::default();
            let progress = Progress::new(Box::new(sink.clone()), size, false).unwrap();
            for outcome in &sample::run().outcomes {
                progress.event(Event::Ended { outcome });
            }
            progress.finish();
            let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
            assert!(text.ends_with("skipped panic & co #3: the run was stopped\n"), "{text:?}");
        }
    }
}
