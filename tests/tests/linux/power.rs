//! How a machine ends, and what its exit code says.

use tests::Skiff;

/// A guest whose kernel does not start again by itself after a panic, so that pvpanic is what is tested.
const KEEP_PANICKED: &str = "panic=0";

#[test]
fn poweroff_is_0() {
    let ended = Skiff::linux().cmdline("skiff.run=true").run();
    assert_eq!(ended.code, Some(0), "{}", ended.messages);
    assert!(ended.console.contains("skiff-guest: run"));
}

#[test]
fn reboot_starts_the_machine_again() {
    let mut guest = Skiff::linux().cpus(2).boot();
    let first = guest.ask("cat /proc/sys/kernel/random/boot_id");
    guest.send("reboot -f\n");
    guest.wait_ready();
    let second = guest.ask("cat /proc/sys/kernel/random/boot_id");
    assert_ne!(first, second, "another boot");
    assert_eq!(guest.ask("nproc"), "2");
    assert_eq!(guest.power_off().code, Some(0));
}

#[test]
fn reboot_ends_with_0_under_no_reboot() {
    let mut guest = Skiff::linux().flag("--no-reboot").boot();
    guest.send("reboot -f\n");
    let ended = guest.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.messages);
    assert_eq!(ended.console.matches("skiff-guest: ready").count(), 1);
}

#[test]
fn panic_is_4() {
    let mut guest = Skiff::linux().cmdline(KEEP_PANICKED).boot();
    guest.ask("grep -q pvpanic /proc/modules");
    guest.send("echo c >/proc/sysrq-trigger\n");
    let ended = guest.wait();
    assert_eq!(ended.code, Some(4), "{}", ended.messages);
    assert!(ended.console.contains("Kernel panic - not syncing: sysrq triggered crash"));
}

/// `reboot=t` makes the kernel reset by loading an empty IDT and raising an exception.
#[test]
fn triple_fault_is_6() {
    let mut guest = Skiff::linux().cmdline("reboot=t").boot();
    guest.send("reboot -f\n");
    let ended = guest.wait();
    assert_eq!(ended.code, Some(6), "{}", ended.messages);
}

/// The first signal presses the power button, and acpid in the guest answers it.
fn button(signal: &str) {
    let mut guest = Skiff::linux().boot();
    guest.ask("pidof acpid");
    guest.signal(signal);
    let ended = guest.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.messages);
    assert!(ended.console.contains("reboot: Power down"), "the guest powered itself off");
}

#[test]
fn sigterm_presses_the_power_button() {
    button("TERM");
}

#[test]
fn sigint_presses_the_power_button() {
    button("INT");
}

/// Before there is a kernel that listens to its button, and then for long nobody whom it could tell.
#[test]
fn sigterm_during_boot_presses_the_power_button() {
    let mut guest = Skiff::linux().cmdline("loglevel=7").start();
    guest.wait_for("Linux version");
    guest.signal("TERM");
    let ended = guest.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.messages);
    assert!(ended.console.contains("reboot: Power down"), "the guest powered itself off");
}

#[test]
fn a_second_signal_is_10() {
    let mut guest = Skiff::linux().boot();
    guest.ask("killall acpid");
    guest.signal("TERM");
    // The guest saw the button and went on.
    guest.ask("until grep -q '^ *[0-9]*: *[1-9].*ACPI:Ged' /proc/interrupts; do usleep 100000; done");
    guest.signal("TERM");
    let ended = guest.wait();
    assert_eq!(ended.code, Some(10), "{}", ended.messages);
}

#[test]
fn the_end_of_the_grace_period_is_10() {
    let mut guest = Skiff::linux().option("--grace", "1").boot();
    guest.ask("killall acpid");
    guest.signal("TERM");
    let ended = guest.wait();
    assert_eq!(ended.code, Some(10), "{}", ended.messages);
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
