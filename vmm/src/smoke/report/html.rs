//! A page of HTML that needs nothing else: a table of the tests, then each with its steps as a timeline and its console.
//! It runs no scripts, and tells the browser to run none, whatever a guest wrote.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::Duration;

use super::summary::{human, notes};
use super::text::{Shown, escape, excerpt, one_line, utc, visible_lines};
use crate::smoke::{Outcome, Run, StepState, TimedStep, Verdict};

/// Bytes of the begin and of the end of a console; of a test that passed a quarter.
const CONSOLE: (usize, usize) = (64 << 10, 192 << 10);

const HEAD: &str = "<!DOCTYPE html>
<html lang=\"en\"><head><meta charset=\"utf-8\">
<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">
<meta name=\"viewport\" content=\"width=device-width\"><title>skiff smoke</title>
<style>
:root{color-scheme:light dark;--good:#00734f;--bad:#b3261e;--odd:#8a5a00;--line:#8886}
@media(prefers-color-scheme:dark){:root{--good:#5bd6a5;--bad:#ff8a80;--odd:#ffc14d}}
body{font:16px/1.45 sans-serif;max-width:70em;margin:1em auto;padding:0 1em}
table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:.2em .6em .2em 0;
border-bottom:1px solid var(--line)}td.number{text-align:right;white-space:nowrap}
h2{margin-top:2em;border-top:2px solid var(--line);padding-top:.6em;overflow-wrap:anywhere}td{overflow-wrap:anywhere}
.passed{color:var(--good)}.failed,.error{color:var(--bad)}.skipped,.warning{color:var(--odd)}.not-reached{opacity:.6}
.verdict{font-weight:bold}.time{width:30%}.time div{background:currentColor;height:.7em;margin-top:.4em;min-width:2px}
pre{font:13px/1.35 monospace;border:1px solid var(--line);padding:.5em;overflow:auto;max-height:40em;margin:.5em 0}
pre i{opacity:.6;font-style:normal;user-select:none}pre b{color:var(--odd)}mark{background:#ffd54f;color:#000}
@media print{pre{max-height:none;white-space:pre-wrap;overflow-wrap:anywhere;font-size:9px}h2{break-before:page}
body{max-width:none;font-size:12px}tr,mark{break-inside:avoid}.time div{print-color-adjust:exact}}
</style></head>
<body><h1>skiff smoke</h1>
";

/// `run` as a page.
pub(super) fn write(run: &Run) -> String {
    let mut page = HEAD.to_owned();
    let counts = run.counts();
    let _ = writeln!(
        page,
        "<p>{} UTC, {}: <span class=\"passed\">{} passed</span>, <span class=\"failed\">{} failed</span>, \
         <span class=\"error\">{} errors</span>, <span class=\"skipped\">{} skipped</span>.</p>",
        utc(run.started).replace('T', " "),
        human(run.took),
        counts.passed,
        counts.failed,
        counts.errors,
        counts.skipped
    );
    if run.interrupted {
        page.push_str("<p><strong>Interrupted: not every test was run to its end.</strong></p>\n");
    }
    page.push_str("<table><tr><th>Test</th><th>Verdict</th><th>Took</th><th>Why</th></tr>\n");
    for (at, outcome) in run.outcomes.iter().enumerate() {
        let why = outcome.failure.as_ref().map(|failure| line(&failure.summary)).unwrap_or_default();
        let _ = writeln!(
            page,
            "<tr><td><a href=\"#t{at}\">{}</a></td><td class=\"verdict {verdict}\">{verdict}</td>\
             <td class=\"number\">{}</td><td>{why}</td></tr>",
            line(&outcome.test.to_string()),
            human(outcome.took),
            verdict = outcome.verdict.name()
        );
    }
    page.push_str("</table>\n");
    flakes(&mut page, run);
    for (at, outcome) in run.outcomes.iter().enumerate() {
        test(&mut page, at, outcome);
    }
    page + "</body></html>\n"
}

/// A text on one line, escaped.
fn line(text: &str) -> String {
    escape(&one_line(text))
}

fn flakes(page: &mut String, run: &Run) {
    let flakes = run.flakes();
    if flakes.is_empty() {
        return;
    }
    page.push_str("<h2>Repetitions</h2>\n<table><tr><th>Test</th><th>Runs</th><th>Failed</th></tr>\n");
    for flake in flakes {
        let (name, percent) = (line(&flake.test.to_string()), 100 * flake.failed / flake.runs.max(1));
        let _ = writeln!(
            page,
            "<tr><td>{name}</td><td class=\"number\">{}</td><td class=\"number\">{} ({percent} %)</td></tr>",
            flake.runs, flake.failed
        );
    }
    page.push_str("</table>\n");
}

fn test(page: &mut String, at: usize, outcome: &Outcome) {
    let verdict = outcome.verdict.name();
    let _ = writeln!(
        page,
        "<h2 id=\"t{at}\">{} <span class=\"{verdict}\">{verdict}</span></h2>\n<p>{}, {}{}</p>",
        line(&outcome.test.to_string()),
        line(&outcome.test.file.to_string_lossy()),
        human(outcome.took),
        outcome.end.as_ref().map(|end| format!("; the machine: {}", line(end))).unwrap_or_default()
    );
    if let Some(failure) = &outcome.failure {
        let place = failure.place.as_ref().map(|place| format!(" ({})", line(place))).unwrap_or_default();
        let _ = writeln!(page, "<p class=\"verdict {verdict}\">{}{place}</p>", line(&failure.summary));
    }
    if let Some(kept) = &outcome.kept {
        let _ = writeln!(page, "<p>Kept in {}</p>", line(&kept.to_string_lossy()));
    }
    for note in notes(outcome).lines() {
        let class = if note.starts_with("warning") { " class=\"warning\"" } else { "" };
        let _ = writeln!(page, "<p{class}>{}</p>", escape(note));
    }
    timeline(page, &outcome.steps);
    if !outcome.console.is_empty() {
        console(page, outcome);
    }
    if !outcome.messages.is_empty() {
        let _ = writeln!(page, "<h3>What skiff said</h3>\n<pre>{}</pre>", escape(&visible_lines(&outcome.messages)));
    }
}

/// The steps, each with a bar from its begin to its end.
fn timeline(page: &mut String, steps: &[TimedStep]) {
    if steps.is_empty() {
        return;
    }
    let ends = steps.iter().filter_map(|step| Some(step.began? + step.took));
    let all = ends.max().unwrap_or_default().as_secs_f64().max(1e-3);
    page.push_str(
        "<table><tr><th>Step</th><th>Line</th><th>Began</th><th>Took</th><th>At most</th><th class=\"time\"></th></tr>\n",
    );
    for step in steps {
        let (state, bar) = match (step.state, step.began) {
            (StepState::NotReached, _) | (_, None) => ("not-reached", String::new()),
            (state, Some(began)) => {
                let (left, width) = (began.as_secs_f64() / all * 100.0, step.took.as_secs_f64() / all * 100.0);
                let bar = format!("<div style=\"margin-left:{left:.1}%;width:{width:.1}%\"></div>");
                (if state == StepState::Passed { "passed" } else { "failed" }, bar)
            }
        };
        let began = step.began.map(human).unwrap_or_default();
        let took = step.began.map(|_| human(step.took)).unwrap_or_default();
        let _ = writeln!(
            page,
            "<tr class=\"{state}\"><td>{}</td><td>{}</td><td class=\"number\">{began}</td><td class=\"number\">{took}</td>\
             <td class=\"number\">{}</td><td class=\"time\">{bar}</td></tr>",
            line(&step.title),
            line(&step.place),
            human(step.limit)
        );
    }
    page.push_str("</table>\n");
}

/// The lines of the console with their times, the quoted ones marked, and between them where each step began.
fn console(page: &mut String, outcome: &Outcome) {
    let (mut head, mut tail) = CONSOLE;
    if outcome.verdict == Verdict::Passed {
        (head, tail) = (head / 4, tail / 4);
    }
    let quoted: BTreeSet<u64> =
        outcome.failure.iter().flat_map(|failure| &failure.quotes).map(|quote| quote.number).collect();
    let mut begins: Vec<(Duration, String)> = Vec::new();
    for (number, step) in (1..).zip(&outcome.steps) {
        begins.extend(step.began.map(|began| (began, format!("step {number}: {}", one_line(&step.title)))));
    }
    let mut begins = begins.into_iter().peekable();
    let _ = writeln!(page, "<h3>Console, {} bytes</h3>\n<pre>", outcome.console.len());
    for shown in excerpt(&outcome.console, head, tail) {
        match shown {
            Shown::Gap(bytes) => _ = writeln!(page, "<b>[{bytes} bytes left out]</b>"),
            Shown::Line { number, at, text } => {
                while let Some((_, step)) = begins.next_if(|(began, _)| *began <= at) {
                    let _ = writeln!(page, "<b>--- {} ---</b>", escape(&step));
                }
                let text = escape(&text);
                let text = if quoted.contains(&number) { format!("<mark>{text}</mark>") } else { text };
                let _ = writeln!(page, "<i>{:>9.3}</i>  {text}", at.as_secs_f64());
            }
        }
    }
    for (_, step) in begins {
        let _ = writeln!(page, "<b>--- {} ---</b>", escape(&step));
    }
    page.push_str("</pre>\n");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::smoke::report::sample;
    use std::io::Write;
    use std::process::{Command, Stdio};

    /// What a parser that is not ours finds: that every element that opens closes in order; the elements and their
    /// attributes; the text.
    const CHECK: &str = r#"
import sys
from html.parser import HTMLParser
class Page(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.seen, self.text = [], set(), []
    def handle_starttag(self, tag, attributes):
        self.seen.update((tag, name) for name, _ in attributes or [("", "")])
        if tag != "meta": self.open.append(tag)
    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.open, self.getpos())
    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["title"]): self.text.append(data)
    def handle_comment(self, data): assert False, data
    def unknown_decl(self, data): assert False, data
page = Page()
page.feed(sys.stdin.buffer.read().decode())
page.close()
assert page.open == [], page.open
print(" ".join(sorted({tag for tag, _ in page.seen})))
print(" ".join(sorted({name for _, name in page.seen if name})))
print("".join(page.text))
"#;

    /// Elements, attributes and text of the page.
    fn parse(page: &str) -> Option<(String, String, String)> {
        let python = Command::new("python3").args(["-c", CHECK]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let Ok(mut python) = python else {
            skip::because("no python3");
            return None;
        };
        python.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
        let output = python.wait_with_output().unwrap();
        assert!(output.status.success(), "{page}");
        let text = String::from_utf8(output.stdout).unwrap();
        let mut parts = text.splitn(3, '\n').map(str::to_owned);
        Some((parts.next()?, parts.next()?, parts.next()?))
    }

    const ELEMENTS: &str = "a b body div h1 h2 h3 head html i mark meta p pre span strong style table td th title tr";
    const ATTRIBUTES: &str = "charset class content href http-equiv id lang name style";

    fn are_ours(found: &str, ours: &str) {
        let ours: Vec<_> = ours.split(' ').collect();
        found.split(' ').for_each(|one| assert!(ours.contains(&one), "{one}"));
    }

    #[test]
    fn every_test_with_its_timeline_and_console() {
        let page = write(&sample::run());
        let Some((elements, attributes, text)) = parse(&page) else { return };
        are_ours(&elements, ELEMENTS);
        are_ours(&attributes, ATTRIBUTES);
        for said in [
            "2026-11-20 20:00:00 UTC, 22 s: 1 passed, 2 failed, 1 errors, 1 skipped.",
            "no \"login: \" within 20 s (boot.toml:12)",
            "--- step 1: wait for \"login: \" ---\n    2.500  [  OK  ] Reached target Network.\n",
            "warning: boot took 3.1 s, more than 3 s",
            "the machine: killed at its limit",
            "Kept in kept/panic-1",
            "panic & co11 (100 %)",
            "the passed console",
            "skiff: the guest panicked",
        ] {
            assert!(text.contains(said), "{said}: {text}");
        }
        let mark = "<mark>Kernel panic - not syncing: VFS: Unable to mount root fs on &lt;&quot;vda&quot;&gt;</mark>";
        assert_eq!(page.matches("<mark>").count(), page.matches(mark).count());
        assert!(page.contains("<div style=\"margin-left:0.0%;width:100.0%\"></div>"), "{page}");
    }

    #[test]
    fn hostile_consoles() {
        let Some((elements, attributes, text)) = parse(&write(&sample::hostile())) else { return };
        are_ours(&elements, ELEMENTS);
        are_ours(&attributes, ATTRIBUTES);
        assert!(text.contains("</system-out><script>alert('x')</script> & ]]> <![CDATA[ &#0; \"'"), "{text}");
        assert!(text.contains("</failure><script>alert(1)</script>"), "{text}");
        assert!(text.contains("Interrupted"), "{text}");
        assert!(text.contains("95904 bytes left out]"), "{text}");
    }

    #[test]
    fn a_large_console_is_cut_and_says_so() {
        let mut run = sample::passed();
        for number in 0..100_000 {
            let line = format!("filler {number}\n");
            run.outcomes[0].console.push(Duration::from_secs(10), line.as_bytes());
        }
        let page = write(&run);
        assert!(page.len() < 1 << 20, "{}", page.len());
        assert!(page.contains("the passed console") && page.contains("filler 99999"));
        assert!(page.contains(" bytes left out]"));
    }
}
