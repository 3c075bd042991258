//! The command line. Flags become a request here, errors become one line on stderr and an exit code. Runs on the main
//! thread.

mod bench;
mod completions;
mod disk;
mod doctor;
mod log;
mod man;
mod run;
mod smoke;

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use skiff::config::ConfigError;
use skiff::exit;

/// A small virtual machine monitor for Linux KVM
#[derive(Debug, Parser)]
#[command(name = "skiff", version, max_term_width = 100, arg_required_else_help = false, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    log: log::LogArgs,
}

/// `skiff run` alone, for the common case that there is nothing to complain about: the definitions of all the other commands would
/// only cost time and memory, which a machine then keeps as long as it runs.
#[derive(Debug, Parser)]
struct RunCli {
    #[command(flatten)]
    args: run::RunArgs,
    #[command(flatten)]
    log: log::LogArgs,
}

impl Cli {
    /// What `args` say, the name of the program first.
    fn of(args: &[OsString]) -> Result<Self, clap::Error> {
        if args.get(1).is_some_and(|name| name == "run")
            && let Ok(run) = RunCli::try_parse_from(&args[1..])
        {
            return Ok(Self { command: Command::Run(Box::new(run.args)), log: run.log });
        }
        Self::try_parse_from(args)
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<run::RunArgs>),
    Smoke(Box<smoke::SmokeArgs>),
    Bench(Box<bench::BenchArgs>),
    Disk(disk::DiskArgs),
    Doctor(doctor::DoctorArgs),
    Completions(completions::CompletionsArgs),
    Man(man::ManArgs),
}

const EXAMPLES: &str = "\
Examples:
  Boot a Linux distribution from its own kernel:
    skiff run --kernel vmlinuz --initrd initrd.img --disk path=root.img \\
        --cmdline \"console=ttyS0 root=/dev/vda rw\" --cpus 2 --memory 1G
  The same machine from a file, with more memory:
    skiff run --config vm.toml --memory 4G
  Try a kernel or an image: boot it, talk to it, and get a verdict for CI:
    skiff smoke scenarios/*.toml --junit results.xml
  Which engine is the fastest for disks in this folder:
    skiff bench --dir /var/lib/images
  See on what a disk would run, and why:
    skiff disk explain root.img
  Check whether this host can run virtual machines:
    skiff doctor";

/// Why a command did not do its work: one line, without the name of the program.
#[derive(Debug, PartialEq, Eq)]
enum Failure {
    /// The flags or the configuration file are wrong.
    Usage(String),
    /// They are right, but it could not be done.
    Failed(String),
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::Usage(error.to_string())
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(format!("{error:#}"))
    }
}

/// Runs the command in `args`, the name of the program first, and returns the exit code of the process.
pub(crate) fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    let done = match Cli::of(&args) {
        Ok(cli) => command(cli),
        Err(error) if error.kind() == ErrorKind::InvalidUtf8 => Err(Failure::Usage(not_utf8(&args))),
        Err(error) => no_command(&error),
    };
    let (line, code) = match done {
        Ok(code) => return code.into(),
        Err(Failure::Usage(line)) => (line, exit::USAGE),
        Err(Failure::Failed(line)) => (line, exit::FAILED_START),
    };
    log::last_line(&line);
    code.into()
}

fn command(cli: Cli) -> Result<u8, Failure> {
    cli.log.start()?;
    match cli.command {
        Command::Run(args) => args.run(),
        Command::Smoke(args) => args.run(),
        Command::Bench(args) => args.run(),
        Command::Disk(args) => args.run(),
        Command::Doctor(args) => args.run(),
        Command::Completions(args) => args.run(),
        Command::Man(args) => args.run(),
    }
}

/// Answers a command line that names no work: help and version on stdout, anything else is a usage error.
fn no_command(error: &clap::Error) -> Result<u8, Failure> {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            print(&error.render().to_string())?;
            Ok(0)
        }
        _ => Err(Failure::Usage(one_line(&error.render().to_string()))),
    }
}

/// The complaint about the first of `args` that is not UTF-8, after the flag it belongs to: clap does not say which.
fn not_utf8(args: &[OsString]) -> String {
    let bad = args.iter().position(|arg| arg.to_str().is_none()).unwrap_or(0);
    let flag = bad.checked_sub(1).and_then(|at| args[at].to_str()).filter(|flag| flag.starts_with('-'));
    let flag = flag.map(|flag| format!("{flag} ")).unwrap_or_default();
    format!("{flag}{}: not UTF-8; rename the file", args[bad].display())
}

/// The paragraphs of a message of clap in one line, without its usage text.
fn one_line(message: &str) -> String {
    let end = ["\nUsage:", "\nFor more information"].iter().filter_map(|mark| message.find(mark)).min();
    let message = &message[..end.unwrap_or(message.len())];
    let message = message.strip_prefix("error: ").unwrap_or(message);
    let mut parts: Vec<&str> = message.lines().map(str::trim).filter(|part| !part.is_empty()).collect();
    parts.push("see --help");
    parts.join("; ").replace("; tip: ", "; ").replace(":; ", ": ")
}

/// Writes `text` to stdout. A reader that has seen enough is no failure.
fn print(text: &str) -> Result<(), Failure> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::Failed(format!("stdout: {error}"))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn usage(args: &str) -> String {
        let args = std::iter::once("skiff").chain(args.split_ascii_whitespace());
        match no_command(&Cli::try_parse_from(args).unwrap_err()) {
            Err(Failure::Usage(line)) => line,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_alone_is_understood_as_among_all_commands() {
        for line in [
            "run --kernel k",
            "run -vv --kernel k --disk a --disk path=b,readonly=on --log-file l",
            "run --kernel=k --debug-exit --stats=json -q",
            "run --config vm.toml --dry-run",
            "-v run --kernel k",
            "run --help",
            "run --kernl k",
            "run --cpus",
            "run -q -v",
            "run run",
            "doctor",
        ] {
            let args: Vec<OsString> = ["skiff"].into_iter().chain(line.split(' ')).map(Into::into).collect();
            let told =
                |parsed: Result<Cli, clap::Error>| parsed.map(|cli| format!("{cli:?}")).map_err(|no| no.to_string());
            assert_eq!(told(Cli::of(&args)), told(Cli::try_parse_from(&args)), "{line}");
        }
        let args = ["skiff", "run", "--kernel", "k"].map(OsString::from);
        assert!(RunCli::try_parse_from(&args[1..]).is_ok(), "the short way is not taken");
    }

    #[test]
    fn clap_complains_in_one_line() {
        for (args, line) in [
            ("run --kernl x", "unexpected argument '--kernl' found; a similar argument exists: '--kernel'; see --help"),
            ("run --cpus", "a value is required for '--cpus <N>' but none was supplied; see --help"),
            ("run vmlinuz", "unexpected argument 'vmlinuz' found; see --help"),
            ("run --cpus 1 --cpus 2", "the argument '--cpus <N>' cannot be used multiple times; see --help"),
            ("runn", "unrecognized subcommand 'runn'; a similar subcommand exists: 'run'; see --help"),
            (
                "",
                "'skiff' requires a subcommand but one was not provided; [subcommands: run, smoke, bench, disk, doctor, completions, man, \
                 help]; see --help",
            ),
            ("completions", "the following required arguments were not provided: <SHELL>; see --help"),
        ] {
            assert_eq!(usage(args), line, "{args}");
        }
    }

    #[test]
    fn every_error_of_the_start_is_a_failure_with_its_causes() {
        let error = anyhow::Error::msg("No such file").context("--disk path=x.img");
        assert_eq!(Failure::from(error), Failure::Failed("--disk path=x.img: No such file".to_owned()));
    }
}
