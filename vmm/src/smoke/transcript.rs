//! What a console said, with times, in bounded memory: its begin and its end. Owned by the thread of its machine.

use std::collections::VecDeque;
use std::time::Duration;

/// Kept of the begin.
const HEAD: usize = 256 << 10;
/// Kept of the end, at most twice as much.
const TAIL: usize = 512 << 10;
/// Times are kept to this.
const RESOLUTION: Duration = Duration::from_millis(1);

/// All bytes of a console, or where there were too many the first 256 KiB and at least the last 512 KiB.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transcript {
    head: Part,
    tail: Part,
    /// Bytes between the two that were dropped.
    dropped: u64,
    /// Line ends in all of it.
    newlines: u64,
}

/// Bytes in a row, and when they came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Part {
    bytes: VecDeque<u8>,
    /// From this byte on (counted from the begin of the console) they came at this time. Ascending in both.
    times: VecDeque<(u64, Duration)>,
    /// How many bytes and line ends came before the first.
    before: u64,
    lines_before: u64,
}

/// A line of a [`Transcript`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TranscriptLine {
    /// From 1.
    pub number: u64,
    /// When its first byte came, from the machine's start.
    pub at: Duration,
    /// Its bytes, without the line end (LF, and CRs before it).
    pub bytes: Vec<u8>,
    /// So many bytes of the console are missing before it, and perhaps its own first ones.
    pub dropped: u64,
}

impl Transcript {
    /// Adds what came `at` this time, which is not before that of the call before.
    pub fn push(&mut self, at: Duration, bytes: &[u8]) {
        let (head, rest) = bytes.split_at(bytes.len().min(HEAD - self.head.bytes.len()));
        self.head.push(at, head);
        self.newlines += count_newlines(bytes);
        if rest.is_empty() {
            return;
        }
        if self.tail.bytes.is_empty() {
            self.tail.before = HEAD as u64;
            self.tail.lines_before = self.head.bytes.iter().filter(|&&byte| byte == b'\n').count() as u64;
        }
        self.tail.push(at, rest);
        if self.tail.bytes.len() > 2 * TAIL {
            let excess = self.tail.bytes.len() - TAIL;
            self.tail.drop_first(excess);
            self.dropped += excess as u64;
        }
    }

    /// Keeps the last `most` bytes only. Nothing is to be added after that.
    pub(super) fn keep_end(&mut self, most: usize) {
        if self.tail.bytes.is_empty() {
            self.tail = std::mem::take(&mut self.head);
        } else {
            self.dropped += std::mem::take(&mut self.head).bytes.len() as u64;
        }
        let excess = self.tail.bytes.len().saturating_sub(most);
        self.tail.drop_first(excess);
        self.tail.bytes.shrink_to_fit();
        self.tail.times.shrink_to_fit();
        self.dropped += excess as u64;
    }

    /// How many bytes are kept.
    pub(super) fn kept(&self) -> usize {
        self.head.bytes.len() + self.tail.bytes.len()
    }

    /// How many bytes came in all.
    pub fn len(&self) -> u64 {
        (self.head.bytes.len() + self.tail.bytes.len()) as u64 + self.dropped
    }

    /// Whether nothing came.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many bytes are missing in the middle.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// The bytes that were kept: those before what is missing, and those after it.
    pub fn bytes(&self) -> (Vec<u8>, Vec<u8>) {
        let copy = |part: &Part| part.bytes.iter().copied().collect();
        (copy(&self.head), copy(&self.tail))
    }

    /// The lines that were kept, the last one also if it has no end yet. The line that what is missing begins in ends
    /// there, and the one in which it ends begins there.
    pub fn lines(&self) -> Vec<TranscriptLine> {
        if self.dropped == 0 {
            // One line may reach from the one part into the other.
            let mut whole = self.head.clone();
            whole.bytes.extend(&self.tail.bytes);
            whole.times.extend(&self.tail.times);
            return whole.lines();
        }
        let mut lines = self.head.lines();
        let first = lines.len();
        lines.extend(self.tail.lines());
        if let Some(line) = lines.get_mut(first) {
            line.dropped = self.dropped;
        }
        lines
    }

    /// The number of the line that the next byte belongs to, from 1.
    pub fn line_number(&self) -> u64 {
        self.newlines + 1
    }
}

impl Part {
    fn push(&mut self, at: Duration, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let position = self.before + self.bytes.len() as u64;
        if self.times.back().is_none_or(|last| at >= last.1 + RESOLUTION) {
            self.times.push_back((position, at));
        }
        self.bytes.extend(bytes);
    }

    fn drop_first(&mut self, count: usize) {
        self.lines_before += self.bytes.drain(..count).filter(|&byte| byte == b'\n').count() as u64;
        self.before += count as u64;
        while self.times.get(1).is_some_and(|second| second.0 <= self.before) {
            self.times.pop_front();
        }
    }

    fn lines(&self) -> Vec<TranscriptLine> {
        let mut lines = Vec::new();
        let mut times = self.times.iter().peekable();
        let mut at = Duration::ZERO;
        let (mut number, mut position) = (self.lines_before + 1, self.before);
        let bytes: Vec<u8> = self.bytes.iter().copied().collect();
        for line in bytes.split_inclusive(|&byte| byte == b'\n') {
            while let Some((_, time)) = times.next_if(|(from, _)| *from <= position) {
                at = *time;
            }
            let end = line.strip_suffix(b"\n").unwrap_or(line);
            let end = end.iter().rposition(|&byte| byte != b'\r').map_or(0, |last| last + 1);
            lines.push(TranscriptLine { number, at, bytes: line[..end].to_vec(), dropped: 0 });
            number += 1;
            position += line.len() as u64;
        }
        lines
    }
}

fn count_newlines(bytes: &[u8]) -> u64 {
    bytes.split(|&byte| byte == b'\n').count() as u64 - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn lines_have_numbers_and_times() {
        let mut console = Transcript::default();
        for (at, bytes) in [(5, "on"), (7, "e\r\n\r\ntw"), (9, "o\nthr\r\r\n"), (20, "last")] {
            console.push(ms(at), bytes.as_bytes());
        }
        let lines = console.lines();
        let seen: Vec<_> = lines.iter().map(|line| (line.number, line.at, line.bytes.as_slice())).collect();
        let expected: [(u64, Duration, &[u8]); 5] =
            [(1, ms(5), b"one"), (2, ms(7), b""), (3, ms(7), b"two"), (4, ms(9), b"thr"), (5, ms(20), b"last")];
        assert_eq!(seen, expected);
        assert_eq!((console.line_number(), console.len(), console.dropped()), (5, 21, 0));
    }

    #[test]
    fn memory_is_bounded_and_numbers_stay_right() {
        let mut console = Transcript::default();
        let mut all = Vec::new();
        for number in 1..=300_000_u64 {
            let line = format!("line {number}\n");
            console.push(ms(number), line.as_bytes());
            all.extend_from_slice(line.as_bytes());
        }
        let (head, tail) = console.bytes();
        assert!(head.len() + tail.len() <= HEAD + 2 * TAIL);
        assert_eq!(console.len(), all.len() as u64);
        assert_eq!(console.dropped(), all.len() as u64 - (head.len() + tail.len()) as u64);
        assert!(all.starts_with(&head) && all.ends_with(&tail));
        let lines = console.lines();
        assert_eq!(lines.iter().filter(|line| line.dropped == console.dropped()).count(), 1);
        for line in lines.iter().filter(|line| line.bytes.starts_with(b"line ")).rev().skip(1).step_by(1000) {
            let said = format!("line {}", line.number);
            assert!(said.as_bytes().starts_with(&line.bytes), "{said}");
            assert_eq!(line.at, ms(line.number));
        }
        assert_eq!(lines.last().map(|line| line.number), Some(300_000));
    }

    #[test]
    fn only_the_end_is_kept() {
        for lines in [10_u64, 1000, 300_000] {
            let mut console = Transcript::default();
            (1..=lines).for_each(|number| console.push(ms(number), format!("line {number}\n").as_bytes()));
            let len = console.len();
            console.keep_end(100);
            assert_eq!((console.len(), console.line_number()), (len, lines + 1));
            assert!(console.kept() <= 100 && console.dropped() == len - console.kept() as u64);
            let kept = console.lines();
            let last = kept.last().unwrap();
            let text = format!("line {lines}");
            assert_eq!((last.number, last.at, last.bytes.as_slice()), (lines, ms(lines), text.as_bytes()));
            assert_eq!(kept[0].dropped, console.dropped());
        }
    }

    #[test]
    fn ten_megabytes_without_a_line_end() {
        let mut console = Transcript::default();
        for at in 0..10_000 {
            console.push(ms(at), &[b'x'; 1024]);
        }
        let lines = console.lines();
        assert_eq!(lines.len(), 2);
        assert_eq!((lines[0].number, lines[1].number, lines[1].dropped), (1, 1, console.dropped()));
        assert_eq!(lines[0].bytes.len() as u64 + lines[1].bytes.len() as u64 + console.dropped(), 10_000 << 10);
    }
}
