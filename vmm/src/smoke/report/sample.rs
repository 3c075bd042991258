//! Results for the tests of the reports: one of each kind, and what a guest that means harm might write.

use std::time::{Duration, UNIX_EPOCH};

use crate::smoke::{Failure, Measure, Outcome, Quote, Run, StepState, TestId, TimedStep, Transcript, Verdict, Warning};

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn step(title: &str, line: u32, state: StepState, began: Option<u64>, took: u64) -> TimedStep {
    let place = format!("boot.toml:{line}");
    TimedStep { title: title.into(), place, state, began: began.map(ms), took: ms(took), limit: ms(20_000) }
}

fn quote(number: u64, at: u64, text: &str) -> Quote {
    Quote { number, at: ms(at), text: text.into() }
}

fn console(chunks: &[(u64, &[u8])]) -> Transcript {
    let mut console = Transcript::default();
    for (at, bytes) in chunks {
        console.push(ms(*at), bytes);
    }
    console
}

fn outcome(scenario: &str, cell: &[(&str, &str)], repetition: u32, verdict: Verdict, took: u64) -> Outcome {
    let cell = cell.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
    let file = if scenario == "boot" { "boot.toml" } else { "dir/panic.toml" };
    let test = TestId { scenario: scenario.into(), file: file.into(), cell, repetition };
    Outcome { took: ms(took), ..Outcome::new(test, verdict) }
}

fn failure(summary: &str) -> Failure {
    Failure { summary: summary.into(), step: None, place: None, quotes: Vec::new(), last_lines: Vec::new() }
}

fn boots() -> Outcome {
    Outcome {
        steps: vec![step("wait for \"login: \"", 12, StepState::Passed, Some(0), 3100)],
        warnings: vec![Warning { text: "boot took 3.1 s, more than 3 s".into(), quote: None }],
        measures: vec![Measure { name: "boot".into(), value: ms(3100), max: Some(ms(3000)) }],
        console: console(&[(900, b"the passed console\r\n"), (3100, b"vm login: \r\n")]),
        end: Some("powered off".into()),
        ..outcome("boot", &[("cpus", "1")], 0, Verdict::Passed, 3210)
    }
}

fn hangs() -> Outcome {
    Outcome {
        failure: Some(Failure {
            step: Some(0),
            place: Some("boot.toml:12".into()),
            last_lines: vec![
                quote(1, 2500, "[  OK  ] Reached target Network."),
                quote(2, 2600, "    Starting systemd-logind..."),
            ],
            ..failure("no \"login: \" within 20 s")
        }),
        steps: vec![
            step("wait for \"login: \"", 12, StepState::Failed, Some(0), 20_000),
            step("send \"root\"", 15, StepState::NotReached, None, 0),
        ],
        console: console(&[
            (2500, b"[\x1b[0;32m  OK  \x1b[0m] Reached target Network.\r\n"),
            (2600, b"    Starting systemd-logind...\r\n"),
        ]),
        began: ms(10),
        end: Some("killed at its limit".into()),
        ..outcome("boot", &[("cpus", "2")], 0, Verdict::Failed, 20_125)
    }
}

fn panics() -> Outcome {
    let panic = "Kernel panic - not syncing: VFS: Unable to mount root fs on <\"vda\">";
    Outcome {
        failure: Some(Failure {
            step: Some(0),
            place: Some("dir/panic.toml:7".into()),
            quotes: vec![quote(3, 1500, panic)],
            last_lines: vec![quote(3, 1500, panic), quote(4, 1501, "---[ end Kernel panic ]---")],
            ..failure("kernel panic while waiting for \"login: \"")
        }),
        steps: vec![step("wait for \"login: \"", 7, StepState::Failed, Some(0), 1500)],
        console: console(&[
            (100, b"Linux version 6.1\r\nCommand line: root=/dev/vdz\r\n"),
            (1500, format!("{panic}\r\n---[ end Kernel panic ]---\r\n").as_bytes()),
        ]),
        messages: "skiff: the guest panicked\n".into(),
        end: Some("panicked".into()),
        kept: Some("kept/panic-1".into()),
        ..outcome("panic & co", &[], 1, Verdict::Failed, 1600)
    }
}

fn run_of(outcomes: Vec<Outcome>) -> Run {
    let started = UNIX_EPOCH + Duration::from_secs(1_795_204_800);
    Run { started, took: ms(22_000), outcomes, interrupted: false }
}

/// A run with each verdict, a matrix and repetitions, from 2026-11-20 20:00:00 UTC on.
pub(in crate::smoke) fn run() -> Run {
    let broken = Outcome {
        failure: Some(failure("/dev/kvm: permission denied")),
        ..outcome("panic & co", &[], 2, Verdict::Error, 5)
    };
    let stopped =
        Outcome { failure: Some(failure("the run was stopped")), ..outcome("panic & co", &[], 3, Verdict::Skipped, 0) };
    run_of(vec![boots(), hangs(), panics(), broken, stopped])
}

/// Nothing went wrong.
pub(in crate::smoke) fn passed() -> Run {
    run_of(vec![boots()])
}

/// What is markup, control or reference somewhere, in everything that the guest or the scenario may write; interrupted.
pub(in crate::smoke) fn hostile() -> Run {
    let evil: &[u8] = b"</system-out><script>alert('x')</script> & ]]> <![CDATA[ &#0; \"'\r\n\
        \0\x01bell\x07 \xff\xfe\xc3 \xef\xbf\xbf \x1b]0;title\x07\x1b[31mred\x1b[0m\r\n\
        [[ATTACHMENT|/etc/passwd]]\r\n...\r\n  ---\r\nok 1 - lies\r\nBail out!\r\n";
    let text = "</failure><script>alert(1)</script>\n\"'&]]>\u{1}\u{b}\u{ffff} # SKIP \\ \u{202e}[[ATTACHMENT|x]]";
    let nasty = Failure {
        step: Some(0),
        place: Some(text.into()),
        quotes: vec![quote(1, 1, text)],
        last_lines: vec![quote(2, 2, text)],
        ..failure(text)
    };
    let mut bad = Outcome {
        failure: Some(nasty),
        steps: vec![step(text, 1, StepState::Failed, Some(0), 100)],
        warnings: vec![Warning { text: text.into(), quote: Some(quote(1, 1, text)) }],
        measures: vec![Measure { name: text.into(), value: ms(1), max: None }],
        console: console(&[(1, evil), (2, &b"x".repeat(100_000))]),
        messages: text.into(),
        end: Some(text.into()),
        kept: Some(text.into()),
        ..outcome(text, &[("key", text)], 0, Verdict::Failed, 100)
    };
    bad.test.file = text.into();
    Run { interrupted: true, ..run_of(vec![bad]) }
}
