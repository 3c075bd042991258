//! Where a setting was written, so that every complaint about it starts with the flag or the file and line to change.
//! Used on the main thread.

use std::path::{Path, PathBuf};

/// A flag with its value, or a line of a configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    label: String,
    base: Option<PathBuf>,
}

/// A setting that cannot be used: one line, the place first, then what is wrong and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

impl ConfigError {
    /// An error that no single place is to blame for.
    pub fn new(line: impl Into<String>) -> Self {
        Self(line.into())
    }
}

impl Place {
    /// The flag `name` (with its dashes) as the user typed it.
    pub fn flag(name: &str, text: &str) -> Self {
        Self { label: format!("{name} {text}").trim_end().to_owned(), base: None }
    }

    /// Line `line` (from 1) of `file`, about `key` (empty: about
    /// no single key). Relative paths written there start at the folder of the file.
    pub fn line(file: &Path, line: usize, key: &str) -> Self {
        let mut label = format!("{}:{line}", file.display());
        if !key.is_empty() {
            label = format!("{label}: {key}");
        }
        Self { label, base: Some(file.parent().unwrap_or(Path::new("")).to_owned()) }
    }

    /// The same place, quoting the value that stands there.
    pub(super) fn quoting(mut self, value: &str) -> Self {
        self.label = format!("{} = {value}", self.label);
        self
    }

    /// `what` is wrong here.
    pub fn error(&self, what: impl std::fmt::Display) -> ConfigError {
        ConfigError(format!("{}: {what}", self.label))
    }

    /// The path `text` as meant here.
    pub fn path(&self, text: &str) -> Result<PathBuf, ConfigError> {
        if text.is_empty() {
            return Err(self.error("an empty path; name a file"));
        }
        if text.contains('\0') {
            return Err(self.error("a NUL character in a path; no file can be called so"));
        }
        Ok(self.base.as_deref().unwrap_or(Path::new("")).join(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_a_file_start_at_its_folder() {
        let file = Place::line(Path::new("machines/vm.toml"), 3, "kernel");
        assert_eq!(file.path("vmlinuz"), Ok(PathBuf::from("machines/vmlinuz")));
        assert_eq!(file.path("/boot/vmlinuz"), Ok(PathBuf::from("/boot/vmlinuz")));
        assert_eq!(Place::line(Path::new("vm.toml"), 3, "kernel").path("vmlinuz"), Ok(PathBuf::from("vmlinuz")));
        assert_eq!(Place::flag("--kernel", "vmlinuz").path("vmlinuz"), Ok(PathBuf::from("vmlinuz")));
    }

    #[test]
    fn complaints_start_with_the_place() {
        let flag = Place::flag("--initrd", "").path("").unwrap_err();
        assert_eq!(flag.to_string(), "--initrd: an empty path; name a file");
        let file = Place::line(Path::new("vm.toml"), 12, "kernel").path("a\0b").unwrap_err();
        assert_eq!(file.to_string(), "vm.toml:12: kernel: a NUL character in a path; no file can be called so");
    }
}
