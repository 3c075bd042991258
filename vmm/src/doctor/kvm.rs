//! The checks of the processor and of KVM. Main thread.

use std::path::Path;

use kvm_ioctls::Kvm;

use super::probe::{self, KvmKind, SOFTWARE_KVM};
use super::{Check, Status};
use crate::kvm::{self, Capability, Processor};

/// The checks, and the kind of KVM if it could be found out.
pub(super) fn checks(root: &Path) -> (Vec<Check>, Option<KvmKind>) {
    let mut checks = vec![processor(Processor::under(root))];
    let kvm = match kvm::open_under(root) {
        Ok(kvm) => kvm,
        Err(error) => {
            checks.push(Check::problem("kvm-device", error.finding(), error.remedy()));
            return (checks, None);
        }
    };
    checks.push(device(&kvm));
    checks.extend(capabilities(|capability| kvm::has(&kvm, capability)));
    let kind = probe::kind_of(&kvm);
    checks.push(kind_check(&kind));
    (checks, kind.ok())
}

fn processor(processor: Processor) -> Check {
    let name = "processor";
    match processor {
        Processor::Vmx => Check::ok(name, "VT-x"),
        Processor::Svm => Check::ok(name, "SVM"),
        Processor::NoneInGuest | Processor::None => Check {
            name,
            status: Status::Warning,
            message: "neither VT-x nor SVM".to_owned(),
            remedy: Some(processor.remedy().to_owned()),
        },
    }
}

fn device(kvm: &Kvm) -> Check {
    let message = format!("{}: API version {}, up to {} CPUs", kvm::DEVICE, kvm.get_api_version(), kvm.get_max_vcpus());
    Check::ok("kvm-device", message)
}

/// One check that all are there, or one for each that is not.
fn capabilities(has: impl Fn(&Capability) -> bool) -> Vec<Check> {
    let name = "kvm-features";
    let missing = kvm::REQUIRED.iter().filter(|capability| !has(capability));
    let missing: Vec<_> = missing
        .map(|capability| {
            let error = kvm::KvmError::Lacks(capability);
            Check::problem(name, error.finding(), error.remedy())
        })
        .collect();
    if missing.is_empty() {
        return vec![Check::ok(name, format!("all {} that are needed", kvm::REQUIRED.len()))];
    }
    missing
}

fn kind_check(kind: &anyhow::Result<KvmKind>) -> Check {
    let name = "kvm-kind";
    match kind {
        Ok(KvmKind::Hardware) => Check::ok(name, "hardware: kernel code runs on the processor"),
        Ok(KvmKind::Software { refused }) => {
            let (meaning, remedy) = SOFTWARE_KVM.split_once("; ").unwrap_or((SOFTWARE_KVM, ""));
            Check::problem(name, format!("software: {meaning} (it lacks {})", refused.join(", ")), remedy)
        }
        Err(error) => {
            Check::problem(name, format!("{error:#}"), "look for KVM's reason with \"sudo dmesg | grep -i kvm\"")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_host_without_kvm() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("proc")).unwrap();
        fs::write(root.path().join("proc/cpuinfo"), "flags\t\t: fpu svm\n").unwrap();
        let (checks, kind) = checks(root.path());
        assert_eq!(kind, None);
        let device = root.path().join("dev/kvm");
        let expected = [
            Check::ok("processor", "SVM"),
            Check::problem(
                "kvm-device",
                format!("{}: no such device", device.display()),
                "load the module with \"sudo modprobe kvm_amd\"; if it refuses, enable SVM in the BIOS setup",
            ),
        ];
        assert_eq!(checks, expected);
    }

    #[test]
    fn each_missing_capability_is_named() {
        let all = capabilities(|_| true);
        assert!(all.len() == 1 && all[0].status == Status::Ok, "{all:?}");
        let some = capabilities(|capability| !["KVM_CAP_IRQFD", "KVM_CAP_PIT2"].contains(&capability.name));
        assert!(some.iter().all(|check| check.status == Status::Problem && check.remedy.is_some()));
        let messages: Vec<_> = some.iter().map(|check| check.message.as_str()).collect();
        let expected = [
            "/dev/kvm: this KVM lacks KVM_CAP_PIT2 (the timer in the kernel)",
            "/dev/kvm: this KVM lacks KVM_CAP_IRQFD (interrupts of devices)",
        ];
        assert_eq!(messages, expected);
    }

    #[test]
    fn a_software_kvm_is_a_problem_with_a_way_out() {
        let check = kind_check(&Ok(KvmKind::Software { refused: vec!["popcnt", "fwait"] }));
        let expected = Check::problem(
            "kvm-kind",
            "software: this KVM interprets kernel code and cannot run stock kernels (it lacks popcnt, fwait)",
            "run them on a machine with VT-x or SVM, or nested under QEMU",
        );
        assert_eq!(check, expected);
        assert_eq!(kind_check(&Ok(KvmKind::Hardware)).status, Status::Ok);
        assert_eq!(kind_check(&Err(anyhow::anyhow!("KVM_RUN"))).status, Status::Problem);
    }

    #[test]
    fn a_processor_without_virtualisation_is_only_a_warning() {
        assert_eq!(processor(Processor::Vmx).status, Status::Ok);
        assert_eq!(processor(Processor::NoneInGuest).status, Status::Warning);
        assert_eq!(processor(Processor::None).status, Status::Warning);
    }
}
