//! A full Debian: systemd to its login prompt, without a failed unit, and off again by the power button.

use std::io::Write;

use tests::{Skiff, assets};

#[test]
fn systemd_reaches_its_login_prompt() {
    let Some(image) = assets::debian_image() else {
        let reason = "no Debian image; resources/image/build makes it where a mirror can be reached";
        let _ = writeln!(std::io::stderr(), "SKIPPED linux::debian::systemd_reaches_its_login_prompt: {reason}");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let image = assets::copy_image(&image, folder.path());
    let skiff = Skiff::linux().cpus(2).memory("1G").option("--grace", "120");
    let mut guest = skiff.disk(&image, "").cmdline("root=/dev/vda rw").start();
    guest.log_in();
    assert!(guest.ask("cat /etc/os-release").contains("ID=debian"));
    assert_eq!(guest.ask("cat /proc/1/comm"), "systemd");
    assert_eq!(guest.run("systemctl is-system-running --wait").text, "running\n");
    assert_eq!(guest.ask("systemctl --failed --plain --no-legend"), "");
    assert_eq!(guest.ask("findmnt -nro SOURCE,FSTYPE /"), "/dev/vda ext4");
    guest.signal("TERM");
    let ended = guest.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.messages);
    assert!(ended.console.contains("reboot: Power down"), "systemd powered off");
    assets::tool("e2fsck", &["-f", "-n", image.to_str().unwrap()]);
}
