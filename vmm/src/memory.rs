//! Guest memory: mapped here, registered with KVM here, used everywhere else only through `vm-memory`.
#![expect(unsafe_code, reason = "mapping memory and lending it to KVM")]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use thiserror::Error;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use crate::config::{MemoryConfig, format_size};

/// The huge page of x86-64 that KVM maps guest memory with where it can.
const HUGE_PAGE: usize = 2 << 20;

/// Why the guest has no memory.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The host refuses the mapping.
    #[error("--memory {}: the host cannot map it: {error}; {remedy}", format_size(*size))]
    Map {
        /// Bytes asked for.
        size: u64,
        /// What to do about it.
        remedy: &'static str,
        /// What the host said.
        error: io::Error,
    },
    /// The host cannot touch every page.
    #[error(
        "--memory {},prefault=on: the host cannot provide every page now: {error}; give the guest less memory, or leave \
         out prefault=on (which needs Linux 5.14)",
        format_size(*size)
    )]
    Prefault {
        /// Bytes asked for.
        size: u64,
        /// What the host said.
        error: io::Error,
    },
    /// KVM refuses the region.
    #[error("KVM refuses guest memory at {base:#x}: {error}; check the kernel's log (dmesg)")]
    Register {
        /// Guest address.
        base: u64,
        /// What KVM said.
        error: kvm_ioctls::Error,
    },
}

/// Maps the RAM `ranges` as `config` asks. The pages are zero and not touched yet, unless `prefault` is on.
///
/// # Errors
/// If the host has not that much memory to give, or not of that kind.
///
/// # Panics
/// If `ranges` overlap or are not ascending: the layout is ours.
pub fn map(config: &MemoryConfig, ranges: &[Range<u64>]) -> Result<Arc<GuestMemoryMmap>, MemoryError> {
    let failed = |error| MemoryError::Map {
        size: config.size,
        remedy: if config.hugepages {
            "reserve huge pages first (sysctl vm.nr_hugepages=N, 2 MiB each) or leave out hugepages=on"
        } else {
            "give the guest less memory, or raise the limits that apply (ulimit -v, cgroup memory.max)"
        },
        error,
    };
    let file = if config.shared { Some(Arc::new(memfd(config).map_err(failed)?)) } else { None };
    let mut offset = 0;
    let mut regions = Vec::new();
    for range in ranges {
        let len = (range.end - range.start) as usize;
        let mut flags = libc::MAP_NORESERVE | if config.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        if config.hugepages {
            // Without a reservation a missing huge page would kill the guest later, with SIGBUS.
            flags = (flags & !libc::MAP_NORESERVE) | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
        }
        let build = || {
            let builder = MmapRegionBuilder::new(len).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
            let builder = match &file {
                Some(file) => builder
                    .with_mmap_flags(flags & !(libc::MAP_HUGETLB | libc::MAP_HUGE_2MB))
                    .with_file_offset(FileOffset::from_arc(file.clone(), offset)),
                None => builder.with_mmap_flags(flags | libc::MAP_ANONYMOUS),
            };
            builder.build().map_err(|error| failed(io::Error::other(error)))
        };
        let region = aligned(build)?;
        let region = GuestRegionMmap::new(region, GuestAddress(range.start)).expect("the layout ends below 2^64");
        prepare(&region, config)?;
        regions.push(region);
        offset += len as u64;
    }
    Ok(Arc::new(GuestMemoryMmap::from_regions(regions).expect("the layout is ascending and has no overlap")))
}

/// Maps with `build` until the mapping starts at a multiple of 2 MiB, as every range of guest addresses does: only then
/// can KVM map huge pages. A kernel before 6.7 leaves the address to chance, a later one if the length is no multiple.
///
/// A mapping goes to the top of the highest gap that has the room, so a pad there moves the next attempt down.
fn aligned<E>(build: impl Fn() -> Result<MmapRegion, E>) -> Result<MmapRegion, E> {
    const ATTEMPTS: usize = 4;
    let mut pads = Vec::new();
    let mut region = build()?;
    for _ in 0..ATTEMPTS {
        let excess = region.as_ptr() as usize % HUGE_PAGE;
        if excess == 0 {
            break;
        }
        let end = region.as_ptr() as usize + region.size();
        drop(region);
        pads.extend(Pad::new(end - excess, excess));
        region = build()?;
    }
    Ok(region)
}

/// Addresses that the next mapping shall not have.
struct Pad {
    start: *mut libc::c_void,
    len: usize,
}

impl Pad {
    /// None if something else lies there by now.
    fn new(start: usize, len: usize) -> Option<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: a mapping of its own that replaces no other.
        let start = unsafe { libc::mmap(start as *mut libc::c_void, len, libc::PROT_NONE, flags, -1, 0) };
        (start != libc::MAP_FAILED).then_some(Self { start, len })
    }
}

impl Drop for Pad {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made above, which nobody was given.
        unsafe { libc::munmap(self.start, self.len) };
    }
}

/// A file of memory that other processes can map.
fn memfd(config: &MemoryConfig) -> io::Result<File> {
    const NAME: &CStr = c"skiff-guest";
    let flags = libc::MFD_CLOEXEC | if config.hugepages { libc::MFD_HUGETLB | libc::MFD_HUGE_2MB } else { 0 };
    // SAFETY: the name is a NUL-terminated string.
    let fd = unsafe { libc::memfd_create(NAME.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor, and nobody else has it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(config.size)?;
    Ok(file)
}

fn prepare(region: &GuestRegionMmap, config: &MemoryConfig) -> Result<(), MemoryError> {
    // Fewer and larger page faults while the guest touches its memory for the first time. A kernel without
    // transparent huge pages says EINVAL; then the guest just runs on small ones.
    if !config.hugepages && !config.shared {
        let _ = madvise(region, libc::MADV_HUGEPAGE);
    }
    // Guest memory has no place in a core dump: it is huge and not ours to show. It cannot fail on a mapping of ours.
    let _ = madvise(region, libc::MADV_DONTDUMP);
    if config.prefault {
        let size = config.size;
        madvise(region, libc::MADV_POPULATE_WRITE).map_err(|error| MemoryError::Prefault { size, error })?;
    }
    Ok(())
}

fn madvise(region: &GuestRegionMmap, advice: i32) -> io::Result<()> {
    // SAFETY: the range is exactly the mapping; no advice given here changes its contents.
    let done = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), advice) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes `memory` the physical memory of `vm`. The caller keeps `memory` alive as long as `vm`.
pub fn register(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), MemoryError> {
    for (slot, region) in memory.iter().enumerate() {
        let base = region.start_addr().raw_value();
        let slot = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: base,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the range is a mapping of ours; `Machine` drops it only after the vCPUs and the VM.
        unsafe { vm.set_user_memory_region(slot) }.map_err(|error| MemoryError::Register { base, error })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    fn config(shared: bool, prefault: bool) -> MemoryConfig {
        MemoryConfig { size: 4 << 20, hugepages: false, prefault, shared }
    }

    #[test]
    fn private_and_shared_memory_read_back_across_both_ranges() {
        for shared in [false, true] {
            let ranges = [0..2 << 20, 1 << 32..(1 << 32) + (2 << 20)];
            let memory = map(&config(shared, true), &ranges).unwrap();
            for base in [0, 1 << 32] {
                assert_eq!(memory.read_obj::<u64>(GuestAddress(base + 0x1000)).unwrap(), 0);
                memory.write_obj(base ^ 0x5aa5, GuestAddress(base + 0x1000)).unwrap();
            }
            for base in [0u64, 1 << 32] {
                assert_eq!(memory.read_obj::<u64>(GuestAddress(base + 0x1000)).unwrap(), base ^ 0x5aa5);
            }
            let has_file = memory.iter().all(|region| region.file_offset().is_some());
            assert_eq!(has_file, shared);
        }
    }

    #[test]
    fn memory_is_aligned_to_huge_pages_wherever_the_gap_ends() {
        // Small mappings in between move the end of the gap that the next memory goes to, and so does the odd size.
        let mut held = Vec::new();
        for pages in 0..20 {
            let memory = map(&config(pages % 2 == 1, false), std::slice::from_ref(&(0..(32 << 20) + 4096))).unwrap();
            assert_eq!(memory.iter().next().unwrap().as_ptr() as usize % HUGE_PAGE, 0);
            held.push((memory, MmapRegion::<()>::new(4096 * (pages + 1)).unwrap()));
        }
    }

    #[test]
    fn memory_that_cannot_be_mapped_names_the_option() {
        let size = 1 << 46;
        let config = MemoryConfig { size, hugepages: true, prefault: false, shared: false };
        let error = map(&config, std::slice::from_ref(&(0..size))).unwrap_err().to_string();
        assert!(error.starts_with("--memory 64T: ") && error.contains("hugepages=on"), "{error}");
    }
}
