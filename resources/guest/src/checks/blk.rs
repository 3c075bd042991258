//! What the disk does with data (virtio 1.2, 5.2.6). The host wrote the pattern of seed `seed` (default 1) over the whole
//! disk; the guest reads the first MiB, writes the second with the pattern of `seed + 1` and leaves the rest alone.

use super::{Check, msix};
use crate::Machine;
use crate::blk::{self, Disk, F_FLUSH, F_READ_ONLY, Kind, SECTOR};
use crate::cpu::Mmio;
use crate::memory;
use crate::report::{Failure, Outcome, equal, holds, println};
use crate::virtio::Options;
use crate::workload::pattern;

pub(super) const CHECKS: &[Check] = &[
    Check { name: "the first MiB reads as the host wrote it, in all sizes", run: reads },
    Check { name: "so it does by interrupt", run: reads_by_interrupt },
    Check { name: "requests in several buffers of odd cuts", run: scattered },
    Check { name: "the last sector reads, the one after it does not", run: end_of_disk },
    Check { name: "identifies itself", run: identify },
    Check { name: "a request of an unknown type is unsupported", run: unknown },
    Check { name: "writes are read back and flushed", run: writes },
    Check { name: "a read-only disk refuses writes", run: read_only },
];

const MIB: u64 = 1 << 20;

fn seed(machine: &Machine) -> u64 {
    machine.command_line.number("seed", 1)
}

/// The `bytes` at `buffer` are those of the disk at `offset`.
fn compare(buffer: Mmio, seed: u64, offset: u64, bytes: u64) -> Outcome {
    (0..bytes).step_by(8).try_for_each(|at| equal("a word", buffer.read::<u64>(at), pattern(seed, offset + at)))
}

fn open(machine: &Machine) -> Outcome<Disk> {
    let disk = Disk::open(machine.disk()?, Options::default())?;
    println!("# {} sectors, features {:#x}", disk.sectors(), disk.features);
    if disk.sectors() * SECTOR < 2 * MIB { Err(Failure::Skip("a disk of 2 MiB")) } else { Ok(disk) }
}

/// Up to 64 requests of each size, from the start of the disk.
fn read_first_mib(disk: &mut Disk, seed: u64) -> Outcome {
    let buffer = memory::allocate(MIB);
    for size in [512, 4096, 65536, MIB] {
        let bytes = u64::min(MIB, 64 * size);
        for offset in (0..bytes).step_by(8) {
            buffer.write(offset, 0_u64);
        }
        for offset in (0..bytes).step_by(size as usize) {
            disk.succeed(Kind::Read, offset / SECTOR, &[(Mmio(buffer.0 + offset), size as u32)])?;
        }
        compare(buffer, seed, 0, bytes)?;
    }
    Ok(())
}

fn reads(machine: &Machine) -> Outcome {
    read_first_mib(&mut open(machine)?, seed(machine))
}

fn reads_by_interrupt(machine: &Machine) -> Outcome {
    let (mut disk, _) = msix::open(machine, Options::default())?;
    read_first_mib(&mut disk, seed(machine))
}

fn scattered(machine: &Machine) -> Outcome {
    let mut disk = open(machine)?;
    let buffer = memory::allocate(64 << 10);
    // Cuts that are no multiple of a sector, of a word, of anything; the sum is.
    let cuts: [u32; 8] = [1, 511, 3, 4096, 509, 8191, 1000, 2073];
    let total = cuts.iter().sum::<u32>();
    equal("the sum of the cuts", u64::from(total) % SECTOR, 0_u64)?;
    for sector in [0, 1, 77] {
        let mut parts = [(buffer, 0); 8];
        let mut place = buffer.0;
        for (part, bytes) in parts.iter_mut().zip(cuts) {
            *part = (Mmio(place), bytes);
            place += u64::from(bytes);
        }
        disk.succeed(Kind::Read, sector, &parts)?;
        compare(buffer, seed(machine), sector * SECTOR, total.into())?;
    }
    Ok(())
}

fn end_of_disk(machine: &Machine) -> Outcome {
    let mut disk = open(machine)?;
    let buffer = memory::allocate(2 * SECTOR);
    let end = disk.sectors();
    disk.succeed(Kind::Read, end - 1, &[(buffer, SECTOR as u32)])?;
    for (sector, sectors) in [(end, 1), (end - 1, 2), (u64::MAX / SECTOR, 1), (u64::MAX, 1)] {
        let status = disk.request(Kind::Read, sector, &[(buffer, (sectors * SECTOR) as u32)])?;
        equal("the status of a read past the end", status, blk::IO_ERROR)?;
    }
    disk.works()
}

fn identify(machine: &Machine) -> Outcome {
    let mut disk = open(machine)?;
    let buffer = memory::allocate(20);
    disk.succeed(Kind::Identify, 0, &[(buffer, 20)])?;
    let bytes = buffer.read::<[u8; 20]>(0);
    let text = bytes.split(|byte| *byte == 0).next().and_then(|text| core::str::from_utf8(text).ok());
    let Some(text) = text else { return Err(Failure::Wrong("the serial number is text")) };
    println!("# serial number: {text}");
    match machine.command_line.value("serial") {
        Some(wanted) => holds("the serial number is the one on the command line", text == wanted),
        None => Ok(()),
    }
}

fn unknown(machine: &Machine) -> Outcome {
    let mut disk = open(machine)?;
    let buffer = memory::allocate(SECTOR);
    let status = disk.request(Kind::Unknown, 0, &[(buffer, SECTOR as u32)])?;
    equal("the status", status, blk::UNSUPPORTED)?;
    disk.works()
}

fn writes(machine: &Machine) -> Outcome {
    let mut disk = open(machine)?;
    if disk.features & F_READ_ONLY != 0 {
        return Err(Failure::Skip("a writable disk"));
    }
    let seed = seed(machine) + 1;
    let buffer = memory::allocate(MIB);
    for at in (0..MIB).step_by(8) {
        buffer.write(at, pattern(seed, MIB + at));
    }
    // The sizes of the requests go round, so that every size meets every alignment.
    let mut at = 0;
    for size in [512, 4096, 1024, 65536, 2048].into_iter().cycle() {
        let bytes = u64::min(size, MIB - at);
        disk.succeed(Kind::Write, (MIB + at) / SECTOR, &[(Mmio(buffer.0 + at), bytes as u32)])?;
        at += bytes;
        if at == MIB {
            break;
        }
    }
    if disk.features & F_FLUSH != 0 {
        disk.succeed(Kind::Flush, 0, &[])?;
    }
    let copy = memory::allocate(MIB);
    disk.succeed(Kind::Read, MIB / SECTOR, &[(copy, MIB as u32)])?;
    compare(copy, seed, MIB, MIB)?;
    let past = disk.request(Kind::Write, disk.sectors(), &[(buffer, SECTOR as u32)])?;
    equal("the status of a write past the end", past, blk::IO_ERROR)
}

fn read_only(machine: &Machine) -> Outcome {
    let mut disk = open(machine)?;
    if disk.features & F_READ_ONLY == 0 {
        return Err(Failure::Skip("a read-only disk"));
    }
    let buffer = memory::allocate(SECTOR);
    let status = disk.request(Kind::Write, 0, &[(buffer, SECTOR as u32)])?;
    equal("the status of a write", status, blk::IO_ERROR)?;
    disk.succeed(Kind::Read, 0, &[(buffer, SECTOR as u32)])?;
    compare(buffer, seed(machine), 0, SECTOR)
}
