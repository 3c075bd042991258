//! The definition block of the machine's devices (ACPI 6.5, chapters 5, 6, 8 and 9). Written once by the main thread.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name,
    Notify, Package, PackageBuilder, Path, Register, ResourceTemplate, Scope,
};
use acpi_tables::gas;

use super::{AcpiConfig, PortDevice, S5_SLEEP_TYPE};

/// ECAM bytes of one bus (PCI Express Base Specification, section 7.2.2).
const ECAM_PER_BUS: u32 = 1 << 20;
/// Ports of the PCI configuration mechanism (PCI Local Bus Specification 3.0, section 3.2.2.3.2).
const PCI_CONFIG_PORT: u16 = 0xcf8;
/// "S0 button pressed" (ACPI 6.5, table 4.8).
const BUTTON_PRESSED: u8 = 0x80;
/// As many processors as the tables have room for a device of.
const PROCESSORS_MAX: usize = 1024;

/// The AML behind the header of the DSDT.
pub(super) fn aml(config: &AcpiConfig) -> Vec<u8> {
    let mut aml = Vec::new();
    if config.apic_ids.len() <= PROCESSORS_MAX {
        (0u32..).zip(&config.apic_ids).for_each(|(uid, _)| processor(uid, &mut aml));
    }
    host_bridge(config, &mut aml);
    motherboard(config, &mut aml);
    if let Some(serial) = config.serial {
        port_device("COM1", "PNP0501", serial, 8, &mut aml);
    }
    port_device("RTC_", "PNP0B00", config.rtc, 2, &mut aml);
    power_button(config.power_button_gsi, &mut aml);
    if let Some(port) = config.pvpanic {
        pvpanic(port, &mut aml);
    }
    soft_off(&mut aml);
    aml
}

/// `\_SB` around one device.
fn system_bus(name: &str, children: Vec<&dyn Aml>, aml: &mut Vec<u8>) {
    Scope::new("\\_SB_".into(), vec![&Device::new(name.into(), children)]).to_aml_bytes(aml);
}

fn name(path: &str, value: &dyn Aml) -> Name {
    Name::new(Path::new(path), value)
}

/// The processor of the MADT's structure with this `uid`, and the only way it can be idle: C1, entered by HLT (ACPI
/// 6.5, sections 8.4.1.1 and 8.1.2).
///
/// A guest could halt without being told. But Linux asks its idle governor, who knows when a CPU will be woken, only
/// where there are states to choose from; without them Debian's 6.1, for one, keeps its tick until that has come once
/// more, after everything a CPU did.
fn processor(uid: u32, aml: &mut Vec<u8>) {
    const C1: u8 = 1;
    const WAKING_US: u8 = 1;
    const MILLIWATTS: u8 = 0;
    let halt = gas::GAS::new(gas::AddressSpace::FunctionalFixedHardware, 0, 0, gas::AccessSize::Undefined, 0);
    let halt = Register::new(halt);
    let halt = ResourceTemplate::new(vec![&halt]);
    let state = Package::new(vec![&halt, &C1, &WAKING_US, &MILLIWATTS]);
    system_bus(
        &format!("C{uid:03X}"),
        vec![&name("_HID", &"ACPI0007"), &name("_UID", &uid), &name("_CST", &Package::new(vec![&1u8, &state]))],
        aml,
    );
}

/// PCI Express root of segment 0, with the windows of its buses.
fn host_bridge(config: &AcpiConfig, aml: &mut Vec<u8>) {
    let buses = AddressSpace::new_bus_number(0u16, u16::from(config.last_bus));
    let ports = IO::new(PCI_CONFIG_PORT, PCI_CONFIG_PORT, 1, 8);
    let low = memory_window(config.pci_window_32.start, config.pci_window_32.end - 1);
    let high = config.pci_window_64.as_ref().map(|it| memory_window(it.start, it.end - 1));
    let mut resources: Vec<&dyn Aml> = vec![&buses, &ports, &low];
    resources.extend(high.as_ref().map(|it| it as &dyn Aml));
    system_bus(
        "PCI0",
        vec![
            &name("_HID", &EISAName::new("PNP0A08")),
            &name("_CID", &EISAName::new("PNP0A03")),
            &name("_UID", &0u8),
            &name("_SEG", &0u8),
            &name("_BBN", &0u8),
            &name("_CRS", &ResourceTemplate::new(resources)),
        ],
        aml,
    );
}

fn memory_window<T: Default>(min: T, max: T) -> AddressSpace<T> {
    AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, min, max, None)
}

/// Motherboard resources: addresses taken without a device of their own. A kernel trusts the MCFG only if its ECAM is
/// among them.
fn motherboard(config: &AcpiConfig, aml: &mut Vec<u8>) {
    let ecam = Memory32Fixed::new(true, config.ecam, ECAM_PER_BUS * (u32::from(config.last_bus) + 1));
    let control = IO::new(config.sleep_control, config.sleep_control, 1, 1);
    let status = IO::new(config.sleep_status, config.sleep_status, 1, 1);
    system_bus(
        "MBRD",
        vec![
            &name("_HID", &EISAName::new("PNP0C02")),
            &name("_UID", &0u8),
            &name("_CRS", &ResourceTemplate::new(vec![&ecam, &control, &status])),
        ],
        aml,
    );
}

/// A device at `ports` I/O ports with one interrupt.
fn port_device(device: &str, id: &str, at: PortDevice, ports: u8, aml: &mut Vec<u8>) {
    let io = IO::new(at.port, at.port, 1, ports);
    let interrupt = at.gsi.map(|gsi| Interrupt::new(true, true, false, false, gsi));
    let mut resources: Vec<&dyn Aml> = vec![&io];
    resources.extend(interrupt.iter().map(|interrupt| interrupt as &dyn Aml));
    system_bus(
        device,
        vec![&name("_HID", &EISAName::new(id)), &name("_UID", &0u8), &name("_CRS", &ResourceTemplate::new(resources))],
        aml,
    );
}

/// The power button, and the generic event device (ACPI 6.5, section 5.6.9) whose interrupt presses it.
fn power_button(gsi: u32, aml: &mut Vec<u8>) {
    system_bus("PWRB", vec![&name("_HID", &EISAName::new("PNP0C0C")), &name("_UID", &0u8)], aml);
    let interrupt = Interrupt::new(true, true, false, false, gsi);
    let button = Path::new("\\_SB_.PWRB");
    let press = Notify::new(&button, &BUTTON_PRESSED);
    let is_ours = Equal::new(&Arg(0), &gsi);
    let ours = If::new(&is_ours, vec![&press]);
    system_bus(
        "GED_",
        vec![
            &name("_HID", &"ACPI0013"),
            &name("_UID", &0u8),
            &name("_CRS", &ResourceTemplate::new(vec![&interrupt])),
            &Method::new("_EVT".into(), 1, true, vec![&ours]),
        ],
        aml,
    );
}

/// The port through which a kernel tells of its panic.
fn pvpanic(port: u16, aml: &mut Vec<u8>) {
    system_bus(
        "PEVT",
        vec![
            &name("_HID", &"QEMU0001"),
            &name("_UID", &0u8),
            // Present, enabled, not shown, functioning.
            &name("_STA", &0x0bu8),
            &name("_CRS", &ResourceTemplate::new(vec![&IO::new(port, port, 1, 1)])),
        ],
        aml,
    );
}

/// `\_S5`: what the sleep control register takes to power off.
fn soft_off(aml: &mut Vec<u8>) {
    let mut package = PackageBuilder::new();
    for value in [S5_SLEEP_TYPE, S5_SLEEP_TYPE, 0, 0] {
        package.add_element(&value);
    }
    name("\\_S5_", &package).to_aml_bytes(aml);
}
