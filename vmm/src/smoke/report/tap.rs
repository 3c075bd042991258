//! The Test Anything Protocol: a test point a machine, details in YAML. Version 13, because prove(1) knows no later one, and
//! harnesses that do read it too.

use std::fmt::Write as _;

use super::text::one_line;
use crate::smoke::{Outcome, Quote, Run, Verdict};

/// `run` as TAP.
pub(super) fn write(run: &Run) -> String {
    let mut tap = format!("TAP version 13\n1..{}\n", run.outcomes.len());
    for (number, outcome) in (1..).zip(&run.outcomes) {
        // The bail-out below speaks for all that were not run; a point of theirs could only be a lie.
        if outcome.verdict != Verdict::Skipped || !run.interrupted {
            point(&mut tap, number, outcome);
        }
    }
    if run.interrupted {
        tap.push_str("Bail out! The run was interrupted.\n");
    }
    tap
}

fn point(tap: &mut String, number: usize, outcome: &Outcome) {
    let ok = if matches!(outcome.verdict, Verdict::Passed | Verdict::Skipped) { "ok" } else { "not ok" };
    let name = one_line(&outcome.test.to_string()).replace('\\', "\\\\").replace('#', "\\#");
    let _ = write!(tap, "{ok} {number} - {name}");
    let failure = outcome.failure.as_ref();
    if outcome.verdict == Verdict::Skipped {
        let why = failure.map_or("", |failure| &failure.summary);
        let _ = write!(tap, " # SKIP {}", one_line(why));
    }
    let _ = writeln!(tap, "\n  ---\n  duration_ms: {}", outcome.took.as_millis());
    if let Some(failure) = failure {
        let severity = if outcome.verdict == Verdict::Error { "error" } else { "fail" };
        let _ = writeln!(tap, "  message: {}\n  severity: {severity}", quoted(&failure.summary));
        if let Some(step) = failure.step.and_then(|step| outcome.steps.get(step)) {
            let _ = writeln!(tap, "  step: {}", quoted(&step.title));
        }
        if let Some(place) = &failure.place {
            let _ = writeln!(tap, "  at: {}", quoted(place));
        }
        list(tap, "console", &failure.quotes);
        list(tap, "console_end", &failure.last_lines);
    }
    if let Some(end) = &outcome.end {
        let _ = writeln!(tap, "  end: {}", quoted(end));
    }
    tap.push_str("  ...\n");
}

fn list(tap: &mut String, name: &str, quotes: &[Quote]) {
    if !quotes.is_empty() {
        let _ = writeln!(tap, "  {name}:");
    }
    for quote in quotes {
        let _ = writeln!(tap, "    - {}", quoted(&quote.text));
    }
}

/// A string of JSON, which is one of YAML too.
fn quoted(text: &str) -> String {
    serde_json::Value::from(one_line(text)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::smoke::report::sample;
    use std::io::Write;
    use std::process::{Command, Output, Stdio};

    fn tool(program: &str, args: &[&str], input: &str) -> Option<Output> {
        let child = Command::new(program).args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let Ok(mut child) = child else {
            skip::because(format_args!("no {program}"));
            return None;
        };
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        Some(child.wait_with_output().unwrap())
    }

    #[test]
    fn as_it_is_written() {
        let mut run = sample::run();
        run.outcomes.swap(0, 1);
        run.outcomes.truncate(2);
        let expected = r#"TAP version 13
1..2
not ok 1 - boot [cpus=2]
  ---
  duration_ms: 20125
  message: "no \"login: \" within 20 s"
  severity: fail
  step: "wait for \"login: \""
  at: "boot.toml:12"
  console_end:
    - "[  OK  ] Reached target Network."
    - "    Starting systemd-logind..."
  end: "killed at its limit"
  ...
ok 2 - boot [cpus=1]
  ---
  duration_ms: 3210
  end: "powered off"
  ...
"#;
        assert_eq!(write(&run), expected);
    }

    #[test]
    fn prove_reads_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("run.tap");
        let of_run = "Failed tests:  2-4";
        for (run, said) in
            [(sample::run(), of_run), (sample::passed(), "Result: PASS"), (sample::hostile(), "Bailout called")]
        {
            std::fs::write(&file, write(&run)).unwrap();
            let Some(proved) = tool("prove", &["--verbose", file.to_str().unwrap()], "") else { return };
            let text = String::from_utf8_lossy(&proved.stdout);
            assert_eq!(proved.status.success(), run == sample::passed(), "{text}");
            assert!(text.contains(said) && !text.contains("Parse errors"), "{text}");
        }
    }

    #[test]
    fn what_was_interrupted_does_not_pass() {
        let mut run = sample::run();
        run.outcomes.retain(|outcome| outcome.failure.is_none() || outcome.verdict == Verdict::Skipped);
        assert!(write(&run).contains("\nok 2 - panic & co \\#3 # SKIP the run was stopped\n"), "{}", write(&run));
        run.interrupted = true;
        let tap = write(&run);
        assert!(tap.starts_with("TAP version 13\n1..2\nok 1 - "), "{tap}");
        assert!(!tap.contains("SKIP") && tap.ends_with("\nBail out! The run was interrupted.\n"), "{tap}");
    }

    /// Every block of details by a YAML parser that is not ours.
    #[test]
    fn details_are_yaml() {
        let check = r"
import sys, re
try: import yaml
except ImportError: print('missing'); sys.exit()
for block in re.findall(r'^  ---\n(.*?)^  \.\.\.\n', sys.stdin.read(), re.M | re.S):
    print(yaml.safe_load(block).get('message'))";
        let Some(seen) = tool("python3", &["-c", check], &write(&sample::run())) else { return };
        let seen = String::from_utf8(seen.stdout).unwrap();
        if seen == "missing\n" {
            skip::because("no yaml for python3");
            return;
        }
        let expected = "None\nno \"login: \" within 20 s\nkernel panic while waiting for \"login: \"\n\
                        /dev/kvm: permission denied\nthe run was stopped\n";
        assert_eq!(seen, expected);
        let hostile = tool("python3", &["-c", check], &write(&sample::hostile())).unwrap();
        assert!(hostile.status.success());
    }
}
