use super::*;
use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;

/// A folder with a kernel and an ext4 image with these files in it; `None`, said loudly, where mke2fs is not there.
fn folder(files: &[(&str, &str)]) -> Option<tempfile::TempDir> {
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path().join("tree");
    fs::create_dir(&tree).unwrap();
    for (name, content) in files {
        let file = tree.join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, content).unwrap();
    }
    let (image, tree) = (folder.path().join("root.img"), tree.to_str().unwrap().to_owned());
    let words = ["-q", "-t", "ext4", "-d", &tree, image.to_str().unwrap(), "8M"];
    if !run("/sbin/mke2fs", &words) {
        skip::because("no mke2fs");
        return None;
    }
    fs::remove_dir_all(tree).unwrap();
    // The setup header of a bzImage: "HdrS", and where the text of its version is.
    let mut kernel = vec![0; 0x400];
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    kernel[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
    kernel[0x300..0x312].copy_from_slice(b"6.1.0-9 (builder) ");
    fs::write(folder.path().join("vmlinuz"), kernel).unwrap();
    Some(folder)
}

fn run(program: &str, words: &[&str]) -> bool {
    Command::new(program).args(words).output().is_ok_and(|output| output.status.success())
}

fn wanted(folder: &Path) -> Wanted {
    Wanted {
        kernel: folder.join("vmlinuz"),
        initrd: None,
        disk: folder.join("root.img"),
        output: folder.join("smoke.toml"),
    }
}

const DEBIAN: [(&str, &str); 3] = [
    ("usr/lib/os-release", "NAME=x\nPRETTY_NAME=\"Debian GNU/Linux 12\"\n"),
    ("usr/lib/systemd/systemd", ""),
    ("etc/passwd", "root:x:0:0::/root:/bin/sh\n"),
];

/// What `skiff smoke` understands of a new scenario: the titles of its steps.
fn steps(file: &Path) -> Vec<String> {
    let scenario = crate::smoke::Scenario::read(file).unwrap_or_else(|errors| panic!("{errors:?}"));
    scenario.steps.into_iter().map(|step| step.title).collect()
}

#[test]
fn a_debian_that_lets_root_in() {
    let Some(folder) = folder(&[&DEBIAN[..], &[("etc/shadow", "root::1:0:::::\n")]].concat()) else { return };
    let wanted = wanted(folder.path());
    let said = new(&wanted).unwrap();
    let output = wanted.output.display();
    let first = format!("{output}: Linux 6.1.0-9; ext4, Debian GNU/Linux 12, systemd, root needs no password\n");
    assert!(said.starts_with(&first), "{said}");
    assert!(said.ends_with(&format!("\n  skiff smoke --dry-run {output}\n  skiff smoke {output}\n")), "{said}");
    let text = fs::read_to_string(&wanted.output).unwrap();
    for line in ["kernel = \"vmlinuz\"", "cmdline = \"console=ttyS0 root=/dev/vda rw\"", "path = \"root.img\""] {
        assert!(text.lines().any(|other| other == line), "{line}: {text}");
    }
    let expected = [
        "wait for \"login: \"",
        "send \"root\"",
        "wait for /[#$] $/",
        "run \"uname -a\"",
        "send \"poweroff\"",
        "expect poweroff",
        "check the filesystem of root",
    ];
    assert_eq!(steps(&wanted.output), expected);
}

#[test]
fn nobody_is_overwritten() {
    let Some(folder) = folder(&DEBIAN) else { return };
    let wanted = wanted(folder.path());
    new(&wanted).unwrap();
    let expected =
        ["wait for \"login: \"", "press the power button", "expect poweroff", "check the filesystem of root"];
    assert_eq!(steps(&wanted.output), expected);
    fs::write(&wanted.output, "mine").unwrap();
    let error = format!("{:#}", new(&wanted).unwrap_err());
    assert!(error.ends_with("smoke.toml: there is such a file already; remove it, or name another"), "{error}");
    assert_eq!(fs::read_to_string(&wanted.output).unwrap(), "mine");
}

/// sfdisk(8) makes the tables.
#[test]
fn the_root_filesystem_in_a_partition() {
    let Some(folder) = folder(&DEBIAN) else { return };
    let wanted = wanted(folder.path());
    let filesystem = fs::read(&wanted.disk).unwrap();
    for label in ["dos", "gpt"] {
        let disk = folder.path().join("disk.img");
        File::create(&disk).unwrap().set_len(32 << 20).unwrap();
        let table = format!("label: {label}\nstart=2048, size=2048\nstart=8192, size=16384\n");
        let script = format!("printf '{table}' | /sbin/sfdisk -q '{}'", disk.display());
        if !run("sh", &["-c", &script]) {
            skip::because("no sfdisk");
            return;
        }
        File::options().write(true).open(&disk).unwrap().write_all_at(&filesystem, 8192 * 512).unwrap();
        let output = folder.path().join(format!("{label}.toml"));
        let said = new(&Wanted { disk, output: output.clone(), ..wanted.clone() }).unwrap();
        assert!(said.contains("; ext4 in partition 2, Debian GNU/Linux 12, systemd\n"), "{said}");
        assert!(fs::read_to_string(&output).unwrap().contains("root=/dev/vda2 rw"));
        assert_eq!(steps(&output).last().unwrap(), "check the filesystem of partition 2 of root");
    }
}

#[test]
fn what_is_not_known_is_said() {
    let Some(folder) = folder(&[]) else { return };
    let wanted = wanted(folder.path());
    fs::write(&wanted.disk, [0; 4096]).unwrap();
    let said = new(&wanted).unwrap();
    assert!(said.contains("no filesystem was recognised"), "{said}");
    assert_eq!(steps(&wanted.output), ["wait for \"login: \""]);
}

#[test]
fn paths_from_another_folder() {
    let Some(folder) = folder(&DEBIAN) else { return };
    let other = folder.path().join("it's \"here\"");
    fs::create_dir(&other).unwrap();
    let wanted = Wanted { output: other.join("a b.toml"), ..wanted(folder.path()) };
    let said = new(&wanted).unwrap();
    assert_eq!(steps(&wanted.output).len(), 4);
    // The shell's own idea of what was said.
    let word = said.lines().last().unwrap().trim().strip_prefix("skiff smoke ").unwrap();
    let echo = Command::new("sh").args(["-c", &format!("printf %s {word}")]).output().unwrap();
    assert_eq!(String::from_utf8(echo.stdout).unwrap(), wanted.output.to_str().unwrap());
}

#[test]
fn files_that_will_not_do() {
    let Some(folder) = folder(&[]) else { return };
    let file = |name: &str, content: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        path
    };
    let wanted = wanted(folder.path());
    for (wanted, complaint) in [
        (Wanted { kernel: file("k", b"text"), ..wanted.clone() }, "k: neither a bzImage nor an ELF file"),
        (Wanted { kernel: folder.path().join("none"), ..wanted.clone() }, "none: No such file or directory"),
        (Wanted { kernel: folder.path().to_owned(), ..wanted.clone() }, "not a file; name one"),
        (Wanted { initrd: Some("/none".into()), ..wanted.clone() }, "--initrd /none: No such file or directory"),
        (Wanted { disk: file("q", b"QFI\xfb..."), ..wanted.clone() }, "q: this is a qcow2 image; convert it with"),
        (Wanted { disk: file("z", b"\x1f\x8b..."), ..wanted.clone() }, "z: this is compressed; unpack it with gunzip"),
        (Wanted { disk: file("e", b""), ..wanted.clone() }, "e: neither an image with something in it nor"),
        (Wanted { output: "/none/s.toml".into(), ..wanted.clone() }, "-o /none/s.toml: there is no such folder"),
    ] {
        let error = format!("{:#}", new(&wanted).unwrap_err());
        assert!(error.contains(complaint), "{error}");
        assert!(!wanted.output.exists());
    }
}
