//! The few facts of the ACPI tables that the checks need (ACPI 6.5, chapter 5; MCFG: PCI Firmware Specification 3.3).

use crate::boot::Boot;
use crate::cpu::{self, Mmio};
use crate::report::{Failure, Outcome, holds};

/// A register in I/O space and what to write there.
#[derive(Clone, Copy)]
pub(crate) struct PortWrite {
    pub(crate) port: u16,
    pub(crate) value: u8,
}

impl PortWrite {
    /// Writes it.
    pub(crate) fn perform(self) {
        cpu::port_out(self.port, self.value);
    }
}

/// A range of addresses that the host bridge hands to its devices: first byte and number of bytes.
#[derive(Clone, Copy)]
pub(crate) struct Window {
    pub(crate) start: u64,
    pub(crate) bytes: u64,
}

impl Window {
    /// Whether `address..address + bytes` is inside.
    pub(crate) fn contains(&self, address: u64, bytes: u64) -> bool {
        address >= self.start && address - self.start <= self.bytes && bytes <= self.bytes - (address - self.start)
    }
}

/// What was found.
pub(crate) struct Tables {
    /// Address of the configuration space of bus 0.
    pub(crate) ecam: u64,
    /// Memory windows of the host bridge above 1 MiB; the rest of the array has no bytes.
    pub(crate) windows: [Window; 4],
    /// Powers off.
    pub(crate) poweroff: Option<PortWrite>,
    /// Resets the machine.
    pub(crate) reset: Option<PortWrite>,
}

/// A system description table with a correct checksum.
#[derive(Clone, Copy)]
struct Table(Mmio);

impl Table {
    fn at(address: u64) -> Outcome<Self> {
        let table = Mmio(address);
        let length = table.read::<u32>(4);
        holds("a table has a plausible length", (36..1 << 20).contains(&length))?;
        holds("the checksum of a table is right", sum(table, length.into()) == 0)?;
        Ok(Self(table))
    }

    fn signature(self) -> [u8; 4] {
        self.0.read(0)
    }

    fn length(self) -> u64 {
        self.0.read::<u32>(4).into()
    }
}

fn sum(table: Mmio, bytes: u64) -> u8 {
    (0..bytes).fold(0, |sum, offset| sum.wrapping_add(table.read(offset)))
}

fn root(boot: &Boot) -> Outcome<Table> {
    let rsdp = Mmio(boot.rsdp);
    holds("the start information names an RSDP", boot.rsdp != 0 && &rsdp.read::<[u8; 8]>(0) == b"RSD PTR ")?;
    holds("the checksum of the RSDP is right", sum(rsdp, 20) == 0)?;
    if rsdp.read::<u8>(15) >= 2 {
        holds("the extended checksum of the RSDP is right", sum(rsdp, 36) == 0)?;
        return Table::at(rsdp.read(24));
    }
    Table::at(rsdp.read::<u32>(16).into())
}

fn find(root: Table, signature: [u8; 4]) -> Outcome<Option<Table>> {
    let entry_bytes = if &root.signature() == b"XSDT" { 8 } else { 4 };
    let mut offset = 36;
    while offset + entry_bytes <= root.length() {
        // An XSDT's entries are not aligned.
        let low = read_unaligned(root.0, offset, 4);
        let high = if entry_bytes == 8 { read_unaligned(root.0, offset + 4, 4) } else { 0 };
        let table = Table::at(low | high << 32)?;
        if table.signature() == signature {
            return Ok(Some(table));
        }
        offset += entry_bytes;
    }
    Ok(None)
}

fn read_unaligned(memory: Mmio, offset: u64, bytes: u64) -> u64 {
    (0..bytes).rev().fold(0, |value, index| value << 8 | u64::from(memory.read::<u8>(offset + index)))
}

impl Tables {
    /// What is known of a machine whose tables do not say where its configuration space is.
    pub(crate) fn none(ecam: u64) -> Self {
        Self { ecam, windows: [Window { start: 0, bytes: 0 }; 4], poweroff: None, reset: None }
    }

    /// Follows the RSDP that the loader named, and verifies the checksum of every table.
    pub(crate) fn find(boot: &Boot) -> Outcome<Self> {
        let root = root(boot)?;
        let Some(mcfg) = find(root, *b"MCFG")? else { return Err(Failure::Skip("an MCFG table")) };
        holds("the first segment of MCFG starts with bus 0", mcfg.length() >= 60 && mcfg.0.read::<u8>(54) == 0)?;
        let Some(fadt) = find(root, *b"FACP")? else { return Err(Failure::Skip("a FADT")) };
        let extended = fadt.length() >= 148 + 12 && read_unaligned(fadt.0, 140, 8) != 0;
        let dsdt = Table::at(if extended { read_unaligned(fadt.0, 140, 8) } else { read_unaligned(fadt.0, 40, 4) })?;
        let sleep_type = sleep_type_s5(dsdt);
        let sleep_control = (fadt.length() >= 256).then(|| io_register(fadt, 244)).flatten();
        let has_reset = fadt.0.read::<u32>(112) & 1 << 10 != 0;
        Ok(Self {
            ecam: read_unaligned(mcfg.0, 44, 8),
            windows: windows(dsdt),
            // Sleep control register: SLP_TYP in bits 2 to 4, SLP_EN in bit 5.
            poweroff: sleep_control
                .zip(sleep_type)
                .map(|(port, sleep_type)| PortWrite { port, value: sleep_type << 2 | 1 << 5 }),
            reset: if has_reset { io_register(fadt, 116) } else { None }
                .map(|port| PortWrite { port, value: fadt.0.read(128) }),
        })
    }
}

/// The port of the generic address structure at `offset`, if it names one.
fn io_register(fadt: Table, offset: u64) -> Option<u16> {
    let (space, address) = (fadt.0.read::<u8>(offset), read_unaligned(fadt.0, offset + 4, 8));
    (space == 1 && address != 0).then_some(address as u16)
}

/// SLP_TYP of soft off: the first element of the package `_S5_`, with whatever path before the name.
fn sleep_type_s5(dsdt: Table) -> Option<u8> {
    let package = |&at: &u64| &dsdt.0.read::<[u8; 5]>(at) == b"_S5_\x12";
    let name = (36..dsdt.length().saturating_sub(10)).find(package)?;
    // A length of one byte, the number of elements; then ZeroOp, OneOp or BytePrefix and the byte.
    match dsdt.0.read::<u8>(name + 7) {
        constant @ 0..=1 => Some(constant),
        0x0a => Some(dsdt.0.read(name + 8)),
        _ => None,
    }
}

/// The memory windows of the DSDT: its DWord and QWord address space descriptors (6.4.3.5) of type memory. Without an
/// AML interpreter they are found by their fixed bytes and believed if their length agrees with their limits.
fn windows(dsdt: Table) -> [Window; 4] {
    let mut windows = [Window { start: 0, bytes: 0 }; 4];
    let mut count = 0;
    for at in 36..dsdt.length().saturating_sub(46) {
        let width = match dsdt.0.read::<[u8; 4]>(at) {
            [0x87, 0x17, 0, 0] => 4,
            [0x8a, 0x2b, 0, 0] => 8,
            _ => continue,
        };
        let field = |index| read_unaligned(dsdt.0, at + 6 + index * width, width);
        let (start, end, bytes) = (field(1), field(2), field(4));
        let consistent = field(3) == 0 && start >= 1 << 20 && end > start && bytes == end - start + 1;
        if consistent && count < windows.len() {
            windows[count] = Window { start, bytes };
            count += 1;
        }
    }
    windows
}
