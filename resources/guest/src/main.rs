//! A guest without an operating system. It enters by PVH, goes down to privilege level 3 and from there tests the machine
//! (PCI, BARs, MSI-X, the virtio transport and its devices), or measures how fast a disk is. It reports through COM1 and the debug exit port.
//!
//! One CPU, one thread, memory mapped one to one. entry.s is all that runs at level 0.
#![no_std]
#![no_main]
#![expect(unsafe_code, reason = "a program on bare metal: every device register is a raw address")]

mod acpi;
mod bench;
mod blk;
mod boot;
mod checks;
mod cpu;
mod memory;
mod msix;
mod pci;
mod report;
mod rng;
mod virtio;
mod virtqueue;
mod workload;

use boot::{Boot, CommandLine};
use report::println;

core::arch::global_asm!(include_str!("entry.s"));
core::arch::global_asm!(include_str!("runtime.s"));

/// What the checks know of the machine: found once, then only read.
struct Machine {
    command_line: CommandLine,
    acpi: acpi::Tables,
}

// SAFETY: entry.s calls this name; nothing else has it.
#[unsafe(no_mangle)]
extern "C" fn guest_main(start_info: u64) -> ! {
    cpu::init();
    report::init();
    let boot = Boot::new(start_info);
    report::set_exit_port(boot.command_line.number("exit_port", 0x501) as u16);
    println!("# skiff guest: {}", boot.command_line.text);
    memory::init(&boot);
    let ecam = boot.command_line.value("ecam").map(|_| boot.command_line.number("ecam", 0));
    match ecam.map_or_else(|| acpi::Tables::find(&boot), |ecam| Ok(acpi::Tables::none(ecam))) {
        Ok(acpi) => {
            let machine = Machine { command_line: boot.command_line, acpi };
            if boot.command_line.has("bench") { bench::run(&machine) } else { checks::run(&machine) }
        }
        Err(failure) => {
            println!("not ok acpi: {failure}");
            report::exit(report::FAILED)
        }
    }
}

// SAFETY: entry.s calls this name; nothing else has it.
#[unsafe(no_mangle)]
extern "C" fn guest_exception(vector: u64, error: u64, rip: u64, cr2: u64, cs: u64) -> ! {
    println!("not ok guest: exception {vector}, error {error:#x}, at {cs:#x}:{rip:#x}, CR2 {cr2:#x}");
    report::exit(report::FAILED)
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    println!("not ok guest: {info}");
    report::exit(report::FAILED)
}
