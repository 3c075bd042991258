//! `skiff man`: the manual pages, made from the definition of the command line. Main thread.

use std::fmt::Write as _;
use std::io;
use std::path::PathBuf;

use clap::{Args, Command, CommandFactory};
use clap_mangen::Man;

use super::{Cli, Failure};

/// Print the manual pages, or write them into a folder
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  Read them:
    skiff man | man -l -
  Install them:
    sudo skiff man --dir /usr/local/share/man/man1")]
pub(super) struct ManArgs {
    /// Write skiff.1, skiff-run.1 and so on into this folder
    #[arg(long, value_hint = clap::ValueHint::DirPath)]
    dir: Option<PathBuf>,
}

impl ManArgs {
    pub(super) fn run(&self) -> Result<u8, Failure> {
        let pages = pages().map_err(|error| Failure::Failed(format!("manual pages: {error}")))?;
        let Some(dir) = &self.dir else {
            super::print(&pages.into_iter().map(|page| page.1).collect::<String>())?;
            return Ok(0);
        };
        for (name, page) in pages {
            let path = dir.join(name);
            std::fs::write(&path, page).map_err(|error| {
                Failure::Failed(format!("--dir {}: {error}; name a folder that can be written", path.display()))
            })?;
        }
        Ok(0)
    }
}

/// The file name and the text of every page, that of `skiff` first.
fn pages() -> io::Result<Vec<(String, String)>> {
    let mut skiff = Cli::command().disable_help_subcommand(true);
    skiff.build();
    with_subcommands(skiff).into_iter().map(page).collect()
}

/// `command`, then the commands below it.
fn with_subcommands(command: Command) -> Vec<Command> {
    let below: Vec<_> = command.get_subcommands().filter(|below| below.get_name() != "help").cloned().collect();
    std::iter::once(command).chain(below.into_iter().flat_map(with_subcommands)).collect()
}

fn page(command: Command) -> io::Result<(String, String)> {
    let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let has_commands = command.has_subcommands();
    let man = Man::new(command).manual("skiff");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if has_commands {
        man.render_subcommands_section(&mut page)?;
    }
    let page = String::from_utf8_lossy(&page).into_owned() + &sections(&after);
    Ok((man.get_filename(), page))
}

/// The text below the options as sections: a line that is not indented is a heading, the rest is set as it is.
fn sections(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        if line.is_empty() {
            continue;
        }
        if line.starts_with(' ') {
            // Backslashes, and the hyphens that must stay hyphens; the \& keeps a dot from being a request.
            let _ = writeln!(out, "\\&{}", line.replace('\\', "\\e").replace('-', "\\-"));
        } else {
            let fill = if out.is_empty() { "" } else { ".fi\n" };
            let _ = writeln!(out, "{fill}.SH {}\n.nf", line.trim_end_matches(':').to_uppercase());
        }
    }
    out + if text.is_empty() { "" } else { ".fi\n" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command as Process, Stdio};

    #[test]
    fn a_page_for_every_command() {
        let pages = pages().unwrap();
        let names: Vec<&str> = pages.iter().map(|page| page.0.as_str()).collect();
        assert_eq!(
            names,
            [
                "skiff.1",
                "skiff-run.1",
                "skiff-smoke.1",
                "skiff-smoke-new.1",
                "skiff-bench.1",
                "skiff-bench-compare.1",
                "skiff-disk.1",
                "skiff-disk-explain.1",
                "skiff-disk-engines.1",
                "skiff-doctor.1",
                "skiff-completions.1",
                "skiff-man.1"
            ]
        );
        let run = &pages[1].1;
        for word in [".TH skiff-run 1", "\\-\\-kernel", ".SH EXAMPLES", ".SH EXIT CODES", "triple fault"] {
            assert!(run.contains(word), "{word}");
        }
    }

    #[test]
    fn text_is_set_as_it_is() {
        let set = ".SH EXAMPLES\n.nf\n\\&  a \\-\\-b \\e\n.fi\n.SH EXIT CODES\n.nf\n\\&  0\n.fi\n";
        assert_eq!(sections("Examples:\n  a --b \\\n\nExit codes:\n  0"), set);
        assert_eq!(sections(""), "");
    }

    #[test]
    fn groff_reads_the_pages_without_a_warning() {
        for (name, page) in pages().unwrap() {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join(&name);
            std::fs::write(&path, page).unwrap();
            let mut groff = Process::new("groff");
            groff.args(["-man", "-Tutf8", "-ww", "-z"]).arg(path).stdout(Stdio::null());
            let checked = match groff.output() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    skip::because("groff is not installed");
                    return;
                }
                other => other.unwrap(),
            };
            assert!(checked.status.success(), "{name}");
            assert_eq!(String::from_utf8_lossy(&checked.stderr), "", "{name}");
        }
    }
}
