//! The results of a run for people and for CI servers: the terminal, JUnit XML, JSON, TAP, a page of HTML. Each is made
//! from a [`Run`] alone; what guests wrote is escaped in all of them. Main thread, but for [`Progress`], which is told of
//! events by the threads of the machines.

mod html;
mod json;
mod junit;
mod progress;
#[cfg(test)]
pub(super) mod sample;
mod summary;
mod tap;
mod text;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};

pub use progress::Progress;
pub use summary::summary;

use super::Run;

/// A form that results can have in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// JUnit XML, as Jenkins, GitLab and most CI servers read it.
    Junit,
    /// One JSON object; docs/smoke-results.md describes it.
    Json,
    /// The Test Anything Protocol, version 13.
    Tap,
    /// A page that needs nothing else.
    Html,
}

impl Format {
    /// The option that asks for it.
    fn option(self) -> &'static str {
        match self {
            Self::Junit => "--junit",
            Self::Json => "--json",
            Self::Tap => "--tap",
            Self::Html => "--html",
        }
    }

    /// `run` in this form, with a line end at its end.
    pub fn write(self, run: &Run) -> String {
        match self {
            Self::Junit => junit::write(run),
            Self::Json => json::write(run),
            Self::Tap => tap::write(run),
            Self::Html => html::write(run),
        }
    }
}

/// Where results are to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    format: Format,
    /// `None`: standard output.
    path: Option<PathBuf>,
}

impl Target {
    /// `path` as the user said it: `-` is standard output.
    pub fn new(format: Format, path: &Path) -> Self {
        Self { format, path: (path != Path::new("-")).then(|| path.to_owned()) }
    }

    /// Whether it is standard output, where nothing else should then be written.
    pub fn is_stdout(&self) -> bool {
        self.path.is_none()
    }

    /// Finds out whether the file can be written, while nothing is lost yet. Leaves what is there as it is.
    ///
    /// # Errors
    /// One line that names option, file and remedy.
    pub fn check(&self) -> anyhow::Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        if path.is_dir() {
            return Err(anyhow!("{} {}: this is a folder; name a file in it", self.format.option(), path.display()));
        }
        if is_special(path) {
            let opened = File::options().append(true).open(path);
            return opened.map(drop).map_err(|error| self.cannot_write(path, &error));
        }
        let probe = beside(path);
        let made = File::create_new(&probe).and_then(|_| fs::remove_file(&probe));
        made.map_err(|error| self.cannot_write(path, &error))
    }

    /// Writes the results of `run`. A file has either all of them or what was in it before.
    ///
    /// # Errors
    /// One line that names option, file and remedy.
    pub fn write(&self, run: &Run) -> anyhow::Result<()> {
        let text = self.format.write(run);
        let Some(path) = &self.path else {
            let option = self.format.option();
            return match io::stdout().lock().write_all(text.as_bytes()) {
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                    Err(error).with_context(|| format!("{option} -: standard output cannot be written"))
                }
                _ => Ok(()),
            };
        };
        let written = if is_special(path) {
            File::options().append(true).open(path).and_then(|mut file| file.write_all(text.as_bytes()))
        } else {
            replace(path, text.as_bytes())
        };
        written.map_err(|error| self.cannot_write(path, &error))
    }

    fn cannot_write(&self, path: &Path, error: &io::Error) -> anyhow::Error {
        let remedy = match error.kind() {
            io::ErrorKind::NotFound => "there is no such folder; make it first".to_owned(),
            io::ErrorKind::PermissionDenied => "permission denied; name a file in a folder of yours".to_owned(),
            io::ErrorKind::ReadOnlyFilesystem => "the filesystem is read-only; name a file elsewhere".to_owned(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                "no space left; make some, or name a file elsewhere".to_owned()
            }
            _ => format!("cannot be written: {error}"),
        };
        anyhow!("{} {}: {remedy}", self.format.option(), path.display())
    }
}

/// Whether to write in colours: to a terminal that has them, unless the user does not want them (no-color.org).
pub fn colours(is_terminal: bool) -> bool {
    let said = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    is_terminal && said("NO_COLOR").is_none() && said("TERM").is_some_and(|term| term != "dumb")
}

/// Puts words into colours, or leaves them as they are.
#[derive(Clone, Copy, Debug)]
struct Paint(bool);

impl Paint {
    fn red(self, text: &str) -> String {
        self.with("31", text)
    }

    fn green(self, text: &str) -> String {
        self.with("32", text)
    }

    fn yellow(self, text: &str) -> String {
        self.with("33", text)
    }

    fn dim(self, text: &str) -> String {
        self.with("2", text)
    }

    /// Select Graphic Rendition (ECMA-48, 8.3.117).
    fn with(self, rendition: &str, text: &str) -> String {
        if self.0 && !text.is_empty() { format!("\x1b[{rendition}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// A pipe or a device, or a name of what this process has open, such as `/dev/stderr`: it cannot be replaced.
fn is_special(path: &Path) -> bool {
    let is_open_file = ["/dev", "/proc"].iter().any(|folder| path.starts_with(folder));
    is_open_file || path.metadata().is_ok_and(|metadata| !metadata.is_file())
}

/// A name in the same folder that nobody else uses. Through a symbolic link: where the file is.
fn beside(path: &Path) -> PathBuf {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}.tmp", std::process::id()))
}

/// Gives `path` this content in one step. Its mode stays, or is that of any new file.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let new = beside(path);
    let write = || {
        let mut file = File::create_new(&new)?;
        if let Ok(old) = path.metadata() {
            file.set_permissions(old.permissions())?;
        }
        file.write_all(content)?;
        fs::rename(&new, path.canonicalize().unwrap_or_else(|_| path.to_owned()))
    };
    write().inspect_err(|_| _ = fs::remove_file(&new))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn target(path: &Path) -> Target {
        Target::new(Format::Json, path)
    }

    #[test]
    fn a_file_is_replaced_whole_and_nothing_else_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("run.json"), folder.path().join("latest.json"));
        fs::write(&file, "old").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        symlink("run.json", &link).unwrap();
        let run = sample::run();
        for path in [&file, &link] {
            target(path).check().unwrap();
            target(path).write(&run).unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), Format::Json.write(&run));
            fs::write(&file, "old").unwrap();
        }
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o640);
        assert!(link.symlink_metadata().unwrap().is_symlink());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn checking_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("run.json");
        target(&file).check().unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        fs::write(&file, "old").unwrap();
        target(&file).check().unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "old");
    }

    #[test]
    fn what_cannot_be_written_is_said_with_the_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let (missing, is_folder) = (folder.path().join("no/run.xml"), folder.path().to_owned());
        for (path, line) in [(&missing, "there is no such folder; make it first"), (&is_folder, "this is a folder")] {
            let target = Target::new(Format::Junit, path);
            let said = target.check().unwrap_err().to_string();
            assert!(said.starts_with(&format!("--junit {}: {line}", path.display())), "{said}");
            target.write(&sample::run()).unwrap_err();
        }
        // A device that is always full.
        let full = target(Path::new("/dev/full"));
        full.check().unwrap();
        let said = full.write(&sample::run()).unwrap_err().to_string();
        assert_eq!(said, "--json /dev/full: no space left; make some, or name a file elsewhere");
        assert!(target(Path::new("-")).is_stdout());
    }

    #[test]
    fn what_is_open_is_written_to() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file.as_file()));
        let run = sample::run();
        target(Path::new(&open)).check().unwrap();
        target(Path::new(&open)).write(&run).unwrap();
        assert_eq!(io::read_to_string(file.as_file()).unwrap(), Format::Json.write(&run));
    }
}
