//! The entropy device (virtio 1.2, 5.4).

use super::Check;
use crate::Machine;
use crate::pci::Function;
use crate::report::{Failure, Outcome, holds};
use crate::rng::Rng;
use crate::virtio::Options;

pub(super) const CHECKS: &[Check] = &[
    Check { name: "bytes come, as many as fit, and they differ", run: bytes },
    Check { name: "it can be reset and started again", run: again },
];

fn function(machine: &Machine) -> Outcome<Function> {
    machine.virtio(4).next().ok_or(Failure::Skip("a virtio entropy device"))
}

fn bytes(machine: &Machine) -> Outcome {
    let mut rng = Rng::open(function(machine)?, &Options::default())?;
    let mut last = 0;
    for wanted in [8, 64, 4096, 16] {
        let (buffer, written) = rng.bytes(wanted)?;
        holds("at least 8 bytes come, and no more than fit", (8..=wanted).contains(&written))?;
        // Each is wrong once in 2^64 times.
        let word = buffer.read::<u64>(0);
        holds("they are not zero and not the same as before", word != 0 && word != last)?;
        last = word;
    }
    Ok(())
}

fn again(machine: &Machine) -> Outcome {
    for _ in 0..10 {
        Rng::open(function(machine)?, &Options::default())?.bytes(16)?;
    }
    Ok(())
}
