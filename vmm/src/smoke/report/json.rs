//! JSON: one object, described in docs/smoke-results.md. Every time is in seconds.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::text::{console_end, utc};
use crate::smoke::{Failure, Outcome, Quote, Run, StepState, TimedStep, Verdict};

/// The version of this form.
const SCHEMA: u32 = 1;
/// Bytes of the console of a test that did not pass.
const CONSOLE: usize = 64 << 10;

#[derive(Serialize)]
struct Results<'a> {
    schema: u32,
    started: String,
    seconds: f64,
    interrupted: bool,
    exit_code: u8,
    counts: BTreeMap<&'static str, usize>,
    flakes: Vec<Flake>,
    tests: Vec<Test<'a>>,
}

#[derive(Serialize)]
struct Flake {
    name: String,
    runs: usize,
    failed: usize,
}

#[derive(Serialize)]
struct Test<'a> {
    name: String,
    scenario: &'a str,
    file: String,
    cell: BTreeMap<&'a str, &'a str>,
    repetition: Option<u32>,
    verdict: &'static str,
    began: f64,
    seconds: f64,
    failure: Option<Reason<'a>>,
    steps: Vec<Step<'a>>,
    warnings: Vec<Warning<'a>>,
    measures: Vec<Measure<'a>>,
    console: Console,
    messages: &'a str,
    end: Option<&'a str>,
    kept: Option<String>,
}

#[derive(Serialize)]
struct Reason<'a> {
    summary: &'a str,
    step: Option<usize>,
    place: Option<&'a str>,
    quotes: Vec<Quoted<'a>>,
    last_lines: Vec<Quoted<'a>>,
}

#[derive(Serialize)]
struct Quoted<'a> {
    line: u64,
    at: f64,
    text: &'a str,
}

#[derive(Serialize)]
struct Step<'a> {
    title: &'a str,
    place: &'a str,
    state: &'static str,
    began: Option<f64>,
    seconds: f64,
    limit: f64,
}

#[derive(Serialize)]
struct Warning<'a> {
    text: &'a str,
    quote: Option<Quoted<'a>>,
}

#[derive(Serialize)]
struct Measure<'a> {
    name: &'a str,
    seconds: f64,
    max: Option<f64>,
}

#[derive(Serialize)]
struct Console {
    bytes: u64,
    /// Of a test that did not pass.
    end: Option<String>,
}

/// `run` as JSON.
pub(super) fn write(run: &Run) -> String {
    let counts = run.counts();
    let counts =
        [("passed", counts.passed), ("failed", counts.failed), ("errors", counts.errors), ("skipped", counts.skipped)];
    let flakes = run.flakes().into_iter();
    let results = Results {
        schema: SCHEMA,
        started: utc(run.started) + "Z",
        seconds: seconds(run.took),
        interrupted: run.interrupted,
        exit_code: run.exit_code(),
        counts: BTreeMap::from(counts),
        flakes: flakes.map(|it| Flake { name: it.test.to_string(), runs: it.runs, failed: it.failed }).collect(),
        tests: run.outcomes.iter().map(test).collect(),
    };
    serde_json::to_string_pretty(&results).expect("texts and finite numbers have a JSON form") + "\n"
}

/// To the millisecond.
fn seconds(duration: Duration) -> f64 {
    Duration::from_millis(duration.as_millis() as u64).as_secs_f64()
}

fn test(outcome: &Outcome) -> Test<'_> {
    let id = &outcome.test;
    let warnings = outcome.warnings.iter();
    let measures = outcome.measures.iter();
    Test {
        name: id.to_string(),
        scenario: &id.scenario,
        file: id.file.to_string_lossy().into_owned(),
        cell: id.cell.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect(),
        repetition: (id.repetition > 0).then_some(id.repetition),
        verdict: outcome.verdict.name(),
        began: seconds(outcome.began),
        seconds: seconds(outcome.took),
        failure: outcome.failure.as_ref().map(reason),
        steps: outcome.steps.iter().map(step).collect(),
        warnings: warnings.map(|it| Warning { text: &it.text, quote: it.quote.as_ref().map(line) }).collect(),
        measures: measures
            .map(|it| Measure { name: &it.name, seconds: seconds(it.value), max: it.max.map(seconds) })
            .collect(),
        console: Console {
            bytes: outcome.console.len(),
            end: (outcome.verdict != Verdict::Passed).then(|| console_end(&outcome.console, CONSOLE)),
        },
        messages: &outcome.messages,
        end: outcome.end.as_deref(),
        kept: outcome.kept.as_ref().map(|path| path.to_string_lossy().into_owned()),
    }
}

fn reason(failure: &Failure) -> Reason<'_> {
    Reason {
        summary: &failure.summary,
        step: failure.step,
        place: failure.place.as_deref(),
        quotes: failure.quotes.iter().map(line).collect(),
        last_lines: failure.last_lines.iter().map(line).collect(),
    }
}

fn line(quote: &Quote) -> Quoted<'_> {
    Quoted { line: quote.number, at: seconds(quote.at), text: &quote.text }
}

fn step(step: &TimedStep) -> Step<'_> {
    let state = match step.state {
        StepState::Passed => "passed",
        StepState::Failed => "failed",
        StepState::NotReached => "not-reached",
    };
    Step {
        title: &step.title,
        place: &step.place,
        state,
        began: step.began.map(seconds),
        seconds: seconds(step.took),
        limit: seconds(step.limit),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::smoke::report::sample;
    use serde_json::{Value, json};

    fn value(run: &Run) -> Value {
        serde_json::from_str(&write(run)).unwrap()
    }

    #[test]
    fn as_it_is_documented() {
        let results = value(&sample::run());
        assert_eq!(results["started"], "2026-11-20T20:00:00Z");
        assert_eq!(results["counts"], json!({"passed": 1, "failed": 2, "errors": 1, "skipped": 1}));
        assert_eq!(results["flakes"], json!([{"name": "panic & co", "runs": 1, "failed": 1}]));
        assert_eq!((&results["schema"], &results["exit_code"]), (&json!(1), &json!(1)));
        let passed = json!({
            "name": "boot [cpus=1]", "scenario": "boot", "file": "boot.toml", "cell": {"cpus": "1"}, "repetition": null,
            "verdict": "passed", "began": 0.0, "seconds": 3.21, "failure": null,
            "steps": [{"title": "wait for \"login: \"", "place": "boot.toml:12", "state": "passed", "began": 0.0,
                       "seconds": 3.1, "limit": 20.0}],
            "warnings": [{"text": "boot took 3.1 s, more than 3 s", "quote": null}],
            "measures": [{"name": "boot", "seconds": 3.1, "max": 3.0}],
            "console": {"bytes": 32, "end": null}, "messages": "", "end": "powered off", "kept": null
        });
        assert_eq!(results["tests"][0], passed);
        let failed = &results["tests"][2];
        assert_eq!(
            failed["failure"]["quotes"][0],
            json!({
                "line": 3, "at": 1.5, "text": "Kernel panic - not syncing: VFS: Unable to mount root fs on <\"vda\">"
            })
        );
        assert_eq!(failed["repetition"], 1);
        assert_eq!(failed["kept"], "kept/panic-1");
    }

    #[test]
    fn hostile_consoles() {
        let end = value(&sample::hostile())["tests"][0]["console"]["end"].as_str().unwrap().to_owned();
        assert!(end.contains("</system-out><script>alert('x')</script>"), "{end}");
        assert!(end.chars().all(|letter| letter == '\n' || letter == '\t' || !letter.is_control()), "{end:?}");
    }

    /// The names in docs/smoke-results.md are those that are written, and no others.
    #[test]
    fn every_name_is_documented() {
        fn names(value: &Value, all: &mut Vec<String>) {
            match value {
                Value::Object(object) => object.iter().for_each(|(name, value)| {
                    if name != "cell" {
                        all.push(name.clone());
                        names(value, all);
                    }
                }),
                Value::Array(values) => values.iter().for_each(|value| names(value, all)),
                _ => {}
            }
        }
        let document = include_str!("../../../../docs/smoke-results.md");
        let mut all = Vec::new();
        names(&value(&sample::run()), &mut all);
        for name in all {
            assert!(document.contains(&format!("`{name}`")), "{name}");
        }
    }
}
