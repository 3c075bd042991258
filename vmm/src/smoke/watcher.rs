//! Reads a console: keeps it, makes lines of it, judges them, and finds in order what steps wait for. Memory is bounded,
//! whatever a guest writes. Owned by the thread of the test.

use std::collections::VecDeque;
use std::time::Duration;

use super::pattern::{Pattern, printable};
use super::result::Quote;
use super::transcript::Transcript;
use super::trouble::{Judge, Rules, Trouble, Weight};

/// Where a line that has no end is cut, in bytes; twice as much may wait for its end.
const LONGEST: usize = 8 << 10;
/// Text that waits for a step that looks at it, in bytes; the oldest goes first.
const BACKLOG: usize = 1 << 20;
/// Lines that a failure quotes.
const QUOTED: usize = 20;
/// Lines that a failure says the console ended with.
const LAST: usize = 10;
/// Letters of a line that is quoted.
const WIDEST: usize = 1000;
/// Troubles that are remembered until somebody takes them.
const TROUBLES: usize = 100;

/// How much of a console may be fed before it is looked at, in bytes, so that nothing is cut unseen.
pub(super) const BITE: usize = 4 << 10;

/// A line, or a part of one that is too long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) number: u64,
    pub(super) at: Duration,
    /// Printable.
    pub(super) text: String,
}

/// What looking for a pattern came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// It is in this line; what comes after it is looked at next.
    Here(u64),
    /// It is at the end of what there is, and more may belong to it.
    Perhaps,
    Nowhere,
}

/// A console.
#[derive(Debug)]
pub(super) struct Watcher {
    pub(super) transcript: Transcript,
    judge: Judge,
    /// The line that has no end yet, its number, and when it began.
    open: Vec<u8>,
    number: u64,
    at: Duration,
    /// The begin of the open line was cut off.
    is_cut: bool,
    /// Lines that no step has looked at.
    backlog: VecDeque<Line>,
    waiting: usize,
    /// So many bytes of the text of the first of them, or of the open line, are passed.
    cursor: usize,
    troubles: VecDeque<(Trouble, Quote)>,
    quotes: Vec<Quote>,
    last: VecDeque<Quote>,
}

impl Watcher {
    pub(super) fn new(rules: Rules) -> Self {
        Self {
            transcript: Transcript::default(),
            judge: Judge::new(rules),
            open: Vec::new(),
            number: 1,
            at: Duration::ZERO,
            is_cut: false,
            backlog: VecDeque::new(),
            waiting: 0,
            cursor: 0,
            troubles: VecDeque::new(),
            quotes: Vec::new(),
            last: VecDeque::new(),
        }
    }

    /// Takes what came `at` this time: at most [`BITE`] bytes.
    pub(super) fn feed(&mut self, at: Duration, bytes: &[u8]) {
        self.transcript.push(at, bytes);
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            if self.open.is_empty() {
                self.at = at;
            }
            let (text, ends) = piece.strip_suffix(b"\n").map_or((piece, false), |text| (text, true));
            self.open.extend_from_slice(text);
            if ends {
                let line = std::mem::take(&mut self.open);
                self.take_line(&line);
                self.number += 1;
                self.is_cut = false;
            } else if self.open.len() > 2 * LONGEST {
                let rest = self.open.split_off(LONGEST);
                let cut = std::mem::replace(&mut self.open, rest);
                self.take_line(&cut);
                self.is_cut = true;
            }
        }
    }

    /// Judges the open line too: nothing more will come.
    pub(super) fn finish(&mut self) {
        if !self.open.is_empty() {
            let line = std::mem::take(&mut self.open);
            self.take_line(&line);
        }
    }

    fn take_line(&mut self, bytes: &[u8]) {
        let line = Line { number: self.number, at: self.at, text: printable(bytes) };
        if let Some(mut trouble) = self.judge.judge(&line.text) {
            if self.is_cut {
                // Further on than any match in the part before.
                trouble.at = usize::MAX;
            }
            if trouble.weight == Weight::Fail && self.quotes.is_empty() {
                self.quotes.push(line.quote());
            }
            if self.troubles.len() < TROUBLES {
                self.troubles.push_back((trouble, line.quote()));
            }
        }
        let is_new = self.quotes.last().is_some_and(|last| last.number != line.number);
        if is_new && self.quotes.len() < QUOTED && !line.text.is_empty() {
            self.quotes.push(line.quote());
        }
        if !line.text.trim().is_empty() {
            self.last.push_back(line.quote());
            if self.last.len() > LAST {
                self.last.pop_front();
            }
        }
        self.waiting += line.text.len() + size_of::<Line>();
        self.backlog.push_back(line);
        while self.waiting > BACKLOG {
            self.pop();
        }
    }

    /// The first line that no step has passed, without what is passed of it.
    pub(super) fn next_line(&mut self) -> Option<Line> {
        let from = self.cursor;
        let mut line = self.pop()?;
        line.text = line.text.get(from..).unwrap_or_default().to_owned();
        Some(line)
    }

    fn pop(&mut self) -> Option<Line> {
        let line = self.backlog.pop_front()?;
        self.waiting -= line.text.len() + size_of::<Line>();
        // Behind a line that was cut it may be further on.
        self.cursor = self.cursor.saturating_sub(line.text.len());
        Some(line)
    }

    /// Looks for `pattern` in what no step has passed, and passes it. `settled`: nothing came for a while, so that the end of
    /// what there is is its end.
    pub(super) fn find(&mut self, pattern: &Pattern, settled: bool) -> Found {
        while let Some(line) = self.backlog.front() {
            if let Some(found) = pattern.find(&line.text, at_letter(&line.text, self.cursor)) {
                let number = line.number;
                self.cursor = found.end;
                return Found::Here(number);
            }
            self.pop();
        }
        let text = printable(&self.open);
        let Some(found) = pattern.find(&text, at_letter(&text, self.cursor)) else { return Found::Nowhere };
        if found.end == text.len() && pattern.looks_ahead() && !settled {
            return Found::Perhaps;
        }
        self.cursor = found.end;
        Found::Here(self.number)
    }

    /// Where what [`find`](Self::find) found last ends in its line, in bytes.
    pub(super) fn found_end(&self) -> usize {
        self.cursor
    }

    /// The next sign of trouble that was not taken, and its line.
    pub(super) fn next_trouble(&mut self) -> Option<(Trouble, Quote)> {
        self.troubles.pop_front()
    }

    /// Gives back what was taken, and nobody wanted yet.
    pub(super) fn remember(&mut self, troubles: Vec<(Trouble, Quote)>) {
        self.troubles = troubles.into();
    }

    /// The trouble was none: what comes next may be quoted as the first.
    pub(super) fn forgive(&mut self) {
        self.quotes.clear();
    }

    /// From the first line of trouble on.
    pub(super) fn quotes(&self) -> Vec<Quote> {
        self.quotes.clone()
    }

    /// What the console ends with.
    pub(super) fn last_lines(&self) -> Vec<Quote> {
        let mut last: Vec<_> = self.last.iter().cloned().chain(self.open_quote()).collect();
        last.drain(..last.len().saturating_sub(LAST));
        last
    }

    /// The line that is written just now, or the last one.
    pub(super) fn last_line(&self) -> Option<Quote> {
        self.open_quote().or_else(|| self.last.back().cloned())
    }

    fn open_quote(&self) -> Option<Quote> {
        let line = Line { number: self.number, at: self.at, text: printable(&self.open) };
        (!line.text.trim().is_empty()).then(|| line.quote())
    }
}

impl Line {
    fn quote(&self) -> Quote {
        Quote { number: self.number, at: self.at, text: self.text.chars().take(WIDEST).collect() }
    }
}

/// `at`, or the begin of the letter it is in: text that is not complete may have become other text.
fn at_letter(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn watcher() -> Watcher {
        Watcher::new(Rules::default())
    }

    fn feed(watcher: &mut Watcher, text: &str) {
        watcher.feed(Duration::ZERO, text.as_bytes());
    }

    fn text(text: &str) -> Pattern {
        Pattern::text(text).unwrap()
    }

    #[test]
    fn finds_in_order_and_once() {
        let mut console = watcher();
        feed(&mut console, "one two\r\nthree\n\nlogin: ");
        assert_eq!(console.find(&text("two"), false), Found::Here(1));
        assert_eq!(console.find(&text("three"), false), Found::Here(2));
        assert_eq!(console.find(&text("login: "), false), Found::Here(4));
        assert_eq!(console.find(&text("login: "), false), Found::Nowhere);
        feed(&mut console, "root\nlogin: ");
        assert_eq!(console.find(&text("root"), false), Found::Here(4));
        assert_eq!(console.find(&text("login: "), false), Found::Here(5));
    }

    #[test]
    fn a_prompt_may_come_in_parts() {
        for parts in
            [["lo", "gin", ": "], ["l", "ogin: ", ""], ["\x1b[1", "mlogin:\x1b[", "0m "], ["\0login", "\0", ": "]]
        {
            let mut console = watcher();
            for part in parts {
                feed(&mut console, part);
            }
            assert_eq!(console.find(&text("login: "), false), Found::Here(1), "{parts:?}");
        }
        let mut console = watcher();
        for byte in "gr\u{fc}n> ".as_bytes() {
            console.feed(Duration::ZERO, &[*byte]);
            let _ = console.find(&text("?"), false);
        }
        assert_eq!(console.find(&text("gr\u{fc}n> "), false), Found::Here(1));
    }

    #[test]
    fn a_regular_expression_at_the_end_waits_for_more() {
        let mut console = watcher();
        let ready = Pattern::regex("^ready$").unwrap();
        feed(&mut console, "ready");
        assert_eq!(console.find(&ready, false), Found::Perhaps);
        feed(&mut console, " soon\nready\n");
        assert_eq!(console.find(&ready, false), Found::Here(2));
        let prompt = Pattern::regex("[#$] $").unwrap();
        feed(&mut console, "# ");
        assert_eq!(console.find(&prompt, true), Found::Here(3));
        assert_eq!(console.find(&prompt, true), Found::Nowhere);
    }

    #[test]
    fn megabytes_without_a_line_end_and_a_prompt() {
        for (shift, bites) in [(0, 640), (1, 20), (3, 21), (7, 22)] {
            let mut console = watcher();
            let bite = [b'x'; BITE];
            console.feed(Duration::ZERO, &bite[..shift]);
            for _ in 0..bites {
                console.feed(Duration::ZERO, &bite);
                assert_eq!(console.find(&text("login: "), false), Found::Nowhere);
            }
            feed(&mut console, "log");
            assert_eq!(console.find(&text("login: "), false), Found::Nowhere);
            feed(&mut console, "in: ");
            assert_eq!(console.find(&text("login: "), false), Found::Here(1));
            assert!(console.open.len() + console.waiting <= 4 * LONGEST);
        }
    }

    #[test]
    fn what_nobody_waits_for_is_kept_within_limits() {
        let mut console = watcher();
        for number in 0..100_000 {
            feed(&mut console, &format!("this is the line {number}\n"));
        }
        assert!(console.waiting <= BACKLOG);
        assert!(console.backlog.front().unwrap().number > 50_000);
        assert_eq!(console.find(&text("line 99999"), false), Found::Here(100_000));
    }

    #[test]
    fn trouble_is_quoted_with_what_follows() {
        let mut console = watcher();
        for number in 0..30 {
            feed(&mut console, &format!("before {number}\n"));
        }
        feed(&mut console, "[ 1.0] Kernel panic - not syncing: no\n\nthe trace\n");
        feed(&mut console, "---[ end Kernel panic");
        let (trouble, line) = console.next_trouble().unwrap();
        assert_eq!((trouble.words.as_str(), trouble.panic, line.number), ("kernel panic", true, 31));
        let quotes: Vec<_> = console.quotes().iter().map(|quote| quote.number).collect();
        assert_eq!(quotes, [31, 33]);
        let last = console.last_lines();
        assert_eq!((last.len(), last[LAST - 1].text.as_str()), (LAST, "---[ end Kernel panic"));
        console.forgive();
        assert_eq!((console.next_trouble(), console.quotes().len()), (None, 0));
    }

    proptest! {
        #[test]
        fn how_it_is_cut_does_not_matter(parts in proptest::collection::vec("[a-c\n\u{1b}\\[m]{0,6}", 0..20)) {
            let whole = parts.concat();
            let (mut one, mut many) = (watcher(), watcher());
            feed(&mut one, &whole);
            for part in &parts {
                feed(&mut many, part);
            }
            one.finish();
            many.finish();
            loop {
                let (line, other) = (one.next_line(), many.next_line());
                prop_assert_eq!(&line, &other);
                if line.is_none() {
                    break;
                }
            }
        }
    }
}
