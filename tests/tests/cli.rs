//! The command line from outside: every bad input ends with one line that names the option or file and the remedy, with
//! exit code 2 for usage and 1 for a failed start, before anything was started or touched. No Linux guest runs here.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;
use tests::assets;

const USAGE: i32 = 2;
const FAILED_START: i32 = 1;

/// A folder with a kernel that would boot (the bare-metal guest), in which skiff runs.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().expect("a scratch folder"));
        folder.file("kernel", guest::ELF);
        folder
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), content).expect("a scratch file");
    }

    fn sized(&self, name: &str, size: u64) {
        assets::blank_image(self.0.path(), name, size);
    }

    fn command(&self, program: impl AsRef<OsStr>, words: &[&str]) -> Output {
        let mut command = Command::new(program);
        command.args(words).current_dir(self.0.path()).stdin(Stdio::null());
        command.output().expect("the program starts")
    }

    fn skiff(&self, words: &[&str]) -> Output {
        self.command(assets::skiff(), words)
    }

    /// `skiff run WORDS` is refused with this code and one line that has all of these parts.
    fn refuses(&self, words: &[&str], code: i32, parts: &[&str]) {
        let words = [&["run"], words].concat();
        refused(&self.skiff(&words), &words, code, parts);
    }

    /// The same for a kernel, an initrd or a disk: what is wrong only shows when the machine starts, and that needs the
    /// host's KVM to be there.
    fn does_not_start(&self, words: &[&str], parts: &[&str]) {
        if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
            skip::because(format_args!("/dev/kvm: {error}"));
            return;
        }
        self.refuses(words, FAILED_START, parts);
    }
}

fn refused(output: &Output, words: &[&str], code: i32, parts: &[&str]) {
    let line = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{words:?}: {line}");
    assert_eq!(output.stdout, b"", "{words:?}: nothing on standard output");
    assert_eq!(line.matches('\n').count(), 1, "{words:?}: one line, not {line:?}");
    for part in parts {
        assert!(line.contains(part), "{words:?}: {part:?} is not in {line:?}");
    }
}

#[test]
fn usage_that_makes_no_machine() {
    let folder = Folder::new();
    let table: &[(&[&str], &[&str])] = &[
        (&[], &["--kernel is missing", "--config"]),
        (&["--kernel", "kernel", "--cpus", "0"], &["--cpus 0", "at least 1"]),
        (&["--kernel", "kernel", "--cpus", "two"], &["--cpus two", "write it like"]),
        (&["--kernel", "kernel", "--memory", "1024"], &["--memory 1024", "1024M"]),
        (&["--kernel", "kernel", "--memory", "63M"], &["--memory 63M", "at least 64M"]),
        (&["--kernel", "kernel", "--memory", "1G,huge=on"], &["--memory 1G,huge=on", "\"huge\"", "hugepages"]),
        (&["--kernel", "kernel", "--memory", "1G,shared=maybe"], &["shared=maybe", "on or off"]),
        (&["--kernel", "kernel", "--disk", "path=a,redonly=on"], &["\"redonly\"", "did you mean \"readonly\"?"]),
        (&["--kernel", "kernel", "--disk", "readonly=on"], &["--disk readonly=on", "path=IMAGE"]),
        (&["--kernel", "kernel", "--disk", "path=a,format=qcow2"], &["format=qcow2", "qemu-img convert"]),
        (&["--kernel", "kernel", "--disk", "a,aio=native,cache=unsafe"], &["aio=native", "write cache=none"]),
        (&["--kernel", "kernel", "--disk", "a,aio=fast"], &["aio=fast", "auto, threads, native, io_uring"]),
        (&["--kernel", "kernel", "--disk", "a,queues=0"], &["queues=0", "1 to 64", "leave it out"]),
        (&["--kernel", "kernel", "--disk", "a,queue-size=200"], &["queue-size=200", "4 to 1024", "write 128"]),
        (&["--kernel", "kernel", "--disk", "a,serial=123456789012345678901"], &["serial=1234", "1 to 20"]),
        (&["--kernel", "kernel", "--disk", "a,id=x", "--disk", "b,id=x"], &["\"x\"", "choose another"]),
        (&["--kernel", "kernel", "--boot-protocol", "uefi"], &["--boot-protocol", "uefi", "auto, linux"]),
        (&["--kernel", "kernel", "--serial", "tty"], &["--serial tty", "stdio"]),
        (&["--kernel", "kernel", "--serial", "file"], &["--serial file", "file=PATH"]),
        (&["--kernel", "kernel", "--debug-exit=0x64"], &["--debug-exit", "keyboard controller"]),
        (&["--kernel", "kernel", "--grace", "soon"], &["--grace soon", "write it like 30"]),
        (&["--kernel", "kernel", "--frobnicate"], &["--frobnicate", "--help"]),
        (&["--kernel"], &["--kernel", "--help"]),
    ];
    for (words, parts) in table {
        folder.refuses(words, USAGE, parts);
    }
    refused(&folder.skiff(&["walk"]), &["walk"], USAGE, &["walk", "--help"]);
}

#[test]
fn configuration_files() {
    let folder = Folder::new();
    let table = [
        ("kernl = \"vmlinuz\"\n", ["vm.toml:1", "kernl", "kernel"]),
        ("kernel = \"kernel\"\ncpus = 0\n", ["vm.toml:2", "cpus", "at least 1"]),
        ("kernel = \"kernel\"\nmemory = \"many\"\n", ["vm.toml:2", "memory", "512M"]),
        ("kernel = \"kernel\"\n[[disk]]\npath = \"a\"\nredonly = true\n", ["vm.toml:4", "redonly", "readonly"]),
        ("kernel = \n", ["vm.toml:1", "", ""]),
    ];
    for (text, parts) in table {
        folder.file("vm.toml", text);
        folder.refuses(&["--config", "vm.toml"], USAGE, &parts);
    }
    folder.refuses(&["--config", "absent.toml"], USAGE, &["--config absent.toml", "name a TOML file"]);
}

#[test]
fn flags_win_over_the_file_and_dry_run_starts_nothing() {
    let folder = Folder::new();
    folder.file("vm.toml", "kernel = \"kernel\"\ncpus = 2\nmemory = \"256M\"\nserial = \"file=console.log\"\n");
    let shown = folder.skiff(&["run", "--config", "vm.toml", "--cpus", "3", "--dry-run"]);
    assert_eq!((shown.status.code(), String::from_utf8_lossy(&shown.stderr).as_ref()), (Some(0), ""));
    let text = String::from_utf8(shown.stdout).unwrap();
    assert!(text.contains("cpus = 3") && text.contains("size = \"256M\""), "{text}");
    assert!(!folder.path("console.log").exists());
    // What it prints is such a file, of the same machine.
    folder.file("again.toml", &text);
    let again = folder.skiff(&["run", "--config", "again.toml", "--dry-run"]);
    assert_eq!(String::from_utf8(again.stdout).unwrap(), text);
}

/// The fields of an ELF file that say what it is for (System V ABI): class, machine.
fn elf(class: u8, machine: u8) -> Vec<u8> {
    let mut header = guest::ELF[..64].to_vec();
    header[4] = class;
    header[18] = machine;
    header
}

/// A bzImage whose header (Linux/x86 boot protocol 2.15) promises more than the file has.
fn truncated_bzimage() -> Vec<u8> {
    let mut image = vec![0; 4096];
    let fields: [(usize, &[u8]); 9] = [
        (0x1f1, &[4]),
        (0x1f4, &0x10_0000_u32.to_le_bytes()),
        (0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]),
        (0x202, b"HdrS"),
        (0x206, &0x20f_u16.to_le_bytes()),
        (0x211, &[1]),
        (0x236, &[1]),
        (0x258, &0x100_0000_u64.to_le_bytes()),
        (0x260, &0x200_0000_u32.to_le_bytes()),
    ];
    for (at, bytes) in fields {
        image[at..at + bytes.len()].copy_from_slice(bytes);
    }
    image
}

#[test]
fn kernels_that_are_none() {
    let folder = Folder::new();
    folder.file("empty", "");
    folder.file("text", "I am not a kernel.\n".repeat(100));
    folder.file("script", "#!/bin/sh\necho I am not a kernel\n");
    folder.file("noise", [0xa5; 8192]);
    folder.file("bzImage", truncated_bzimage());
    folder.file("short", &guest::ELF[..guest::ELF.len() / 2]);
    folder.file("elf32", elf(1, 3));
    folder.file("aarch64", elf(2, 183));
    let table = [
        ("absent", "no such file", "check the path"),
        (".", "not a regular file", "bzImage"),
        ("empty", "empty", "bzImage"),
        ("text", "text file", "bzImage"),
        ("script", "script", "bzImage"),
        ("noise", "not a kernel", "bzImage"),
        ("bzImage", "truncated", "copy the kernel again"),
        ("short", "truncated", "copy the kernel again"),
        ("elf32", "32-bit", "64-bit build"),
        ("aarch64", "aarch64", "x86-64 kernel"),
    ];
    for (name, what, remedy) in table {
        folder.does_not_start(&["--kernel", name], &["--kernel", name, what, remedy]);
    }
}

#[test]
fn an_initrd_or_a_machine_that_does_not_fit() {
    let folder = Folder::new();
    folder.sized("huge", 1 << 30);
    let fits = |words: &[&str], parts: &[&str]| {
        folder.does_not_start(&[&["--kernel", "kernel"], words].concat(), parts);
    };
    fits(&["--initrd", "absent"], &["--initrd absent", "no such file", "check the path"]);
    fits(&["--initrd", "huge", "--memory", "256M"], &["--initrd huge", "does not fit", "more memory"]);
    fits(&["--cpus", "100000"], &["--cpus 100000", "at most", "or less"]);
    fits(&["--memory", "1024T"], &["--memory 1024T", "less"]);
    fits(&["--config", "/dev/null", "--serial", "file=none/x"], &["--serial file=none/x", "name a file"]);
}

/// A kernel whose header asks for more memory than the machine has.
#[test]
fn memory_too_small_for_the_kernel() {
    let folder = Folder::new();
    let mut large = guest::ELF.to_vec();
    // The highest segment to load (PT_LOAD, 1) shall take 1 GiB of memory (System V ABI, Elf64_Phdr).
    let number = |at: usize| u64::from_le_bytes(guest::ELF[at..at + 8].try_into().unwrap());
    let (table, count) = (number(32) as usize, usize::from(large[56]));
    let segments = (0..count).map(|n| table + n * 56).filter(|at| large[*at] == 1);
    let highest = segments.max_by_key(|at| number(at + 24)).expect("a segment to load");
    large[highest + 40..highest + 48].copy_from_slice(&(1u64 << 30).to_le_bytes());
    folder.file("large", large);
    folder.does_not_start(&["--kernel", "large", "--memory", "64M"], &["the kernel", "memory", "give it more"]);
}

#[test]
fn disks_that_are_none() {
    let folder = Folder::new();
    folder.sized("odd.img", 1000);
    folder.sized("good.img", 1 << 20);
    folder.file("empty.img", "");
    std::fs::create_dir(folder.path("folder")).unwrap();
    let table: &[(&[&str], &[&str])] = &[
        (&["absent.img"], &["absent.img", "does not exist", "check the path"]),
        (&["folder"], &["folder", "is a directory", "name a raw image"]),
        (&["odd.img"], &["odd.img", "multiple of 512", "truncate -s 1024"]),
        (&["empty.img"], &["empty.img", "empty"]),
        (&["/dev/null"], &["/dev/null", "name a raw image"]),
        // A regular file that no Linux opens with O_DIRECT.
        (&["/proc/self/comm,readonly=on,cache=none"], &["/proc/self/comm", "O_DIRECT", "use cache=writeback"]),
        (&["good.img", "good.img"], &["good.img", "locked by another disk of this VM", "readonly=on"]),
        (&["good.img", "absent.img"], &["absent.img", "does not exist"]),
    ];
    for (disks, parts) in table {
        let mut words = vec!["--kernel", "kernel"];
        words.extend(disks.iter().flat_map(|disk| ["--disk", disk]));
        folder.does_not_start(&words, &[&["--disk"], *parts].concat());
    }
    assert_eq!(std::fs::metadata(folder.path("odd.img")).unwrap().len(), 1000);
}

/// Whatever is wrong, a good disk beside it stays as it was.
#[test]
fn a_failed_start_touches_no_image() {
    let folder = Folder::new();
    let content: Vec<u8> = (0..4096u32).flat_map(u32::to_le_bytes).collect();
    folder.file("disk.img", &content);
    let modified = || std::fs::metadata(folder.path("disk.img")).unwrap().modified().unwrap();
    let before = modified();
    let bad: [&[&str]; 4] = [
        &["--kernel", "absent"],
        &["--kernel", "kernel", "--initrd", "absent"],
        &["--kernel", "kernel", "--disk", "absent.img"],
        &["--kernel", "kernel", "--cpus", "100000"],
    ];
    for words in bad {
        let output = folder.skiff(&[&["run", "--disk", "disk.img"], words].concat());
        assert_eq!(output.status.code(), Some(FAILED_START), "{words:?}");
        assert!(std::fs::read(folder.path("disk.img")).unwrap() == content, "{words:?}");
        assert_eq!(modified(), before, "{words:?}");
    }
}

/// Runs skiff in a mount namespace of its own after a command that changes /dev; `None` where the host forbids that.
fn in_changed_dev(folder: &Folder, change: &str) -> Option<Output> {
    let run = |script: &str| folder.command("unshare", &["--map-root-user", "--mount", "sh", "-c", script]);
    if !run("true").status.success() {
        skip::because("this host forbids user namespaces");
        return None;
    }
    Some(run(&format!("{change} && exec '{}' run --kernel kernel", assets::skiff().display())))
}

#[test]
fn no_kvm() {
    let folder = Folder::new();
    let Some(output) = in_changed_dev(&folder, "mount -t tmpfs none /dev") else { return };
    refused(&output, &["run"], FAILED_START, &["/dev/kvm", "no such device"]);
    // Which of the remedies it is depends on the host.
    let line = String::from_utf8_lossy(&output.stderr);
    assert!(["modprobe", "nested virtualisation", "BIOS"].iter().any(|remedy| line.contains(remedy)), "{line}");
}

#[test]
fn something_else_called_kvm() {
    let folder = Folder::new();
    if !Path::new("/dev/kvm").exists() {
        skip::because("no /dev/kvm to cover");
        return;
    }
    let change = "mount --bind /dev/null /dev/kvm";
    let Some(output) = in_changed_dev(&folder, change) else { return };
    refused(&output, &["run"], FAILED_START, &["/dev/kvm", "KVM API version", "modprobe"]);
}

#[test]
fn no_rights() {
    let folder = Folder::new();
    let skiff = assets::skiff();
    // Only root can become somebody without rights; /dev/kvm is then somebody else's.
    let words = ["--reuid=65534", "--regid=65534", "--clear-groups", skiff.to_str().unwrap()];
    let words = [&words[..], &["run", "--kernel", "/proc/self/exe"]].concat();
    let reason = if !Path::new("/dev/kvm").exists() {
        "no /dev/kvm"
    } else if folder.command("setpriv", &[&words[..3], &["test", "-w", "/dev/kvm"]].concat()).status.code() != Some(1) {
        "this user cannot become one without rights"
    } else if folder.command("setpriv", &[&words[..3], &["test", "-x", words[3]]].concat()).status.code() != Some(0) {
        "the binary is in a folder of root's"
    } else {
        refused(&folder.command("setpriv", &words), &words, FAILED_START, &["/dev/kvm", "permission denied", "group"]);
        return;
    };
    skip::because(reason);
}

#[test]
fn help_man_page_and_completions() {
    let folder = Folder::new();
    for words in [&["--help"][..], &["run", "--help"], &["doctor", "--help"]] {
        let help = folder.skiff(words);
        assert_eq!(help.status.code(), Some(0), "{words:?}");
        assert!(String::from_utf8_lossy(&help.stdout).contains("Usage: skiff"), "{words:?}");
    }
    let help = String::from_utf8(folder.skiff(&["run", "--help"]).stdout).unwrap();
    for word in ["Examples:", "--boot-protocol", "readonly=on", "Ctrl-A x", "triple fault"] {
        assert!(help.contains(word), "{word}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = folder.skiff(&["completions", shell]);
        assert_eq!(script.status.code(), Some(0), "{shell}");
        assert!(String::from_utf8_lossy(&script.stdout).contains("boot-protocol"), "{shell}");
    }
    let bash = folder.skiff(&["completions", "bash"]).stdout;
    folder.file("skiff.bash", bash);
    assert!(folder.command("bash", &["-n", "skiff.bash"]).status.success(), "bash reads its completions");
    let page = folder.skiff(&["man"]);
    assert_eq!(page.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&page.stdout).contains(".TH skiff"));
}
