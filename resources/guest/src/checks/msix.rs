//! MSI-X of the disk: masks, pending bits, and that no interrupt is lost or doubled (PCI 3.0, 6.8.2; virtio 1.2, 4.1.5).

use super::Check;
use crate::Machine;
use crate::blk::{self, Disk, Kind, SECTOR};
use crate::cpu;
use crate::memory;
use crate::msix::Msix;
use crate::pci::Bar;
use crate::report::{Outcome, equal, holds, println};
use crate::virtio::{Device, NO_VECTOR, Options, common};

pub(super) const CHECKS: &[Check] = &[
    Check { name: "switched off and every entry masked at first", run: initial },
    Check { name: "table and pending bits are inside their BARs", run: places },
    Check { name: "table entries read back, reserved bits aside", run: entries },
    Check { name: "enable and function mask read back", run: control },
    Check { name: "every completion raises its interrupt", run: |machine| raised(machine, Options::default()) },
    Check { name: "so it does without EVENT_IDX", run: |machine| raised(machine, PLAIN) },
    Check { name: "a vector masked by its entry is pending, then delivered once", run: entry_mask },
    Check { name: "vectors masked by the function are pending, then delivered once", run: function_mask },
    Check { name: "both masks must go before a pending interrupt is delivered", run: both_masks },
    Check { name: "masking a hundred times loses no interrupt", run: mask_often },
    Check { name: "a message changed while masked is the one delivered", run: redirect },
    Check { name: "the vector is kept through disabling and enabling", run: disable },
    Check { name: "a queue without a vector raises nothing", run: no_vector },
    Check { name: "a vector out of range reads back as none", run: out_of_range },
];

/// Entries of the table that the checks use, and the interrupt vectors they direct them to.
const CONFIG_ENTRY: u16 = 0;
const QUEUE_ENTRY: u16 = 1;
pub(super) const CONFIG_VECTOR: u8 = 0x30;
pub(crate) const QUEUE_VECTOR: u8 = 0x31;
const OTHER_VECTOR: u8 = 0x32;

const PLAIN: Options = Options { features: 0, vectors: None, queue_size: 64 };

fn initial(machine: &Machine) -> Outcome {
    let msix = Msix::find(machine.disk()?)?;
    println!("# {} entries", msix.size);
    holds("MSI-X is off", msix.state() == (false, false))?;
    for index in 0..msix.size {
        equal("vector control", msix.entry(index).read::<u32>(12) & 1, 1_u32)?;
    }
    Ok(())
}

fn places(machine: &Machine) -> Outcome {
    let function = machine.disk()?;
    let msix = Msix::find(function)?;
    let bytes = [u64::from(msix.size) * 16, u64::from(msix.size.div_ceil(64)) * 8];
    for ((index, offset), bytes) in msix.places.into_iter().zip(bytes) {
        holds("the structure is inside its BAR", offset + bytes <= Bar { function, index }.size())?;
    }
    let [(table_bar, table), (pending_bar, pending)] = msix.places;
    let apart = table_bar != pending_bar || table + bytes[0] <= pending || pending + bytes[1] <= table;
    holds("table and pending bits are apart", apart)
}

fn entries(machine: &Machine) -> Outcome {
    let msix = Msix::find(machine.disk()?)?;
    for index in 0..msix.size {
        let entry = msix.entry(index);
        entry.write(0, 0xfee0_1000_u32);
        entry.write(4, 0x1_u32);
        entry.write(8, 0x4000_u32 | u32::from(index));
        equal("the address", entry.read::<u64>(0), 0x1_fee0_1000_u64)?;
        equal("the data", entry.read::<u32>(8), 0x4000_u32 | u32::from(index))?;
        entry.write(0, 0xfee0_2000_u64);
        equal("the low address", entry.read::<u32>(0), 0xfee0_2000_u32)?;
        equal("the high address", entry.read::<u32>(4), 0_u32)?;
        entry.write(12, u32::MAX);
        equal("vector control", entry.read::<u32>(12) & 1, 1_u32)?;
        entry.write(12, 0_u32);
        equal("vector control", entry.read::<u32>(12) & 1, 0_u32)?;
        holds("nothing is pending", !msix.pending(index))?;
    }
    msix.quiesce();
    Ok(())
}

fn control(machine: &Machine) -> Outcome {
    let msix = Msix::find(machine.disk()?)?;
    for state in [(true, true), (true, false), (false, true), (false, false)] {
        msix.control(state.0, state.1);
        holds("the bits read as written", msix.state() == state)?;
    }
    Ok(())
}

/// Directs the disk's two entries to their vectors and unmasks them; their numbers.
pub(crate) fn direct_both(machine: &Machine) -> Outcome<(u16, u16)> {
    let function = machine.disk()?;
    Device::find(function)?;
    let msix = Msix::find(function)?;
    for (entry, vector) in [(CONFIG_ENTRY, CONFIG_VECTOR), (QUEUE_ENTRY, QUEUE_VECTOR)] {
        msix.direct(entry, vector);
        msix.mask(entry, false);
    }
    Ok((CONFIG_ENTRY, QUEUE_ENTRY))
}

/// A running disk with its two entries directed and unmasked.
pub(super) fn open(machine: &Machine, options: Options) -> Outcome<(Disk, Msix)> {
    let vectors = Some(direct_both(machine)?);
    let disk = Disk::open(machine.disk()?, Options { vectors, ..options })?;
    Ok((disk, Msix::find(machine.disk()?)?))
}

fn open_default(machine: &Machine) -> Outcome<(Disk, Msix)> {
    open(machine, Options::default())
}

/// One read, waited for by its used ring alone.
fn read_silently(disk: &mut Disk) -> Outcome {
    let before = memory::mark();
    let buffer = memory::allocate(SECTOR);
    disk.queue.arm();
    holds("there is room in an idle queue", disk.submit(Kind::Read, 0, &[(buffer, SECTOR as u32)]).is_some())?;
    disk.queue.kick();
    let mut status = None;
    cpu::wait_until(|| {
        status = disk.poll().map(|completion| completion.status);
        status.is_some()
    });
    memory::release(before);
    equal("the status of a request", status.unwrap_or(0xff), blk::OK)
}

/// The count of `vector` becomes `wanted`, and then stays.
pub(super) fn delivered(vector: u8, wanted: u64) -> Outcome {
    cpu::wait_until(|| cpu::interrupt_count(vector) >= wanted);
    cpu::settle();
    equal("the number of interrupts", cpu::interrupt_count(vector), wanted)
}

fn held_back(count: u64) -> Outcome {
    cpu::settle();
    equal("the number of interrupts while masked", cpu::interrupt_count(QUEUE_VECTOR), count)
}

fn raised(machine: &Machine, options: Options) -> Outcome {
    let (mut disk, _) = open(machine, options)?;
    for _ in 0..5 {
        let before = cpu::interrupt_count(QUEUE_VECTOR);
        read_silently(&mut disk)?;
        delivered(QUEUE_VECTOR, before + 1)?;
    }
    // And a driver that sleeps wakes up.
    (0..100).try_for_each(|_| disk.works())
}

fn entry_mask(machine: &Machine) -> Outcome {
    let (mut disk, msix) = open_default(machine)?;
    let before = cpu::interrupt_count(QUEUE_VECTOR);
    msix.mask(QUEUE_ENTRY, true);
    (0..3).try_for_each(|_| read_silently(&mut disk))?;
    holds("the interrupt is pending", cpu::wait_until(|| msix.pending(QUEUE_ENTRY)))?;
    held_back(before)?;
    msix.mask(QUEUE_ENTRY, false);
    delivered(QUEUE_VECTOR, before + 1)?;
    holds("nothing is pending after delivery", !msix.pending(QUEUE_ENTRY))?;
    msix.mask(QUEUE_ENTRY, true);
    msix.mask(QUEUE_ENTRY, false);
    delivered(QUEUE_VECTOR, before + 1)?;
    read_silently(&mut disk)?;
    delivered(QUEUE_VECTOR, before + 2)
}

fn function_mask(machine: &Machine) -> Outcome {
    let (mut disk, msix) = open_default(machine)?;
    let before = cpu::interrupt_count(QUEUE_VECTOR);
    msix.control(true, true);
    (0..3).try_for_each(|_| read_silently(&mut disk))?;
    holds("the interrupt is pending", cpu::wait_until(|| msix.pending(QUEUE_ENTRY)))?;
    holds("the other is not", !msix.pending(CONFIG_ENTRY))?;
    held_back(before)?;
    msix.control(true, false);
    delivered(QUEUE_VECTOR, before + 1)?;
    holds("nothing is pending after delivery", !msix.pending(QUEUE_ENTRY))?;
    read_silently(&mut disk)?;
    delivered(QUEUE_VECTOR, before + 2)
}

fn both_masks(machine: &Machine) -> Outcome {
    let (mut disk, msix) = open_default(machine)?;
    let before = cpu::interrupt_count(QUEUE_VECTOR);
    msix.mask(QUEUE_ENTRY, true);
    msix.control(true, true);
    read_silently(&mut disk)?;
    msix.control(true, false);
    held_back(before)?;
    msix.control(true, true);
    msix.mask(QUEUE_ENTRY, false);
    held_back(before)?;
    holds("the interrupt is pending", cpu::wait_until(|| msix.pending(QUEUE_ENTRY)))?;
    msix.control(true, false);
    delivered(QUEUE_VECTOR, before + 1)
}

fn mask_often(machine: &Machine) -> Outcome {
    let (mut disk, msix) = open_default(machine)?;
    for round in 0..100 {
        let before = cpu::interrupt_count(QUEUE_VECTOR);
        // Masked before or while the request runs, so that the mask meets the interrupt at every stage.
        let buffer = memory::allocate(SECTOR);
        disk.queue.arm();
        msix.mask(QUEUE_ENTRY, round % 2 == 0);
        holds("there is room in an idle queue", disk.submit(Kind::Read, 0, &[(buffer, SECTOR as u32)]).is_some())?;
        disk.queue.kick();
        msix.mask(QUEUE_ENTRY, true);
        msix.mask(QUEUE_ENTRY, false);
        let arrived = cpu::wait_until(|| cpu::interrupt_count(QUEUE_VECTOR) > before);
        holds("an interrupt arrives in every round", arrived)?;
        holds("its request is complete", disk.poll().is_some_and(|completion| completion.status == blk::OK))?;
        equal("the number of interrupts", cpu::interrupt_count(QUEUE_VECTOR), before + 1)?;
    }
    Ok(())
}

fn redirect(machine: &Machine) -> Outcome {
    let (mut disk, msix) = open_default(machine)?;
    let (before, other) = (cpu::interrupt_count(QUEUE_VECTOR), cpu::interrupt_count(OTHER_VECTOR));
    msix.mask(QUEUE_ENTRY, true);
    read_silently(&mut disk)?;
    holds("the interrupt is pending", cpu::wait_until(|| msix.pending(QUEUE_ENTRY)))?;
    msix.direct(QUEUE_ENTRY, OTHER_VECTOR);
    msix.mask(QUEUE_ENTRY, false);
    delivered(OTHER_VECTOR, other + 1)?;
    equal("the number of interrupts at the old vector", cpu::interrupt_count(QUEUE_VECTOR), before)
}

fn disable(machine: &Machine) -> Outcome {
    let (mut disk, msix) = open_default(machine)?;
    let before = cpu::interrupt_count(QUEUE_VECTOR);
    read_silently(&mut disk)?;
    delivered(QUEUE_VECTOR, before + 1)?;
    msix.control(false, false);
    // What a request does meanwhile is INTx, which nobody has connected here.
    msix.control(true, false);
    read_silently(&mut disk)?;
    delivered(QUEUE_VECTOR, before + 2)
}

fn no_vector(machine: &Machine) -> Outcome {
    let (mut disk, msix) = open_default(machine)?;
    let before = cpu::interrupt_count(QUEUE_VECTOR);
    disk.device.set(common::QUEUE_SELECT, 0_u16);
    disk.device.set(common::QUEUE_VECTOR, NO_VECTOR);
    equal("queue_msix_vector", disk.device.get::<u16>(common::QUEUE_VECTOR), NO_VECTOR)?;
    read_silently(&mut disk)?;
    held_back(before)?;
    holds("nothing is pending", !msix.pending(QUEUE_ENTRY))?;
    disk.device.set(common::QUEUE_VECTOR, QUEUE_ENTRY);
    read_silently(&mut disk)?;
    delivered(QUEUE_VECTOR, before + 1)
}

fn out_of_range(machine: &Machine) -> Outcome {
    let device = Device::find(machine.disk()?)?;
    let msix = Msix::find(device.function)?;
    msix.control(true, false);
    device.begin(&Options::default())?;
    device.set(common::QUEUE_SELECT, 0_u16);
    for vector in [msix.size, 0x7ff, 0xfffe] {
        device.set(common::CONFIG_VECTOR, vector);
        equal("config_msix_vector", device.get::<u16>(common::CONFIG_VECTOR), NO_VECTOR)?;
        device.set(common::QUEUE_VECTOR, vector);
        equal("queue_msix_vector", device.get::<u16>(common::QUEUE_VECTOR), NO_VECTOR)?;
    }
    Ok(())
}
