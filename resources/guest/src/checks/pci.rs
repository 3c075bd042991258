//! Configuration space by its two ways in (PCI Local Bus 3.0, 3.2.2.3.2; PCI Express 5.0, 7.2.2).

use super::Check;
use crate::Machine;
use crate::cpu::{Mmio, port_in, port_out};
use crate::pci::{COMMAND, DEVICE, Function, HEADER_TYPE, INTERRUPT_LINE, Space, VENDOR};
use crate::report::{Outcome, equal, holds, println};

pub(super) const CHECKS: &[Check] = &[
    Check { name: "both ways in list the same functions", run: same_functions },
    Check { name: "both ways in read the same registers", run: same_registers },
    Check { name: "bytes and words are the parts of doublewords", run: widths },
    Check { name: "a write through one way in is read through the other", run: writes },
    Check { name: "parts of a register can be written alone", run: partial_writes },
    Check { name: "0xcf8 reads back, and without its enable bit nothing answers", run: enable_bit },
    Check { name: "absent functions read as ones and ignore writes", run: absent },
    Check { name: "identity registers are read-only", run: read_only },
    Check { name: "capability lists are aligned and end", run: capability_lists },
];

fn identity(function: Function) -> u64 {
    u64::from(function.device) << 40 | u64::from(function.function) << 32 | u64::from(function.read::<u32>(VENDOR))
}

fn same_functions(machine: &Machine) -> Outcome {
    let mut ports = Machine::functions(Space::Ports);
    let mut found = 0_u64;
    for function in Machine::functions(machine.ecam()) {
        let (vendor, device) = (function.read::<u16>(VENDOR), function.read::<u16>(DEVICE));
        println!("# 00:{:02x}.{} {vendor:04x}:{device:04x}", function.device, function.function);
        let other = ports.next().map_or(0, identity);
        equal("a function (device, function, identity) by ports", other, identity(function))?;
        found += 1;
    }
    holds("ports list no further function", ports.next().is_none())?;
    holds("there are a host bridge and another function", found >= 2)
}

fn same_registers(machine: &Machine) -> Outcome {
    for function in Machine::functions(machine.ecam()) {
        for register in (0..256).step_by(4) {
            let memory = function.read::<u32>(register);
            equal("a register by ports", function.through(Space::Ports).read::<u32>(register), memory)?;
        }
    }
    Ok(())
}

fn widths(machine: &Machine) -> Outcome {
    for function in Machine::functions(machine.ecam()).flat_map(|f| [f, f.through(Space::Ports)]) {
        for register in (0..64).step_by(4) {
            let whole = function.read::<u32>(register);
            for part in 0..4 {
                equal("a byte", function.read::<u8>(register + part), (whole >> (8 * part)) & 0xff)?;
            }
            for part in [0, 2] {
                equal("a word", function.read::<u16>(register + part), (whole >> (8 * part)) & 0xffff)?;
            }
        }
    }
    Ok(())
}

fn writes(machine: &Machine) -> Outcome {
    let memory = machine.disk()?;
    let ports = memory.through(Space::Ports);
    let before = memory.read::<u8>(INTERRUPT_LINE);
    for (writer, reader) in [(memory, ports), (ports, memory)] {
        for value in [0x5a_u8, 0xa5] {
            writer.write(INTERRUPT_LINE, value);
            equal("the interrupt line register", reader.read::<u8>(INTERRUPT_LINE), value)?;
        }
    }
    memory.write(INTERRUPT_LINE, before);
    Ok(())
}

fn partial_writes(machine: &Machine) -> Outcome {
    let memory = machine.disk()?;
    let before = memory.read::<u16>(COMMAND);
    for function in [memory, memory.through(Space::Ports)] {
        // Bit 10 disables INTx, bit 1 decodes memory: one in each byte of the command register.
        function.write::<u16>(COMMAND, 0x402);
        function.write::<u8>(COMMAND, 0);
        equal("the command register", function.read::<u16>(COMMAND) & 0x402, 0x400_u16)?;
        function.write::<u16>(COMMAND, 0x402);
        function.write::<u8>(COMMAND + 1, 0);
        equal("the command register", function.read::<u16>(COMMAND) & 0x402, 2_u16)?;
        function.write::<u32>(COMMAND, 0x402);
        equal("the command register", function.read::<u16>(COMMAND) & 0x402, 0x402_u16)?;
    }
    memory.write(COMMAND, before);
    Ok(())
}

fn enable_bit(machine: &Machine) -> Outcome {
    let function = machine.disk()?;
    let address = u32::from(function.device) << 11 | u32::from(function.function) << 8;
    port_out::<u32>(0xcf8, 1 << 31 | address);
    equal("0xcf8", port_in::<u32>(0xcf8), 1_u32 << 31 | address)?;
    equal("the vendor", port_in::<u16>(0xcfc), 0x1af4_u16)?;
    equal("the device", port_in::<u16>(0xcfe), function.read::<u16>(DEVICE))?;
    port_out::<u32>(0xcf8, address);
    equal("0xcf8", port_in::<u32>(0xcf8), address)?;
    equal("0xcfc without the enable bit", port_in::<u32>(0xcfc), u32::MAX)
}

fn absent(machine: &Machine) -> Outcome {
    let unused = |device: &u8| !Function { space: machine.ecam(), device: *device, function: 0 }.exists();
    let Some(device) = (0..32).find(unused) else { return Ok(()) };
    for space in [machine.ecam(), Space::Ports] {
        let function = Function { space, device, function: 0 };
        for register in [VENDOR, COMMAND, HEADER_TYPE & !3, 0xfc] {
            equal("a doubleword", function.read::<u32>(register), u32::MAX)?;
            function.write::<u32>(register, 0);
        }
        equal("a word", function.read::<u16>(DEVICE), u16::MAX)?;
        equal("a byte", function.read::<u8>(HEADER_TYPE), u8::MAX)?;
    }
    // Function 1 of a single-function device: PCI 3.0, 3.2.2.3.4.
    let disk = machine.disk()?;
    let several = Function { function: 0, ..disk }.read::<u8>(HEADER_TYPE) & 0x80 != 0;
    let sibling = Function { function: 7, ..disk };
    if several { Ok(()) } else { equal("function 7 of the disk", sibling.read::<u32>(VENDOR), u32::MAX) }
}

fn read_only(machine: &Machine) -> Outcome {
    let memory = machine.disk()?;
    for function in [memory, memory.through(Space::Ports)] {
        // Vendor and device; revision and class; subsystem; capability pointer.
        for register in [VENDOR, 0x08, 0x2c, 0x34] {
            let before = function.read::<u32>(register);
            function.write(register, !before);
            equal("a read-only register", function.read::<u32>(register), before)?;
        }
    }
    let Space::Ecam(base) = memory.space else { return Ok(()) };
    holds("ECAM is the function's own 4 KiB", Mmio(base + (u64::from(memory.device) << 15)).read::<u16>(0) == 0x1af4)
}

fn capability_lists(machine: &Machine) -> Outcome {
    for function in Machine::functions(machine.ecam()) {
        let mut seen = [false; 64];
        for (_, register) in function.capabilities() {
            let slot = usize::from(register / 4);
            holds("no capability is listed twice", !seen[slot])?;
            seen[slot] = true;
        }
    }
    Ok(())
}
