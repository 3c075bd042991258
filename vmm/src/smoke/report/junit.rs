//! JUnit XML, in the dialect that Jenkins' schema (junit-10.xsd), GitLab and GitHub's actions have in common: a suite a
//! scenario, a test case a machine.

use std::fmt::Write as _;
use std::time::Duration;

use super::summary::{details, notes};
use super::text::{console_end, escape, one_line, seconds, utc, visible_lines};
use crate::smoke::{Outcome, Run, Verdict};

/// Bytes of the console of a test that did not pass.
const CONSOLE: usize = 64 << 10;

/// `run` as an XML document.
pub(super) fn write(run: &Run) -> String {
    let counts = run.counts();
    let mut xml = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
         <testsuites name=\"skiff smoke\" tests=\"{}\" failures=\"{}\" errors=\"{}\" time=\"{}\">\n",
        run.outcomes.len(),
        counts.failed,
        counts.errors,
        seconds(run.took)
    );
    let same = |one: &Outcome, other: &Outcome| {
        (&one.test.scenario, &one.test.file) == (&other.test.scenario, &other.test.file)
    };
    for outcomes in run.outcomes.chunk_by(same) {
        suite(&mut xml, run, outcomes);
    }
    xml + "</testsuites>\n"
}

fn suite(xml: &mut String, run: &Run, outcomes: &[Outcome]) {
    let count = |verdict| outcomes.iter().filter(|outcome| outcome.verdict == verdict).count();
    let began = outcomes.iter().map(|outcome| outcome.began).min().unwrap_or_default();
    let took: Duration = outcomes.iter().map(|outcome| outcome.took).sum();
    let test = &outcomes[0].test;
    let _ = writeln!(
        xml,
        "  <testsuite name=\"{}\" file=\"{}\" timestamp=\"{}\" time=\"{}\" tests=\"{}\" failures=\"{}\" errors=\"{}\" \
         skipped=\"{}\">",
        attribute(&test.scenario),
        attribute(&test.file.to_string_lossy()),
        utc(run.started + began),
        seconds(took),
        outcomes.len(),
        count(Verdict::Failed),
        count(Verdict::Error),
        count(Verdict::Skipped)
    );
    if run.interrupted {
        xml.push_str("    <properties>\n      <property name=\"interrupted\" value=\"true\"/>\n    </properties>\n");
    }
    for outcome in outcomes {
        case(xml, outcome);
    }
    xml.push_str("  </testsuite>\n");
}

fn case(xml: &mut String, outcome: &Outcome) {
    let (name, class, took) = (outcome.test.to_string(), &outcome.test.scenario, seconds(outcome.took));
    let _ = writeln!(
        xml,
        "    <testcase name=\"{}\" classname=\"{}\" time=\"{took}\">",
        attribute(&name),
        attribute(class)
    );
    let summary = outcome.failure.as_ref().map_or("", |failure| &failure.summary);
    let (element, kind) = match outcome.verdict {
        Verdict::Passed => ("", ""),
        Verdict::Failed => ("failure", " type=\"failed\""),
        Verdict::Error => ("error", " type=\"host\""),
        Verdict::Skipped => ("skipped", ""),
    };
    if !element.is_empty() {
        let _ = writeln!(
            xml,
            "      <{element}{kind} message=\"{}\">{}</{element}>",
            attribute(summary),
            content(&details(outcome))
        );
    }
    let mut output = notes(outcome);
    if outcome.verdict != Verdict::Passed {
        output += &console_end(&outcome.console, CONSOLE);
    }
    for (element, text) in [("system-out", output), ("system-err", visible_lines(&outcome.messages))] {
        if !text.is_empty() {
            let _ = writeln!(xml, "      <{element}>{}</{element}>", content(&text));
        }
    }
    xml.push_str("    </testcase>\n");
}

fn attribute(text: &str) -> String {
    escape(&one_line(text))
}

/// Jenkins and GitLab take `[[ATTACHMENT|path]]` in a text as a wish to keep that file: no guest has such a wish.
fn content(text: &str) -> String {
    escape(text).replace("[[ATTACHMENT", "[ [ATTACHMENT")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::smoke::report::sample;
    use std::io::Write;
    use std::process::{Command, Stdio};

    /// What the schema allows (elements, attributes, their places and forms), and what the counts must be, asked of a
    /// parser that is not ours; it prints names, verdicts and messages.
    const CHECK: &str = r#"
import re, sys, xml.etree.ElementTree as tree
root = tree.fromstring(sys.stdin.buffer.read())
allowed = {
    "testsuites": ({"name", "time", "tests", "failures", "errors"}, {"testsuite"}),
    "testsuite": ({"name", "tests", "failures", "errors", "group", "time", "skipped", "timestamp", "hostname", "id",
                   "package", "file", "log", "url"}, {"testsuite", "properties", "testcase", "system-out", "system-err"}),
    "testcase": ({"name", "time", "classname", "group"}, {"skipped", "error", "failure", "system-out", "system-err"}),
    "failure": ({"type", "message"}, set()), "error": ({"type", "message"}, set()),
    "skipped": ({"type", "message"}, set()), "properties": (set(), {"property"}),
    "property": ({"name", "value"}, set()), "system-out": (set(), set()), "system-err": (set(), set()),
}
assert root.tag == "testsuites"
for element in root.iter():
    attributes, children = allowed[element.tag]
    assert set(element.keys()) <= attributes, element.attrib
    assert {child.tag for child in element} <= children, element.tag
    assert re.fullmatch(r"\d{1,9}\.\d{3}", element.get("time", "0.000")), element.attrib
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", element.get("timestamp", "2000-01-01T00:00:00"))
for suite in root.iter("testsuite"):
    counts = {"tests": "testcase", "failures": "failure", "errors": "error", "skipped": "skipped"}
    for attribute, tag in counts.items():
        assert int(suite.get(attribute)) == len(list(suite.iter(tag))), (attribute, suite.attrib)
for attribute in ["tests", "failures", "errors"]:
    assert int(root.get(attribute)) == sum(int(suite.get(attribute)) for suite in root)
assert "[[ATTACHMENT" not in "".join(root.itertext())
for case in root.iter("testcase"):
    verdict = [element for element in case if element.tag in ("failure", "error", "skipped")]
    said = verdict[0].tag + ": " + verdict[0].get("message") if verdict else "passed"
    print(case.get("classname") + " / " + case.get("name") + " / " + said)
print("interrupted:", len(root.findall("testsuite/properties/property[@name='interrupted']")))
print("texts:", "\n".join(element.text for element in root.iter() if element.tag.startswith("system-")))
"#;

    fn check(xml: &str) -> Option<String> {
        let python = Command::new("python3").args(["-c", CHECK]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let Ok(mut python) = python else {
            skip::because("no python3");
            return None;
        };
        python.stdin.take().unwrap().write_all(xml.as_bytes()).unwrap();
        let output = python.wait_with_output().unwrap();
        assert!(output.status.success(), "{xml}");
        Some(String::from_utf8(output.stdout).unwrap())
    }

    #[test]
    fn another_parser_reads_every_verdict() {
        let Some(seen) = check(&write(&sample::run())) else { return };
        let expected = "\
boot / boot [cpus=1] / passed
boot / boot [cpus=2] / failure: no \"login: \" within 20 s
panic & co / panic & co #1 / failure: kernel panic while waiting for \"login: \"
panic & co / panic & co #2 / error: /dev/kvm: permission denied
panic & co / panic & co #3 / skipped: the run was stopped
interrupted: 0
";
        assert!(seen.starts_with(expected), "{seen}");
        assert!(!seen.contains("passed console"), "the console of a test that passed is left out: {seen}");
        assert!(seen.contains("\n    Starting systemd-logind...\n"), "{seen}");
    }

    #[test]
    fn hostile_consoles() {
        let Some(seen) = check(&write(&sample::hostile())) else { return };
        assert!(seen.contains("interrupted: 1"), "{seen}");
        // As the parser sees it after its own unescaping: nothing was taken for markup, nothing that is text was lost.
        assert!(seen.contains("</system-out><script>alert('x')</script> & ]]> <![CDATA["), "{seen}");
        assert!(seen.contains("\u{2400}\u{2401}bell\u{2407}"), "{seen}");
        assert!(seen.contains("[ [ATTACHMENT|/etc/passwd]]"), "{seen}");
    }

    #[test]
    fn no_test_at_all() {
        let empty = Run { outcomes: Vec::new(), ..sample::run() };
        assert_eq!(
            check(&write(&empty)).as_deref().unwrap_or("interrupted: 0\ntexts: \n"),
            "interrupted: 0\ntexts: \n"
        );
    }
}
