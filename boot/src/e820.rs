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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_machine_with_memory_past_the_hole() {
        let ram = [0..0xc000_0000, 0x1_0000_0000..0x1_4000_0000];
        let map = map(&ram, &[0xe000_0000..0xe010_0000, 0x9_fc00..0x10_0000]);
        let expected = [
            (0, 0x9_fc00, Kind::Ram),
            (0x9_fc00, 0x6_0400, Kind::Reserved),
            (0x10_0000, 0xbff0_0000, Kind::Ram),
            (0xe000_0000, 0x10_0000, Kind::Reserved),
            (0x1_0000_0000, 0x4000_0000, Kind::Ram),
        ];
        assert_eq!(map, expected.map(|(base, len, kind)| Entry { base, len, kind }));
    }

    fn ranges() -> impl Strategy<Value = Vec<Range<u64>>> {
        proptest::collection::vec((0..40u64, 0..12u64).prop_map(|(start, len)| start..start + len), 0..6)
    }

    proptest! {
        #[test]
        fn every_address_is_what_the_ranges_say(ram in ranges(), reserved in ranges()) {
            let map = map(&ram, &reserved);
            prop_assert!(map.windows(2).all(|pair| pair[0].end() <= pair[1].base));
            prop_assert!(map.windows(2).all(|pair| pair[0].end() < pair[1].base || pair[0].kind != pair[1].kind));
            prop_assert!(map.iter().all(|entry| entry.len > 0));
            for address in 0..60 {
                let is = |ranges: &[Range<u64>]| ranges.iter().any(|range| range.contains(&address));
                let expected = if is(&reserved) { Some(Kind::Reserved) } else { is(&ram).then_some(Kind::Ram) };
                let found = map.iter().find(|entry| (entry.base..entry.end()).contains(&address));
                prop_assert_eq!(found.map(|entry| entry.kind), expected);
            }
        }
    }
}
