//! KVM's interrupt routing and its eventfds: GSI routes, irqfds and ioeventfds. Called while the machine is built and,
//! rarely, from vCPU threads when the guest unmasks a vector or moves a BAR; by the main thread before it presses the
//! power button.

#![expect(unsafe_code, reason = "what KVM tells of an interrupt controller is a union")]

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use devices::pci::msix::{MsiMessage, MsiRouter};
use devices::virtio::pci::Doorbells;
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi, kvm_irqchip,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::layout::gsi;

/// The mask bit of an entry of the I/O APIC's redirection table (82093AA, 3.2.4).
const MASKED: u64 = 1 << 16;

/// The interrupt side of one VM.
pub struct KvmInterrupts {
    vm: Arc<VmFd>,
    /// A 15-bit destination is folded into bits 11:5 of the message address (KVM_FEATURE_MSI_EXT_DEST_ID).
    extended_destination: bool,
    messages: Mutex<BTreeMap<u32, Route>>,
}

#[derive(Clone, Copy)]
struct Route {
    message: MsiMessage,
    attached: bool,
}

impl KvmInterrupts {
    /// Takes over the routing of `vm`, whose in-kernel irqchip exists already and has KVM's default routes.
    pub fn new(vm: Arc<VmFd>, extended_destination: bool) -> Self {
        Self { vm, extended_destination, messages: Mutex::default() }
    }

    /// Lets a write to `event` raise the edge-triggered `gsi` of the I/O APIC.
    pub fn attach_pin(&self, gsi: u32, event: &EventFd) -> io::Result<()> {
        Ok(self.vm.register_irqfd(event, gsi)?)
    }

    /// Whether the guest takes edges of pin `gsi`, one of the first 8, at the I/O APIC or at the master PIC. KVM drops an
    /// edge that comes while the pin is masked.
    ///
    /// # Errors
    /// When KVM does not tell.
    pub fn pin_is_enabled(&self, gsi: u32) -> io::Result<bool> {
        let ioapic = self.controller(KVM_IRQCHIP_IOAPIC)?;
        // SAFETY: KVM filled in this member for this controller, and any bits are integers; `bits` spans its whole union.
        let entry = unsafe { ioapic.chip.ioapic.redirtbl[gsi as usize].bits };
        let pic = self.controller(KVM_IRQCHIP_PIC_MASTER)?;
        // SAFETY: as above.
        let (mask, base) = unsafe { (pic.chip.pic.imr, pic.chip.pic.irq_base) };
        // A PIC begins with every pin enabled; it is used from when the guest has given it its vectors.
        Ok(entry & MASKED == 0 || base != 0 && mask & 1 << gsi == 0)
    }

    fn controller(&self, id: u32) -> io::Result<kvm_irqchip> {
        let mut controller = kvm_irqchip { chip_id: id, ..Default::default() };
        self.vm.get_irqchip(&mut controller)?;
        Ok(controller)
    }

    /// KVM replaces the whole table at each call, so the pins of the PIC and the I/O APIC are in it every time.
    fn set_table(&self, messages: &BTreeMap<u32, Route>) -> io::Result<()> {
        let pins = (0..gsi::IOAPIC_PINS).flat_map(|pin| {
            let pic = match pin {
                0..8 => Some((KVM_IRQCHIP_PIC_MASTER, pin)),
                8..16 => Some((KVM_IRQCHIP_PIC_SLAVE, pin - 8)),
                _ => None,
            };
            pic.into_iter().chain([(KVM_IRQCHIP_IOAPIC, pin)]).map(move |(chip, at)| pin_entry(pin, chip, at))
        });
        let messages = messages.iter().map(|(gsi, route)| self.message_entry(*gsi, route.message));
        let entries: Vec<_> = pins.chain(messages).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
        Ok(self.vm.set_gsi_routing(&table)?)
    }

    fn message_entry(&self, gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
        let (low, high) = address_halves(message.address, self.extended_destination);
        let mut u = kvm_irq_routing_entry__bindgen_ty_1::default();
        u.msi = kvm_irq_routing_msi { address_lo: low, address_hi: high, data: message.data, ..Default::default() };
        kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, u, ..Default::default() }
    }
}

/// A message address as KVM takes it. With `extended_destination` the guest writes bits 14:8 of the destination into bits
/// 11:5 (KVM_FEATURE_MSI_EXT_DEST_ID), and KVM reads bits 31:8 in the upper half (KVM_CAP_X2APIC_API).
fn address_halves(address: u64, extended_destination: bool) -> (u32, u32) {
    let (low, high) = (address as u32, (address >> 32) as u32);
    if extended_destination && high == 0 { (low & !0xfe0, (low & 0xfe0) << 3) } else { (low, high) }
}

fn pin_entry(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut u = kvm_irq_routing_entry__bindgen_ty_1::default();
    u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, u, ..Default::default() }
}

impl MsiRouter for KvmInterrupts {
    fn set(&self, gsi: u32, message: MsiMessage, event: &EventFd) -> io::Result<()> {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let before = messages.get(&gsi).copied();
        let attached = before.is_some_and(|route| route.attached);
        if before.is_none_or(|route| route.message != message) {
            messages.insert(gsi, Route { message, attached });
            if let Err(error) = self.set_table(&messages) {
                // A message that KVM refuses must not be in the table at the next call.
                match before {
                    Some(route) => messages.insert(gsi, route),
                    None => messages.remove(&gsi),
                };
                return Err(error);
            }
        }
        if !attached {
            self.vm.register_irqfd(event, gsi)?;
            messages.insert(gsi, Route { message, attached: true });
        }
        Ok(())
    }

    fn clear(&self, gsi: u32, event: &EventFd) -> io::Result<()> {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(route) = messages.get_mut(&gsi).filter(|route| route.attached) {
            self.vm.unregister_irqfd(event, gsi)?;
            route.attached = false;
        }
        Ok(())
    }
}

impl Doorbells for KvmInterrupts {
    fn attach(&self, address: u64, event: &EventFd) -> io::Result<()> {
        Ok(self.vm.register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }

    fn detach(&self, address: u64, event: &EventFd) -> io::Result<()> {
        Ok(self.vm.unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    const TO_APIC_0: MsiMessage = MsiMessage { address: 0xfee0_0000, data: 0x41 };

    /// Over a VM of this host's KVM; `None`, said loudly, where there is none.
    fn interrupts() -> Option<KvmInterrupts> {
        let kvm = match crate::kvm::open() {
            Ok(kvm) => kvm,
            Err(error) => {
                skip::because(error);
                return None;
            }
        };
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        Some(KvmInterrupts::new(Arc::new(vm), false))
    }

    #[test]
    fn destinations_of_more_than_8_bits_move_to_the_upper_half() {
        // Destination 0x3421: its low byte in bits 19:12, 0x34 in bits 11:5.
        let address = 0xfee0_0000 | 0x21 << 12 | 0x34 << 5;
        assert_eq!(address_halves(address, true), (0xfee2_1000, 0x3400));
        assert_eq!(address_halves(address, false), (address as u32, 0));
        assert_eq!(address_halves(0x1_fee2_1000, true), (0xfee2_1000, 1), "what the guest put there stays");
    }

    #[test]
    fn a_message_that_kvm_refuses_leaves_the_others_as_they_were() {
        let Some(interrupts) = interrupts() else { return };
        let (good, bad) = (EventFd::new(EFD_NONBLOCK).unwrap(), EventFd::new(EFD_NONBLOCK).unwrap());
        // KVM_MAX_IRQ_ROUTES is 4096 (api.rst, KVM_SET_GSI_ROUTING): a GSI past it is refused.
        interrupts.set(5000, TO_APIC_0, &bad).unwrap_err();
        interrupts.set(24, TO_APIC_0, &good).unwrap();
        interrupts.set(5000, TO_APIC_0, &bad).unwrap_err();
    }

    #[test]
    fn a_pin_is_enabled_at_either_controller() {
        let Some(interrupts) = interrupts() else { return };
        let change = |id, change: fn(&mut kvm_irqchip)| {
            let mut controller = interrupts.controller(id).unwrap();
            change(&mut controller);
            interrupts.vm.set_irqchip(&controller).unwrap();
        };
        let enabled = || [4, 5].map(|pin| interrupts.pin_is_enabled(pin).unwrap());
        // The I/O APIC begins with every pin masked (82093AA, 3.2.4).
        assert_eq!(enabled(), [false, false]);
        // Vector 0x35, an edge, not masked.
        change(KVM_IRQCHIP_IOAPIC, |it| {
            // SAFETY: KVM filled in this member for this controller.
            let ioapic = unsafe { &mut it.chip.ioapic };
            ioapic.redirtbl[5].bits = 0x35;
        });
        assert_eq!(enabled(), [false, true]);
        change(KVM_IRQCHIP_IOAPIC, |it| {
            // SAFETY: KVM filled in this member for this controller.
            let ioapic = unsafe { &mut it.chip.ioapic };
            ioapic.redirtbl[5].bits = 1 << 16 | 0x35;
        });
        assert_eq!(enabled(), [false, false]);
        // ICW2 0x30, OCW1 with all but pin 5 masked (8259A).
        change(KVM_IRQCHIP_PIC_MASTER, |it| {
            // SAFETY: KVM filled in this member for this controller.
            let pic = unsafe { &mut it.chip.pic };
            (pic.irq_base, pic.imr) = (0x30, !(1 << 5));
        });
        assert_eq!(enabled(), [false, true]);
    }

    #[test]
    fn a_message_is_set_replaced_and_cleared_as_often_as_the_guest_likes() {
        let Some(interrupts) = interrupts() else { return };
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        for data in [0x41, 0x41, 0x42] {
            interrupts.set(24, MsiMessage { data, ..TO_APIC_0 }, &event).unwrap();
        }
        for _ in 0..3 {
            interrupts.clear(24, &event).unwrap();
            interrupts.clear(24, &event).unwrap();
            interrupts.set(24, TO_APIC_0, &event).unwrap();
        }
    }
}
