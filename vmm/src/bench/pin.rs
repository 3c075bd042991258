//! `--pin`: the vCPU has the first CPU to itself, everything else the others. By taskset(1), which is on every Linux.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, bail, ensure};

use super::usage::{Usage, is_vcpu};

/// Who may run where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pin {
    vcpu: String,
    others: String,
}

impl Pin {
    /// Keeps this process, and all that it starts from now on, off the CPU that is for vCPUs.
    ///
    /// # Errors
    /// With a single CPU, or without taskset.
    pub(super) fn this_process() -> anyhow::Result<Self> {
        let status = fs::read_to_string("/proc/self/status").context("--pin")?;
        let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        let pin = Self::of(allowed.unwrap_or_default().trim())?;
        taskset(&["-a", "-p", "-c", &pin.others, &std::process::id().to_string()])?;
        Ok(pin)
    }

    /// Of a list as the kernel writes it, such as `0-3,8`.
    fn of(allowed: &str) -> anyhow::Result<Self> {
        let (first, rest) = allowed.split_once(',').map_or((allowed, None), |(first, rest)| (first, Some(rest)));
        let (vcpu, range) = match first.split_once('-') {
            Some((low, high)) => {
                let next = low.parse::<u32>().context("--pin: the kernel's list of CPUs")? + 1;
                (low, Some(if next.to_string() == high { high.to_owned() } else { format!("{next}-{high}") }))
            }
            None => (first, None),
        };
        let others: Vec<_> = range.into_iter().chain(rest.map(str::to_owned)).collect();
        ensure!(!others.is_empty(), "--pin: needs two CPUs, and this process may use one; leave it out");
        Ok(Self { vcpu: vcpu.to_owned(), others: others.join(",") })
    }

    /// Puts the vCPUs of a machine where they belong.
    pub(super) fn vcpus(&self, machine: &Usage) -> anyhow::Result<()> {
        machine.ids(is_vcpu).try_for_each(|thread| taskset(&["-p", "-c", &self.vcpu, thread]))
    }
}

fn taskset(args: &[&str]) -> anyhow::Result<()> {
    let output = Command::new("taskset").args(args).stdin(Stdio::null()).output();
    let output = output.context("--pin: taskset cannot be started; install util-linux, or leave --pin out")?;
    if !output.status.success() {
        bail!("--pin: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_cpu_is_for_the_vcpu() {
        for (allowed, vcpu, others) in [
            ("0-1", "0", "1"),
            ("0-7", "0", "1-7"),
            ("3,5", "3", "5"),
            ("2-3,8-11", "2", "3,8-11"),
            ("4,6-7,9", "4", "6-7,9"),
        ] {
            let pin = Pin { vcpu: vcpu.to_owned(), others: others.to_owned() };
            assert_eq!(Pin::of(allowed).unwrap(), pin, "{allowed}");
        }
    }

    #[test]
    fn one_cpu_is_too_few() {
        for allowed in ["0", "17"] {
            assert!(Pin::of(allowed).unwrap_err().to_string().contains("needs two CPUs"));
        }
    }
}
