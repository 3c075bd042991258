//! Compiles the guest with the compiler of the build. Cargo itself could not: the guest needs its own linker script and
//! no start files, and it must stay an optimised `panic=abort` program also when `cargo test` builds for unwinding.

use std::env;
use std::path::Path;
use std::process::Command;

fn main() {
    let here = env::var("CARGO_MANIFEST_DIR").expect("cargo sets it for build scripts");
    let out = env::var("OUT_DIR").expect("cargo sets it for build scripts");
    let (source, script) = (Path::new(&here).join("src"), Path::new(&here).join("guest.ld"));
    for input in ["src", "guest.ld", "build.rs"] {
        println!("cargo::rerun-if-changed={input}");
    }
    println!("cargo::rerun-if-env-changed=RUSTC");
    let mut rustc = Command::new(env::var_os("RUSTC").expect("cargo sets it for build scripts"));
    rustc.arg(source.join("main.rs")).args(["--edition=2024", "--crate-type=bin", "--crate-name=guest"]);
    rustc.args(["--target=x86_64-unknown-linux-gnu", "-Copt-level=2", "-Cpanic=abort", "-Ccodegen-units=1"]);
    rustc.args(["-Crelocation-model=static", "-Cforce-unwind-tables=no", "-Cdebuginfo=0", "-Cstrip=debuginfo"]);
    for argument in ["-nostdlib", "-nostartfiles", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-n"] {
        rustc.arg(format!("-Clink-arg={argument}"));
    }
    rustc.arg(format!("-Clink-arg=-Wl,-T,{}", script.display()));
    rustc.arg("-o").arg(Path::new(&out).join("guest.elf"));
    let status = rustc.status().unwrap_or_else(|error| panic!("cannot run {rustc:?}: {error}"));
    assert!(status.success(), "the guest does not compile: {rustc:?}");
}
