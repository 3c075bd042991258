//! Signs of trouble that every console is watched for, whatever its scenario waits for. Any thread.

use super::pattern::Pattern;

/// A kind of trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    /// As `[fail]` names it.
    pub(super) name: &'static str,
    /// For a person.
    pub(super) words: &'static str,
    signs: &'static [Sign],
}

/// All of these texts, in this order, in one line.
type Sign = &'static [&'static str];

/// Where a sign must stand at the begin of a kernel's message.
const MESSAGE: &str = "\0";

const fn kind(name: &'static str, words: &'static str, signs: &'static [Sign]) -> Kind {
    Kind { name, words, signs }
}

/// kernel/panic.c
const PANIC: &str = "Kernel panic - not syncing";

/// What Linux says in trouble. The first that fits a line names it.
pub(super) const KINDS: [Kind; 10] = [
    kind(
        "root",
        "the root filesystem cannot be mounted",
        &[
            &["Unable to mount root fs"],
            &["Cannot open root device"],
            &["Gave up waiting for root"],
            &["Dropping to a shell!"],
            &["You are in emergency mode"],
            &["Entering emergency mode"],
        ],
    ),
    kind("panic", "kernel panic", &[&[PANIC]]),
    kind("lockup", "CPU lockup", &[&["soft lockup - CPU#"], &["hard LOCKUP"], &["Watchdog detected hard"]]),
    kind("rcu-stall", "RCU stall", &[&["INFO: rcu_", "stall"], &["rcu", "detected stall"]]),
    kind("hung-task", "hung task", &[&["INFO: task ", "blocked for more than"]]),
    kind(
        "oops",
        "kernel oops",
        &[
            &[MESSAGE, "Oops: "],
            &[MESSAGE, "general protection fault"],
            &["unable to handle kernel"],
            &["unable to handle page fault"],
            &["Internal error: Oops"],
        ],
    ),
    kind("bug", "kernel bug", &[&[MESSAGE, "BUG: "], &[MESSAGE, "kernel BUG at "]]),
    kind("warning", "kernel warning", &[&[MESSAGE, "WARNING: "]]),
    kind("call-trace", "call trace", &[&["Call Trace:"]]),
    kind(
        "filesystem",
        "filesystem or disk error",
        &[
            &["EXT4-fs error"],
            &["XFS (", "orruption"],
            &["XFS (", "Internal error"],
            &["XFS (", "Filesystem has been shut down"],
            &["BTRFS error"],
            &["BTRFS critical"],
            &["SQUASHFS error"],
            &["I/O error, dev "],
            &["Buffer I/O error on dev"],
        ],
    ),
];

/// Where these are in [`KINDS`].
const WARNING: usize = 7;
const CALL_TRACE: usize = 8;

/// How much a kind of trouble counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Weight {
    Fail,
    Warn,
    Ignore,
}

impl Weight {
    pub(super) const ALL: [(&str, Self); 3] = [("fail", Self::Fail), ("warn", Self::Warn), ("ignore", Self::Ignore)];
}

/// What a scenario counts as trouble.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    /// One for each of [`KINDS`].
    pub(super) weights: [Weight; KINDS.len()],
    /// Lines with these are no trouble at all.
    pub(super) allow: Vec<Pattern>,
    /// Lines with these are.
    pub(super) deny: Vec<Pattern>,
}

impl Default for Rules {
    fn default() -> Self {
        Self { weights: [Weight::Fail; KINDS.len()], allow: Vec::new(), deny: Vec::new() }
    }
}

/// What a line means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Trouble {
    pub(super) words: String,
    pub(super) weight: Weight,
    /// The kernel panicked.
    pub(super) panic: bool,
    /// The scenario itself denies it.
    pub(super) denied: bool,
    /// Where its sign begins in the line, in bytes.
    pub(super) at: usize,
}

/// Lines that may lie between a warning and the end of its call trace.
const TRACE: u32 = 100;

/// Judges the lines of one console, in their order.
#[derive(Debug)]
pub(super) struct Judge {
    rules: Rules,
    /// So many lines more may belong to a warning, and what that counts.
    trace: (u32, Weight),
}

impl Judge {
    pub(super) fn new(rules: Rules) -> Self {
        Self { rules, trace: (0, Weight::Fail) }
    }

    /// What `line`, which is complete, means.
    pub(super) fn judge(&mut self, line: &str) -> Option<Trouble> {
        self.trace.0 = self.trace.0.saturating_sub(1);
        if line.contains("---[ end trace") {
            self.trace.0 = 0;
        }
        if self.rules.allow.iter().any(|pattern| pattern.find(line, 0).is_some()) {
            return None;
        }
        let denies = |pattern: &Pattern| Some((pattern.to_string(), pattern.find(line, 0)?.start));
        if let Some((pattern, at)) = self.rules.deny.iter().find_map(denies) {
            let words = format!("{pattern}, which [fail] denies");
            return Some(Trouble { words, weight: Weight::Fail, panic: false, denied: true, at });
        }
        let sign = |kind: usize| KINDS[kind].signs.iter().find_map(|sign| find(sign, line));
        let counts = |kind: &usize| self.rules.weights[*kind] != Weight::Ignore;
        let found = (0..KINDS.len()).filter(counts).find_map(|kind| Some((kind, sign(kind)?)));
        if sign(WARNING).is_some() {
            self.trace = (TRACE, self.rules.weights[WARNING]);
        }
        let (kind, at) = found?;
        // The trace of a warning counts no more than the warning.
        if kind == CALL_TRACE && self.trace.0 > 0 && self.trace.1 != Weight::Fail {
            return None;
        }
        Some(Trouble {
            words: KINDS[kind].words.to_owned(),
            weight: self.rules.weights[kind],
            panic: line.contains(PANIC),
            denied: false,
            at,
        })
    }
}

/// Where the sign begins.
fn find(sign: Sign, line: &str) -> Option<usize> {
    let (message, texts) = match sign {
        [MESSAGE, texts @ ..] => (true, texts),
        texts => (false, texts),
    };
    let (mut rest, mut begin) = (line, 0);
    for (nth, text) in texts.iter().enumerate() {
        let at = rest.find(text)?;
        if nth == 0 && message && !is_begin(&rest[..at]) {
            return None;
        }
        if nth == 0 {
            begin = at;
        }
        rest = &rest[at + text.len()..];
    }
    Some(begin)
}

/// Whether a kernel's message begins behind `text`: behind nothing, or behind the time and perhaps the speaker that the
/// kernel puts in front, as "[    1.234567] " and "[    1.234567][    T1] ". A process has its number in brackets too, but
/// without a point.
fn is_begin(text: &str) -> bool {
    let Some(text) = text.strip_suffix("] ") else { return text.is_empty() };
    let stamp = text.rsplit_once('[').map_or("", |(_, stamp)| stamp.trim_start());
    stamp.strip_prefix(['T', 'C']).map_or(stamp.contains('.'), |speaker| speaker.bytes().all(|it| it.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(rules: Rules, console: &str) -> Vec<(String, Weight)> {
        let mut judge = Judge::new(rules);
        let troubles = console.lines().filter_map(|line| judge.judge(line));
        troubles.map(|trouble| (trouble.words, trouble.weight)).collect()
    }

    fn named(name: &str) -> usize {
        KINDS.iter().position(|kind| kind.name == name).unwrap()
    }

    /// Lines as kernels print them: kernel/panic.c, lib/bug.c, kernel/hung_task.c, kernel/rcu/tree_stall.h, kernel/watchdog.c,
    /// arch/x86/mm/fault.c, init/do_mounts.c, fs/ext4/super.c, fs/xfs/xfs_error.c, block/blk-core.c.
    #[test]
    fn what_kernels_say_in_trouble() {
        for (line, kind) in [
            ("[    1.5] Kernel panic - not syncing: sysrq triggered crash", "panic"),
            ("[    1.5] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)", "root"),
            ("[    1.5] VFS: Cannot open root device \"vdz\" or unknown-block(0,0): error -6", "root"),
            ("ALERT!  /dev/vdz does not exist.  Dropping to a shell!", "root"),
            ("[    1.5] BUG: kernel NULL pointer dereference, address: 0000000000000000", "bug"),
            ("[    1.5][    T1] BUG: KASAN: use-after-free in foo+0x1/0x2", "bug"),
            ("[    1.5] watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [sh:1]", "lockup"),
            ("[    1.5] NMI watchdog: Watchdog detected hard LOCKUP on cpu 1", "lockup"),
            ("[    1.5] Oops: 0002 [#1] PREEMPT SMP NOPTI", "oops"),
            ("[    1.5] BUG: unable to handle page fault for address: ffffffff81000000", "oops"),
            ("[    1.5] WARNING: CPU: 0 PID: 1 at kernel/foo.c:12 foo+0x1/0x2", "warning"),
            ("WARNING: possible circular locking dependency detected", "warning"),
            ("[    1.5] Call Trace:", "call-trace"),
            ("[  242.5] INFO: task sh:1 blocked for more than 120 seconds.", "hung-task"),
            ("[   21.5] rcu: INFO: rcu_preempt self-detected stall on CPU", "rcu-stall"),
            ("[   21.5] rcu: INFO: rcu_sched detected stalls on CPUs/tasks:", "rcu-stall"),
            ("[    1.5] EXT4-fs error (device vda): ext4_lookup:1855: inode #2: comm ls: bad", "filesystem"),
            ("[    1.5] XFS (vda): Metadata corruption detected at xfs_agf_read_verify", "filesystem"),
            ("[    1.5] I/O error, dev vda, sector 2 op 0x0:(READ) flags 0x0", "filesystem"),
            ("login: [    1.5] WARNING: CPU: 0 PID: 1 at kernel/foo.c:12 foo+0x1/0x2", "warning"),
        ] {
            let words = KINDS[named(kind)].words.to_owned();
            assert_eq!(judge(Rules::default(), line), [(words, Weight::Fail)], "{line}");
        }
    }

    #[test]
    fn positions_in_the_table() {
        assert_eq!((KINDS[WARNING].name, KINDS[CALL_TRACE].name), ("warning", "call-trace"));
    }

    #[test]
    fn a_kind_that_is_ignored_does_not_hide_another() {
        let mut rules = Rules::default();
        rules.weights[named("root")] = Weight::Ignore;
        let line = "Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)";
        assert_eq!(judge(rules, line), [("kernel panic".to_owned(), Weight::Fail)]);
    }

    #[test]
    fn what_is_none() {
        for line in [
            "[    0.0] Command line: console=ttyS0 panic=-1 root=/dev/vda",
            "[    1.5] EXT4-fs (vda): mounted filesystem with ordered data mode",
            "[    1.5] XFS (vda): Mounting V5 Filesystem",
            "apt says WARNING: no stable interface",
            "fixed a BUG: in it",
            "[    0.2] rcu: Hierarchical RCU implementation.",
            "[    1.5] RCU Tasks: Setting shift to 0",
            // A program that crashed, by arch/x86/kernel/traps.c; a line of systemd's.
            "[    1.5] traps: a.out[123] general protection fault ip:5581 sp:7ffc error:0 in a.out[5581+1000]",
            "[FAILED] WARNING: no such unit",
        ] {
            assert_eq!(judge(Rules::default(), line), [], "{line}");
        }
    }

    #[test]
    fn a_scenario_may_weigh_them() {
        let warning = "WARNING: CPU: 0 PID: 1 at a.c:1 f\nCall Trace:\n f+1\n---[ end trace 0 ]---\n";
        let mut rules = Rules::default();
        rules.weights[named("warning")] = Weight::Warn;
        let expected = [("kernel warning".to_owned(), Weight::Warn)];
        assert_eq!(judge(rules.clone(), warning), expected);
        let later = format!("{warning}Call Trace:\n");
        assert_eq!(judge(rules.clone(), &later).last().unwrap().0, "call trace", "that of something else");
        rules.weights[named("warning")] = Weight::Ignore;
        assert_eq!(judge(rules.clone(), warning), []);

        rules.allow = vec![Pattern::regex("panic.*on purpose").unwrap()];
        rules.deny = vec![Pattern::text("segfault").unwrap()];
        let console = "Kernel panic - not syncing: on purpose\nsh[1]: segfault at 0\n";
        assert_eq!(judge(rules, console), [("\"segfault\", which [fail] denies".to_owned(), Weight::Fail)]);
    }
}
