//! The checks, in groups; `test=` of the command line chooses groups.

mod bar;
mod blk;
pub(crate) mod msix;
mod notify;
mod pci;
mod reset;
mod rng;
mod virtio;

use crate::Machine;
use crate::acpi::PortWrite;
use crate::cpu;
use crate::memory;
use crate::msix::Msix;
use crate::report::{self, Failure, Outcome, println};
use crate::virtio::Device;

/// One property of the machine.
pub(crate) struct Check {
    name: &'static str,
    run: fn(&Machine) -> Outcome,
}

/// The groups in the order in which `all` runs them. msix looks at tables that nobody has touched, so no group before it
/// uses interrupts.
const GROUPS: [(&str, &[Check]); 8] = [
    ("pci", pci::CHECKS),
    ("virtio", virtio::CHECKS),
    ("bar", bar::CHECKS),
    ("msix", msix::CHECKS),
    ("notify", notify::CHECKS),
    ("reset", reset::CHECKS),
    ("blk", blk::CHECKS),
    ("rng", rng::CHECKS),
];

/// Runs what the command line asks for, reports, and ends the machine as `end=` says.
pub(crate) fn run(machine: &Machine) -> ! {
    let wanted = machine.command_line.value("test").unwrap_or("all");
    if wanted == "none" {
        end(machine, report::PASSED);
    }
    let chosen = |group: &str| wanted.split(',').any(|word| word == "all" || word == group);
    for word in wanted.split(',').filter(|word| *word != "all") {
        if !GROUPS.iter().any(|(group, _)| *group == word) {
            println!("not ok command line: there is no test {word}");
            report::exit(report::FAILED);
        }
    }
    let (mut passed, mut failed, mut skipped) = (0_u32, 0_u32, 0_u32);
    for (group, checks) in GROUPS.iter().filter(|(group, _)| chosen(group)) {
        for check in *checks {
            let name = check.name;
            let before = memory::mark();
            let outcome = (check.run)(machine);
            quiesce(machine);
            memory::release(before);
            match outcome {
                Ok(()) => println!("ok {group}: {name}"),
                Err(Failure::Skip(_)) => println!("ok {group}: {name} # SKIP {}", Reason(&outcome)),
                Err(_) => println!("not ok {group}: {name}: {}", Reason(&outcome)),
            }
            match outcome {
                Ok(()) => passed += 1,
                Err(Failure::Skip(_)) => skipped += 1,
                Err(_) => failed += 1,
            }
        }
    }
    println!("# {passed} passed, {failed} failed, {skipped} skipped");
    let verdict = if failed == 0 && passed > 0 { report::PASSED } else { report::FAILED };
    end(machine, verdict)
}

struct Reason<'a>(&'a Outcome);

impl core::fmt::Display for Reason<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.0.as_ref().err().map_or(Ok(()), |failure| failure.fmt(f))
    }
}

/// Resets every virtio device and masks its interrupts, so that none writes into memory that the next check reuses.
fn quiesce(machine: &Machine) {
    for device_type in [2, 4] {
        for function in machine.virtio(device_type) {
            if let Ok(device) = Device::find(function) {
                let _ = device.reset();
            }
            if let Ok(msix) = Msix::find(function) {
                msix.quiesce();
            }
        }
    }
}

/// Ends the machine: by the exit port unless `end=` says otherwise. A failure always goes to the exit port.
fn end(machine: &Machine, verdict: u32) -> ! {
    let mut way = machine.command_line.value("end").unwrap_or("exit");
    let mut line = [0; 32];
    if way == "ask" {
        report::print(format_args!("end? "));
        way = report::read_line(&mut line);
        println!("# {way}");
    }
    let write = match way {
        _ if verdict != report::PASSED => report::exit(verdict),
        "exit" => report::exit(verdict),
        "hang" => loop {
            cpu::sleep(cpu::interrupts_seen());
        },
        "triple-fault" => cpu::triple_fault(),
        "panic" => Some(PortWrite { port: machine.command_line.number("panic_port", 0x505) as u16, value: 1 }),
        "poweroff" => machine.acpi.poweroff,
        "reset" => machine.acpi.reset,
        _ => None,
    };
    if let Some(write) = write {
        write.perform();
        // The machine may need a moment to end.
        cpu::wait_until(|| false);
    }
    println!("not ok end: the machine did not end by {way}");
    report::exit(report::FAILED)
}
