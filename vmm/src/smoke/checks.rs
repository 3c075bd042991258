//! What is looked at after a machine has ended: files of the host, and disks with the tools of e2fsprogs. On the thread of
//! the test.

use std::io;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use super::pattern::printable;
use super::process::{Heard, Process};
use super::scenario::{Content, DiskCheck};

/// The most that is read of a file, and of what a tool says.
const MOST: usize = 16 << 20;

/// Why a check is not passed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Complaint {
    /// It is not so.
    Wrong(String),
    /// It could not be found out.
    Host(String),
}

/// Whether the file `path` is as `content` says.
pub(super) fn file(path: &Path, content: &Content) -> Result<(), Complaint> {
    let shown = path.display().to_string();
    let read = || {
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(std::fs::File::open(path)?, MOST as u64), &mut bytes)?;
        Ok::<_, io::Error>(bytes)
    };
    match read() {
        Ok(bytes) => holds(&shown, Some(&bytes), content),
        Err(error) if error.kind() == io::ErrorKind::NotFound => holds(&shown, None, content),
        Err(error) => Err(Complaint::Host(format!("{shown}: {error}"))),
    }
}

/// Whether the image at `image`, which the scenario calls `id`, passes `check`, found out before `deadline`.
pub(super) fn disk(image: &Path, id: &str, check: &DiskCheck, deadline: Instant) -> Result<(), Complaint> {
    match check {
        DiskCheck::Clean => {
            let mut command = Command::new("e2fsck");
            command.args(["-f", "-n"]).arg(image);
            let said = tool(command, deadline)?;
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
        DiskCheck::File { path, content } => {
            let mut command = Command::new("debugfs");
            command.args(["-R", &format!("cat \"{path}\"")]).arg(image);
            let said = tool(command, deadline)?;
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

fn tool(mut command: Command, deadline: Instant) -> Result<Said, Complaint> {
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
        let left = deadline.saturating_duration_since(Instant::now());
        match process.hear(left) {
            Heard::Output(more) if bytes.len() + more.len() <= MOST => bytes.extend(more),
            Heard::Message(more) if errors.len() + more.len() <= MOST => errors.extend(more),
            Heard::Output(_) | Heard::Message(_) => {}
            Heard::End => break,
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
    use std::io::Write;
    use std::time::Duration;

    fn contains(text: &str) -> Content {
        Content::Has(Pattern::text(text).unwrap())
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
                let _ = writeln!(io::stderr(), "SKIPPED smoke::checks: e2fsprogs is not installed");
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
        let deadline = Instant::now() + Duration::from_secs(60);
        let check = |check: DiskCheck| disk(&image, "root", &check, deadline);
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
}
