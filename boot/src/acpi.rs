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

/// An ISA-style device: its first I/O port and, if it has one, its interrupt, edge triggered and active high.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortDevice {
    /// First port.
    pub port: u16,
    /// Global system interrupt.
    pub gsi: Option<u32>,
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
    /// The CMOS clock. Without an interrupt: a driver that expects one of a clock that has none waits for it in vain.
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

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::{Command, Output};

    use super::*;
    use crate::bytes::{u16_at, u32_at, u64_at};
    use crate::synthetic;

    const RSDP: u64 = 0xe_0000;

    fn config(cpus: u32) -> AcpiConfig {
        AcpiConfig {
            apic_ids: (0..cpus).collect(),
            local_apic: 0xfee0_0000,
            io_apic: 0xfec0_0000,
            ecam: 0xe000_0000,
            last_bus: 0,
            pci_window_32: 0xc000_0000..0xe000_0000,
            pci_window_64: Some(0x80_0000_0000..0x100_0000_0000),
            serial: Some(PortDevice { port: 0x3f8, gsi: Some(4) }),
            rtc: PortDevice { port: 0x70, gsi: None },
            power_button_gsi: 5,
            sleep_control: 0x600,
            sleep_status: 0x601,
            reset_port: 0x64,
            reset_value: 0xfe,
            pvpanic: Some(0x505),
        }
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// The table at `address`, after the checks every operating system makes.
    fn table_at(memory: &GuestMemoryMmap, address: u64) -> ([u8; 4], Vec<u8>) {
        let len = u32_at(&synthetic::read(memory, address, 8), 4);
        let table = synthetic::read(memory, address, len as usize);
        assert_eq!(sum(&table), 0, "checksum");
        assert_eq!(table.len(), len as usize);
        (table[..4].try_into().unwrap(), table)
    }

    /// Finds the tables as an operating system does: from the root pointer through the XSDT, the DSDT through the FADT.
    fn walk(memory: &GuestMemoryMmap) -> Vec<([u8; 4], Vec<u8>)> {
        let rsdp = synthetic::read(memory, RSDP, 36);
        assert_eq!((&rsdp[..8], rsdp[15], u32_at(&rsdp, 20)), (b"RSD PTR ".as_slice(), 2, 36));
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0), "both checksums");
        let (signature, xsdt) = table_at(memory, u64_at(&rsdp, 24));
        assert_eq!(&signature, b"XSDT");
        let mut found: Vec<_> = xsdt[36..].chunks(8).map(|entry| table_at(memory, u64_at(entry, 0))).collect();
        let fadt = found.iter().find(|(signature, _)| signature == b"FACP").unwrap();
        found.push(table_at(memory, u64_at(&fadt.1, 140)));
        found
    }

    fn written(config: &AcpiConfig) -> Vec<([u8; 4], Vec<u8>)> {
        let memory = synthetic::dirty_memory(1);
        write(&memory, RSDP..0x10_0000, config).unwrap();
        walk(&memory)
    }

    fn body(tables: &[([u8; 4], Vec<u8>)], signature: [u8; 4]) -> Vec<u8> {
        tables.iter().find(|table| table.0 == signature).unwrap().1.clone()
    }

    #[test]
    fn an_operating_system_finds_every_table() {
        let tables = written(&config(2));
        let signatures: Vec<_> = tables.iter().map(|table| &table.0).collect();
        assert_eq!(signatures, [b"FACP", b"APIC", b"MCFG", b"DSDT"]);

        // Offsets: ACPI 6.5, table 5.9.
        let fadt = body(&tables, *b"FACP");
        assert_eq!((fadt[8], fadt.len()), (6, 276));
        let boot_arch = u16_at(&fadt, 109);
        assert_eq!(boot_arch & 1 << 1, 0, "no 8042 to probe");
        assert_eq!(boot_arch & 1 << 2, 1 << 2, "no VGA");
        assert_eq!(boot_arch & 1 << 3, 0, "MSI works");
        assert_eq!(boot_arch & 1 << 5, 0, "there is a CMOS RTC");
        let flags = u32_at(&fadt, 112);
        for bit in [0, 4, 5, 10, 20] {
            assert_eq!(flags >> bit & 1, 1, "flag {bit}: WBINVD, no fixed buttons, reset register, hardware reduced");
        }
        let register = |at: usize| (fadt[at], fadt[at + 1], fadt[at + 3], u64_at(&fadt, at + 4));
        assert_eq!((register(116), fadt[128]), ((1, 8, 1, 0x64), 0xfe), "reset");
        assert_eq!(register(244), (1, 8, 1, 0x600), "sleep control");
        assert_eq!(register(256), (1, 8, 1, 0x601), "sleep status");

        let mcfg = body(&tables, *b"MCFG");
        assert_eq!((mcfg.len(), u64_at(&mcfg, 44), u32_at(&mcfg, 52)), (60, 0xe000_0000, 0));
    }

    /// Type and bytes of the interrupt controller structures.
    fn structures(madt: &[u8]) -> Vec<Vec<u8>> {
        let mut rest = &madt[44..];
        let mut found = Vec::new();
        while !rest.is_empty() {
            let (structure, behind) = rest.split_at(usize::from(rest[1]));
            found.push(structure.to_vec());
            rest = behind;
        }
        found
    }

    #[test]
    fn every_cpu_has_a_structure_that_can_hold_its_apic_id() {
        let config = AcpiConfig { apic_ids: vec![0, 1, 254, 255, 256, 0x1_0000], ..config(0) };
        let madt = body(&written(&config), *b"APIC");
        assert_eq!((u32_at(&madt, 36), u32_at(&madt, 40)), (0xfee0_0000, 1));
        let found = structures(&madt);
        // ACPI 6.5, sections 5.2.12.2, 5.2.12.12 and 5.2.12.3: what is enabled, then the IOAPIC of GSI 0.
        let local = |uid: u8, id: u8| vec![0, 8, uid, id, 1, 0, 0, 0];
        let x2 = |uid: u8, id: [u8; 4]| [&[9, 16, 0, 0], id.as_slice(), &[1, 0, 0, 0, uid, 0, 0, 0]].concat();
        assert_eq!(found[..3], [local(0, 0), local(1, 1), local(2, 254)]);
        assert_eq!(found[3..6], [x2(3, [255, 0, 0, 0]), x2(4, [0, 1, 0, 0]), x2(5, [0, 0, 1, 0])]);
        assert_eq!(found[6..], [vec![1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]]);
    }

    #[test]
    fn as_many_cpus_as_kvm_can_fit_and_more_are_an_error() {
        let madt = body(&written(&config(4096)), *b"APIC");
        assert_eq!(structures(&madt).len(), 4097);
        let memory = synthetic::dirty_memory(1);
        let error = write(&memory, RSDP..0x10_0000, &config(9000)).unwrap_err();
        let BootError::AcpiTooBig { cpus: 9000, size, room: 0x2_0000 } = error else { panic!("{error:?}") };
        assert!(size > 0x2_0000);
        assert_eq!(synthetic::read(&memory, RSDP, 4), [0xa5; 4], "nothing was written");
        assert!(matches!(write(&memory, 0x20_0000..0x40_0000, &config(1)), Err(BootError::Memory(_))));
    }

    #[test]
    fn every_cpu_has_a_device_while_there_is_room() {
        for (cpus, devices) in [(1, 1), (300, 300), (1024, 1024), (1025, 0)] {
            let dsdt = body(&written(&config(cpus)), *b"DSDT");
            let found = dsdt.windows(9).filter(|name| name == b"ACPI0007\0").count();
            assert_eq!(found, devices, "{cpus} CPUs");
        }
    }

    #[test]
    fn tables_are_aligned_and_apart() {
        let tables = tables(RSDP, &config(3));
        assert!(tables.iter().all(|table| table.address % 16 == 0));
        assert!(tables.windows(2).all(|pair| pair[0].address + pair[0].bytes.len() as u64 <= pair[1].address));
    }

    /// Runs a tool of acpica-tools, or says loudly that it is not there.
    fn tool(name: &str, directory: &Path, arguments: &[&str]) -> Option<Output> {
        match Command::new(name).args(arguments).current_dir(directory).output() {
            Ok(output) => Some(output),
            Err(error) if std::env::var_os("SKIFF_REQUIRE_TOOLS").is_some() => {
                panic!("cannot run {name} (package acpica-tools): {error}")
            }
            Err(error) => {
                skip::because(format_args!("cannot run {name} (package acpica-tools): {error}"));
                None
            }
        }
    }

    fn text(output: &Output) -> String {
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    }

    #[test]
    fn iasl_disassembles_and_recompiles_every_table() {
        let variants = [config(2), AcpiConfig { serial: None, pvpanic: None, pci_window_64: None, ..config(300) }];
        for config in variants {
            let directory = tempfile::tempdir().unwrap();
            // iasl knows no RSDP: `walk` reads that.
            for table in tables(RSDP, &config).into_iter().skip(1) {
                let name = table.name;
                std::fs::write(directory.path().join(format!("{name}.aml")), &table.bytes).unwrap();
                let Some(output) = tool("iasl", directory.path(), &["-d", &format!("{name}.aml")]) else { return };
                let said = text(&output);
                assert!(
                    output.status.success() && !said.contains("rror") && !said.contains("arning"),
                    "{name}: {said}"
                );

                let arguments = ["-we", "-oa", "-p", "again", &format!("{name}.dsl")];
                let Some(output) = tool("iasl", directory.path(), &arguments) else { return };
                let said = text(&output);
                assert!(output.status.success() && said.contains("Compilation successful. 0 Errors"), "{name}: {said}");
                if name == "DSDT" {
                    let again = std::fs::read(directory.path().join("again.aml")).unwrap();
                    assert_eq!(again[36..], table.bytes[36..], "the same AML");
                }
            }
        }
    }

    #[test]
    fn acpica_finds_in_the_dsdt_what_the_machine_has() {
        let directory = tempfile::tempdir().unwrap();
        let dsdt = tables(RSDP, &config(1)).into_iter().find(|table| table.name == "DSDT").unwrap();
        std::fs::write(directory.path().join("DSDT.aml"), dsdt.bytes).unwrap();
        let pressed = "Received a Device Notify on [PWRB]";
        for (command, expected, unexpected) in [
            ("evaluate \\_SB.GED._EVT 5", pressed, "rror"),
            ("evaluate \\_SB.GED._EVT 6", "No object was returned", pressed),
            ("evaluate \\_S5", "[Integer] = 0000000000000005", "rror"),
            ("evaluate \\_SB.C000._CST", "[Package] Contains 4 Elements: [Buffer] Length 11", "rror"),
            ("resources \\_SB.PCI0", "Address Minimum : 0CF8", "rror"),
            ("resources \\_SB.PCI0", "Address Minimum : C0000000 Address Maximum : DFFFFFFF", "rror"),
            ("resources \\_SB.PCI0", "Address Minimum : 0000008000000000 Address Maximum : 000000FFFFFFFFFF", "rror"),
            ("resources \\_SB.MBRD", "Address : E0000000 Address Length : 00100000", "rror"),
            ("resources \\_SB.COM1", "Address Minimum : 03F8 Address Maximum : 03F8", "rror"),
            ("resources \\_SB.COM1", "Triggering : Edge Polarity : ActiveHigh", "rror"),
            ("resources \\_SB.COM1", "Interrupt Count : 01 Dword00 : 00000004", "rror"),
            ("resources \\_SB.RTC", "Address Minimum : 0070 Address Maximum : 0070", "Interrupt"),
            ("resources \\_SB.GED", "Interrupt Count : 01 Dword00 : 00000005", "rror"),
            ("resources \\_SB.PEVT", "Address Minimum : 0505 Address Maximum : 0505", "rror"),
        ] {
            let Some(output) = tool("acpiexec", directory.path(), &["-b", command, "DSDT.aml"]) else { return };
            let said = text(&output).split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(said.contains(expected) && !said.contains(unexpected), "{command}: {said}");
        }
    }
}
