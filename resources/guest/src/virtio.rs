//! The driver's side of the virtio PCI transport (virtio 1.2, 4.1) and of initialisation (3.1).

use crate::cpu::{self, Mmio, Width};
use crate::memory;
use crate::msix::Msix;
use crate::pci::{Bar, COMMAND_MASTER, COMMAND_MEMORY, Function};
use crate::report::{Failure, Outcome, equal, holds};
use crate::virtqueue::{F_EVENT_IDX, F_INDIRECT_DESC, Virtqueue};

pub(crate) const ACKNOWLEDGE: u8 = 1;
pub(crate) const DRIVER: u8 = 2;
pub(crate) const DRIVER_OK: u8 = 4;
pub(crate) const FEATURES_OK: u8 = 8;
pub(crate) const NEEDS_RESET: u8 = 64;

pub(crate) const F_VERSION_1: u64 = 1 << 32;

/// "No vector" in the vector registers.
pub(crate) const NO_VECTOR: u16 = 0xffff;

/// Offsets in the common configuration structure (4.1.4.3).
pub(crate) mod common {
    pub(crate) const DEVICE_FEATURE_SELECT: u64 = 0;
    pub(crate) const DEVICE_FEATURE: u64 = 4;
    pub(crate) const DRIVER_FEATURE_SELECT: u64 = 8;
    pub(crate) const DRIVER_FEATURE: u64 = 12;
    pub(crate) const CONFIG_VECTOR: u64 = 16;
    pub(crate) const NUM_QUEUES: u64 = 18;
    pub(crate) const STATUS: u64 = 20;
    pub(crate) const CONFIG_GENERATION: u64 = 21;
    pub(crate) const QUEUE_SELECT: u64 = 22;
    pub(crate) const QUEUE_SIZE: u64 = 24;
    pub(crate) const QUEUE_VECTOR: u64 = 26;
    pub(crate) const QUEUE_ENABLE: u64 = 28;
    pub(crate) const QUEUE_NOTIFY_OFF: u64 = 30;
    pub(crate) const QUEUE_DESC: u64 = 32;
    pub(crate) const QUEUE_DRIVER: u64 = 40;
    pub(crate) const QUEUE_DEVICE: u64 = 48;
    /// Bytes that every device has.
    pub(crate) const BYTES: u32 = 56;
}

/// The structures a virtio capability can point at (4.1.4).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Structure {
    Common = 1,
    Notify = 2,
    Isr = 3,
    Device = 4,
    PciConfig = 5,
}

/// One virtio capability.
#[derive(Clone, Copy)]
pub(crate) struct Capability {
    /// Its place in configuration space.
    pub(crate) register: u16,
    pub(crate) bar: u8,
    pub(crate) offset: u32,
    pub(crate) length: u32,
}

impl Capability {
    /// The first of its kind: devices list the one they prefer first.
    pub(crate) fn find(function: Function, structure: Structure) -> Outcome<Self> {
        let wanted = |&(id, register): &(u8, u16)| id == 9 && function.read::<u8>(register + 3) == structure as u8;
        let Some((_, register)) = function.capabilities().find(wanted) else {
            return Err(Failure::Wrong("the function has every virtio capability"));
        };
        Ok(Self {
            register,
            bar: function.read(register + 4),
            offset: function.read(register + 8),
            length: function.read(register + 12),
        })
    }

    fn map(self, function: Function) -> Mmio {
        let address = Bar { function, index: self.bar }.address() + u64::from(self.offset);
        memory::map(address, self.length.into());
        Mmio(address)
    }
}

/// How a device is to be driven.
#[derive(Clone, Copy)]
pub(crate) struct Options {
    /// Features to accept besides VERSION_1, if they are offered.
    pub(crate) features: u64,
    /// The MSI-X entry for the configuration and for every queue, or no interrupts.
    pub(crate) vectors: Option<(u16, u16)>,
    /// The largest queue to set up.
    pub(crate) queue_size: u16,
}

impl Default for Options {
    fn default() -> Self {
        Self { features: F_EVENT_IDX | F_INDIRECT_DESC, vectors: None, queue_size: 64 }
    }
}

/// A virtio PCI function, mapped where its BARs are now.
#[derive(Clone, Copy)]
pub(crate) struct Device {
    pub(crate) function: Function,
    pub(crate) common: Mmio,
    pub(crate) isr: Mmio,
    /// What chapter 5 gives the device. One that has nothing shows no structure for it (4.1.4.6), and nobody may look here:
    /// it is the null address, which is not mapped.
    pub(crate) config: Mmio,
    notify: Mmio,
    notify_multiplier: u32,
}

impl Device {
    /// Finds the structures and switches memory decoding and bus mastering on.
    pub(crate) fn find(function: Function) -> Outcome<Self> {
        let notify = Capability::find(function, Structure::Notify)?;
        let device = Self {
            function,
            common: Capability::find(function, Structure::Common)?.map(function),
            isr: Capability::find(function, Structure::Isr)?.map(function),
            config: Capability::find(function, Structure::Device).map_or(Mmio(0), |found| found.map(function)),
            notify: notify.map(function),
            notify_multiplier: function.read(notify.register + 16),
        };
        function.command(COMMAND_MEMORY | COMMAND_MASTER, 0);
        Ok(device)
    }

    /// The same device after its BARs moved.
    pub(crate) fn again(&self) -> Outcome<Self> {
        Self::find(self.function)
    }

    /// Reads a register of the common configuration.
    pub(crate) fn get<T: Width>(&self, register: u64) -> T {
        self.common.read(register)
    }

    /// Writes a register of the common configuration.
    pub(crate) fn set<T: Width>(&self, register: u64, value: T) {
        self.common.write(register, value);
    }

    /// Adds bits to the device status.
    pub(crate) fn add_status(&self, bits: u8) {
        self.set(common::STATUS, self.get::<u8>(common::STATUS) | bits);
    }

    /// Resets the device and waits until it has.
    pub(crate) fn reset(&self) -> Outcome {
        self.set(common::STATUS, 0_u8);
        holds("the status reads 0 after a reset", cpu::wait_until(|| self.get::<u8>(common::STATUS) == 0))
    }

    /// The features it offers.
    pub(crate) fn offered(&self) -> u64 {
        let half = |select: u32| {
            self.set(common::DEVICE_FEATURE_SELECT, select);
            u64::from(self.get::<u32>(common::DEVICE_FEATURE))
        };
        half(0) | half(1) << 32
    }

    /// Resets the device, acknowledges it, and accepts exactly `features`; whether it agrees.
    pub(crate) fn negotiate(&self, features: u64) -> Outcome<bool> {
        self.reset()?;
        self.add_status(ACKNOWLEDGE);
        self.add_status(DRIVER);
        for (select, half) in [(0_u32, features as u32), (1, (features >> 32) as u32)] {
            self.set(common::DRIVER_FEATURE_SELECT, select);
            self.set(common::DRIVER_FEATURE, half);
        }
        self.add_status(FEATURES_OK);
        Ok(self.get::<u8>(common::STATUS) & FEATURES_OK != 0)
    }

    /// Takes the device as far as to its queues; returns the features in use.
    pub(crate) fn begin(&self, options: &Options) -> Outcome<u64> {
        let features = F_VERSION_1 | options.features & self.offered();
        holds("FEATURES_OK stays set", self.negotiate(features)?)?;
        if let Some((config_vector, _)) = options.vectors {
            Msix::find(self.function)?.control(true, false);
            self.set(common::CONFIG_VECTOR, config_vector);
            equal("config_msix_vector", self.get::<u16>(common::CONFIG_VECTOR), config_vector)?;
        }
        Ok(features)
    }

    /// Sets up and enables one queue.
    pub(crate) fn queue(&self, index: u16, features: u64, options: &Options) -> Outcome<Virtqueue> {
        self.set(common::QUEUE_SELECT, index);
        let size = self.get::<u16>(common::QUEUE_SIZE).min(options.queue_size);
        holds("the queue exists", size != 0)?;
        let queue = Virtqueue::new(index, size, features, options.vectors.is_some(), self.doorbell());
        self.enable(&queue, options.vectors.map(|(_, vector)| vector))?;
        Ok(queue)
    }

    /// Tells the device where the rings of `queue` are, and enables it.
    pub(crate) fn enable(&self, queue: &Virtqueue, vector: Option<u16>) -> Outcome {
        self.set(common::QUEUE_SELECT, queue.index);
        self.set(common::QUEUE_SIZE, queue.size);
        let rings = [(common::QUEUE_DESC, queue.descriptors), (common::QUEUE_DRIVER, queue.available)];
        for (register, ring) in rings.into_iter().chain([(common::QUEUE_DEVICE, queue.used)]) {
            self.set(register, ring.0 as u32);
            self.set(register + 4, (ring.0 >> 32) as u32);
        }
        if let Some(vector) = vector {
            self.set(common::QUEUE_VECTOR, vector);
            equal("queue_msix_vector", self.get::<u16>(common::QUEUE_VECTOR), vector)?;
        }
        self.set(common::QUEUE_ENABLE, 1_u16);
        equal("queue_enable", self.get::<u16>(common::QUEUE_ENABLE), 1_u16)
    }

    /// The notification register of the selected queue.
    pub(crate) fn doorbell(&self) -> Mmio {
        let offset = u64::from(self.get::<u16>(common::QUEUE_NOTIFY_OFF)) * u64::from(self.notify_multiplier);
        Mmio(self.notify.0 + offset)
    }

    /// Sets DRIVER_OK: the device runs.
    pub(crate) fn start(&self) -> Outcome {
        self.add_status(DRIVER_OK);
        equal("the status", self.get::<u8>(common::STATUS), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
    }
}
