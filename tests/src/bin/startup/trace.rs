//! KVM's trace events, counted by the kernel itself (Documentation/trace/histogram.rst), for `--profile`. All virtual
//! machines of the host are counted, so only one may run.

use std::fmt;
use std::fs;
use std::path::PathBuf;

use anyhow::Context;

const EVENTS: &str = "/sys/kernel/debug/tracing/events/kvm";

/// Event, and the fields its counts are kept by.
const COUNTED: [(&str, &str); 7] = [
    ("kvm_exit", "exit_reason"),
    ("kvm_userspace_exit", "reason"),
    ("kvm_pio", "port.hex,rw,size"),
    ("kvm_mmio", "gpa.hex,type"),
    ("kvm_msr", "ecx.hex,write"),
    ("kvm_cpuid", "function.hex"),
    ("kvm_page_fault", "error_code.hex"),
];

/// Counting from [`Trace::start`] until dropped.
pub(crate) struct Trace {
    events: Vec<(&'static str, &'static str)>,
}

/// The counts of one event, most frequent first.
pub(crate) struct Table {
    event: &'static str,
    rows: Vec<(u64, String)>,
}

impl Trace {
    pub(crate) fn start() -> anyhow::Result<Self> {
        let mut trace = Self { events: Vec::new() };
        for (event, keys) in COUNTED {
            let trigger = trigger(event);
            fs::write(&trigger, format!("hist:keys={keys}:size=4096"))
                .with_context(|| format!("{}: --profile needs root rights and debugfs", trigger.display()))?;
            trace.events.push((event, keys));
        }
        Ok(trace)
    }

    pub(crate) fn read(&self) -> anyhow::Result<Vec<Table>> {
        self.events.iter().map(|(event, _)| Table::read(event)).collect()
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        for (event, keys) in &self.events {
            let _ = fs::write(trigger(event), format!("!hist:keys={keys}:size=4096"));
        }
    }
}

fn trigger(event: &str) -> PathBuf {
    PathBuf::from(EVENTS).join(event).join("trigger")
}

impl Table {
    fn read(event: &'static str) -> anyhow::Result<Self> {
        let text = fs::read_to_string(format!("{EVENTS}/{event}/hist")).context("the histogram")?;
        let rows = text.lines().filter_map(|line| line.strip_prefix("{ ")?.split_once("} hitcount:"));
        let mut rows: Vec<_> = rows
            .filter_map(|(key, count)| {
                let key = key.split_ascii_whitespace().collect::<Vec<_>>().join(" ");
                Some((count.trim().parse().ok()?, key))
            })
            .collect();
        rows.sort_by(|a, b| b.cmp(a));
        Ok(Self { event, rows })
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        const SHOWN: usize = 40;
        let total: u64 = self.rows.iter().map(|(count, _)| count).sum();
        writeln!(f, "  {} {total}", self.event)?;
        for (count, key) in self.rows.iter().take(SHOWN) {
            writeln!(f, "    {count:>7}  {key}")?;
        }
        if self.rows.len() > SHOWN {
            writeln!(f, "    and {} more kinds", self.rows.len() - SHOWN)?;
        }
        Ok(())
    }
}
