//! How a test says that this host has nothing for it to run on. Each test does so on its own thread.

use std::fmt::Display;
use std::io::{self, Write};
use std::{env, thread};

/// Says that the test on this thread is skipped, and why, in one line that `tests/run.sh` counts. It goes to the stderr of
/// the process: what passing tests print by macro the harness keeps to itself. The test is to return then.
///
/// # Panics
/// On a thread without a name, which is not the test's own.
pub fn because(reason: impl Display) {
    let program = env::current_exe().expect("a test has a path");
    let program = program.file_stem().expect("and a name").to_string_lossy();
    // Cargo puts a hash behind the name of a crate.
    let program = program.rsplit_once('-').map_or(&*program, |(name, _)| name);
    let thread = thread::current();
    let test = thread.name().expect("the harness names the thread of a test after it");
    let reason = reason.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
    // In one piece, for the harness writes too.
    let _ = io::stderr().write_all(format!("SKIPPED {program}::{test}: {reason}\n").as_bytes());
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use super::*;

    fn log(name: &str) -> PathBuf {
        env::temp_dir().join(format!("skip-{}-{name}.log", std::process::id()))
    }

    /// What `tests/run.sh` finds in this log, which is removed.
    fn found(log: &Path) -> String {
        let lines = Path::new(env!("CARGO_MANIFEST_DIR")).join("lines");
        let found = Command::new(lines).arg(log).output().unwrap();
        std::fs::remove_file(log).unwrap();
        String::from_utf8(found.stdout).unwrap()
    }

    /// This test once more, as one that finds nothing to run on: alone, when the harness begins its line before the test
    /// runs, and as one of several.
    #[test]
    fn a_test_that_passes_is_seen_to_be_skipped() {
        const AGAIN: &str = "SKIFF_TEST_SKIPS";
        const NAME: &str = "tests::a_test_that_passes_is_seen_to_be_skipped";
        if env::var_os(AGAIN).is_some() {
            because("no loop device\n");
            return because("said twice");
        }
        for threads in ["1", "2"] {
            let log = log(threads);
            let mut again = Command::new("sh");
            again.args(["-c", "exec >\"$0\" 2>&1 \"$@\""]).arg(&log).arg(env::current_exe().unwrap());
            again.args(["--exact", NAME, "--test-threads", threads]).env(AGAIN, "1");
            assert!(again.status().unwrap().success());
            assert_eq!(found(&log), format!("SKIPPED skip::{NAME}: no loop device\n"), "{threads} threads");
        }
    }

    /// The harness writes the name of a test, its result and the newline apart, on another stream.
    #[test]
    fn wherever_it_stands_in_the_harness_line_it_is_seen() {
        let log = log("lines");
        let begun = "test a::b ... SKIPPED x::a::b: one\nok\ntest a::c ... okSKIPPED x::a::d: two\n\n";
        let others =
            "SKIPPED x::a::e: three\ntest a::e ... ok\nSKIPPED 12 tests of linux: four\nnothing SKIPPED x::y: z\n";
        std::fs::write(&log, format!("{begun}{others}")).unwrap();
        let expected = "SKIPPED x::a::b: one\nSKIPPED x::a::d: two\nSKIPPED x::a::e: three\n\
                        SKIPPED 12 tests of linux: four\n";
        assert_eq!(found(&log), expected);
    }

    /// A line that a test prints itself is lost, if it passes.
    #[test]
    fn nobody_else_says_so() {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let mut grep = Command::new("grep");
        grep.args(["-rl", "--include=*.rs", "--exclude-dir=target", "\"SKIPPED ", "."]).current_dir(sources);
        let found = String::from_utf8(grep.output().unwrap().stdout).unwrap();
        assert_eq!(found, "./tests/skip/src/lib.rs\n");
    }
}
