//! What the loader hands over: struct hvm_start_info of the PVH boot protocol (version 1).

use crate::cpu::Mmio;

const MAGIC: u32 = 0x336e_c578;

/// The start information, checked.
pub(crate) struct Boot {
    /// Words for the guest.
    pub(crate) command_line: CommandLine,
    /// Address of the RSDP.
    pub(crate) rsdp: u64,
    memory_map: Mmio,
    memory_map_entries: u32,
}

impl Boot {
    /// Reads the structure at `start_info`.
    pub(crate) fn new(start_info: u64) -> Self {
        let info = Mmio(start_info);
        assert!(info.read::<u32>(0) == MAGIC, "no hvm_start_info at {start_info:#x}");
        assert!(info.read::<u32>(4) >= 1, "hvm_start_info without a memory map");
        Self {
            command_line: CommandLine { text: string_at(info.read(24)) },
            rsdp: info.read(32),
            memory_map: Mmio(info.read(40)),
            memory_map_entries: info.read(48),
        }
    }

    /// The ranges of RAM: start and end.
    pub(crate) fn ram(&self) -> impl Iterator<Item = (u64, u64)> {
        let map = self.memory_map;
        (0..u64::from(self.memory_map_entries)).map(move |index| Mmio(map.0 + index * 24)).filter_map(|entry| {
            let (start, size) = (entry.read::<u64>(0), entry.read::<u64>(8));
            (entry.read::<u32>(16) == 1).then_some((start, start + size))
        })
    }
}

fn string_at(address: u64) -> &'static str {
    if address == 0 {
        return "";
    }
    // SAFETY: the loader put a NUL-terminated string there, outside of the guest's image and of `memory`'s arena.
    let bytes = unsafe { core::ffi::CStr::from_ptr(address as *const core::ffi::c_char) };
    bytes.to_str().unwrap_or("")
}

/// Words separated by blanks: `key=value` or just `key`.
#[derive(Clone, Copy)]
pub(crate) struct CommandLine {
    /// All of it.
    pub(crate) text: &'static str,
}

impl CommandLine {
    /// The value of the last `key=value`.
    pub(crate) fn value(&self, key: &str) -> Option<&'static str> {
        self.text.split_ascii_whitespace().filter_map(|word| word.strip_prefix(key)?.strip_prefix('=')).next_back()
    }

    /// Whether `word` is there, as it is.
    pub(crate) fn has(&self, word: &str) -> bool {
        self.text.split_ascii_whitespace().any(|said| said == word)
    }

    /// `on` or `off`; `default` if it is not given.
    pub(crate) fn switch(&self, key: &str, default: bool) -> bool {
        match self.value(key) {
            None => default,
            Some("on") => true,
            Some("off") => false,
            Some(value) => panic!("{key}={value} is neither on nor off"),
        }
    }

    /// The value as a number, decimal or 0x; `default` if it is not given.
    pub(crate) fn number(&self, key: &str, default: u64) -> u64 {
        let Some(value) = self.value(key) else { return default };
        let parsed = match value.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => value.parse(),
        };
        parsed.unwrap_or_else(|_| panic!("{key}={value} is not a number"))
    }
}
