//! `skiff doctor`: prints the report on this host. Main thread.

use clap::Args;
use skiff::doctor::{Report, Status};
use skiff::exit;

use super::Failure;

/// Check whether this host can run virtual machines, and say what to change
#[derive(Debug, Args)]
#[command(after_help = "\
Exit codes:
  0    everything is well, or only something optional is missing (a warning)
  1    machines will not run: there is a problem
  2    usage")]
pub(super) struct DoctorArgs {
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

impl DoctorArgs {
    pub(super) fn run(&self) -> Result<u8, Failure> {
        let report = Report::of_this_host();
        super::print(&if self.json { report.to_json() + "\n" } else { report.to_string() })?;
        Ok(if report.verdict() == Status::Problem { exit::FAILED_START } else { 0 })
    }
}
