//! What a machine writes, collected by one reader thread per stream and awaited by the test thread.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// The output of one stream so far. Carriage returns are left out, so that a line ends as it does in a file.
#[derive(Clone, Debug, Default)]
pub struct Console {
    shared: Arc<(Mutex<Seen>, Condvar)>,
}

#[derive(Debug, Default)]
struct Seen {
    text: String,
    /// Everything before this byte was awaited already.
    cursor: usize,
    ended: bool,
}

impl Console {
    /// Starts the thread that reads the stream until its end.
    pub fn reading(mut stream: impl Read + Send + 'static) -> Self {
        let console = Self::default();
        let writer = console.clone();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            // A pseudoterminal whose other end was closed reports an error instead of an end.
            while let Ok(count @ 1..) = stream.read(&mut buffer) {
                writer.lock().text.push_str(&String::from_utf8_lossy(&buffer[..count]).replace('\r', ""));
                writer.shared.1.notify_all();
            }
            writer.lock().ended = true;
            writer.shared.1.notify_all();
        });
        console
    }

    /// Everything so far.
    pub fn text(&self) -> String {
        self.lock().text.clone()
    }

    /// Waits until `pattern` appears after what was awaited before, and returns the text in between.
    ///
    /// # Errors
    /// What happened instead: the stream ended, or the time was up.
    pub fn wait_for(&self, pattern: &str, limit: Duration) -> Result<String, String> {
        let deadline = Instant::now() + limit;
        let mut seen = self.lock();
        loop {
            let start = seen.cursor;
            if let Some(found) = seen.text[start..].find(pattern) {
                seen.cursor = start + found + pattern.len();
                return Ok(seen.text[start..start + found].to_owned());
            }
            if seen.ended {
                return Err(format!("the output ended before {pattern:?}"));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!("no {pattern:?} within {limit:?}"));
            }
            seen = self.shared.1.wait_timeout(seen, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until the stream has ended: the process and all that hold its output are gone.
    ///
    /// # Errors
    /// If the time was up.
    pub fn wait_for_end(&self, limit: Duration) -> Result<(), String> {
        let seen = self.lock();
        let (_seen, timeout) =
            self.shared.1.wait_timeout_while(seen, limit, |seen| !seen.ended).unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() { Err(format!("no end of the output within {limit:?}")) } else { Ok(()) }
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(10);
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn waits_in_order_and_tells_what_is_missing() {
        let console = Console::reading(&b"one\r\ntwo\r\nthree"[..]);
        assert_eq!(console.wait_for("two\n", LONG), Ok("one\n".into()));
        assert_eq!(console.wait_for("one", LONG), Err("the output ended before \"one\"".into()));
        assert_eq!(console.wait_for("three", LONG), Ok(String::new()));
        assert_eq!(console.wait_for_end(LONG), Ok(()));
        assert_eq!(console.text(), "one\ntwo\nthree");
    }

    #[test]
    fn gives_up() {
        let (reader, writer) = std::io::pipe().unwrap();
        let console = Console::reading(reader);
        assert_eq!(console.wait_for("x", SHORT), Err("no \"x\" within 10ms".into()));
        assert_eq!(console.wait_for_end(SHORT), Err("no end of the output within 10ms".into()));
        drop(writer);
        assert_eq!(console.wait_for_end(LONG), Ok(()));
    }
}
