//! The network interfaces' part of the statistics. Main thread.

use std::fmt;

use devices::virtio::net::statistics::{DropReason, PairSnapshot, Snapshot, Statistics};
use serde_json::{Value, json};

/// The numbers of one interface at one moment.
pub(super) struct Net {
    id: String,
    pairs: Vec<PairSnapshot>,
}

impl Net {
    pub(super) fn new(id: &str, statistics: &Statistics) -> Self {
        Self { id: id.to_owned(), pairs: statistics.snapshot() }
    }

    pub(super) fn json(&self) -> Value {
        let pairs = self.pairs.iter().map(|pair| json!({ "rx": queue_json(&pair.rx), "tx": queue_json(&pair.tx) }));
        json!({ "id": self.id, "pairs": pairs.collect::<Vec<_>>() })
    }
}

fn queue_json(queue: &Snapshot) -> Value {
    let drops: Value = reasons(queue).map(|(reason, count)| (reason.to_owned(), json!(count))).collect();
    json!({
        "frames": queue.frames,
        "bytes": queue.bytes,
        "drops": drops,
        "kicks": queue.kicks,
        "interrupts": queue.interrupts,
    })
}

fn reasons(queue: &Snapshot) -> impl Iterator<Item = (&'static str, u64)> + '_ {
    DropReason::ALL.iter().zip(&queue.drops).map(|(reason, count)| (reason.name(), *count))
}

impl fmt::Display for Net {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(out, "net {}", self.id)?;
        if self.pairs.is_empty() {
            return writeln!(out, "  no driver has used it");
        }
        writeln!(out, "  {:<10}{:>14}{:>20}{:>10}{:>10}{:>12}", "", "frames", "bytes", "drops", "kicks", "interrupts")?;
        for (index, pair) in self.pairs.iter().enumerate() {
            for (name, queue) in [("received", &pair.rx), ("sent", &pair.tx)] {
                let Snapshot { frames, bytes, kicks, interrupts, .. } = queue;
                let drops: u64 = queue.drops.iter().sum();
                let name = format!("{name} {index}");
                write!(out, "  {name:<10}{frames:>14}{bytes:>20}{drops:>10}{kicks:>10}{interrupts:>12}")?;
                reasons(queue)
                    .filter(|(_, count)| *count > 0)
                    .try_for_each(|(reason, count)| write!(out, "  {count} {reason}"))?;
                writeln!(out)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net() -> Net {
        let rx = Snapshot { frames: 3, bytes: 200, drops: [0, 2, 0, 1, 0, 0], kicks: 4, interrupts: 5 };
        let tx = Snapshot { frames: 7, bytes: 900, ..Snapshot::default() };
        Net { id: "net0".to_owned(), pairs: vec![PairSnapshot { rx, tx }] }
    }

    #[test]
    fn text_for_a_person() {
        let expected = "\
net net0
                    frames               bytes     drops     kicks  interrupts
  received 0             3                 200         3         4           5  2 no-buffer  1 filtered
  sent 0                 7                 900         0         0           0
";
        assert_eq!(net().to_string(), expected);
        let unused = Net { id: "lan".to_owned(), pairs: Vec::new() };
        assert_eq!(unused.to_string(), "net lan\n  no driver has used it\n");
    }

    #[test]
    fn json_for_a_program() {
        let value = net().json();
        let drops = json!({ "length": 0, "no-buffer": 2, "offload": 0, "filtered": 1, "host": 0, "link-down": 0 });
        let rx = json!({ "frames": 3, "bytes": 200, "drops": drops, "kicks": 4, "interrupts": 5 });
        assert_eq!((&value["id"], &value["pairs"][0]["rx"]), (&json!("net0"), &rx));
        assert_eq!(value["pairs"][0]["tx"]["bytes"], 900);
    }
}
