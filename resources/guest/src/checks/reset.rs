//! Device reset, again and again and at the wrong moment (virtio 1.2, 2.1, 2.4, 3.1).

use super::{Check, msix};
use crate::Machine;
use crate::blk::{Disk, Kind, SECTOR};
use crate::cpu;
use crate::memory;
use crate::report::{Outcome, equal, holds};
use crate::virtio::{Device, NEEDS_RESET, Options, common};

pub(super) const CHECKS: &[Check] = &[
    Check { name: "a hundred activations, each with a request", run: often },
    Check { name: "a hundred activations with interrupts", run: often_with_interrupts },
    Check { name: "resets without activation", run: idle },
    Check { name: "after a reset with requests in flight nothing is written any more", run: in_flight },
    Check { name: "nothing happens before DRIVER_OK", run: before_driver_ok },
    Check { name: "features, sizes and rings may differ each time", run: variants },
    Check { name: "a broken ring asks for a reset by a configuration interrupt, and the reset helps", run: broken },
];

fn often(machine: &Machine) -> Outcome {
    let mut disk = Disk::open(machine.disk()?, Options::default())?;
    for _ in 0..100 {
        disk.reopen()?;
        disk.works()?;
    }
    Ok(())
}

fn often_with_interrupts(machine: &Machine) -> Outcome {
    let (mut disk, _) = msix::open(machine, Options::default())?;
    for _ in 0..100 {
        let before = cpu::interrupt_count(msix::QUEUE_VECTOR);
        disk.reopen()?;
        disk.works()?;
        let arrived = cpu::wait_until(|| cpu::interrupt_count(msix::QUEUE_VECTOR) > before);
        holds("an interrupt arrives after every activation", arrived)?;
    }
    Ok(())
}

fn idle(machine: &Machine) -> Outcome {
    let device = Device::find(machine.disk()?)?;
    (0..100).try_for_each(|_| device.reset())?;
    Disk::open(device.function, Options::default())?.works()
}

fn in_flight(machine: &Machine) -> Outcome {
    const BYTES: u64 = 64 << 10;
    let mut disk = Disk::open(machine.disk()?, Options::default())?;
    let buffer = memory::allocate(BYTES);
    for _ in 0..20 {
        while disk.submit(Kind::Read, 0, &[(buffer, BYTES as u32)]).is_some() {}
        disk.queue.ring();
        disk.device.reset()?;
        let used = disk.queue.used_index();
        for offset in (0..BYTES).step_by(8) {
            buffer.write(offset, 0x5555_5555_5555_5555_u64);
        }
        cpu::settle();
        equal("the used index", disk.queue.used_index(), used)?;
        for offset in (0..BYTES).step_by(8) {
            equal("a word of a buffer", buffer.read::<u64>(offset), 0x5555_5555_5555_5555_u64)?;
        }
        disk.reopen()?;
        disk.works()?;
    }
    Ok(())
}

fn before_driver_ok(machine: &Machine) -> Outcome {
    let options = Options { features: 0, ..Options::default() };
    let mut disk = Disk::open(machine.disk()?, options)?;
    disk.device.begin(&options)?;
    disk.queue.clear();
    disk.device.enable(&disk.queue, None)?;
    let buffer = memory::allocate(SECTOR);
    holds("there is room in an idle queue", disk.submit(Kind::Read, 0, &[(buffer, SECTOR as u32)]).is_some())?;
    disk.queue.ring();
    cpu::settle();
    equal("the used index", disk.queue.used_index(), 0_u16)?;
    disk.device.start()?;
    disk.queue.ring();
    equal("the status of a request", disk.wait()?.status, 0_u8)
}

fn variants(machine: &Machine) -> Outcome {
    for features in 0..4 {
        for queue_size in [4, 8, 128, 256] {
            let options = Options { features: features << 28, queue_size, vectors: None };
            let mut disk = Disk::open(machine.disk()?, options)?;
            (0..20).try_for_each(|_| disk.works())?;
        }
    }
    Ok(())
}

fn broken(machine: &Machine) -> Outcome {
    let (mut disk, _) = msix::open(machine, Options::default())?;
    for breakage in 0..2 {
        let before = cpu::interrupt_count(msix::CONFIG_VECTOR);
        if breakage == 0 {
            // Further than the queue is long.
            disk.queue.set_available_index(disk.queue.size * 2);
        } else {
            // A head that is no descriptor.
            let head = disk.queue.size;
            disk.queue.publish(head);
        }
        disk.queue.ring();
        let told = cpu::wait_until(|| disk.device.get::<u8>(common::STATUS) & NEEDS_RESET != 0);
        holds("the status says DEVICE_NEEDS_RESET", told)?;
        msix::delivered(msix::CONFIG_VECTOR, before + 1)?;
        disk.reopen()?;
        disk.works()?;
    }
    Ok(())
}
