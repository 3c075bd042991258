//! `skiff smoke new`: a first scenario for a kernel and a disk, from what can be seen in them. Main thread.

mod image;

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};

use super::partitions::read;
use image::{Image, Inside, Login};

/// What a scenario is wanted for.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// bzImage or ELF.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The root filesystem, raw.
    pub disk: PathBuf,
    /// The new scenario.
    pub output: PathBuf,
}

/// The size of the machine: most distributions boot in it.
const MEMORY: &str = "512M";

/// Writes the scenario, which must not be there yet, and says what was seen and what to do next.
///
/// # Errors
/// One line that names the option, the file and the remedy. Nothing is written then.
pub fn new(wanted: &Wanted) -> anyhow::Result<String> {
    let kernel = kernel(&wanted.kernel)?;
    if let Some(initrd) = &wanted.initrd {
        open("--initrd", initrd)?;
    }
    let image = image::look(&wanted.disk).context("--disk")?;
    let scenario = scenario(wanted, &kernel, &image)?;
    let output = wanted.output.display();
    let mut file = File::create_new(&wanted.output).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => {
            anyhow!("-o {output}: there is such a file already; remove it, or name another")
        }
        io::ErrorKind::NotFound => anyhow!("-o {output}: there is no such folder; make it first"),
        _ => anyhow!("-o {output}: {error}"),
    })?;
    file.write_all(scenario.as_bytes()).with_context(|| format!("-o {output}"))?;
    Ok(format!(
        "{output}: {kernel}; {image}\n\
         Read it through, then try it:\n  \
         skiff smoke --dry-run {quoted}\n  \
         skiff smoke {quoted}\n",
        quoted = shell_word(&wanted.output)
    ))
}

fn open(option: &str, path: &Path) -> anyhow::Result<File> {
    let shown = path.display();
    let file = File::open(path).map_err(|error| anyhow!("{option} {shown}: {error}; name a file that can be read"))?;
    if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        bail!("{option} {shown}: not a file; name one");
    }
    Ok(file)
}

/// What the kernel is, in a few words.
fn kernel(path: &Path) -> anyhow::Result<String> {
    let file = open("--kernel", path)?;
    let mut head = [0; 0x210];
    let length = read(&file, &mut head, 0).with_context(|| format!("--kernel {}", path.display()))?;
    let head = &head[..length];
    if head.starts_with(b"\x7fELF") {
        return Ok("an ELF kernel".to_owned());
    }
    // The boot protocol's `header`, and `kernel_version`: where a text lies, from byte 0x200 on.
    if head.get(0x202..0x206) != Some(b"HdrS") {
        bail!("--kernel {}: neither a bzImage nor an ELF file; name the kernel's vmlinuz or vmlinux", path.display());
    }
    let version = match head.get(0x20e..0x210) {
        Some(&[low, high]) if (low, high) != (0, 0) => {
            version(&file, 0x200 + u64::from(u16::from_le_bytes([low, high])))
        }
        _ => None,
    };
    Ok(version.map_or_else(|| "a bzImage".to_owned(), |version| format!("Linux {version}")))
}

/// The first word of the text there.
fn version(file: &File, at: u64) -> Option<String> {
    let mut text = [0; 64];
    let length = read(file, &mut text, at).ok()?;
    let word = text[..length].split(|byte| !byte.is_ascii_graphic()).next()?;
    (!word.is_empty()).then(|| String::from_utf8_lossy(word).into_owned())
}

fn scenario(wanted: &Wanted, kernel: &str, image: &Image) -> anyhow::Result<String> {
    let folder = folder_of(&wanted.output)?;
    let quoted = |path: &Path| quoted_path(&folder, path);
    let mut text = format!("# {kernel} boots from its disk: {image}.\n");
    let _ = writeln!(text, "timeout = \"2m\"              # for the whole scenario\n\n[machine]");
    let _ = writeln!(text, "kernel = {}", quoted(&wanted.kernel)?);
    if let Some(initrd) = &wanted.initrd {
        let _ = writeln!(text, "initrd = {}", quoted(initrd)?);
    }
    let _ = writeln!(text, "cmdline = \"console=ttyS0 root={} rw\"", image.root());
    let _ = writeln!(text, "memory = \"{MEMORY}\"\n");
    text += "# A snapshot: what the guest writes is gone afterwards, and the image stays as it is.\n[[machine.disk]]\n";
    let _ = writeln!(text, "path = {}\nid = \"root\"\n", quoted(&wanted.disk)?);
    text += "# A kernel panic, BUG:, Oops, WARNING: and their like fail the test wherever they come. To let one pass:\n\
             # [fail]\n# warning = \"warn\"\n# allow = ['a regular expression of harmless lines']\n\n";
    text += &steps(image.inside.as_ref());
    // Only a machine that has ended can be checked.
    if image.is_ext() && ends(image.inside.as_ref()) {
        text += "\n[[step]]\ncheck-disk = \"root\"         # e2fsck finds nothing to repair\n";
        if let Some(number) = image.partition {
            let _ = writeln!(text, "partition = {number}");
        }
    }
    Ok(text)
}

/// Whether the steps below end with a power-off.
fn ends(inside: Option<&Inside>) -> bool {
    inside.is_some_and(|inside| inside.login == Login::RootWithoutPassword || inside.systemd)
}

fn steps(inside: Option<&Inside>) -> String {
    let mut text = String::from(
        "[[step]]\nwait = \"login: \"\nmeasure = \"boot\"\n# max = \"20s\"               # slower becomes a warning\n",
    );
    match inside {
        Some(Inside { login: Login::RootWithoutPassword, systemd, .. }) => {
            text += "\n[[step]]\nsend = \"root\"\n\n[[step]]\nwait-regex = '[#$] $'       # the shell's prompt\n\n\
                     [[step]]\nrun = \"uname -a\"            # its exit status must be 0\n";
            if *systemd {
                text += "\n# [[step]]\n# run = \"systemctl is-system-running --wait\"\n# output = \"running\"\n";
            }
            text += "\n[[step]]\nsend = \"poweroff\"\n\n[[step]]\nexpect = \"poweroff\"\n";
        }
        Some(Inside { systemd: true, .. }) => {
            text += "\n# Nobody can log in without a password. To do so:\n# [[step]]\n# send = \"USER\"\n# [[step]]\n\
                     # wait = \"Password: \"\n# [[step]]\n# send = \"PASSWORD\"\n\n\
                     [[step]]\npower-button = true\n\n[[step]]\nexpect = \"poweroff\"\n";
        }
        _ => {
            text += "\n# What the guest is to do then:\n# [[step]]\n# send = \"root\"\n# [[step]]\n# wait-regex = '[#$] $'\n\
                     # [[step]]\n# run = \"uname -a\"\n# [[step]]\n# send = \"poweroff\"\n# [[step]]\n# expect = \"poweroff\"\n";
        }
    }
    text
}

/// The folder that paths in the scenario start at.
fn folder_of(output: &Path) -> anyhow::Result<PathBuf> {
    let folder = output.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let named = || format!("-o {}: there is no such folder; make it first", output.display());
    folder.canonicalize().with_context(named)
}

/// `path` as the scenario names it: from its folder on if it is in there, else whole.
fn quoted_path(folder: &Path, path: &Path) -> anyhow::Result<String> {
    let whole = std::path::absolute(path).with_context(|| path.display().to_string())?;
    // Not the file itself: a symbolic link to the newest kernel should stay one.
    let whole = match (whole.parent().map(Path::canonicalize), whole.file_name()) {
        (Some(Ok(parent)), Some(name)) => parent.join(name),
        _ => whole,
    };
    let shown = whole.strip_prefix(folder).unwrap_or(&whole);
    let text = shown.to_str().ok_or_else(|| anyhow!("{}: not UTF-8; rename the file", path.display()))?;
    Ok(toml::Value::from(text).to_string())
}

/// One word of a shell's command line.
fn shell_word(path: &Path) -> String {
    let text = path.to_string_lossy();
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "/._-+,=@%:".contains(letter);
    if !text.is_empty() && text.chars().all(plain) {
        text.into_owned()
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests;
