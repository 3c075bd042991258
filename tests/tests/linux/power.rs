//! Ends of a machine that only a signal or a key of a terminal brings about. The others, with their exit codes, are scenarios:
//! tests/scenarios.

use tests::Skiff;

/// As SIGTERM does: the first one presses the power button, and acpid in the guest answers it.
#[test]
fn sigint_presses_the_power_button() {
    let mut guest = Skiff::linux().boot();
    guest.ask("pidof acpid");
    guest.signal("INT");
    let ended = guest.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.messages);
    assert!(ended.console.contains("reboot: Power down"), "the guest powered itself off");
}

/// `Ctrl-A x` is a key of the terminal, so skiff gets one: script(1) makes a pseudoterminal.
#[test]
fn ctrl_a_x_ends_the_machine() {
    let skiff = Skiff::linux().into_command();
    let quoted = |word: &std::ffi::OsStr| format!("'{}'", word.to_str().expect("UTF-8"));
    let line: Vec<_> = std::iter::once(skiff.get_program()).chain(skiff.get_args()).map(quoted).collect();
    let mut script = std::process::Command::new("script");
    script.args(["--quiet", "--return", "--command", &line.join(" "), "/dev/null"]);
    let mut guest = tests::Machine::start(script);
    guest.wait_ready();
    guest.send("\x01h");
    guest.wait_for("Ctrl-A x");
    guest.send("\x01x");
    assert_eq!(guest.wait().code, Some(0));
}
