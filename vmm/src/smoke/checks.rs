//! What is looked at after a machine has ended: files of the host, and disks with the tools of e2fsprogs. On the thread of
//! the test.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::partitions::Layout;
use super::pattern::printable;
use super::process::{Heard, Process};
use super::scenario::{Content, DiskCheck};

/// The most that is read of a file, and of what a tool says.
const MOST: usize = 16 << 20;
/// Between two looks at whether the user wants to stop.
const TICK: Duration = Duration::from_millis(100);

/// Why a check is not passed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Complaint {
    /// It is not so.
    Wrong(String),
    /// It could not be found out.
    Host(String),
    /// The user wants to stop.
    Stopped,
}

/// How long a check may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits<'a> {
    pub(super) deadline: Instant,
    /// The user wants to stop.
    pub(super) stop: &'a AtomicBool,
}

/// Whether the file `path` is as `content` says.
pub(super) fn file(path: &Path, content: &Content) -> Result<(), Complaint> {
    let shown = path.display().to_string();
    let read = || {
        // A pipe without a writer is opened without waiting for one.
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        let kind = file.metadata()?.file_type();
        if kind.is_fifo() || kind.is_char_device() {
            return Err(io::Error::other("neither a file nor a folder"));
        }
        let mut bytes = Vec::new();
        if !kind.is_dir() {
            io::Read::read_to_end(&mut io::Read::take(file, MOST as u64), &mut bytes)?;
        }
        Ok::<_, io::Error>(bytes)
    };
    match read() {
        Ok(bytes) => holds(&shown, Some(&bytes), content),
        Err(error) if error.kind() == io::ErrorKind::NotFound => holds(&shown, None, content),
        Err(error) => Err(Complaint::Host(format!("{shown}: {error}"))),
    }
}

/// Whether the image at `image`, which the scenario calls `id`, passes `check`, in this partition or in the only one that can
/// be meant.
pub(super) fn disk(
    image: &Path,
    id: &str,
    partition: Option<u32>,
    check: &DiskCheck,
    limits: Limits<'_>,
) -> Result<(), Complaint> {
    let file = File::open(image).map_err(|error| Complaint::Host(format!("{id}: {error}")))?;
    let begin = Layout::of(&file).ext(partition).map_err(|what| Complaint::Wrong(format!("{id} {what}")))?;
    // By a name in which no letter means anything to e2fsprogs: what follows a question mark are options of the file.
    let volume = format!("/proc/{}/fd/{}?offset={begin}", std::process::id(), file.as_raw_fd());
    let id = partition.map_or_else(|| id.to_owned(), |number| format!("partition {number} of {id}"));
    match check {
        DiskCheck::Clean => clean(&volume, &id, limits),
        DiskCheck::File { path, content } => file_in(&volume, &id, path, content, limits),
    }
}

/// Whether e2fsck finds nothing to repair in `volume`.
fn clean(volume: &str, id: &str, limits: Limits<'_>) -> Result<(), Complaint> {
    let mut command = Command::new("e2fsck");
    command.args(["-f", "-n", volume]);
    let said = tool(command, limits)?;
    // e2fsck(8), exit code: 0 no errors, 4 errors left uncorrected; with -n also 0 after a journal that it left alone.
    match said.code {
        Some(0) if said.has("skipping journal recovery") => {
            Err(Complaint::Wrong(format!("{id}: its journal was not written back: it was not unmounted")))
        }
        Some(0) => Ok(()),
        Some(4) => Err(Complaint::Wrong(format!("{id}: e2fsck finds: {}", said.in_short()))),
        _ => Err(Complaint::Wrong(format!("{id}: e2fsck cannot check it: {}", said.in_short()))),
    }
}

/// Whether the file `path` in `volume` is as `content` says.
fn file_in(volume: &str, id: &str, path: &str, content: &Content, limits: Limits<'_>) -> Result<(), Complaint> {
    let mut command = Command::new("debugfs");
    command.args(["-R", &format!("cat \"{path}\""), volume]);
    let said = tool(command, limits)?;
    let shown = format!("{path} on {id}");
    if said.code.is_none() {
        return Err(Complaint::Host(format!("debugfs was killed while it read {shown}")));
    }
    // It ends with 0 whatever happened, and says the rest on standard error, after its version.
    let errors: Vec<_> = said.errors.lines().filter(|line| !line.starts_with("debugfs ")).collect();
    match errors.as_slice() {
        [] => holds(&shown, Some(&said.bytes), content),
        [.., last] if last.contains("File not found") => holds(&shown, None, content),
        [.., last] => Err(Complaint::Wrong(format!("{shown}: debugfs cannot read it: {last}"))),
    }
}

/// Whether a file that has these `bytes`, or does not exist, is as `content` says.
fn holds(shown: &str, bytes: Option<&[u8]>, content: &Content) -> Result<(), Complaint> {
    let wrong = |what: String| Err(Complaint::Wrong(format!("{shown} {what}")));
    match (bytes, content) {
        (None, Content::Absent) | (Some(_), Content::Exists) => Ok(()),
        (None, _) => wrong("does not exist".to_owned()),
        (Some(_), Content::Absent) => wrong("exists".to_owned()),
        (Some(bytes), Content::Equals(text)) if bytes == text.as_bytes() => Ok(()),
        (Some(bytes), Content::Equals(text)) => {
            wrong(format!("has {} bytes, {:?}, not {text:?}", bytes.len(), begin(&String::from_utf8_lossy(bytes))))
        }
        (Some(bytes), Content::Has(pattern)) => {
            let text = String::from_utf8_lossy(bytes);
            if pattern.is_in(&text) { Ok(()) } else { wrong(format!("has no {pattern} in it: {:?}", begin(&text))) }
        }
    }
}

/// Enough of a text to see what it is.
fn begin(text: &str) -> String {
    let mut begin: String = text.chars().take(200).collect();
    if begin.len() < text.len() {
        begin.push('\u{2026}');
    }
    begin
}

/// What a tool said.
struct Said {
    code: Option<i32>,
    bytes: Vec<u8>,
    output: String,
    errors: String,
}

impl Said {
    /// Whether `text` is in what it said; which stream has it differs between versions.
    fn has(&self, text: &str) -> bool {
        self.output.contains(text) || self.errors.contains(text)
    }

    fn in_short(&self) -> String {
        let lines = self.errors.lines().chain(self.output.lines());
        let lines: Vec<_> =
            lines.map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("e2fsck ")).collect();
        begin(&lines[..lines.len().min(5)].join("; "))
    }
}

fn tool(mut command: Command, Limits { deadline, stop }: Limits<'_>) -> Result<Said, Complaint> {
    let name = command.get_program().to_string_lossy().into_owned();
    // Where Debian has them, which is not in the path of every user.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin")).env("LC_ALL", "C");
    let mut process = Process::start(command).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Complaint::Host(format!("{name} is missing: apt-get install e2fsprogs")),
        _ => Complaint::Host(format!("{name}: {error}")),
    })?;
    process.close_input();
    let (mut bytes, mut errors) = (Vec::new(), Vec::new());
    loop {
        if stop.load(Ordering::Relaxed) {
            // It is killed when this returns.
            return Err(Complaint::Stopped);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        match process.hear(left.min(TICK)) {
            Heard::Output(more) if bytes.len() + more.len() <= MOST => bytes.extend(more),
            Heard::Message(more) if errors.len() + more.len() <= MOST => errors.extend(more),
            Heard::Output(_) | Heard::Message(_) => {}
            Heard::End => break,
            Heard::Silence if left > TICK => {}
            Heard::Silence => return Err(Complaint::Wrong(format!("{name} did not end in time"))),
        }
    }
    process.ends_within(deadline.saturating_duration_since(Instant::now()));
    let status = process.end().map_err(|error| Complaint::Host(format!("{name}: {error}")))?;
    let text = |bytes: &[u8]| bytes.split(|&byte| byte == b'\n').map(printable).collect::<Vec<_>>().join("\n");
    Ok(Said { code: status.code(), output: text(&bytes), errors: text(&errors), bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::smoke::pattern::Pattern;

    fn contains(text: &str) -> Content {
        Content::Has(Pattern::text(text).unwrap())
    }

    fn soon(stop: &AtomicBool) -> Limits<'_> {
        Limits { deadline: Instant::now() + Duration::from_secs(60), stop }
    }

    fn wrong(result: Result<(), Complaint>) -> String {
        match result {
            Err(Complaint::Wrong(what)) => what,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn files_of_the_host() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        assert_eq!(file(&path, &Content::Absent), Ok(()));
        assert!(wrong(file(&path, &Content::Exists)).ends_with("out does not exist"));
        std::fs::write(&path, "one\ntwo\n").unwrap();
        for content in [Content::Exists, Content::Equals("one\ntwo\n".into()), contains("two")] {
            assert_eq!(file(&path, &content), Ok(()), "{content:?}");
        }
        assert!(wrong(file(&path, &Content::Absent)).ends_with("out exists"));
        assert!(
            wrong(file(&path, &Content::Equals("one".into()))).ends_with("has 8 bytes, \"one\\ntwo\\n\", not \"one\"")
        );
        assert!(wrong(file(&path, &contains("three"))).ends_with("has no \"three\" in it: \"one\\ntwo\\n\""));
    }

    /// An image of 4 MiB with a file in it; `None` where e2fsprogs is not installed.
    fn image(folder: &Path) -> Option<std::path::PathBuf> {
        let files = folder.join("files");
        std::fs::create_dir_all(files.join("etc")).unwrap();
        std::fs::write(files.join("etc/host name"), "skiff\n").unwrap();
        let path = folder.join("root.img");
        std::fs::File::create(&path).unwrap().set_len(4 << 20).unwrap();
        let mut mke2fs = Command::new("mke2fs");
        mke2fs.args(["-q", "-t", "ext4", "-d"]).arg(&files).arg(&path).env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
        match mke2fs.status() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                skip::because("e2fsprogs is not installed");
                None
            }
            made => {
                assert!(made.unwrap().success());
                Some(path)
            }
        }
    }

    #[test]
    fn disks() {
        let folder = tempfile::tempdir().unwrap();
        let Some(image) = image(folder.path()) else { return };
        let check = |check: DiskCheck| disk(&image, "root", None, &check, soon(&AtomicBool::new(false)));
        let file = |path: &str, content| DiskCheck::File { path: path.into(), content };
        assert_eq!(check(DiskCheck::Clean), Ok(()));
        assert_eq!(check(file("/etc/host name", Content::Equals("skiff\n".into()))), Ok(()));
        assert_eq!(check(file("/etc/passwd", Content::Absent)), Ok(()));
        assert_eq!(wrong(check(file("/etc/passwd", Content::Exists))), "/etc/passwd on root does not exist");
        let other = wrong(check(file("/etc/host name", contains("other"))));
        assert_eq!(other, "/etc/host name on root has no \"other\" in it: \"skiff\\n\"");

        let change = |request: &str| {
            let mut debugfs = Command::new("debugfs");
            debugfs.args(["-w", "-R", request]).arg(&image).env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
            assert!(debugfs.output().unwrap().status.success());
        };
        // As a machine leaves it that is killed while it is mounted.
        change("feature needs_recovery");
        let unmounted = "root: its journal was not written back: it was not unmounted";
        assert_eq!(wrong(check(DiskCheck::Clean)), unmounted);
        change("feature -needs_recovery");
        assert_eq!(check(DiskCheck::Clean), Ok(()));
        // Says of an inode that is used that it is free.
        change("freei /etc");
        assert!(wrong(check(DiskCheck::Clean)).starts_with("root: e2fsck finds: "));
        std::fs::write(&image, vec![0; 4 << 20]).unwrap();
        assert!(wrong(check(DiskCheck::Clean)).starts_with("root: e2fsck cannot check it: "));
        assert!(wrong(check(file("/x", Content::Exists))).starts_with("/x on root: debugfs cannot read it: "));
    }

    #[test]
    fn a_partition_of_a_disk() {
        let folder = tempfile::tempdir().unwrap();
        let Some(filesystem) = image(folder.path()) else { return };
        // Its name means nothing to e2fsprogs.
        let disk_image = folder.path().join("disk?offset=5.img");
        let script = "truncate -s 16M \"$1\" && printf 'label: gpt\\nsize=2MiB\\nsize=4MiB\\n' | sfdisk -q \"$1\" && \
                      dd if=\"$0\" of=\"$1\" bs=1M seek=3 conv=notrunc status=none";
        let mut shell = Command::new("sh");
        let made =
            shell.args(["-c", script]).arg(filesystem).arg(&disk_image).env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
        if made.status().unwrap().code() == Some(127) {
            skip::because("fdisk is not installed");
            return;
        }
        let check =
            |partition, check: DiskCheck| disk(&disk_image, "root", partition, &check, soon(&AtomicBool::new(false)));
        let name = || DiskCheck::File { path: "/etc/host name".into(), content: Content::Equals("skiff\n".into()) };
        for partition in [None, Some(2)] {
            assert_eq!(check(partition, DiskCheck::Clean), Ok(()));
            assert_eq!(check(partition, name()), Ok(()));
        }
        assert!(wrong(check(Some(1), DiskCheck::Clean)).starts_with("partition 1 of root: e2fsck cannot check it: "));
        let missing = "root has no partition 3 (1: unknown, 2: ext4)";
        assert_eq!(wrong(check(Some(3), DiskCheck::Clean)), missing);
    }

    #[test]
    fn what_would_block_is_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        let Err(Complaint::Host(what)) = file(&path, &Content::Exists) else { panic!("a pipe is a file") };
        assert!(what.ends_with("neither a file nor a folder"), "{what}");
        assert_eq!(file(folder.path(), &Content::Exists), Ok(()));
    }

    /// What a tool does is not waited for when the user wants to stop, nor past the limit.
    #[test]
    fn tools_are_killed() {
        let sleep = || {
            let mut command = Command::new("sleep");
            command.arg("1000");
            command
        };
        let stop = AtomicBool::new(true);
        assert!(matches!(tool(sleep(), soon(&stop)), Err(Complaint::Stopped)));
        let stop = AtomicBool::new(false);
        let limits = Limits { deadline: Instant::now() + Duration::from_millis(250), stop: &stop };
        let Err(Complaint::Wrong(what)) = tool(sleep(), limits) else { panic!("it ended") };
        assert_eq!(what, "sleep did not end in time");
    }
}
