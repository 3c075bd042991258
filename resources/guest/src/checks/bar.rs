//! Base address registers of the disk: sizes, moves, doorbells that move along (PCI Local Bus 3.0, 6.2.5).

use super::Check;
use crate::Machine;
use crate::acpi::Window;
use crate::blk::{self, Disk, Kind, SECTOR};
use crate::cpu::{self, Mmio};
use crate::memory;
use crate::pci::{Bar, COMMAND_MEMORY, Function};
use crate::report::{Failure, Outcome, equal, holds, println};
use crate::virtio::{Capability, Options, Structure, common};

pub(super) const CHECKS: &[Check] = &[
    Check { name: "BARs were assigned inside the windows of ACPI, apart from each other", run: assigned },
    Check { name: "sizes are powers of two, addresses are multiples of them", run: sizes },
    Check { name: "without memory decoding a BAR does not answer, with it again", run: decoding },
    Check { name: "BARs move inside the 32-bit window while the disk runs", run: |machine| moves(machine, false) },
    Check {
        name: "BARs move into the 64-bit window and back while the disk runs",
        run: |machine| moves(machine, true),
    },
    Check { name: "a device whose BARs moved can be reset and started", run: move_and_reset },
];

fn overlap(a: (u64, u64), b: (u64, u64)) -> bool {
    a.0 < b.0 + b.1 && b.0 < a.0 + a.1
}

fn all_bars(machine: &Machine) -> impl Iterator<Item = Bar> {
    Machine::functions(machine.ecam()).flat_map(Function::bars)
}

fn assigned(machine: &Machine) -> Outcome {
    for bar in machine.disk()?.bars() {
        let (address, size) = (bar.address(), bar.size());
        println!("# BAR {}: {size:#x} bytes at {address:#x}", bar.index);
        let inside = machine.acpi.windows.iter().any(|window| window.contains(address, size));
        holds("the BAR is inside a window", inside)?;
        let clashes = all_bars(machine).filter(|other| overlap((address, size), (other.address(), other.size())));
        equal("the number of BARs there", clashes.count() as u64, 1_u64)?;
    }
    Ok(())
}

fn sizes(machine: &Machine) -> Outcome {
    let mut bars = 0_u64;
    for bar in machine.disk()?.bars() {
        let (address, mask) = (bar.address(), bar.mask());
        let size = bar.size();
        holds("the size is a power of two and at least 16", size.is_power_of_two() && size >= 16)?;
        equal("the mask above its lowest one", mask & !0xf, !(size - 1))?;
        equal("the address modulo the size", address % size, 0_u64)?;
        equal("the address after sizing", bar.address(), address)?;
        bars += 1;
    }
    holds("there is a memory BAR", bars > 0)
}

fn decoding(machine: &Machine) -> Outcome {
    let mut disk = Disk::open(machine.disk()?, Options::default())?;
    let device = disk.device;
    let queues = device.get::<u16>(common::NUM_QUEUES);
    device.function.command(0, COMMAND_MEMORY);
    equal("a register without decoding", device.get::<u16>(common::NUM_QUEUES), u16::MAX)?;
    device.function.command(COMMAND_MEMORY, 0);
    equal("num_queues", device.get::<u16>(common::NUM_QUEUES), queues)?;
    disk.works()
}

/// A place in `window` for `size` bytes that no BAR uses.
fn vacancy(machine: &Machine, window: Window, size: u64) -> Outcome<u64> {
    let first = window.start.next_multiple_of(size);
    let mut places = (0..4096).map(|index| first + index * size).take_while(|place| window.contains(*place, size));
    let vacant = |place: &u64| !all_bars(machine).any(|bar| overlap((*place, size), (bar.address(), bar.size())));
    places.find(vacant).ok_or(Failure::Wrong("the window has room for another BAR"))
}

fn window(machine: &Machine, wide: bool, bar: Bar) -> Outcome<Window> {
    let suits = |window: &&Window| (window.start >= 1 << 32) == wide && window.bytes >= 2 * bar.size();
    // A BAR that lies below 4 GiB stays in its window, if that has room.
    let own = |window: &&Window| suits(window) && window.contains(bar.address(), bar.size());
    let windows = &machine.acpi.windows;
    let found = windows.iter().find(own).or_else(|| windows.iter().find(suits));
    found.copied().ok_or(Failure::Skip("such a window in the DSDT"))
}

/// Moves every BAR of the running disk away and back; after each step the disk must work where it is and be gone where it
/// was.
fn moves(machine: &Machine, wide: bool) -> Outcome {
    let mut disk = Disk::open(machine.disk()?, Options::default())?;
    let function = disk.device.function;
    let notify = Capability::find(function, Structure::Notify)?;
    let mut moved = 0_u64;
    for bar in function.bars().filter(|bar| !wide || bar.is_64_bit()) {
        let home = bar.address();
        let away = vacancy(machine, window(machine, wide, bar)?, bar.size())?;
        memory::map(away, bar.size());
        println!("# BAR {} moves from {home:#x} to {away:#x}", bar.index);
        for (from, to) in [(home, away), (away, home)] {
            bar.set_address(to);
            equal("the address", bar.address(), to)?;
            equal("what is read at the old address", Mmio(from).read::<u32>(0), u32::MAX)?;
            if notify.bar == bar.index {
                silent(&mut disk)?;
            }
            disk.follow()?;
            for _ in 0..32 {
                disk.works()?;
            }
        }
        moved += 1;
    }
    if moved == 0 { Err(Failure::Skip("a 64-bit BAR")) } else { Ok(()) }
}

/// The old doorbell must not start a request: one made available and notified there stays where it is. A device may look at
/// its ring whenever it likes, and one whose thread the host held up does; but not ten times in a row.
fn silent(disk: &mut Disk) -> Outcome {
    let buffer = memory::allocate(SECTOR);
    let mut started = 0_u64;
    for _ in 0..10 {
        cpu::settle();
        let used = disk.queue.used_index();
        holds("there is room in an idle queue", disk.submit(Kind::Read, 0, &[(buffer, SECTOR as u32)]).is_some())?;
        disk.queue.ring();
        cpu::settle();
        if disk.queue.used_index() == used {
            disk.follow()?;
            disk.queue.ring();
            return equal("the status of a request", disk.wait()?.status, blk::OK);
        }
        equal("the status of a request", disk.wait()?.status, blk::OK)?;
        started += 1;
    }
    equal("the number of requests started by the old address, of ten", started, 0_u64)
}

fn move_and_reset(machine: &Machine) -> Outcome {
    let mut disk = Disk::open(machine.disk()?, Options::default())?;
    let function = disk.device.function;
    let Some(bar) = function.bars().next() else { return Err(Failure::Skip("a memory BAR")) };
    let home = bar.address();
    let away = vacancy(machine, window(machine, false, bar)?, bar.size())?;
    for address in [away, home] {
        disk.device.reset()?;
        bar.set_address(address);
        disk.reopen()?;
        disk.works()?;
    }
    Ok(())
}
