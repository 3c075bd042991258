//! The PCI transport of a virtio 1.2 device (4.1), without the legacy interface. Accesses come from vCPU threads;
//! doorbells and interrupts are eventfds and pass without a lock.

mod common;
mod doorbells;
mod signals;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::common::Transport;
use self::doorbells::DoorbellSet;
pub use self::doorbells::Doorbells;
use self::signals::Signals;
use super::device::VirtioDevice;
use crate::pci::config::{BarWidth, Bars, Configuration, Identity};
use crate::pci::msix::{MAX_VECTORS, MsiRouter, Msix};
use crate::pci::root::PciDevice;

/// The structures in BAR 0. Each has a page of its own, so that a guest can map one to user space without the others.
mod layout {
    pub(super) const COMMON: u64 = 0x0000;
    pub(super) const ISR: u64 = 0x1000;
    pub(super) const DEVICE: u64 = 0x2000;
    pub(super) const PBA: u64 = 0x3000;
    pub(super) const NOTIFY: u64 = 0x4000;
    pub(super) const TABLE: u64 = 0x8000;
    /// The table of [`super::MAX_VECTORS`] vectors is half of it.
    pub(super) const SIZE: u64 = 0x1_0000;
    pub(super) const NOTIFY_MULTIPLIER: u64 = 4;
}

const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;
/// The writable bits of MSI-X Message Control (PCI Local Bus 3.0, 6.8.2.3).
const MSIX_ENABLE: u32 = 1 << 15;
const MSIX_MASK: u32 = 1 << 14;

/// Configuration space and what follows from it, under one lock.
struct Function {
    config: Configuration,
    msix: Msix,
    /// Offsets of two capabilities in `config`.
    msix_cap: usize,
    window_cap: usize,
    doorbells: DoorbellSet,
}

/// A virtio device as a PCI function.
///
/// It has no interrupt pin: a driver uses MSI-X, or polls the used rings and the ISR status.
pub struct VirtioPci {
    bars: Bars,
    kicks: Arc<[EventFd]>,
    signals: Arc<Signals>,
    vectors: u16,
    window: u16,
    function: Mutex<Function>,
    transport: Mutex<Transport>,
}

impl VirtioPci {
    /// Puts `device` behind a PCI function whose MSI-X vectors have the GSIs from `first_gsi` up, one for the
    /// configuration and one a queue. With `ioeventfd` off, notifications exit to [`PciDevice::bar_write`].
    ///
    /// # Errors
    /// If the host gives no eventfds, or the device has more queues than MSI-X vectors exist.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemoryMmap>,
        first_gsi: u32,
        msi: Arc<dyn MsiRouter>,
        doorbells: Arc<dyn Doorbells>,
        ioeventfd: bool,
    ) -> io::Result<Arc<Self>> {
        let queues = device.queue_sizes().len();
        let vectors = u16::try_from(queues + 1).unwrap_or(u16::MAX);
        let msix = Msix::new(vectors, first_gsi, msi)?;
        let kicks: Arc<[_]> = (0..queues).map(|_| EventFd::new(EFD_NONBLOCK)).collect::<io::Result<_>>()?;
        let signals = Arc::new(Signals::new(queues, msix.events()));
        let mut config = Configuration::new(identity(device.device_type()));
        config.add_memory_bar(0, layout::SIZE, BarWidth::Bits64);
        let (msix_cap, window_cap) = add_capabilities(&mut config, vectors, device.has_config());
        Ok(Arc::new(Self {
            bars: config.bars(),
            kicks: kicks.clone(),
            signals: signals.clone(),
            vectors,
            window: window_cap as u16 + 16,
            function: Mutex::new(Function {
                config,
                msix,
                msix_cap,
                window_cap,
                doorbells: DoorbellSet::new(doorbells, kicks.clone(), ioeventfd),
            }),
            transport: Mutex::new(Transport::new(device, memory, signals, kicks)),
        }))
    }

    /// MSI-X vectors, and so GSIs: one more than queues.
    pub fn vectors(&self) -> u16 {
        self.vectors
    }

    /// Back to the state after power-on, as a reset of the bus does: on return nothing of the device runs, and the
    /// function has no address and no pending interrupt. For the end and for a restart of the machine.
    pub fn reset(&self) {
        self.transport().reset();
        let mut function = self.function();
        function.config.reset();
        self.follow(&mut function);
        function.msix.reset();
    }

    /// Lets dispatch, interrupts and doorbells follow what was written to configuration space.
    fn follow(&self, function: &mut Function) {
        self.bars.follow(&function.config);
        let control = function.config.dword(function.msix_cap) >> 16;
        let enabled = control & MSIX_ENABLE != 0;
        // First: what is raised from now on goes where the driver will look for it.
        self.signals.set_msix_enabled(enabled);
        function.msix.set_control(enabled, control & MSIX_MASK != 0);
        function.doorbells.place(self.bars.base(0).map(|base| base + layout::NOTIFY));
    }

    fn transport(&self) -> MutexGuard<'_, Transport> {
        self.transport.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn function(&self) -> MutexGuard<'_, Function> {
        self.function.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether an access touches `pci_cfg_data`, the window of VIRTIO_PCI_CAP_PCI_CFG.
    fn touches_window(&self, offset: u16, len: usize) -> bool {
        let (start, end) = (usize::from(self.window), usize::from(self.window) + 4);
        usize::from(offset) < end && usize::from(offset) + len > start
    }
}

impl PciDevice for VirtioPci {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let mut function = self.function();
        if self.touches_window(offset, data.len())
            && let Some((at, len)) = function.window()
        {
            // The access may be to the MSI-X table, which is under the same lock.
            drop(function);
            let mut value = [0; 4];
            self.bar_read(0, at, &mut value[..len]);
            function = self.function();
            for (at, &byte) in (usize::from(self.window)..).zip(&value[..len]) {
                function.config.set(at, byte);
            }
        }
        function.config.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut function = self.function();
        function.config.write(offset, data);
        self.follow(&mut function);
        if self.touches_window(offset, data.len())
            && let Some((at, len)) = function.window()
        {
            let value = function.config.dword(usize::from(self.window)).to_le_bytes();
            drop(function);
            self.bar_write(0, at, &value[..len]);
        }
    }

    fn bars(&self) -> &Bars {
        &self.bars
    }

    fn bar_read(&self, _bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            layout::COMMON..layout::ISR => self.transport().read(offset - layout::COMMON, data),
            layout::ISR => data.iter_mut().take(1).for_each(|byte| *byte = self.signals.take_isr()),
            layout::DEVICE..layout::PBA => self.transport().device.read_config(offset - layout::DEVICE, data),
            layout::PBA..layout::NOTIFY => self.function().msix.pba_read(offset - layout::PBA, data),
            layout::TABLE..layout::SIZE => self.function().msix.table_read(offset - layout::TABLE, data),
            _ => {}
        }
    }

    fn bar_write(&self, _bar: usize, offset: u64, data: &[u8]) {
        match offset {
            layout::NOTIFY..layout::TABLE => {
                let index = (offset - layout::NOTIFY) / layout::NOTIFY_MULTIPLIER;
                if let Some(kick) = self.kicks.get(index as usize) {
                    // A nonblocking eventfd refuses only a full counter, and that one is readable already.
                    let _ = kick.write(1);
                }
            }
            layout::COMMON..layout::ISR => self.transport().write(offset - layout::COMMON, data),
            layout::DEVICE..layout::PBA => self.transport().device.write_config(offset - layout::DEVICE, data),
            layout::TABLE..layout::SIZE => self.function().msix.table_write(offset - layout::TABLE, data),
            _ => {}
        }
    }
}

impl Function {
    /// Where in BAR 0 the window of VIRTIO_PCI_CAP_PCI_CFG looks, and how many bytes; `None` if the driver set it to
    /// nothing that exists (4.1.4.9).
    fn window(&self) -> Option<(u64, usize)> {
        let bar = self.config.dword(self.window_cap + 4) as u8;
        let offset = u64::from(self.config.dword(self.window_cap + 8));
        let len = self.config.dword(self.window_cap + 12);
        let inside = offset + u64::from(len) <= layout::SIZE;
        (bar == 0 && matches!(len, 1 | 2 | 4) && inside).then_some((offset, len as usize))
    }
}

/// 4.1.2.1; the class tells a firmware what it would boot from.
fn identity(device_type: u32) -> Identity {
    let class = match device_type {
        1 => 0x02_00_00, // network: Ethernet controller
        2 => 0x01_80_00, // block: other mass storage controller
        3 => 0x07_80_00, // console: other communication controller
        _ => 0xff_00_00, // no class fits
    };
    let device = DEVICE_BASE + device_type as u16;
    Identity { vendor: VENDOR, device, revision: 1, class, subsystem_vendor: VENDOR, subsystem: device }
}

/// Adds MSI-X and the vendor capabilities of 4.1.4; returns the offsets of MSI-X and of VIRTIO_PCI_CAP_PCI_CFG.
fn add_capabilities(config: &mut Configuration, vectors: u16, has_config: bool) -> (usize, usize) {
    let mut msix = (vectors - 1).to_le_bytes().to_vec();
    msix.extend((layout::TABLE as u32).to_le_bytes());
    msix.extend((layout::PBA as u32).to_le_bytes());
    let msix_cap = config.add_capability(CAP_MSIX, &msix, &[0x00, 0xc0]);

    let mut add = |cfg_type: u8, offset: u64, length: u64, more: &[u8], writable: &[u8]| {
        let cap_len = 16 + more.len() as u8;
        let bar = 0;
        let mut body = vec![cap_len, cfg_type, bar, 0, 0, 0];
        body.extend((offset as u32).to_le_bytes());
        body.extend((length as u32).to_le_bytes());
        body.extend(more);
        config.add_capability(CAP_VENDOR, &body, writable)
    };
    let multiplier = layout::NOTIFY_MULTIPLIER as u32;
    let doorbells = u64::from(vectors - 1) * layout::NOTIFY_MULTIPLIER;
    add(1, layout::COMMON, common::SIZE, &[], &[]);
    add(2, layout::NOTIFY, doorbells, &multiplier.to_le_bytes(), &[]);
    add(3, layout::ISR, 1, &[], &[]);
    if has_config {
        add(4, layout::DEVICE, layout::PBA - layout::DEVICE, &[], &[]);
    }
    // The driver writes bar, offset, length and the data behind them.
    let mut writable = [0xff; 18];
    writable[..2].fill(0);
    writable[3..6].fill(0);
    let window_cap = add(5, 0, 0, &[0; 4], &writable);
    (msix_cap, window_cap)
}

const _: () = assert!(layout::TABLE + MAX_VECTORS as u64 * 16 == layout::SIZE);
const _: () = assert!(layout::NOTIFY + MAX_VECTORS as u64 * layout::NOTIFY_MULTIPLIER <= layout::TABLE);

#[cfg(test)]
mod tests;
