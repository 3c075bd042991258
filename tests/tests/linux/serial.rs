//! The other ends that COM1 can have.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;

use tests::{Console, PATIENCE, Skiff, assets};

/// The guest answers on the other end as it does on standard output, and powers off when told.
fn conversation(console: &Console, mut keys: impl Write) {
    console.wait_for("skiff-guest: ready\n", PATIENCE).unwrap();
    keys.write_all(b"echo six times seven is $((6 * 7))\n").unwrap();
    console.wait_for("<<<\nsix times seven is 42\n>>> 0\n", PATIENCE).unwrap();
    keys.write_all(b"poweroff -f\n").unwrap();
}

#[test]
fn a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("console.log");
    let ended = Skiff::linux().option("--serial", format!("file={}", path.display())).cmdline("skiff.run=uname").run();
    assert_eq!((ended.code, ended.console.as_str()), (Some(0), ""));
    let text = std::fs::read_to_string(path).unwrap().replace('\r', "");
    assert!(text.contains("skiff-guest: run\nLinux\n"), "{text}");
}

#[test]
fn a_pseudoterminal() {
    let mut machine = Skiff::linux().option("--serial", "pty").flag("-v").start();
    machine.wait_for_message("the serial console is at ");
    let name = machine.wait_for_message("\n");
    let terminal = File::options().read(true).write(true).open(&name).unwrap();
    let console = Console::reading(terminal.try_clone().unwrap());
    conversation(&console, terminal);
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (Some(0), ""));
}

#[test]
fn a_socket_whose_client_comes_and_goes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("console");
    let mut machine = Skiff::linux().option("--serial", format!("socket={}", path.display())).flag("-v").start();
    machine.wait_for_message("the serial console listens at ");
    let mut first = UnixStream::connect(&path).unwrap();
    let console = Console::reading(first.try_clone().unwrap());
    console.wait_for("skiff-guest: ready\n", PATIENCE).unwrap();
    first.write_all(b"echo $((1 + 2))\n").unwrap();
    console.wait_for("<<<\n3\n>>> 0\n", PATIENCE).unwrap();
    first.shutdown(std::net::Shutdown::Both).unwrap();
    console.wait_for_end(PATIENCE).unwrap();
    drop(first);

    let mut second = UnixStream::connect(&path).unwrap();
    let console = Console::reading(second.try_clone().unwrap());
    second.write_all(b"echo $((2 + 3))\n").unwrap();
    console.wait_for("<<<\n5\n>>> 0\n", PATIENCE).unwrap();
    second.write_all(b"poweroff -f\n").unwrap();
    assert_eq!(machine.wait().code, Some(0));
    assert!(!path.exists(), "the socket is removed");
}

#[test]
fn nothing() {
    let folder = tempfile::tempdir().unwrap();
    let image = assets::blank_image(folder.path(), "data.img", 1 << 20);
    let ended = Skiff::linux()
        .option("--serial", "none")
        .disk(&image, "")
        .cmdline("skiff.run=\"echo here >/dev/vda; sync\"")
        .run();
    assert_eq!((ended.code, ended.console.as_str()), (Some(0), ""));
    assert!(std::fs::read(image).unwrap().starts_with(b"here\n"), "the guest ran all the same");
}
