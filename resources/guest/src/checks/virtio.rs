//! The virtio PCI transport of the disk (virtio 1.2, 2.1, 2.2, 4.1).

use super::Check;
use crate::Machine;
use crate::blk::Disk;
use crate::cpu::Width;
use crate::pci::{Bar, Function};
use crate::report::{Outcome, equal, holds, println};
use crate::virtio::{
    ACKNOWLEDGE, Capability, DRIVER, DRIVER_OK, Device, F_VERSION_1, FEATURES_OK, NO_VECTOR, Options, Structure, common,
};
use crate::virtqueue::{F_EVENT_IDX, F_INDIRECT_DESC};

pub(super) const CHECKS: &[Check] = &[
    Check { name: "the structures are inside their BARs and aligned", run: structures },
    Check { name: "offers VERSION_1, EVENT_IDX and INDIRECT_DESC, and nothing past bit 63", run: features },
    Check { name: "the status shows what the driver did", run: status },
    Check { name: "a feature that was not offered is refused", run: unoffered },
    Check { name: "a driver without VERSION_1 is refused", run: legacy },
    Check { name: "after a refusal the device can be started", run: after_refusal },
    Check { name: "a reset forgets queues, vectors and features", run: reset_state },
    Check { name: "a queue keeps its addresses and a smaller size", run: queue_registers },
    Check { name: "queues out of range are unavailable", run: queue_out_of_range },
    Check { name: "the configuration reads the same in every width", run: config_widths },
    Check { name: "PCI_CFG reads what the BAR reads", run: pci_cfg_reads },
    Check { name: "PCI_CFG writes what the BAR would", run: pci_cfg_writes },
    Check { name: "the interrupt status says queue, and is cleared by reading", run: isr },
];

const STRUCTURES: [Structure; 4] = [Structure::Common, Structure::Notify, Structure::Isr, Structure::Device];

fn device(machine: &Machine) -> Outcome<Device> {
    Device::find(machine.disk()?)
}

fn structures(machine: &Machine) -> Outcome {
    let function = machine.disk()?;
    for structure in STRUCTURES {
        let found = Capability::find(function, structure)?;
        let end = u64::from(found.offset) + u64::from(found.length);
        holds("the structure is inside its BAR", end <= Bar { function, index: found.bar }.size())?;
        let aligned = match structure {
            Structure::Common | Structure::Device => found.offset.is_multiple_of(4),
            Structure::Notify => found.offset.is_multiple_of(2),
            Structure::Isr | Structure::PciConfig => true,
        };
        holds("the structure is aligned", aligned)?;
    }
    holds("the common structure is whole", Capability::find(function, Structure::Common)?.length >= common::BYTES)?;
    holds("there is a PCI_CFG capability", Capability::find(function, Structure::PciConfig).is_ok())
}

fn features(machine: &Machine) -> Outcome {
    let device = device(machine)?;
    let offered = device.offered();
    println!("# features {offered:#x}, {} queues", device.get::<u16>(common::NUM_QUEUES));
    let wanted = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC;
    equal("the features offered among these", offered & wanted, wanted)?;
    for select in [2_u32, 3, 0x8000_0000, u32::MAX] {
        device.set(common::DEVICE_FEATURE_SELECT, select);
        equal("a feature word past bit 63", device.get::<u32>(common::DEVICE_FEATURE), 0_u32)?;
    }
    Ok(())
}

fn status(machine: &Machine) -> Outcome {
    let device = device(machine)?;
    device.reset()?;
    let mut so_far = 0;
    for bit in [ACKNOWLEDGE, DRIVER] {
        so_far |= bit;
        device.add_status(bit);
        equal("the status", device.get::<u8>(common::STATUS), so_far)?;
    }
    holds("FEATURES_OK stays set", device.negotiate(F_VERSION_1)?)?;
    device.start()?;
    device.reset()
}

/// The lowest bit that the device does not offer.
fn unoffered(machine: &Machine) -> Outcome {
    let device = device(machine)?;
    let missing = !device.offered();
    let bit = missing & missing.wrapping_neg();
    holds("FEATURES_OK is refused", !device.negotiate(F_VERSION_1 | bit)?)
}

fn legacy(machine: &Machine) -> Outcome {
    holds("FEATURES_OK is refused", !device(machine)?.negotiate(0)?)
}

fn after_refusal(machine: &Machine) -> Outcome {
    let device = device(machine)?;
    device.negotiate(!device.offered())?;
    Disk::open(device.function, Options::default())?.works()
}

fn reset_state(machine: &Machine) -> Outcome {
    let disk = Disk::open(machine.disk()?, Options::default())?;
    let device = disk.device;
    device.set(common::QUEUE_SELECT, 0_u16);
    for register in [common::CONFIG_VECTOR, common::QUEUE_VECTOR] {
        device.set(register, 0_u16);
        equal("a vector register", device.get::<u16>(register), 0_u16)?;
    }
    device.reset()?;
    device.set(common::QUEUE_SELECT, 0_u16);
    equal("queue_enable", device.get::<u16>(common::QUEUE_ENABLE), 0_u16)?;
    equal("queue_msix_vector", device.get::<u16>(common::QUEUE_VECTOR), NO_VECTOR)?;
    equal("config_msix_vector", device.get::<u16>(common::CONFIG_VECTOR), NO_VECTOR)?;
    let largest = device.get::<u16>(common::QUEUE_SIZE);
    holds("queue_size is the largest again", largest >= disk.queue.size && largest.is_power_of_two())?;
    for select in 0..2_u32 {
        device.set(common::DRIVER_FEATURE_SELECT, select);
        equal("the accepted features", device.get::<u32>(common::DRIVER_FEATURE), 0_u32)?;
    }
    Ok(())
}

fn queue_registers(machine: &Machine) -> Outcome {
    let device = device(machine)?;
    device.begin(&Options::default())?;
    device.set(common::QUEUE_SELECT, 0_u16);
    let largest = device.get::<u16>(common::QUEUE_SIZE);
    for size in [largest, largest / 2, 2] {
        device.set(common::QUEUE_SIZE, size);
        equal("queue_size", device.get::<u16>(common::QUEUE_SIZE), size)?;
    }
    let registers = [common::QUEUE_DESC, common::QUEUE_DRIVER, common::QUEUE_DEVICE];
    for register in registers {
        device.set(register, 0x1234_5000_u32 | register as u32);
        device.set(register + 4, register as u32);
    }
    for register in registers {
        equal("the low half of a ring's address", device.get::<u32>(register), 0x1234_5000 | register as u32)?;
        equal("the high half", device.get::<u32>(register + 4), register as u32)?;
    }
    device.reset()
}

fn queue_out_of_range(machine: &Machine) -> Outcome {
    let device = device(machine)?;
    device.begin(&Options::default())?;
    for queue in [device.get::<u16>(common::NUM_QUEUES), 0x7fff, 0xffff] {
        device.set(common::QUEUE_SELECT, queue);
        equal("queue_select", device.get::<u16>(common::QUEUE_SELECT), queue)?;
        equal("queue_size", device.get::<u16>(common::QUEUE_SIZE), 0_u16)?;
        device.set(common::QUEUE_SIZE, 64_u16);
        device.set(common::QUEUE_DESC, 0x1000_u32);
        device.set(common::QUEUE_VECTOR, 0_u16);
        device.set(common::QUEUE_ENABLE, 1_u16);
        equal("queue_enable", device.get::<u16>(common::QUEUE_ENABLE), 0_u16)?;
    }
    Disk::open(device.function, Options::default())?.works()
}

fn config_widths(machine: &Machine) -> Outcome {
    let device = device(machine)?;
    let generation = device.get::<u8>(common::CONFIG_GENERATION);
    for register in (0..32).step_by(4) {
        let whole = device.config.read::<u32>(register);
        for part in 0..4 {
            equal("a byte", device.config.read::<u8>(register + part), (whole >> (8 * part)) & 0xff)?;
        }
        for part in [0, 2] {
            equal("a word", device.config.read::<u16>(register + part), (whole >> (8 * part)) & 0xffff)?;
        }
    }
    equal("config_generation", device.get::<u8>(common::CONFIG_GENERATION), generation)
}

/// Points the window of PCI_CFG (4.1.4.9) at `offset` of a structure and returns the register of its data.
fn aim<T: Width>(function: Function, structure: Structure, offset: u64) -> Outcome<u16> {
    let window = Capability::find(function, Structure::PciConfig)?;
    let target = Capability::find(function, structure)?;
    function.write(window.register + 4, target.bar);
    function.write(window.register + 8, target.offset + offset as u32);
    function.write(window.register + 12, T::BYTES as u32);
    Ok(window.register + 16)
}

fn through_window<T: Width>(function: Function, structure: Structure, offset: u64) -> Outcome<T> {
    Ok(function.read(aim::<T>(function, structure, offset)?))
}

fn pci_cfg_reads(machine: &Machine) -> Outcome {
    let device = device(machine)?;
    let function = device.function;
    for offset in (0..24).step_by(4) {
        let wanted = device.config.read::<u32>(offset);
        equal("a doubleword of configuration", through_window::<u32>(function, Structure::Device, offset)?, wanted)?;
        let wanted = device.config.read::<u16>(offset + 2);
        equal("a word of configuration", through_window::<u16>(function, Structure::Device, offset + 2)?, wanted)?;
        let wanted = device.config.read::<u8>(offset + 3);
        equal("a byte of configuration", through_window::<u8>(function, Structure::Device, offset + 3)?, wanted)?;
    }
    let queues = through_window::<u16>(function, Structure::Common, common::NUM_QUEUES)?;
    equal("num_queues", queues, device.get::<u16>(common::NUM_QUEUES))
}

fn pci_cfg_writes(machine: &Machine) -> Outcome {
    let device = device(machine)?;
    for value in [1_u32, 0] {
        let data = aim::<u32>(device.function, Structure::Common, common::DEVICE_FEATURE_SELECT)?;
        device.function.write(data, value);
        equal("device_feature_select", device.get::<u32>(common::DEVICE_FEATURE_SELECT), value)?;
    }
    // A running device is reset by it.
    let disk = Disk::open(device.function, Options::default())?;
    let running = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
    let status = through_window::<u8>(device.function, Structure::Common, common::STATUS)?;
    equal("the status of the running device", status, running)?;
    let data = aim::<u8>(device.function, Structure::Common, common::STATUS)?;
    device.function.write(data, 0_u8);
    disk.device.reset()
}

/// With MSI-X off the device must say in the ISR why it interrupts, whether or not the line is connected (4.1.4.5).
fn isr(machine: &Machine) -> Outcome {
    let mut disk = Disk::open(machine.disk()?, Options { features: 0, ..Options::default() })?;
    disk.device.isr.read::<u8>(0);
    disk.queue.arm();
    disk.works()?;
    let mut seen = 0;
    crate::cpu::wait_until(|| {
        seen = disk.device.isr.read::<u8>(0);
        seen != 0
    });
    equal("the interrupt status", seen, 1_u8)?;
    equal("the interrupt status after it was read", disk.device.isr.read::<u8>(0), 0_u8)
}
