//! The harness of the tests that drive skiff from outside: a [`Machine`] is a running `skiff` (or QEMU beside it) with
//! its console; [`assets`] names the guest's files; a [`Network`] is one to start machines in. Test threads own the
//! machines they start.

pub mod assets;
mod console;
mod machine;
pub mod network;
mod wired;

pub use console::Console;
pub use machine::{Answer, Ended, Machine, PATIENCE, Skiff};
pub use network::Network;
pub use wired::Wired;
