//! Sessions with shell scripts in the place of machines: they say what no guest says at will.

use super::*;
use std::sync::Mutex;

/// Notes the events in short.
#[derive(Default)]
struct Notes(Mutex<Vec<String>>);

impl Observer for Notes {
    fn event(&self, event: Event<'_>) {
        let note = match event {
            Event::Started { steps, .. } => format!("started {steps}"),
            Event::StepBegan { step, title, .. } => format!("began {step} {title}"),
            Event::StepEnded { step, .. } => format!("ended {step}"),
            Event::Line { text, .. } => format!("line {text}"),
            Event::Planned { .. } | Event::Ended { .. } | Event::Stopping => return,
        };
        self.0.lock().unwrap().push(note);
    }
}

/// The words with which `skiff run -v` ends.
const POWERED_OFF: &str = "echo 'skiff: the guest powered off; exit code 0' >&2";

/// What becomes of a scenario, whose machine is a script for sh.
fn play_with(scenario: &str, script: &str, stop: &AtomicBool, notes: &Notes) -> Outcome {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("k"), "").unwrap();
    let whole = format!("machine.kernel = 'k'\n{scenario}");
    let scenario = Scenario::parse(&folder.path().join("a.toml"), &whole).unwrap_or_else(|errors| panic!("{errors:?}"));
    let prepared = Prepared::new(&scenario, &scenario.cells[0], false, stop).unwrap();
    let test = TestId { scenario: "a".into(), file: "a.toml".into(), cell: Vec::new(), repetition: 0 };
    let surroundings = Surroundings { observer: notes, stop, began: Instant::now() };
    let mut command = Command::new("bash");
    command.args(["-c", script]);
    Session::start(&surroundings, &scenario, &scenario.cells[0], &test, &prepared, command).unwrap().run()
}

fn play(scenario: &str, script: &str) -> Outcome {
    play_with(scenario, script, &AtomicBool::new(false), &Notes::default())
}

/// Why it failed.
fn failure(scenario: &str, script: &str) -> Failure {
    let outcome = play(scenario, script);
    assert_eq!(outcome.verdict, Verdict::Failed, "{outcome:?}");
    outcome.failure.unwrap()
}

fn passes(scenario: &str, script: &str) -> Outcome {
    let outcome = play(scenario, script);
    assert_eq!((outcome.verdict, &outcome.failure), (Verdict::Passed, &None), "{:?}", outcome.console.lines());
    outcome
}

#[test]
fn a_conversation() {
    let scenario = "[[step]]\nwait = 'login: '\nmeasure = 'boot'\nmax = '1ms'\n[[step]]\nsend = 'root'\n\
                    [[step]]\nwait-regex = '[$#] $'\n[[step]]\nrun = 'echo six $((2 * 3)); exit_ 2>/dev/null || (exit 3)'\n\
                    status = 3\noutput = 'six 6'\n[[step]]\nkey = 'ctrl-d'\n[[step]]\nexpect = 'poweroff'\n";
    let script = format!(
        "sleep 0.05; printf 'boot\\r\\nguest login: '; read name; echo \"hello $name\"; printf '# '\n\
         read line; echo \"$line\"; eval \"$line\"; printf '# '; read -N1 key; [ \"$key\" = $'\\x04' ] || exit 1; {POWERED_OFF}"
    );
    let notes = Notes::default();
    let outcome = play_with(scenario, &script, &AtomicBool::new(false), &notes);
    assert_eq!((outcome.verdict, &outcome.failure), (Verdict::Passed, &None), "{:?}", outcome.console.lines());
    assert_eq!(outcome.end.as_deref(), Some("the guest powered off"));
    assert!(outcome.steps.iter().all(|step| step.state == StepState::Passed && step.began.is_some()));
    assert_eq!((outcome.measures[0].name.as_str(), outcome.measures.len()), ("boot", 1));
    assert!(outcome.warnings[0].text.starts_with("boot took ") && outcome.warnings[0].text.ends_with("more than 1 ms"));
    let notes = notes.0.into_inner().unwrap();
    assert_eq!(notes[..2], ["started 6", "began 0 wait for \"login: \""]);
    assert_eq!(notes.iter().filter(|note| note.starts_with("ended")).count(), 6);
    assert!(notes.iter().any(|note| note.starts_with("line ")), "{notes:?}");
}

#[test]
fn output_that_is_hardly_text() {
    passes("[[step]]\nwait = 'login: '\n", "printf '\\0\\0lo\\0gin\\0: '; sleep 100");
    passes("[[step]]\nwait = 'login: '\n", "printf '\\xff\\xfe\\xc3login: '; sleep 100");
    passes("[[step]]\nwait = 'login: '\n", "printf 'lo'; sleep 0.1; printf 'gin'; sleep 0.1; printf ': '; sleep 100");
    let flood =
        passes("[[step]]\nwait = 'login: '\n", "head -c 10485760 /dev/zero | tr '\\0' x; printf 'login: '; sleep 100");
    assert_eq!(flood.console.len(), (10 << 20) + 7);
    assert!(flood.console.dropped() > 8 << 20);
    passes("[[step]]\nwait = 'login: '\n", "head -c 1000000 /dev/urandom; printf '\\nlogin: '; sleep 100");
}

#[test]
fn what_a_step_waits_for_in_vain() {
    let steps = "[[step]]\nwait = 'two'\n[[step]]\nwait = 'login: '\ntimeout = '100ms'\n";
    let failed = failure(steps, "echo one; echo two; sleep 100");
    assert_eq!((failed.summary.as_str(), failed.step), ("no \"login: \" within 100 ms", Some(1)));
    assert!(failed.place.unwrap().ends_with("a.toml:5"));
    let last: Vec<_> = failed.last_lines.iter().map(|line| (line.number, line.text.as_str())).collect();
    assert_eq!((last, failed.quotes.len()), (vec![(1, "one"), (2, "two")], 0));

    let failed = failure("timeout = '200ms'\n[[step]]\nwait = 'x'\ntimeout = '1m'\n", "sleep 100");
    assert!(failed.summary.starts_with("no \"x\" within the scenario's 200 ms"), "{}", failed.summary);
    let failed = failure("[[step]]\nwait = 'x'\n", POWERED_OFF);
    assert_eq!(failed.summary, "the guest powered off (step: wait for \"x\")");
    let failed = failure("[[step]]\nexpect = 'poweroff'\ntimeout = '50ms'\n", "sleep 100");
    assert!(failed.summary.starts_with("no poweroff within 50 ms"), "{}", failed.summary);
    let failed = failure("[[step]]\nexpect = 'reboot'\n", POWERED_OFF);
    assert_eq!(failed.summary, "the guest powered off (step: expect reboot)");
    // Where a busy host has not let the machine say a word until then, that is said behind it.
    let failed = failure("silence = '200ms'\n[[step]]\nwait = 'x'\n", "echo last; sleep 100");
    assert!(failed.summary.starts_with("the console was silent for 200 ms"), "{}", failed.summary);
    // Nobody asked for it.
    let failed = failure("timeout = '1s'\n[[step]]\nwait = 'x'\n", "echo last; sleep 100");
    let half = "the console was silent for 500 ms, half of the scenario's timeout";
    assert!(failed.summary.starts_with(half), "{}", failed.summary);
    let remedy = "; if it may be, write silence = \"off\" (step: wait for \"x\")";
    assert!(failed.summary.ends_with(remedy), "{}", failed.summary);
    let failed = failure("timeout = '1s'\nsilence = 'off'\n[[step]]\nwait = 'x'\n", "echo last; sleep 100");
    assert!(failed.summary.starts_with("no \"x\" within the scenario's 1 s"), "{}", failed.summary);
    let failed = failure("[[step]]\nwait = 'x'\ntimeout = '200ms'\n", "sleep 100");
    let unheard = "no \"x\" within 200 ms; nothing ever came from the machine, whose cmdline has no console=ttyS0";
    assert_eq!(failed.summary, unheard);
}

#[test]
fn commands_that_fail() {
    let shell = "while read line; do eval \"$line\"; done";
    let failed = failure("[[step]]\nrun = 'echo no; false'\n", shell);
    assert_eq!(failed.summary, "\"echo no; false\" ended with 1, not 0; it said \"no\"");
    let failed = failure("[[step]]\nrun = 'echo no'\noutput-regex = '^yes$'\n", shell);
    assert_eq!(failed.summary, "\"echo no\" said \"no\", and no /^yes$/");
    passes("[[step]]\nrun = 'false'\nstatus = 'any'\n[[step]]\nrun = 'printf a'\noutput = 'a'\n", shell);
    let failed = failure("[[step]]\nrun = 'sleep 100'\ntimeout = '200ms'\n", shell);
    assert_eq!(failed.summary, "\"sleep 100\" did not end within 200 ms");
    let shell_that_ends = format!("read line; {POWERED_OFF}");
    let failed = failure("[[step]]\nrun = 'true'\n", &shell_that_ends);
    assert_eq!(failed.summary, "the guest powered off (step: run \"true\")");
}

/// A machine that says this, all at once, and lives on.
fn said(text: &str) -> String {
    format!("cat <<'END'\n{text}END\nsleep 100")
}

#[test]
fn trouble_nobody_asked_about() {
    let wait = "[[step]]\nwait = 'login: '\n";
    let panic = said("boot\n[    1.0] Kernel panic - not syncing: no init\n trace\n");
    let panic = panic.as_str();
    let failed = failure(wait, panic);
    assert_eq!(failed.summary, "kernel panic (step: wait for \"login: \")");
    let quotes: Vec<_> = failed.quotes.iter().map(|line| (line.number, line.text.as_str())).collect();
    assert_eq!(quotes, [(2, "[    1.0] Kernel panic - not syncing: no init"), (3, " trace")]);

    // In the same breath as what the last step waits for.
    let failed = failure(wait, &said("login: \nKernel panic - not syncing: late\n"));
    assert_eq!(failed.summary, "kernel panic after the last step");
    // At once and one after the other, it is the step that waited then.
    let warning = "WARNING: CPU: 0 PID: 1 at a.c:1 f\nlogin: \n";
    assert_eq!(failure(wait, &said(warning)).summary, "kernel warning (step: wait for \"login: \")");
    let warning = "echo 'WARNING: CPU: 0 PID: 1 at a.c:1 f'; printf 'login: '; sleep 100";
    assert_eq!(failure(wait, warning).summary, "kernel warning (step: wait for \"login: \")");
    let outcome = passes(&format!("fail.warning = 'warn'\n{wait}"), warning);
    assert_eq!((outcome.warnings.len(), outcome.warnings[0].quote.as_ref().unwrap().number), (1, 1));
    assert_eq!(passes(&format!("fail.warning = 'ignore'\n{wait}"), warning).warnings, []);
    passes(&format!("fail.allow = ['a\\.c:1']\n{wait}"), warning);
    let denied = failure(&format!("fail.deny = ['^boot$']\n{wait}"), "echo boot; printf 'login: '; sleep 100");
    assert_eq!(denied.summary, "/^boot$/, which [fail] denies (step: wait for \"login: \")");
    // A scenario that waits for it does not mind it.
    passes(
        "[[step]]\nwait = 'BUG: '\n[[step]]\nwait = 'login: '\n",
        "echo 'BUG: one'; sleep 0.1; printf 'login: '; sleep 100",
    );
    passes(
        "[[step]]\nwait = 'BUG: '\n[[step]]\nwait = 'login: '\n",
        "printf 'BUG: '; sleep 0.1; echo one; sleep 0.1; printf 'login: '; sleep 100",
    );
}

#[test]
fn trouble_behind_a_prompt() {
    let steps = "[[step]]\nwait = 'login: '\n[[step]]\nwait = 'again'\n";
    let panic = "[    1.0] Kernel panic - not syncing: x";
    for machine in
        [said(&format!("login: {panic}\n")), format!("printf 'login: '; sleep 0.1; echo '{panic}'; sleep 100")]
    {
        assert_eq!(failure(steps, &machine).summary, "kernel panic (step: wait for \"again\")");
    }
    // But a step may wait for what it says.
    passes("[[step]]\nwait = 'syncing: x'\n", &said(&format!("{panic}\n")));
}

#[test]
fn trouble_right_after_the_last_step() {
    let wait = "[[step]]\nwait = 'ready'\n";
    // It speaks when the machine is gone, so that no time between the two counts.
    let ready = "(while kill -0 $$ 2>/dev/null; do sleep 0.01; done; echo ready) &";
    let ends = |message: &str, code: u8| format!("{ready} echo 'skiff: {message}; exit code {code}' >&2; exit {code}");
    assert_eq!(
        failure(wait, &ends("warning: triple fault", 6)).summary,
        "triple fault (exit code 6) after the last step"
    );
    assert!(
        failure(wait, &ends("warning: the guest kernel panicked", 4)).summary.starts_with("the guest kernel panicked")
    );
    passes(wait, &ends("the guest powered off", 0));
    passes(wait, &ends("the guest wrote 0x10 to the debug exit port", 33));
    let outcome = play(wait, &format!("{ready} echo 'a bug of skiff' >&2; exit 101"));
    assert_eq!((outcome.verdict, outcome.failure.unwrap().summary.as_str()), (Verdict::Error, "a bug of skiff"));
    // A machine that reset in between comes to its last step all the same.
    let reset = format!("echo boot; echo 'skiff: {RESTART}' >&2; sleep 0.1; echo ready; sleep 100");
    let failed = failure(wait, &reset);
    assert!(failed.summary.starts_with("the guest reset the machine"), "{}", failed.summary);
}

#[test]
fn what_a_machine_says_at_its_end_is_kept() {
    let steps = "[[step]]\nwait = 'c'\n[[step]]\nwait = 'never'\ntimeout = '100ms'\n";
    let failed = play(steps, "echo a; echo b >&2; sleep 0.1; echo c; sleep 100");
    let lines: Vec<_> = failed.console.lines().into_iter().map(|line| line.bytes).collect();
    assert_eq!((lines, failed.messages.as_str()), (vec![b"a".to_vec(), b"c".to_vec()], "b\n"));
}

#[test]
fn a_panic_that_is_wanted() {
    let panic = "echo 'BUG: it'; echo 'Kernel panic - not syncing: on purpose'; echo 'Call Trace:'; sleep 100";
    passes("[[step]]\nexpect = 'panic'\n", panic);
    passes(
        "[[step]]\nwait = 'Kernel panic'\n[[step]]\nexpect = 'panic'\n",
        "echo 'Kernel panic - not syncing: x'; sleep 100",
    );
    passes("[[step]]\nexpect = 'panic'\n", "echo 'Kernel panic - not syncing: x'; yes");
    let silent = "echo 'skiff: warning: the guest kernel panicked; exit code 4' >&2; exit 4";
    passes("[[step]]\nexpect = 'panic'\n[[step]]\ncheck-file = 'k'\n", silent);
    let failed = failure("[[step]]\nexpect = 'panic'\n", POWERED_OFF);
    assert_eq!(failed.summary, "the guest powered off (step: expect panic)");
    let failed = failure("fail.deny = ['leak']\n[[step]]\nexpect = 'panic'\n", "echo 'a leak'; sleep 100");
    assert_eq!(failed.summary, "/leak/, which [fail] denies (step: expect panic)");
}

#[test]
fn resets() {
    let reset = format!("echo 'skiff: {RESTART}' >&2");
    let loops = format!("while :; do echo boot; sleep 0.05; {reset}; done");
    let failed = failure("[[step]]\nwait = 'login: '\n", &loops);
    assert_eq!(failed.summary, "the guest reset the machine (step: wait for \"login: \")");
    passes("[[step]]\nexpect = 'reboot'\n[[step]]\nwait = 'boot'\n[[step]]\nexpect = 'reboot'\n", &loops);
    // The message may be faster than the console.
    let late = format!("{reset}; sleep 0.05; echo 'restarting'; sleep 100");
    passes("[[step]]\nwait = 'restarting'\n[[step]]\nexpect = 'reboot'\n", &late);
}

#[test]
fn files_are_checked_after_the_end() {
    let failed = failure("[[step]]\nexpect = 'poweroff'\n[[step]]\ncheck-file = 'gone'\n", POWERED_OFF);
    assert!(failed.summary.ends_with("gone does not exist"), "{}", failed.summary);
    assert_eq!(failed.step, Some(1));
}

#[test]
fn hosts_that_cannot() {
    let outcome = play("[[step]]\nwait = 'x'\n", "echo 'skiff: /dev/kvm: no such file' >&2; exit 1");
    assert_eq!(outcome.verdict, Verdict::Error);
    assert_eq!(outcome.failure.unwrap().summary, "/dev/kvm: no such file");
    assert_eq!(outcome.messages, "skiff: /dev/kvm: no such file\n");
}

#[test]
fn the_user_stops_it() {
    let outcome = play_with("[[step]]\nwait = 'x'\n", "sleep 100", &AtomicBool::new(true), &Notes::default());
    assert_eq!((outcome.verdict, outcome.failure.unwrap().summary.as_str()), (Verdict::Skipped, "interrupted"));
}

#[test]
fn a_machine_that_takes_no_input() {
    let scenario = format!("timeout = '1s'\n{}", format!("[[step]]\nsend = '{}'\n", "x".repeat(3900)).repeat(300));
    assert_eq!(failure(&scenario, "sleep 100").summary, "the machine takes no input");
}
