//! The bare-metal guest: a small program without an operating system that tests skiff's machine from inside. It is
//! compiled by `build.rs`; this is how the rest of the workspace gets hold of it. README.md lists its command line.

/// Where the ELF image lies on the machine that built it.
pub const PATH: &str = concat!(env!("OUT_DIR"), "/guest.elf");

/// The ELF image, for who wants to carry it along.
pub const ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"));

/// What the guest writes to the exit port when every check passed; isa-debug-exit makes `33` of it.
pub const PASSED: u32 = 0x10;

/// What the guest writes to the exit port when a check failed, the command line was bad or it crashed; `35` outside.
pub const FAILED: u32 = 0x11;
