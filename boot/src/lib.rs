//! Everything a kernel finds in memory and registers at its first instruction. Knows guest memory only, not KVM.
