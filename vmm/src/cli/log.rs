//! Log lines: `skiff: warning: ...` on stderr, or with time and level in a file. Set up on the main thread, written by
//! any.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use clap::Args;
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::registry::LookupSpan;

use super::Failure;

#[derive(Debug, Args)]
#[command(next_help_heading = "Messages")]
pub(super) struct LogArgs {
    /// Say more: -v a line for each device, -vv what helps to find a fault, -vvv everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Say less: -q errors only, -qq nothing but why a start failed
    #[arg(short, long, global = true, action = clap::ArgAction::Count, conflicts_with = "verbose")]
    quiet: u8,
    /// Append messages to this file, with the time, instead of writing them to stderr
    #[arg(long, global = true, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    log_file: Option<PathBuf>,
}

impl LogArgs {
    /// Starts logging for the whole process. Called once.
    pub(super) fn start(&self) -> Result<(), Failure> {
        let level = match (self.quiet, self.verbose) {
            (2.., _) => LevelFilter::OFF,
            (1, _) => LevelFilter::ERROR,
            (0, 0) => LevelFilter::WARN,
            (0, 1) => LevelFilter::INFO,
            (0, 2) => LevelFilter::DEBUG,
            (0, _) => LevelFilter::TRACE,
        };
        let log = tracing_subscriber::fmt().with_max_level(level).with_ansi(false);
        let Some(path) = &self.log_file else {
            log.event_format(Line { dated: false }).with_writer(Stderr::here).init();
            return Ok(());
        };
        let file = OpenOptions::new().append(true).create(true).open(path).map_err(|error| {
            let path = path.display();
            Failure::Usage(format!("--log-file {path}: {error}; name a file that can be written"))
        })?;
        let file = FILE.get_or_init(|| Arc::new(file)).clone();
        log.event_format(Line { dated: true }).with_writer(move || LogFile(file.clone())).init();
        Ok(())
    }
}

/// Writes the reason of a failure to stderr, whatever the log goes to: one line, whatever `line` contains.
pub(super) fn last_line(line: &str) {
    let line: String = line.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect();
    let _ = writeln!(Stderr::here(), "skiff: {line}");
}

/// Writes `text`, whole lines that are no log line, to where log lines go, at every level.
pub(super) fn block(text: &str) {
    // Neither fails: the file hands to stderr what it does not take, and stderr takes everything.
    let _ = match FILE.get() {
        Some(file) => LogFile(file.clone()).write_all(text.as_bytes()),
        None => Stderr::here().write_all(text.as_bytes()),
    };
}

/// The file of `--log-file`, if there is one.
static FILE: OnceLock<Arc<File>> = OnceLock::new();

/// One event as a line.
struct Line {
    /// With time and level for a file; else in words for a person.
    dated: bool,
}

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let metadata = event.metadata();
        if self.dated {
            SystemTime.format_time(&mut out)?;
            write!(out, " {} {}: ", metadata.level(), metadata.target())?;
        } else {
            out.write_str(match *metadata.level() {
                Level::ERROR => "skiff: error: ",
                Level::WARN => "skiff: warning: ",
                Level::INFO => "skiff: ",
                Level::DEBUG | Level::TRACE => "skiff: debug: ",
            })?;
        }
        context.field_format().format_fields(out.by_ref(), event)?;
        out.write_str("\n")
    }
}

/// Stderr. A terminal may be raw, as the guest's console is, and then a line needs its carriage return; on a terminal
/// that is not raw it does no harm.
struct Stderr {
    terminal: bool,
}

impl Stderr {
    fn here() -> Self {
        Self { terminal: io::stderr().is_terminal() }
    }
}

impl Write for Stderr {
    /// Never fails: a machine goes on when its terminal hangs up, and there is nobody left to tell.
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        // In one piece, so that lines of several threads do not mix.
        let returned = if self.terminal { carriage_returned(text) } else { text.to_vec() };
        let _ = io::stderr().lock().write_all(&returned);
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The file of `--log-file`. What it does not take, because the disk is full, goes to stderr.
struct LogFile(Arc<File>);

impl Write for LogFile {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        (&*self.0).write_all(text).or_else(|_| Stderr::here().write_all(text))?;
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `text` with a carriage return before every line feed.
fn carriage_returned(text: &[u8]) -> Vec<u8> {
    text.iter()
        .flat_map(|byte| if *byte == b'\n' { &b"\r\n"[..] } else { std::slice::from_ref(byte) })
        .copied()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use tracing::subscriber::with_default;
    use tracing_subscriber::fmt::MakeWriter;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, text: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(text);
            Ok(text.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl MakeWriter<'_> for Kept {
        type Writer = Self;
        fn make_writer(&self) -> Self {
            self.clone()
        }
    }

    fn logged(dated: bool) -> String {
        let kept = Kept::default();
        let log = tracing_subscriber::fmt().with_max_level(LevelFilter::DEBUG).with_ansi(false);
        let log = log.event_format(Line { dated }).with_writer(kept.clone()).finish();
        with_default(log, || {
            tracing::error!("gone");
            tracing::warn!(disk = "root", "slow");
            tracing::info!("started");
            tracing::debug!("detail");
            tracing::trace!("hidden");
        });
        String::from_utf8(kept.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn lines_for_a_person() {
        let lines = "skiff: error: gone\nskiff: warning: slow disk=\"root\"\nskiff: started\nskiff: debug: detail\n";
        assert_eq!(logged(false), lines);
    }

    #[test]
    fn lines_of_a_file_have_time_and_level() {
        let text = logged(true);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        let (time, rest) = lines[1].split_once(' ').unwrap();
        assert!(time.starts_with("20") && time.contains('T') && time.ends_with('Z'), "{time}");
        assert_eq!(rest, "WARN skiff::cli::log::tests: slow disk=\"root\"");
    }

    #[test]
    fn a_raw_terminal_needs_the_carriage_return() {
        assert_eq!(carriage_returned(b"a\nb\n"), b"a\r\nb\r\n");
        assert_eq!(carriage_returned(b""), b"");
    }
}
