//! What is said at the end, in words for a person: on the terminal, and in the texts of other reports.

use std::fmt::Write as _;
use std::time::Duration;

use super::Paint;
use super::text::one_line;
use crate::smoke::{Outcome, Quote, Run, Verdict};

/// The whole run: every test that did not pass, with what it waited for and what the console said, then what was measured,
/// warnings, rates of repetitions, and the counts in the last line.
pub fn summary(run: &Run, colours: bool) -> String {
    let paint = Paint(colours);
    let mut text = String::new();
    for outcome in run.outcomes.iter().filter(|outcome| matches!(outcome.verdict, Verdict::Failed | Verdict::Error)) {
        let _ = writeln!(text, "{}", ended(outcome, paint));
        details(outcome).lines().for_each(|line| _ = writeln!(text, "    {line}"));
        text.push('\n');
    }
    for outcome in &run.outcomes {
        let name = one_line(&outcome.test.to_string());
        notes(outcome).lines().for_each(|line| _ = writeln!(text, "{name}: {line}"));
    }
    for flake in run.flakes() {
        let (name, percent) = (one_line(&flake.test.to_string()), 100 * flake.failed / flake.runs.max(1));
        let _ = writeln!(text, "{name}: {} of {} failed ({percent} %)", flake.failed, flake.runs);
    }
    let counts = run.counts();
    let plural = if counts.errors == 1 { "" } else { "s" };
    let counts = [
        (counts.passed, paint.green(&format!("{} passed", counts.passed))),
        (counts.failed, paint.red(&format!("{} failed", counts.failed))),
        (counts.errors, paint.red(&format!("{} error{plural}", counts.errors))),
        (counts.skipped, paint.yellow(&format!("{} skipped", counts.skipped))),
    ];
    let mut parts: Vec<_> = counts.into_iter().filter(|(count, _)| *count > 0).map(|(_, words)| words).collect();
    if parts.is_empty() {
        parts.push("no tests".to_owned());
    }
    let interrupted = if run.interrupted { "; interrupted" } else { "" };
    let _ = writeln!(text, "{} in {}{interrupted}", parts.join(", "), human(run.took));
    text
}

/// A test that is over, on one line.
pub(super) fn ended(outcome: &Outcome, paint: Paint) -> String {
    let word = match outcome.verdict {
        Verdict::Passed => paint.green("ok     "),
        Verdict::Failed => paint.red("FAILED "),
        Verdict::Error => paint.red("ERROR  "),
        Verdict::Skipped => paint.yellow("skipped"),
    };
    let name = one_line(&outcome.test.to_string());
    let why = outcome.failure.as_ref().map(|failure| format!(": {}", one_line(&failure.summary))).unwrap_or_default();
    let took = if outcome.verdict == Verdict::Skipped { String::new() } else { format!(" ({})", human(outcome.took)) };
    format!("{word} {name}{took}{why}")
}

/// Why a test did not pass, but for the summary: the step, the lines that show it, how the console and the machine ended.
pub(super) fn details(outcome: &Outcome) -> String {
    let mut text = String::new();
    let Some(failure) = &outcome.failure else { return text };
    if let Some((at, step)) = failure.step.and_then(|at| Some((at, outcome.steps.get(at)?))) {
        let (count, title, place) = (outcome.steps.len(), one_line(&step.title), one_line(&step.place));
        let (took, limit) = (human(step.took), human(step.limit));
        let _ = writeln!(text, "step {} of {count} ({place}): {title}; {took} of at most {limit}", at + 1);
    } else if let Some(place) = &failure.place {
        let _ = writeln!(text, "at {}", one_line(place));
    }
    lines(&mut text, "on the console:", &failure.quotes);
    // What was quoted already need not be said again.
    let rest: Vec<_> = failure.last_lines.iter().filter(|line| !failure.quotes.contains(line)).cloned().collect();
    lines(&mut text, "the console ended with:", &rest);
    if let Some(end) = &outcome.end {
        let _ = writeln!(text, "the machine: {}", one_line(end));
    }
    if let Some(kept) = &outcome.kept {
        let _ = writeln!(text, "kept in {}", one_line(&kept.to_string_lossy()));
    }
    text
}

fn lines(text: &mut String, title: &str, quotes: &[Quote]) {
    if !quotes.is_empty() {
        let _ = writeln!(text, "{title}");
    }
    for quote in quotes {
        let _ = writeln!(text, "  {:>9.3}  {}", quote.at.as_secs_f64(), one_line(&quote.text));
    }
}

/// What was measured and what is to be looked at, a line each; empty if there is neither.
pub(super) fn notes(outcome: &Outcome) -> String {
    let mut text = String::new();
    for measure in &outcome.measures {
        let max = measure.max.map(|max| format!(" (at most {:.3} s)", max.as_secs_f64())).unwrap_or_default();
        let _ = writeln!(text, "measured {}: {:.3} s{max}", one_line(&measure.name), measure.value.as_secs_f64());
    }
    for warning in &outcome.warnings {
        let quote = warning.quote.as_ref().map(|quote| format!(": {}", one_line(&quote.text))).unwrap_or_default();
        let _ = writeln!(text, "warning: {}{quote}", one_line(&warning.text));
    }
    text
}

/// A time to a tenth of a second.
pub(super) fn human(duration: Duration) -> String {
    let tenths = (duration.as_millis() + 50) / 100;
    let fraction = if tenths.is_multiple_of(10) { String::new() } else { format!(".{}", tenths % 10) };
    format!("{}{fraction} s", tenths / 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::smoke::report::sample;

    #[test]
    fn as_it_is_read() {
        let expected = r#"FAILED  boot [cpus=2] (20.1 s): no "login: " within 20 s
    step 1 of 2 (boot.toml:12): wait for "login: "; 20 s of at most 20 s
    the console ended with:
          2.500  [  OK  ] Reached target Network.
          2.600      Starting systemd-logind...
    the machine: killed at its limit

FAILED  panic & co #1 (1.6 s): kernel panic while waiting for "login: "
    step 1 of 1 (boot.toml:7): wait for "login: "; 1.5 s of at most 20 s
    on the console:
          1.500  Kernel panic - not syncing: VFS: Unable to mount root fs on <"vda">
    the console ended with:
          1.501  ---[ end Kernel panic ]---
    the machine: panicked
    kept in kept/panic-1

ERROR   panic & co #2 (0 s): /dev/kvm: permission denied

boot [cpus=1]: measured boot: 3.100 s (at most 3.000 s)
boot [cpus=1]: warning: boot took 3.1 s, more than 3 s
panic & co: 1 of 1 failed (100 %)
1 passed, 2 failed, 1 error, 1 skipped in 22 s
"#;
        assert_eq!(summary(&sample::run(), false), expected);
    }

    #[test]
    fn colours_change_nothing_else() {
        let coloured = summary(&sample::run(), true);
        assert!(coloured.contains("\x1b[31mFAILED \x1b[0m boot [cpus=2]"), "{coloured:?}");
        let plain: String = ["\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[0m"]
            .into_iter()
            .fold(coloured, |text, sequence| text.replace(sequence, ""));
        assert_eq!(plain, summary(&sample::run(), false));
    }

    #[test]
    fn no_guest_and_no_scenario_writes_to_the_terminal() {
        let text = summary(&sample::hostile(), false);
        assert!(text.chars().all(|letter| letter == '\n' || !letter.is_control()), "{text:?}");
        assert!(text.ends_with("1 failed in 22 s; interrupted\n"), "{text}");
    }
}
