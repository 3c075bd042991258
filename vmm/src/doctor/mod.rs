//! `skiff doctor`: what this host can do for virtual machines, and what to change where it cannot. Runs on the main
//! thread and changes nothing on the host.
//!
//! A [`Report`] is a list of checks; as JSON (`skiff doctor --json`) it is one object:
//!
//! | field | value |
//! |---|---|
//! | `schema` | 1; a new number if a field ever changes its meaning |
//! | `version` | the version of skiff |
//! | `verdict` | `ok`, `warning` or `problem`: the worst status of the checks |
//! | `kvm` | `hardware`, `software`, or null where no guest could be run |
//! | `checks` | in order, each an object of the four fields below |
//! | `checks[].name` | which check: a short word that stays the same |
//! | `checks[].status` | `ok`, `warning` (something optional is missing) or `problem` (machines will not run) |
//! | `checks[].message` | one line for a person |
//! | `checks[].remedy` | one line saying what to do, or null where there is nothing to do |

mod host;
mod kvm;
mod probe;

use std::path::Path;

use serde::Serialize;

pub use probe::{KvmKind, SOFTWARE_KVM, kvm_kind};

/// The version of the JSON form.
const SCHEMA: u32 = 1;

/// How a check ended; the later, the worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Something that only some machines need is missing.
    Warning,
    /// Machines will not run.
    Problem,
}

/// One thing looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// A short word that stays the same from version to version.
    pub name: &'static str,
    /// How it ended.
    pub status: Status,
    /// What was found, in one line.
    pub message: String,
    /// What to do, in one line.
    pub remedy: Option<String>,
}

impl Check {
    fn ok(name: &'static str, message: impl Into<String>) -> Self {
        Self { name, status: Status::Ok, message: message.into(), remedy: None }
    }

    fn warning(name: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, status: Status::Warning, message: message.into(), remedy: Some(remedy.into()) }
    }

    fn problem(name: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, status: Status::Problem, message: message.into(), remedy: Some(remedy.into()) }
    }
}

/// All checks of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    schema: u32,
    version: &'static str,
    verdict: Status,
    kvm: Option<KvmKind>,
    checks: Vec<Check>,
}

impl Report {
    /// Looks at this host.
    pub fn of_this_host() -> Self {
        let root = Path::new("/");
        let (mut checks, kvm) = kvm::checks(root);
        checks.extend(host::checks(root));
        Self::new(checks, kvm)
    }

    fn new(checks: Vec<Check>, kvm: Option<KvmKind>) -> Self {
        let verdict = checks.iter().map(|check| check.status).max().unwrap_or(Status::Ok);
        Self { schema: SCHEMA, version: env!("CARGO_PKG_VERSION"), verdict, kvm, checks }
    }

    /// The worst status of the checks.
    pub fn verdict(&self) -> Status {
        self.verdict
    }

    /// The checks, in the order of the report.
    pub fn checks(&self) -> &[Check] {
        &self.checks
    }

    /// The report as JSON, in the form documented above.
    ///
    /// # Panics
    /// Never: a tree of texts and numbers has a JSON form.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("texts and numbers have a JSON form")
    }
}

impl std::fmt::Display for Report {
    /// A line for each check, and one more for its remedy.
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for check in &self.checks {
            let status = match check.status {
                Status::Ok => "ok",
                Status::Warning => "warning",
                Status::Problem => "problem",
            };
            writeln!(out, "{status:<8} {:<14} {}", check.name, check.message)?;
            if let Some(remedy) = &check.remedy {
                writeln!(out, "{:<8} {:<14} -> {remedy}", "", "")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let checks = vec![
            Check::ok("processor", "VT-x"),
            Check::problem("kvm-device", "/dev/kvm: no such device", "load it"),
            Check::warning("tun", "no \"tun\"", "load that"),
        ];
        Report::new(checks, None)
    }

    #[test]
    fn the_worst_check_is_the_verdict() {
        assert_eq!(report().verdict(), Status::Problem);
        assert_eq!(Report::new(vec![Check::ok("a", "b")], None).verdict(), Status::Ok);
        let warned = Report::new(vec![Check::warning("a", "b", "c"), Check::ok("a", "b")], None);
        assert_eq!(warned.verdict(), Status::Warning);
    }

    #[test]
    fn the_json_form_is_the_documented_one() {
        let json: serde_json::Value = serde_json::from_str(&report().to_json()).unwrap();
        let expected = serde_json::json!({
            "schema": 1,
            "version": env!("CARGO_PKG_VERSION"),
            "verdict": "problem",
            "kvm": null,
            "checks": [
                { "name": "processor", "status": "ok", "message": "VT-x", "remedy": null },
                { "name": "kvm-device", "status": "problem", "message": "/dev/kvm: no such device", "remedy": "load it" },
                { "name": "tun", "status": "warning", "message": "no \"tun\"", "remedy": "load that" },
            ],
        });
        assert_eq!(json, expected);
        let software = Report::new(Vec::new(), Some(KvmKind::Software { refused: vec!["popcnt"] }));
        let json: serde_json::Value = serde_json::from_str(&software.to_json()).unwrap();
        assert_eq!(json["kvm"], "software");
    }

    #[test]
    fn lines_for_a_person() {
        let lines = "ok       processor      VT-x\n\
                     problem  kvm-device     /dev/kvm: no such device\n\
                     \x20                       -> load it\n\
                     warning  tun            no \"tun\"\n\
                     \x20                       -> load that\n";
        assert_eq!(report().to_string(), lines);
    }
}
