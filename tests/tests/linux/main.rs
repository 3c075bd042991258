//! Stock Linux guests under skiff. They need a KVM that can run them: `tests/lab/runner` takes this binary into the lab
//! where the host has none, one boot for many of these tests.

mod choices;
mod discard;
mod disk;
mod filesystems;
mod fio;
mod kill;
mod limits;
mod messages;
mod net;
mod power;
mod serial;
mod smoke;
mod snapshot;
mod stable;
mod topology;
mod tree;
mod unbind;
