//! `skiff smoke` sees what goes wrong in real kernels, though no step asks for it. Scenarios of which all is well are in
//! tests/scenarios.

use std::process::{Command, Stdio};

use serde_json::Value;
use tests::assets;

/// The only test of a scenario: its verdict and its failure.
fn run(cmdline: &str, initrd: bool, steps: &str) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let scenario = folder.path().join("a.toml");
    let kernel = assets::guest("vmlinuz");
    let initrd = if initrd { format!("initrd = '{}'\n", assets::guest("initrd.img").display()) } else { String::new() };
    let script = format!(
        "timeout = '5m'\n[machine]\nkernel = '{}'\n{initrd}cmdline = 'console=ttyS0 quiet {cmdline}'\n{steps}",
        kernel.display()
    );
    std::fs::write(&scenario, script).unwrap();
    let mut command = Command::new(assets::skiff());
    command.arg("smoke").arg(&scenario).args(["--json", "-"]).stdin(Stdio::null());
    let output = command.output().unwrap();
    let results: Value = serde_json::from_slice(&output.stdout).unwrap();
    let test = results["tests"][0].clone();
    assert_eq!((test["verdict"].as_str(), output.status.code()), (Some("failed"), Some(1)), "{test:#}");
    test["failure"].clone()
}

fn quotes(failure: &Value, text: &str) -> bool {
    failure["quotes"].to_string().contains(text)
}

#[test]
fn a_panic_nobody_waited_for() {
    let steps = "[[step]]\nwait = 'skiff-guest: ready'\n[[step]]\nsend = 'echo c >/proc/sysrq-trigger'\n\
                 [[step]]\nwait = 'login: '\n";
    for end in ["panic=0", "panic=-1"] {
        let failure = run(end, true, steps);
        assert!(quotes(&failure, "Kernel panic - not syncing: sysrq triggered crash"), "{failure:#}");
        assert!(failure["summary"].as_str().unwrap().contains("kernel panic"), "{failure:#}");
    }
}

#[test]
fn a_root_device_that_is_not_there() {
    let failure = run("root=/dev/vdz panic=-1", false, "[[step]]\nwait = 'login: '\n");
    assert!(quotes(&failure, "Unable to mount root fs"), "{failure:#}");
    assert!(failure["summary"].as_str().unwrap().starts_with("the root filesystem cannot be mounted"), "{failure:#}");
}
