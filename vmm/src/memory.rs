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
};

use crate::config::{MemoryConfig, format_size};

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
        let mut builder = MmapRegionBuilder::new(len).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
        builder = match &file {
            Some(file) => builder
                .with_mmap_flags(flags & !(libc::MAP_HUGETLB | libc::MAP_HUGE_2MB))
                .with_file_offset(FileOffset::from_arc(file.clone(), offset)),
            None => builder.with_mmap_flags(flags | libc::MAP_ANONYMOUS),
        };
        let region = builder.build().map_err(|error| failed(io::Error::other(error)))?;
        let region = GuestRegionMmap::new(region, GuestAddress(range.start)).expect("the layout ends below 2^64");
        advise(&region, config).map_err(failed)?;
        regions.push(region);
        offset += len as u64;
    }
    Ok(Arc::new(GuestMemoryMmap::from_regions(regions).expect("the layout is ascending and has no overlap")))
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

fn advise(region: &GuestRegionMmap, config: &MemoryConfig) -> io::Result<()> {
    let madvise = |advice| {
        // SAFETY: the range is exactly the mapping; no advice given here changes its contents.
        let done = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), advice) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // Fewer and larger page faults while the guest touches its memory for the first time. A kernel without
    // transparent huge pages says EINVAL; then the guest just runs on small ones.
    if !config.hugepages && !config.shared {
        let _ = madvise(libc::MADV_HUGEPAGE);
    }
    // Guest memory has no place in a core dump: it is huge and not ours to show.
    madvise(libc::MADV_DONTDUMP)?;
    if config.prefault {
        madvise(libc::MADV_POPULATE_WRITE)?;
    }
    Ok(())
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
    fn memory_that_cannot_be_mapped_names_the_option() {
        let size = 1 << 46;
        let config = MemoryConfig { size, hugepages: true, prefault: false, shared: false };
        let error = map(&config, std::slice::from_ref(&(0..size))).unwrap_err().to_string();
        assert!(error.starts_with("--memory 64T: ") && error.contains("hugepages=on"), "{error}");
    }
}
