//! What a console wrote, as text that is safe to show and to write into XML and HTML; and times as the formats want them.
//! Any thread.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::smoke::{Transcript, TranscriptLine};

/// Of one line so many bytes are shown.
const LONGEST_LINE: usize = 4096;

const ESCAPE: char = '\x1b';

/// `bytes` as text without line ends: no escape sequences of terminals, other control characters as their pictures
/// (U+2400 and on), U+FFFD for what is no UTF-8, no text, or turns the direction of writing around. Tabs stay.
pub(super) fn visible(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut shown = String::with_capacity(text.len());
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        match letter {
            ESCAPE => skip_sequence(&mut letters),
            '\t' => shown.push(letter),
            '\0'..='\x1f' => shown.extend(char::from_u32(0x2400 + letter as u32)),
            '\x7f' => shown.push('\u{2421}'),
            // The last two are no characters, and the only such pair that XML 1.0 (2.2) does not take.
            '\u{80}'..='\u{9f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{fffe}' | '\u{ffff}' => {
                shown.push('\u{fffd}');
            }
            _ => shown.push(letter),
        }
    }
    shown
}

/// The rest of an escape sequence (ECMA-48, 5.3, 5.4 and 5.6): up to its final byte, or to where it can be none.
fn skip_sequence(letters: &mut std::iter::Peekable<std::str::Chars<'_>>) {
    match letters.peek() {
        Some('[') => {
            letters.next();
            while letters.next_if(|letter| (' '..='?').contains(letter)).is_some() {}
            letters.next_if(|letter| ('@'..='~').contains(letter));
        }
        // A string, such as the title of a window: until BEL or ESC \, or as far as it is text.
        Some(']' | 'P' | 'X' | '^' | '_') => {
            while letters.next_if(|letter| !letter.is_control()).is_some() {}
            if letters.next_if_eq(&'\x07').is_none() && letters.next_if_eq(&ESCAPE).is_some() {
                letters.next_if_eq(&'\\');
            }
        }
        _ => {
            while letters.next_if(|letter| (' '..='/').contains(letter)).is_some() {}
            letters.next_if(|letter| ('0'..='~').contains(letter));
        }
    }
}

/// `text` of ours or of the scenario's, on one line.
pub(super) fn one_line(text: &str) -> String {
    visible(text.replace(['\n', '\r', '\t'], " ").as_bytes())
}

/// The same for several lines; each ends with a line end.
pub(super) fn visible_lines(text: &str) -> String {
    text.lines().map(|line| visible(line.as_bytes()) + "\n").collect()
}

/// Escapes for a text or an attribute of XML 1.0 and of HTML; what XML has no way to say becomes U+FFFD.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len() + text.len() / 16);
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\n' | '\t' => escaped.push(letter),
            '\0'..='\x1f' | '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            _ => escaped.push(letter),
        }
    }
    escaped
}

/// A part of a console.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Shown {
    /// A line, visible.
    Line {
        /// From 1.
        number: u64,
        /// From the machine's start.
        at: Duration,
        /// Without its end.
        text: String,
    },
    /// So many bytes are left out here.
    Gap(u64),
}

/// The first `head` and the last `tail` bytes of a console, in whole lines, each at most as long as is of use.
pub(super) fn excerpt(console: &Transcript, head: usize, tail: usize) -> Vec<Shown> {
    let lines = console.lines();
    let cost = |line: &TranscriptLine| line.bytes.len().min(LONGEST_LINE) + 1;
    let mut budget = head;
    let mut fits = |line: &TranscriptLine| {
        let left = budget.checked_sub(cost(line));
        left.inspect(|left| budget = *left).is_some()
    };
    let first = lines.iter().take_while(|line| fits(line)).count();
    budget = tail;
    let mut fits = |line: &TranscriptLine| {
        let left = budget.checked_sub(cost(line));
        left.inspect(|left| budget = *left).is_some()
    };
    let last = lines[first..].iter().rev().take_while(|line| fits(line)).count();
    let (left_out, last) = (first..lines.len() - last, lines.len() - last);
    let mut shown = Vec::with_capacity(first + lines.len() - last + 2);
    lines[..first].iter().for_each(|line| show(line, &mut shown));
    let bytes = |line: &TranscriptLine| line.dropped + line.bytes.len() as u64 + 1;
    match lines[left_out].iter().map(bytes).sum() {
        0 => {}
        gap => shown.push(Shown::Gap(gap)),
    }
    lines[last..].iter().for_each(|line| show(line, &mut shown));
    shown
}

fn show(line: &TranscriptLine, shown: &mut Vec<Shown>) {
    if line.dropped > 0 {
        shown.push(Shown::Gap(line.dropped));
    }
    let kept = line.bytes.len().min(LONGEST_LINE);
    let text = visible(&line.bytes[..kept]);
    shown.push(Shown::Line { number: line.number, at: line.at, text });
    if kept < line.bytes.len() {
        shown.push(Shown::Gap((line.bytes.len() - kept) as u64));
    }
}

/// The end of a console as plain text, at most `limit` bytes of it, and where something is missing a line that says so.
pub(super) fn console_end(console: &Transcript, limit: usize) -> String {
    let mut text = String::new();
    for shown in excerpt(console, 0, limit) {
        let _ = match shown {
            Shown::Line { text: line, .. } => writeln!(text, "{line}"),
            Shown::Gap(bytes) => writeln!(text, "[skiff: {bytes} bytes left out]"),
        };
    }
    text
}

/// Seconds with three decimals.
pub(super) fn seconds(duration: Duration) -> String {
    format!("{}.{:03}", duration.as_secs(), duration.subsec_millis())
}

/// Date and time in UTC as ISO 8601 has it, to the second, without a zone. Before 1970: its begin.
pub(super) fn utc(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // The calendar repeats after 400 years; a year that begins in March has its odd day last.
    let since_march = days + 719_468;
    let (era, day) = (since_march / 146_097, since_march % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, year) = if month < 10 { (month + 3, era * 400 + year) } else { (month - 9, era * 400 + year + 1) };
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn control_characters_become_visible() {
        for (bytes, text) in [
            (&b"plain\ttext"[..], "plain\ttext"),
            (b"\0\x01\x07\x08\r\n\x7f", "\u{2400}\u{2401}\u{2407}\u{2408}\u{240d}\u{240a}\u{2421}"),
            (b"\xff\xfe caf\xc3\xa9 \xc3", "\u{fffd}\u{fffd} caf\u{e9} \u{fffd}"),
            (b"\xc2\x9b31m", "\u{fffd}31m"),
            ("\u{202e}abc\u{2066}\u{ffff}".as_bytes(), "\u{fffd}abc\u{fffd}\u{fffd}"),
            // What systemd, GRUB and shells write.
            (b"[\x1b[0;32m  OK  \x1b[0m] Started", "[  OK  ] Started"),
            (b"\x1b[?2004hroot@debian:~# \x1b[K\x1b[1;1H", "root@debian:~# "),
            (b"\x1b]0;title\x07after \x1b]8;;x\x1b\\link", "after link"),
            (b"\x1b(Bafter\x1b=\x1b>\x1bM", "after"),
            (b"cut \x1b", "cut "),
            (b"cut \x1b[1;3", "cut "),
            (b"\x1b]never\x01ends", "\u{2401}ends"),
            (b"\x1b\x1b[31mred", "red"),
        ] {
            assert_eq!(visible(bytes), text, "{bytes:?}");
        }
    }

    #[test]
    fn escapes() {
        assert_eq!(escape("<a href=\"x\" b='&'>]]>"), "&lt;a href=&quot;x&quot; b=&#39;&amp;&#39;&gt;]]&gt;");
        assert_eq!(escape("\0\x0b\u{fffe}\t\n"), "\u{fffd}\u{fffd}\u{fffd}\t\n");
    }

    /// date(1) knows the calendar too.
    #[test]
    fn dates() {
        let seconds = [0, 951_782_399, 951_782_400, 951_868_800, 1_798_761_599, 4_107_542_400, 16_725_225_600];
        for seconds in seconds {
            let date = std::process::Command::new("date").args(["-u", "-d", &format!("@{seconds}"), "+%FT%T"]).output();
            let date = String::from_utf8(date.unwrap().stdout).unwrap();
            assert_eq!(utc(UNIX_EPOCH + Duration::from_secs(seconds)), date.trim(), "{seconds}");
        }
    }

    fn console(text: &[u8]) -> Transcript {
        let mut console = Transcript::default();
        console.push(Duration::from_millis(1500), text);
        console
    }

    fn line(number: u64, text: &str) -> Shown {
        Shown::Line { number, at: Duration::from_millis(1500), text: text.into() }
    }

    #[test]
    fn a_console_is_cut_in_the_middle() {
        let console = console(b"aaaa\nbbbb\ncccc\ndddd\neeee\n");
        let all = [line(1, "aaaa"), line(2, "bbbb"), line(3, "cccc"), line(4, "dddd"), line(5, "eeee")];
        assert_eq!(excerpt(&console, 0, 25), all);
        assert_eq!(excerpt(&console, 25, 0), all);
        assert_eq!(excerpt(&console, 10, 15), all);
        assert_eq!(excerpt(&console, 5, 14), [line(1, "aaaa"), Shown::Gap(10), line(4, "dddd"), line(5, "eeee")]);
        assert_eq!(excerpt(&console, 0, 0), [Shown::Gap(25)]);
        assert_eq!(console_end(&console, 9), "[skiff: 20 bytes left out]\neeee\n");
        assert_eq!(excerpt(&Transcript::default(), 0, 9), []);
    }

    #[test]
    fn a_long_line_is_cut() {
        let console = console(&[b"x".repeat(10_000), b"\nend".to_vec()].concat());
        let shown = excerpt(&console, 0, 1 << 20);
        assert_eq!(shown, [line(1, &"x".repeat(4096)), Shown::Gap(5904), line(2, "end")]);
    }

    #[test]
    fn what_was_never_kept_is_said() {
        let mut console = Transcript::default();
        for _ in 0..3000 {
            console.push(Duration::ZERO, &[b'y'; 1024]);
        }
        let text = console_end(&console, 1 << 20);
        assert!(text.contains(&format!("[skiff: {} bytes left out]", console.dropped())), "{}", text.len());
    }

    proptest! {
        #[test]
        fn everything_visible_is_one_line_of_xml(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let text = visible(&bytes);
            prop_assert!(text.chars().all(|letter| letter == '\t' || !letter.is_control()), "{text:?}");
            prop_assert_eq!(escape(&text).contains(['<', '>', '"', '\'']), false);
        }
    }
}
