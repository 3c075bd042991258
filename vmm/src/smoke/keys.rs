//! The names of keys that a scenario can press, and what a terminal sends for them. Any thread.

/// What the key `name` sends: a name below, `ctrl-` and a letter or one of `[ \ ] ^ _`, or a single letter.
pub(super) fn bytes(name: &str) -> Result<Vec<u8>, String> {
    if let Some((_, bytes)) = NAMED.iter().find(|key| key.0 == name) {
        return Ok(bytes.to_vec());
    }
    if let Some(&[letter]) = name.strip_prefix("ctrl-").map(str::as_bytes)
        && (b'@'..=b'_').contains(&letter.to_ascii_uppercase())
    {
        // ASCII: a control character is 64 below its letter.
        return Ok(vec![letter.to_ascii_uppercase() - b'@']);
    }
    let mut letters = name.chars();
    match (letters.next(), letters.next()) {
        (Some(letter), None) if !letter.is_control() => Ok(name.as_bytes().to_vec()),
        _ => {
            let names: Vec<_> = NAMED.iter().map(|key| key.0).collect();
            Err(format!("no such key; write ctrl-c, a single letter, or one of {}", names.join(", ")))
        }
    }
}

/// As a VT102, which Linux takes a serial console for, sends them.
const NAMED: [(&str, &[u8]); 12] = [
    ("enter", b"\r"),
    ("tab", b"\t"),
    ("esc", b"\x1b"),
    ("space", b" "),
    ("backspace", b"\x7f"),
    ("delete", b"\x1b[3~"),
    ("up", b"\x1b[A"),
    ("down", b"\x1b[B"),
    ("right", b"\x1b[C"),
    ("left", b"\x1b[D"),
    ("home", b"\x1b[1~"),
    ("end", b"\x1b[4~"),
];

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn keys() {
        for (name, sent) in [
            ("ctrl-c", "\x03"),
            ("ctrl-D", "\x04"),
            ("ctrl-]", "\x1d"),
            ("enter", "\r"),
            ("y", "y"),
            ("\u{e4}", "\u{e4}"),
        ] {
            assert_eq!(bytes(name), Ok(sent.as_bytes().to_vec()), "{name}");
        }
        for name in ["", "ctrl-", "ctrl-1", "ctrl-ab", "return", "\n"] {
            assert!(bytes(name).unwrap_err().starts_with("no such key; write ctrl-c, "), "{name}");
        }
    }
}
