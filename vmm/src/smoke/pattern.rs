//! What is looked for on a console, and what of its bytes counts as text. Any thread.

use std::fmt;
use std::ops::Range;

use regex_lite::Regex;

/// A text or a regular expression, found within one line.
#[derive(Clone, Debug)]
pub(super) enum Pattern {
    Text(String),
    Regex(Regex),
}

impl Pattern {
    /// A text that can be found: not empty, and of one line.
    pub(super) fn text(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("an empty text is everywhere; write what to look for".to_owned());
        }
        if text.contains(char::is_control) {
            return Err("a text is looked for within a line, without control characters; leave them out".to_owned());
        }
        Ok(Self::Text(text.to_owned()))
    }

    /// A regular expression, as Rust's crate regex-lite has them.
    pub(super) fn regex(text: &str) -> Result<Self, String> {
        let regex = Regex::new(text).map_err(|error| format!("no regular expression: {error}"))?;
        if regex.is_match("") {
            return Err("it matches where nothing is; write what to look for".to_owned());
        }
        Ok(Self::Regex(regex))
    }

    /// Where it is in `line` for the first time, from the byte `from` on; `^` is the begin of the line all the same.
    pub(super) fn find(&self, line: &str, from: usize) -> Option<Range<usize>> {
        match self {
            Self::Text(text) => line.get(from..)?.find(text).map(|at| from + at..from + at + text.len()),
            Self::Regex(regex) => regex.find_at(line, from).map(|found| found.range()),
        }
    }

    /// Whether it is in one of the lines of `text`.
    pub(super) fn is_in(&self, text: &str) -> bool {
        text.lines().any(|line| self.find(line, 0).is_some())
    }

    /// Whether more text behind a match may change it.
    pub(super) fn looks_ahead(&self) -> bool {
        matches!(self, Self::Regex(_))
    }
}

/// As a scenario has it: a text in quotes, a regular expression between slashes.
impl fmt::Display for Pattern {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => write!(out, "{text:?}"),
            Self::Regex(regex) => write!(out, "/{regex}/"),
        }
    }
}

/// `bytes` as a person reads them: the escape sequences of a terminal and control characters other than tabs left out, what
/// is no UTF-8 as U+FFFD.
pub(super) fn printable(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    let lossy = String::from_utf8_lossy(bytes);
    let mut letters = lossy.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '\x1b' => skip_escape(&mut letters),
            '\t' => text.push(letter),
            _ if letter.is_control() => {}
            _ => text.push(letter),
        }
    }
    text
}

/// Passes what belongs to an escape sequence behind its ESC (ECMA-48, 5.3, 5.4 and 8.3.89), as far as it is there.
fn skip_escape(letters: &mut std::str::Chars<'_>) {
    let mut rest = letters.clone();
    match rest.next() {
        // CSI: parameters and intermediate bytes, then a final byte.
        Some('[') => {
            for letter in rest.by_ref() {
                if !(' '..='?').contains(&letter) {
                    break;
                }
            }
        }
        // OSC: until BEL or ST.
        Some(']') => {
            let mut last = ' ';
            for letter in rest.by_ref() {
                if letter == '\x07' || (last, letter) == ('\x1b', '\\') {
                    break;
                }
                last = letter;
            }
        }
        // Character sets have one more byte.
        Some('(' | ')' | '#') => _ = rest.next(),
        Some(_) | None => {}
    }
    *letters = rest;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn text_and_regular_expressions_are_found_in_order() {
        let text = Pattern::text("login: ").unwrap();
        assert_eq!(text.find("login: login: ", 1), Some(7..14));
        assert_eq!(text.find("login:", 0), None);
        assert_eq!(text.find("login: ", 40), None);
        let regex = Pattern::regex("^[a-z]+[$#] ").unwrap();
        assert_eq!(regex.find("root# ls", 0), Some(0..6));
        assert_eq!(regex.find("root# ls# ", 6), None, "^ is where the line begins");
        assert!(Pattern::regex("b$").unwrap().is_in("a\nab\nc"));
        assert_eq!((text.to_string(), regex.to_string()), ("\"login: \"".into(), "/^[a-z]+[$#] /".into()));
    }

    #[test]
    fn what_cannot_be_looked_for() {
        assert!(Pattern::text("").unwrap_err().contains("empty"));
        assert!(Pattern::text("a\nb").unwrap_err().contains("within a line"));
        assert!(Pattern::regex("a(b").unwrap_err().starts_with("no regular expression: "));
        assert!(Pattern::regex("a*").unwrap_err().contains("where nothing is"));
    }

    #[test]
    fn only_text_is_left() {
        for (bytes, text) in [
            (&b"a\0b\x07c\td"[..], "abc\td"),
            (b"[\x1b[0;32m  OK  \x1b[0m] Started", "[  OK  ] Started"),
            (b"\x1b]0;title\x07$ \x1b]0;other\x1b\\# ", "$ # "),
            (b"\x1b(Bx\x1b7y\x1b", "xy"),
            (b"cut \x1b[0;3", "cut "),
            (b"\xff\xc3\xa4\xc3", "\u{fffd}\u{e4}\u{fffd}"),
        ] {
            assert_eq!(printable(bytes), text);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in any::<Vec<u8>>(), escapes in "[\u{1b}\\[\\]()a-z0-9;\u{7}\\\\]{0,20}") {
            for bytes in [&bytes[..], escapes.as_bytes()] {
                prop_assert!(printable(bytes).chars().all(|letter| letter == '\t' || !letter.is_control()));
            }
        }
    }
}
