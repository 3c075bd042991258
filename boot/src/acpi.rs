//! The ACPI tables of the machine (ACPI 6.5, hardware-reduced): what a stock kernel needs to find its CPUs, interrupt
//! controllers, PCI host bridge, console, clock and power button. Written once by the main thread.
//!
//! Two things the rest of the machine has to match:
//! - The MADT has no interrupt source overrides: ISA interrupt N is GSI N and IOAPIC pin N, edge triggered and active
//!   high, the timer's 0 included. That is KVM's default routing, where the in-kernel PIT raises GSI 0.
//! - Powering off is a write of [`SLEEP_ENABLE`] with [`S5_SLEEP_TYPE`] in bits 2 to 4 to the sleep control register.
//!   Before it the guest writes 0x80 to the sleep status register, to clear the wake status.

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::BootError;

mod dsdt;

/// SLP_TYP of the S5 (soft off) state, as `\_S5` tells the guest.
pub const S5_SLEEP_TYPE: u8 = 5;
/// SLP_EN of the sleep control register (ACPI 6.5, table 4.18).
pub const SLEEP_ENABLE: u8 = 1 << 5;

const OEM_ID: [u8; 6] = *b"SKIFF ";
const OEM_TABLE: [u8; 8] = *b"SKIFFVM ";
const OEM_REVISION: u32 = 1;
/// Tables start at multiples of this.
const ALIGN: usize = 16;
const MADT_REVISION: u8 = 5;
const DSDT_REVISION: u8 = 2;
/// The dual 8259 exists beside the APICs (ACPI 6.5, table 5.20).
const PCAT_COMPAT: u32 = 1;
/// Local APIC structures reach up to this id; 255 is the broadcast address.
const XAPIC_ID_MAX: u32 = 254;
/// Fixed-hardware facts about the boot CPU's platform (ACPI 6.5, table 5.11): there are devices at ISA addresses, there
/// is no VGA, and, by bits left at zero, no 8042 to probe, MSI works and a CMOS RTC is there.
const BOOT_ARCH_LEGACY_DEVICES: u16 = 1 << 0;
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;

/// An ISA-style device: its first I/O port and its interrupt, edge triggered and active high.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortDevice {
    /// First port.
    pub port: u16,
    /// Global system interrupt.
    pub gsi: u32,
}

/// The machine as the tables describe it. Addresses are guest-physical.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiConfig {
    /// APIC ids of the vCPUs, in the order of their numbers.
    pub apic_ids: Vec<u32>,
    /// Local APIC registers.
    pub local_apic: u32,
    /// IOAPIC registers. Its id is 0, its first GSI 0.
    pub io_apic: u32,
    /// PCI configuration space (ECAM) of bus 0 and the buses after it.
    pub ecam: u32,
    /// The last bus that has an ECAM.
    pub last_bus: u8,
    /// Addresses for 32-bit BARs, not empty.
    pub pci_window_32: Range<u32>,
    /// Addresses for 64-bit BARs, not empty.
    pub pci_window_64: Option<Range<u64>>,
    /// The 16550 at COM1.
    pub serial: Option<PortDevice>,
    /// The CMOS clock.
    pub rtc: PortDevice,
    /// The interrupt of the power button.
    pub power_button_gsi: u32,
    /// Port of the sleep control register.
    pub sleep_control: u16,
    /// Port of the sleep status register.
    pub sleep_status: u16,
    /// Port of the reset register.
    pub reset_port: u16,
    /// What resets the machine when it is written there.
    pub reset_value: u8,
    /// Port of pvpanic.
    pub pvpanic: Option<u16>,
}

/// One table and where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedTable {
    /// Its signature, four characters; "RSDP" for the root pointer.
    pub name: &'static str,
    /// Guest-physical address.
    pub address: u64,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// Writes the tables into guest memory from `area.start` on, where the RSDP goes (16-byte aligned, as firmware scans
/// demand; all of `area` is below 4 GiB and stays reserved in the memory map).
///
/// # Errors
/// [`BootError::AcpiTooBig`] if they end past `area.end`; [`BootError::Memory`] if the area is not guest memory.
pub fn write(memory: &GuestMemoryMmap, area: Range<u64>, config: &AcpiConfig) -> Result<(), BootError> {
    let tables = tables(area.start, config);
    let end = tables.iter().map(|table| table.address + table.bytes.len() as u64).max().unwrap_or(area.start);
    if end > area.end {
        return Err(BootError::AcpiTooBig {
            cpus: config.apic_ids.len(),
            size: end - area.start,
            room: area.end.saturating_sub(area.start),
        });
    }
    for table in tables {
        memory.write_slice(&table.bytes, GuestAddress(table.address))?;
    }
    Ok(())
}

/// The tables for a root pointer at `rsdp`, the root pointer first, in ascending order of their addresses.
pub fn tables(rsdp: u64, config: &AcpiConfig) -> Vec<PlacedTable> {
    let mut next = rsdp + Rsdp::len().next_multiple_of(ALIGN) as u64;
    let mut placed = Vec::new();
    let mut place = |name, bytes: Vec<u8>| {
        let address = next;
        next += bytes.len().next_multiple_of(ALIGN) as u64;
        placed.push(PlacedTable { name, address, bytes });
        address
    };
    let dsdt = place("DSDT", table(*b"DSDT", DSDT_REVISION, &dsdt::aml(config)));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(place("FACP", fadt(dsdt, config)));
    xsdt.add_entry(place("APIC", table(*b"APIC", MADT_REVISION, &madt(config))));
    xsdt.add_entry(place("MCFG", mcfg(config)));
    let xsdt = place("XSDT", bytes(&xsdt));
    placed.insert(0, PlacedTable { name: "RSDP", address: rsdp, bytes: bytes(&Rsdp::new(OEM_ID, xsdt)) });
    placed
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

/// A table with the common header (ACPI 6.5, section 5.2.6) in front of `body`.
fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut sdt = Sdt::new(signature, 36, revision, OEM_ID, OEM_TABLE, OEM_REVISION);
    sdt.append_slice(body);
    bytes(&sdt)
}

/// FADT (ACPI 6.5, section 5.2.9). The power button is a device of the DSDT, there is no sleep button.
fn fadt(dsdt: u64, config: &AcpiConfig) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.iapc_boot_arch = (BOOT_ARCH_LEGACY_DEVICES | BOOT_ARCH_NO_VGA).into();
    fadt.reset_reg = port_register(config.reset_port);
    fadt.reset_value = config.reset_value;
    fadt.sleep_control_reg = port_register(config.sleep_control);
    fadt.sleep_status_reg = port_register(config.sleep_status);
    bytes(&fadt.finalize())
}

/// An 8-bit register at an I/O port.
fn port_register(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port))
}

/// MADT behind its header (ACPI 6.5, section 5.2.12).
fn madt(config: &AcpiConfig) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(config.local_apic.to_le_bytes());
    body.extend(PCAT_COMPAT.to_le_bytes());
    for (uid, &apic_id) in (0u32..).zip(&config.apic_ids) {
        match (u8::try_from(uid), apic_id) {
            (Ok(uid), 0..=XAPIC_ID_MAX) => {
                ProcessorLocalApic::new(uid, apic_id as u8, EnabledStatus::Enabled).to_aml_bytes(&mut body);
            }
            _ => body.extend(local_x2apic(uid, apic_id)),
        }
    }
    IoApic::new(0, config.io_apic, 0).to_aml_bytes(&mut body);
    body
}

/// Processor Local x2APIC structure, enabled (ACPI 6.5, section 5.2.12.12).
fn local_x2apic(uid: u32, apic_id: u32) -> [u8; 16] {
    let mut structure = [0; 16];
    structure[0] = 9;
    structure[1] = 16;
    structure[4..8].copy_from_slice(&apic_id.to_le_bytes());
    structure[8..12].copy_from_slice(&1u32.to_le_bytes());
    structure[12..16].copy_from_slice(&uid.to_le_bytes());
    structure
}

/// MCFG (PCI Firmware Specification 3.3, section 4.1.2).
fn mcfg(config: &AcpiConfig) -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(u64::from(config.ecam), 0, 0, config.last_bus);
    bytes(&mcfg)
}
