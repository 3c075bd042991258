//! KVM's interrupt routing and its eventfds: GSI routes, irqfds and ioeventfds. Called while the machine is built and,
//! rarely, from vCPU threads when the guest unmasks a vector or moves a BAR.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use devices::pci::msix::{MsiMessage, MsiRouter};
use devices::virtio::pci::Doorbells;
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::layout::gsi;

/// The interrupt side of one VM.
pub struct KvmInterrupts {
    vm: Arc<VmFd>,
    /// A 15-bit destination is folded into bits 11:5 of the message address (KVM_FEATURE_MSI_EXT_DEST_ID).
    extended_destination: bool,
    messages: Mutex<BTreeMap<u32, Route>>,
}

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

/// The halves of a message's address as KVM takes them, lower first.
fn address_halves(address: u64, extended_destination: bool) -> (u32, u32) {
    let (low, high) = (address as u32, (address >> 32) as u32);
    if extended_destination && high == 0 {
        // KVM_X2APIC_API takes bits 31:8 of the destination in the upper half of the address.
        (low & !0xfe0, (low & 0xfe0) << 3)
    } else {
        (low, high)
    }
}

fn pin_entry(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut u = kvm_irq_routing_entry__bindgen_ty_1::default();
    u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, u, ..Default::default() }
}

impl MsiRouter for KvmInterrupts {
    fn set(&self, gsi: u32, message: MsiMessage, event: &EventFd) -> io::Result<()> {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let attached = messages.get(&gsi).is_some_and(|route| route.attached);
        if messages.get(&gsi).is_none_or(|route| route.message != message) {
            let before = messages.insert(gsi, Route { message, attached });
            if let Err(error) = self.set_table(&messages) {
                // KVM refuses the whole table for one bad message of the guest: it must not be in the next one.
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
    use kvm_bindings::kvm_enable_cap;
    use kvm_ioctls::{Cap, Kvm};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn interrupts() -> Option<KvmInterrupts> {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("SKIPPED: no KVM on this host");
            return None;
        };
        let vm = kvm.create_vm().unwrap();
        let mut x2apic = kvm_enable_cap { cap: Cap::X2ApicApi as u32, ..Default::default() };
        x2apic.args[0] = 0b11;
        vm.enable_cap(&x2apic).unwrap();
        vm.create_irq_chip().unwrap();
        Some(KvmInterrupts::new(Arc::new(vm), true))
    }

    #[test]
    fn a_message_that_kvm_refuses_does_not_spoil_the_others() {
        let Some(interrupts) = interrupts() else { return };
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let good = MsiMessage { address: 0xfee0_0000, data: 0x41 };
        // Bits 7:0 of the upper half must be zero (KVM API, 4.52).
        let bad = MsiMessage { address: 0x1_fee0_0000, data: 0x41 };
        assert!(interrupts.set(24, bad, &event).is_err());
        assert!(interrupts.set(24, bad, &event).is_err(), "nor is it taken for known");
        interrupts.set(25, good, &event).unwrap();
        let other = EventFd::new(EFD_NONBLOCK).unwrap();
        interrupts.set(24, good, &other).unwrap();
        assert!(interrupts.set(24, bad, &other).is_err());
        interrupts.clear(24, &other).unwrap();
        interrupts.set(24, good, &other).unwrap();
    }

    #[test]
    fn a_destination_of_15_bits_goes_where_kvm_looks_for_it() {
        // Destination 0x1234: its bits 7:0 are address bits 19:12, its bits 14:8 address bits 11:5. KVM wants its bits
        // 31:8 in bits 31:8 of the upper half (KVM API, 4.52).
        let address = 0xfee0_0000 | 0x34 << 12 | 0x12 << 5;
        assert_eq!(address_halves(address, true), (0xfee3_4000, 0x1200));
        assert_eq!(address_halves(address, false), (0xfee3_4240, 0));
        assert_eq!(address_halves(0x1_0000_0000 | address, true), (0xfee3_4240, 1));
    }
}
