//! `skiff smoke` sees what goes wrong in real kernels, though no step asks for it. Scenarios of which all is well are in
//! tests/scenarios.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use tests::assets;

/// The only test of a scenario of the stock kernel: `machine` has its other keys, `rest` what comes after them.
fn test(cmdline: &str, machine: &str, rest: &str) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let scenario = folder.path().join("a.toml");
    let kernel = assets::guest("vmlinuz");
    let script = format!(
        "timeout = '5m'\n[machine]\nkernel = '{}'\ncmdline = 'console=ttyS0 quiet {cmdline}'\n{machine}\n{rest}",
        kernel.display()
    );
    std::fs::write(&scenario, script).unwrap();
    let mut command = Command::new(assets::skiff());
    command.arg("smoke").arg(&scenario).args(["--json", "-"]).stdin(Stdio::null());
    let output = command.output().unwrap();
    let results: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    assert_eq!(results["exit_code"].as_i64(), output.status.code().map(i64::from));
    results["tests"][0].clone()
}

/// Why it failed: the summary must begin so, and the quoted lines have this in them.
#[track_caller]
fn fails(test: &Value, summary: &str, quoted: &str) {
    assert_eq!(test["verdict"], "failed", "{test:#}");
    let failure = &test["failure"];
    assert!(failure["summary"].as_str().unwrap().starts_with(summary), "{failure:#}");
    assert!(failure["quotes"].to_string().contains(quoted), "{failure:#}");
}

fn initrd() -> String {
    format!("initrd = '{}'", assets::guest("initrd.img").display())
}

/// Sends these lines to the shell of the guest, then waits in vain.
fn steps(lines: &[&str]) -> String {
    let sent: Vec<_> = lines.iter().map(|line| format!("[[step]]\nsend = \"{line}\"\n")).collect();
    let sent = sent.concat();
    format!("[[step]]\nwait = 'skiff-guest: ready'\n{sent}[[step]]\nwait = 'login: '\n")
}

/// An ext4 image with the folder `etc` in it.
fn ext4(folder: &Path) -> String {
    let tree = folder.join("tree");
    std::fs::create_dir_all(tree.join("etc")).unwrap();
    let image = assets::blank_image(folder, "data.img", 16 << 20);
    let (tree, path) = (tree.to_str().unwrap(), image.to_str().unwrap());
    assets::tool("mke2fs", &["-qF", "-t", "ext4", "-d", tree, path]);
    path.to_owned()
}

#[test]
fn a_panic_nobody_waited_for() {
    for end in ["panic=0", "panic=-1"] {
        let test = test(end, &initrd(), &steps(&["echo c >/proc/sysrq-trigger"]));
        fails(&test, "kernel panic (step: ", "Kernel panic - not syncing: sysrq triggered crash");
    }
}

#[test]
fn a_root_device_that_is_not_there() {
    let test = test("root=/dev/vdz panic=-1", "", "[[step]]\nwait = 'login: '\n");
    fails(&test, "the root filesystem cannot be mounted", "Unable to mount root fs");
}

#[test]
fn a_guest_that_reboots_and_reboots() {
    let test = test("panic=-1 skiff.run=\"reboot -f\"", &initrd(), "[[step]]\nwait = 'login: '\n");
    assert_eq!(test["verdict"], "failed", "{test:#}");
    let summary = test["failure"]["summary"].as_str().unwrap();
    assert_eq!(summary, "the guest reset the machine (step: wait for \"login: \")");
}

/// A process that writes to a frozen filesystem waits for ever, and the kernel complains of it.
#[test]
fn a_task_that_hangs() {
    let folder = tempfile::tempdir().unwrap();
    let machine = format!("{}\ndisk = [{{ path = '{}' }}]", initrd(), ext4(folder.path()));
    let lines = [
        "mount /dev/vda /mnt && fsfreeze --freeze /mnt",
        "echo 1 >/proc/sys/kernel/hung_task_timeout_secs; touch /mnt/file &",
    ];
    fails(&test("panic=-1", &machine, &steps(&lines)), "hung task (step: ", "blocked for more than");
}

#[test]
fn a_filesystem_that_is_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let image = ext4(folder.path());
    assets::tool("debugfs", &["-w", "-R", "clri /etc", &image]);
    let machine = format!("{}\ndisk = [{{ path = '{image}' }}]", initrd());
    let test = test("panic=-1", &machine, &steps(&["mount /dev/vda /mnt; ls -l /mnt/etc"]));
    fails(&test, "filesystem or disk error (step: ", "EXT4-fs error");
}

/// What it takes a broken kernel or broken hardware to say, said by a sound one: all kinds are found on a real console and
/// their weight may be chosen.
#[test]
fn every_kind_of_trouble_may_be_a_warning() {
    let lines = [
        ("lockup", "watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [sh:1]", "CPU lockup"),
        ("rcu-stall", "rcu: INFO: rcu_preempt self-detected stall on CPU", "RCU stall"),
        ("hung-task", "INFO: task sh:1 blocked for more than 120 seconds.", "hung task"),
        ("oops", "Oops: 0002 [#1] PREEMPT SMP NOPTI", "kernel oops"),
        ("bug", "BUG: Bad page state in process sh  pfn:00001", "kernel bug"),
        ("call-trace", "Call Trace:", "call trace"),
        ("warning", "WARNING: CPU: 0 PID: 1 at kernel/foo.c:12 foo+0x1/0x2", "kernel warning"),
        (
            "filesystem",
            "EXT4-fs error (device vda): ext4_lookup:1855: inode #2: comm ls: bad",
            "filesystem or disk error",
        ),
    ];
    let rules: Vec<_> = lines.iter().map(|(kind, ..)| format!("{kind} = 'warn'\n")).collect();
    // KERN_ERR, which "quiet" lets through.
    let runs: Vec<_> =
        lines.iter().map(|(_, line, _)| format!("[[step]]\nrun = \"echo '<3>{line}' >/dev/kmsg\"\n")).collect();
    let (rules, runs) = (rules.concat(), runs.concat());
    let rest = format!(
        "[fail]\n{rules}[[step]]\nwait = 'skiff-guest: ready'\n{runs}[[step]]\nsend = 'poweroff -f'\n[[step]]\nexpect = 'poweroff'\n"
    );
    let test = test("panic=-1", &initrd(), &rest);
    assert_eq!(test["verdict"], "passed", "{test:#}");
    let found: Vec<_> = test["warnings"].as_array().unwrap().iter().map(|it| it["text"].as_str().unwrap()).collect();
    assert_eq!(found, lines.map(|line| line.2));
}
