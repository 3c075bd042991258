//! Doorbells of the disk and the promises about suppressing them (virtio 1.2, 2.7.10, 2.7.13, 4.1.4.4).

use super::Check;
use crate::Machine;
use crate::blk::{self, Disk, Kind, SECTOR};
use crate::cpu;
use crate::memory;
use crate::report::{Outcome, equal, holds, println};
use crate::virtio::Options;
use crate::virtqueue::{F_EVENT_IDX, F_INDIRECT_DESC};

pub(super) const CHECKS: &[Check] = &[
    Check { name: "no request is forgotten, plain rings", run: |machine| requests(machine, 0) },
    Check { name: "no request is forgotten, INDIRECT_DESC", run: |machine| requests(machine, F_INDIRECT_DESC) },
    Check { name: "no request is forgotten, EVENT_IDX", run: |machine| requests(machine, F_EVENT_IDX) },
    Check { name: "no request is forgotten, both", run: |machine| requests(machine, F_EVENT_IDX | F_INDIRECT_DESC) },
    Check { name: "no request is forgotten while the device falls asleep", run: falling_asleep },
    Check { name: "one doorbell serves a full queue", run: batch },
    Check { name: "rings wrap around", run: wrap },
    Check { name: "idle doorbells do nothing", run: idle },
    Check { name: "doorbells of other queues and widths do no harm", run: strange },
];

/// Requests after which the indices have gone round.
const WRAPPED: u32 = 0x1_0000 + 100;

fn options(features: u64) -> Options {
    Options { features, ..Options::default() }
}

/// Three hundred requests at depths from one to eight, the doorbell rung only when the device asks for it: one that looks
/// at the ring too early before it goes to sleep leaves a request behind.
fn requests(machine: &Machine, features: u64) -> Outcome {
    let mut disk = Disk::open(machine.disk()?, options(features))?;
    let buffer = memory::allocate(8 * SECTOR);
    for depth in (1..=8).cycle().take(64) {
        for _ in 0..depth {
            let head = disk.submit(Kind::Read, 0, &[(buffer, SECTOR as u32)]);
            holds("there is room in the queue", head.is_some())?;
            disk.queue.kick();
        }
        for _ in 0..depth {
            equal("the status of a request", disk.wait()?.status, blk::OK)?;
        }
    }
    println!("# 288 requests, {} doorbells", disk.queue.kicks);
    Ok(())
}

/// Requests at every distance from the one before, so that some meet the device between its last look at the ring and its
/// sleep. Identification requests are answered at once, which makes that moment regular.
fn falling_asleep(machine: &Machine) -> Outcome {
    for features in [F_EVENT_IDX, 0] {
        let mut disk = Disk::open(machine.disk()?, options(features))?;
        let buffer = memory::allocate(20);
        for distance in (0..20_000).step_by(5) {
            let start = cpu::ticks();
            while cpu::ticks() < start + distance {}
            disk.succeed(Kind::Identify, 0, &[(buffer, 20)])?;
        }
    }
    Ok(())
}

fn batch(machine: &Machine) -> Outcome {
    let mut disk = Disk::open(machine.disk()?, options(F_EVENT_IDX | F_INDIRECT_DESC))?;
    let buffer = memory::allocate(SECTOR);
    for _ in 0..10 {
        let mut requests = 0_u16;
        while disk.submit(Kind::Read, 0, &[(buffer, SECTOR as u32)]).is_some() {
            requests += 1;
        }
        equal("the requests that fit", requests, disk.queue.size)?;
        disk.queue.ring();
        for _ in 0..requests {
            equal("the status of a request", disk.wait()?.status, blk::OK)?;
        }
    }
    Ok(())
}

/// The 16-bit indices go round once. By identification requests: they need no I/O, and there are many.
fn wrap(machine: &Machine) -> Outcome {
    let mut disk = Disk::open(machine.disk()?, options(F_EVENT_IDX | F_INDIRECT_DESC))?;
    let buffer = memory::allocate(20);
    let (mut submitted, mut completed) = (0_u32, 0_u32);
    while completed < WRAPPED {
        while submitted < WRAPPED && disk.submit(Kind::Identify, 0, &[(buffer, 20)]).is_some() {
            submitted += 1;
        }
        disk.queue.kick();
        equal("the status of a request", disk.wait()?.status, blk::OK)?;
        completed += 1;
        while let Some(completion) = disk.poll() {
            equal("the status of a request", completion.status, blk::OK)?;
            completed += 1;
        }
    }
    Ok(())
}

fn idle(machine: &Machine) -> Outcome {
    let mut disk = Disk::open(machine.disk()?, options(F_EVENT_IDX))?;
    disk.works()?;
    let used = disk.queue.used_index();
    for _ in 0..1000 {
        disk.queue.ring();
    }
    cpu::settle();
    equal("the used index", disk.queue.used_index(), used)?;
    disk.works()
}

fn strange(machine: &Machine) -> Outcome {
    let mut disk = Disk::open(machine.disk()?, options(0))?;
    let doorbell = disk.queue.doorbell;
    for queue in [1_u16, 64, 0xffff] {
        doorbell.write(0, queue);
    }
    doorbell.write(0, 0_u8);
    doorbell.write(0, 0_u32);
    doorbell.read::<u16>(0);
    disk.works()
}
