//! The map of guest-physical memory as firmware reports it (ACPI 6.5, section 15: System Address Map), for the zero page
//! and for the PVH memory map, which use the same type numbers. Built once by the main thread.

use std::ops::Range;

/// The entries a zero page has room for (`E820_MAX_ENTRIES_ZEROPAGE`).
pub const MAX_ENTRIES: usize = 128;

/// What a range of addresses is good for (ACPI 6.5, table 15.374).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Memory the guest may use.
    Ram = 1,
    /// Not to be used: firmware areas, device windows.
    Reserved = 2,
    /// ACPI tables, usable as RAM once they were read.
    AcpiReclaimable = 3,
    /// To be preserved across sleep.
    AcpiNvs = 4,
}

/// One range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First address.
    pub base: u64,
    /// Length in bytes, not zero.
    pub len: u64,
    /// What is there.
    pub kind: Kind,
}

impl Entry {
    /// The first address after the entry.
    pub fn end(&self) -> u64 {
        self.base.saturating_add(self.len)
    }
}

/// The map of a machine with these ranges of RAM, of which (or beside which) the `reserved` ranges are not usable.
///
/// Returns entries sorted by address that do not overlap; neighbours of one kind are one entry. Ranges of each list may
/// come in any order, may touch and overlap; empty ones are left out.
pub fn map(ram: &[Range<u64>], reserved: &[Range<u64>]) -> Vec<Entry> {
    let reserved = union(reserved);
    let mut entries: Vec<Entry> = reserved.iter().map(|range| entry(range, Kind::Reserved)).collect();
    for ram in union(ram) {
        let mut free = ram.start;
        for hole in &reserved {
            if free < hole.start.min(ram.end) {
                entries.push(entry(&(free..hole.start.min(ram.end)), Kind::Ram));
            }
            free = free.max(hole.end);
        }
        if free < ram.end {
            entries.push(entry(&(free..ram.end), Kind::Ram));
        }
    }
    entries.sort_unstable_by_key(|entry| entry.base);
    entries
}

fn entry(range: &Range<u64>, kind: Kind) -> Entry {
    Entry { base: range.start, len: range.end - range.start, kind }
}

/// The same addresses as sorted ranges with gaps between them.
fn union(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut sorted: Vec<_> = ranges.iter().filter(|range| !range.is_empty()).cloned().collect();
    sorted.sort_unstable_by_key(|range| range.start);
    let mut union: Vec<Range<u64>> = Vec::with_capacity(sorted.len());
    for range in sorted {
        match union.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => union.push(range),
        }
    }
    union
}
