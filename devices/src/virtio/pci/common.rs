//! The common configuration structure (virtio 1.2, 4.1.4.3) and the life of the device behind it: feature negotiation,
//! queue set-up, activation and reset (2.1, 2.2, 3.1). Called on vCPU threads under one lock.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::signals::{NO_VECTOR, Signals, status};
use crate::virtio::device::{ActivateError, Activation, ActiveQueue, Interrupt, VirtioDevice};
use crate::virtio::queue::{QueueLayout, Virtqueue};

/// Bytes of the structure, up to and with `queue_reset`.
pub(super) const SIZE: u64 = 0x3c;

/// What the transport itself offers.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// The registers, as (offset, width) in ascending order. 64-bit ones are two, as drivers access them (4.1.3.1).
const FIELDS: [(u64, usize); 21] = [
    (DEVICE_FEATURE_SELECT, 4),
    (DEVICE_FEATURE, 4),
    (DRIVER_FEATURE_SELECT, 4),
    (DRIVER_FEATURE, 4),
    (CONFIG_VECTOR, 2),
    (NUM_QUEUES, 2),
    (DEVICE_STATUS, 1),
    (CONFIG_GENERATION, 1),
    (QUEUE_SELECT, 2),
    (QUEUE_SIZE, 2),
    (QUEUE_VECTOR, 2),
    (QUEUE_ENABLE, 2),
    (QUEUE_NOTIFY_OFF, 2),
    (QUEUE_DESC, 4),
    (QUEUE_DESC + 4, 4),
    (QUEUE_DRIVER, 4),
    (QUEUE_DRIVER + 4, 4),
    (QUEUE_DEVICE, 4),
    (QUEUE_DEVICE + 4, 4),
    // Not offered, so they read as zero: VIRTIO_F_NOTIF_CONFIG_DATA and VIRTIO_F_RING_RESET.
    (QUEUE_NOTIFY_DATA, 2),
    (QUEUE_RESET, 2),
];
const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_VECTOR: u64 = 0x10;
const NUM_QUEUES: u64 = 0x12;
const DEVICE_STATUS: u64 = 0x14;
const CONFIG_GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;
const QUEUE_NOTIFY_DATA: u64 = 0x38;
const QUEUE_RESET: u64 = 0x3a;

/// One queue while the driver sets it up.
#[derive(Default)]
struct QueueSetup {
    layout: QueueLayout,
    enabled: bool,
}

/// The registers of the transport and the device they drive.
pub(super) struct Transport {
    pub(super) device: Box<dyn VirtioDevice>,
    memory: Arc<GuestMemoryMmap>,
    signals: Arc<Signals>,
    kicks: Arc<[EventFd]>,
    device_feature_select: u32,
    driver_feature_select: u32,
    /// Wider than what exists, so that a driver that accepts a bit beyond it is noticed.
    driver_features: u128,
    queue_select: u16,
    queues: Vec<QueueSetup>,
    warned: bool,
}

impl Transport {
    pub(super) fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemoryMmap>,
        signals: Arc<Signals>,
        kicks: Arc<[EventFd]>,
    ) -> Self {
        let queues = fresh_queues(device.as_ref());
        Self {
            device,
            memory,
            signals,
            kicks,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues,
            warned: false,
        }
    }

    /// Reads any bytes of the structure; zeroes past its end. Reading has no side effect.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        for (field, width) in touched(offset, data.len()) {
            let value = self.get(field).to_le_bytes();
            for (at, byte) in (field..).zip(&value[..width]) {
                if let Some(place) = at.checked_sub(offset).and_then(|at| data.get_mut(at as usize)) {
                    *place = *byte;
                }
            }
        }
    }

    /// Writes any bytes of the structure. A register that is touched only in part keeps its other bytes.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        for (field, width) in touched(offset, data.len()) {
            let mut value = self.get(field).to_le_bytes();
            for (at, byte) in (field..).zip(&mut value[..width]) {
                if let Some(given) = at.checked_sub(offset).and_then(|at| data.get(at as usize)) {
                    *byte = *given;
                }
            }
            self.set(field, u32::from_le_bytes(value));
        }
    }

    /// Stops the device and forgets the driver. On return the status reads 0.
    pub(super) fn reset(&mut self) {
        self.device.reset();
        for kick in self.kicks.iter() {
            // A notification to the old life; none is fine too.
            let _ = kick.read();
        }
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.queues = fresh_queues(self.device.as_ref());
        self.signals.reset();
    }

    fn get(&self, field: u64) -> u32 {
        let queue = self.queues.get(usize::from(self.queue_select));
        let layout = queue.map_or_else(QueueLayout::default, |queue| queue.layout);
        match field {
            DEVICE_FEATURE_SELECT => self.device_feature_select,
            DEVICE_FEATURE => word(u128::from(self.offered()), self.device_feature_select),
            DRIVER_FEATURE_SELECT => self.driver_feature_select,
            DRIVER_FEATURE => word(self.driver_features, self.driver_feature_select),
            CONFIG_VECTOR => u32::from(self.signals.config_vector.load(Ordering::Acquire)),
            NUM_QUEUES => self.queues.len() as u32,
            DEVICE_STATUS => u32::from(self.signals.status()),
            CONFIG_GENERATION => u32::from(self.signals.generation()),
            QUEUE_SELECT => u32::from(self.queue_select),
            QUEUE_SIZE => u32::from(layout.size),
            QUEUE_VECTOR => u32::from(
                self.signals
                    .queue_vectors
                    .get(usize::from(self.queue_select))
                    .map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire)),
            ),
            QUEUE_ENABLE => u32::from(queue.is_some_and(|queue| queue.enabled)),
            QUEUE_NOTIFY_OFF => queue.map_or(0, |_| u32::from(self.queue_select)),
            QUEUE_DESC => layout.desc as u32,
            QUEUE_DRIVER => layout.driver as u32,
            QUEUE_DEVICE => layout.device as u32,
            _ if field == QUEUE_DESC + 4 => (layout.desc >> 32) as u32,
            _ if field == QUEUE_DRIVER + 4 => (layout.driver >> 32) as u32,
            _ if field == QUEUE_DEVICE + 4 => (layout.device >> 32) as u32,
            _ => 0,
        }
    }

    fn set(&mut self, field: u64, value: u32) {
        match field {
            DEVICE_FEATURE_SELECT => self.device_feature_select = value,
            DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
            DRIVER_FEATURE => self.set_driver_feature(value),
            CONFIG_VECTOR => {
                self.signals.config_vector.store(self.signals.checked_vector(value as u16), Ordering::Release);
            }
            DEVICE_STATUS => self.set_status(value as u8),
            QUEUE_SELECT => self.queue_select = value as u16,
            QUEUE_VECTOR => {
                if let Some(vector) = self.signals.queue_vectors.get(usize::from(self.queue_select)) {
                    vector.store(self.signals.checked_vector(value as u16), Ordering::Release);
                }
            }
            _ => self.set_queue(field, value),
        }
    }

    fn set_driver_feature(&mut self, value: u32) {
        // Negotiation ends with FEATURES_OK (3.1.1).
        if self.signals.status() & status::FEATURES_OK == 0 && self.driver_feature_select < 4 {
            let shift = 32 * self.driver_feature_select;
            self.driver_features = self.driver_features & !(0xffff_ffff << shift) | u128::from(value) << shift;
        }
    }

    /// The registers of the selected queue. A queue that is enabled, or not there, takes nothing (4.1.4.3.2).
    fn set_queue(&mut self, field: u64, value: u32) {
        let max = self.device.queue_sizes().get(usize::from(self.queue_select)).copied().unwrap_or(0);
        let live = self.signals.status() & status::DRIVER_OK != 0;
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)).filter(|queue| !queue.enabled && !live)
        else {
            return;
        };
        let layout = &mut queue.layout;
        match field {
            QUEUE_SIZE if value <= u32::from(max) && value.is_power_of_two() => layout.size = value as u16,
            QUEUE_ENABLE => queue.enabled = value == 1,
            QUEUE_DESC => set_low(&mut layout.desc, value),
            QUEUE_DRIVER => set_low(&mut layout.driver, value),
            QUEUE_DEVICE => set_low(&mut layout.device, value),
            _ if field == QUEUE_DESC + 4 => set_high(&mut layout.desc, value),
            _ if field == QUEUE_DRIVER + 4 => set_high(&mut layout.driver, value),
            _ if field == QUEUE_DEVICE + 4 => set_high(&mut layout.device, value),
            _ => {}
        }
    }

    /// A driver sets the bits one after the other and never clears one, except all by a reset (2.1.1). A bit whose
    /// predecessor is missing is ignored, and so is a bit that is missing from what was set.
    fn set_status(&mut self, value: u8) {
        if value == 0 {
            self.reset();
            return;
        }
        let order = [0, status::ACKNOWLEDGE, status::DRIVER, status::FEATURES_OK, status::DRIVER_OK];
        for step in order.windows(2) {
            let (before, bit) = (step[0], step[1]);
            let current = self.signals.status();
            let next = value & bit != 0 && current & bit == 0 && current & before == before;
            if !next || bit == status::FEATURES_OK && !self.features_acceptable() {
                continue;
            }
            self.signals.add_status(bit);
            if bit == status::DRIVER_OK {
                self.start();
            }
        }
        self.signals.add_status(value & status::FAILED);
    }

    fn offered(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    fn features_acceptable(&self) -> bool {
        let unknown = self.driver_features & !u128::from(self.offered());
        unknown == 0 && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    /// DRIVER_OK: what cannot start needs a reset, and the machine goes on.
    fn start(&mut self) {
        if let Err(error) = self.activate() {
            if !std::mem::replace(&mut self.warned, true) {
                tracing::warn!(device_type = self.device.device_type(), %error, "a virtio device could not start");
            }
            self.signals.needs_reset();
        }
    }

    fn activate(&mut self) -> Result<(), ActivateError> {
        let features = self.driver_features as u64;
        let mut queues = Vec::new();
        for (index, setup) in self.queues.iter().enumerate().filter(|(_, setup)| setup.enabled) {
            let queue = Virtqueue::new(setup.layout, features, self.memory.clone())
                .map_err(|error| ActivateError { what: "virtqueue", source: io::Error::other(error) })?;
            let kick =
                self.kicks[index].try_clone().map_err(|source| ActivateError { what: "notification", source })?;
            queues.push(ActiveQueue { index: index as u16, queue, kick });
        }
        self.device.activate(Activation {
            memory: self.memory.clone(),
            features,
            queues,
            interrupt: self.signals.clone(),
        })
    }
}

fn fresh_queues(device: &dyn VirtioDevice) -> Vec<QueueSetup> {
    let setup = |&size: &u16| QueueSetup { layout: QueueLayout { size, ..QueueLayout::default() }, enabled: false };
    device.queue_sizes().iter().map(setup).collect()
}

/// The registers that share bytes with `offset..offset + len`.
fn touched(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize)> {
    let end = offset.saturating_add(len as u64);
    FIELDS.into_iter().filter(move |&(field, width)| field < end && field + width as u64 > offset)
}

/// The 32 bits that a feature select register shows; none past the last.
fn word(features: u128, select: u32) -> u32 {
    features.checked_shr(select.saturating_mul(32)).unwrap_or(0) as u32
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !0xffff_ffff | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & 0xffff_ffff | u64::from(value) << 32;
}
