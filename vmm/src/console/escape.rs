//! The escape keys of the console, as QEMU has them: `Ctrl-A` and one more key. Pure: bytes in, what they mean out.

const CTRL_A: u8 = 0x01;

/// What `Ctrl-A h` prints.
pub(super) const HELP: &str = "\r\n\
    Ctrl-A h       this list\r\n\
    Ctrl-A x       end the machine at once\r\n\
    Ctrl-A p       press the power button\r\n\
    Ctrl-A c       continue, when a disk's error has paused the machine\r\n\
    Ctrl-A Ctrl-A  send Ctrl-A to the guest (also Ctrl-A a)\r\n";

/// What one byte from the terminal means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    /// It is for the guest.
    Guest(u8),
    /// `Ctrl-A x`.
    Quit,
    /// `Ctrl-A p`.
    PowerButton,
    /// `Ctrl-A c`.
    Continue,
    /// `Ctrl-A h`.
    Help,
    /// The first half of an escape, or an unknown one, which is swallowed.
    Nothing,
}

/// The parser. It remembers a `Ctrl-A` from one read to the next.
#[derive(Debug, Default)]
pub(super) struct Escape {
    pending: bool,
}

impl Escape {
    /// Takes the next byte.
    pub(super) fn key(&mut self, byte: u8) -> Key {
        if !self.pending {
            self.pending = byte == CTRL_A;
            return if self.pending { Key::Nothing } else { Key::Guest(byte) };
        }
        self.pending = false;
        match byte {
            CTRL_A | b'a' => Key::Guest(CTRL_A),
            b'x' => Key::Quit,
            b'p' => Key::PowerButton,
            b'c' => Key::Continue,
            b'h' | b'?' => Key::Help,
            _ => Key::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(input: &[u8]) -> Vec<Key> {
        let mut escape = Escape::default();
        input.iter().map(|byte| escape.key(*byte)).filter(|key| *key != Key::Nothing).collect()
    }

    fn guest(input: &[u8]) -> Vec<Key> {
        input.iter().map(|byte| Key::Guest(*byte)).collect()
    }

    #[test]
    fn plain_bytes_pass_untouched() {
        let bytes: Vec<u8> = (0..=255).filter(|byte| *byte != 1).collect();
        assert_eq!(keys(&bytes), guest(&bytes));
    }

    #[test]
    fn each_escape_has_its_meaning() {
        assert_eq!(keys(b"\x01x"), [Key::Quit]);
        assert_eq!(keys(b"\x01p"), [Key::PowerButton]);
        assert_eq!(keys(b"\x01c"), [Key::Continue]);
        assert_eq!(keys(b"\x01h"), [Key::Help]);
        assert_eq!(keys(b"\x01?"), [Key::Help]);
        assert_eq!(keys(b"\x01\x01"), guest(b"\x01"));
        assert_eq!(keys(b"\x01a"), guest(b"\x01"));
    }

    #[test]
    fn an_escape_ends_with_its_key() {
        assert_eq!(keys(b"ax\x01qx\x01\x01x"), guest(b"axx\x01x"));
        assert_eq!(keys(b"\x01\x01\x01x"), [Key::Guest(1), Key::Quit]);
    }

    #[test]
    fn an_escape_may_be_split_between_reads() {
        let mut escape = Escape::default();
        assert_eq!(escape.key(1), Key::Nothing);
        // The next read starts here; the parser is the same.
        assert_eq!(escape.key(b'x'), Key::Quit);
        assert_eq!(escape.key(b'x'), Key::Guest(b'x'));
    }
}
