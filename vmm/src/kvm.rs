//! The host's KVM: is it there, may we use it, can it do what the machine needs. Used on the main thread, before anything
//! else is opened; `skiff doctor` walks the same table.
//!
//! Specification: Linux, Documentation/virt/kvm/api.rst.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use kvm_bindings::{
    KVM_CAP_EXT_CPUID, KVM_CAP_IOEVENTFD, KVM_CAP_IOEVENTFD_ANY_LENGTH, KVM_CAP_IRQ_ROUTING, KVM_CAP_IRQCHIP,
    KVM_CAP_IRQFD, KVM_CAP_PIT2, KVM_CAP_SET_IDENTITY_MAP_ADDR, KVM_CAP_SET_TSS_ADDR, KVM_CAP_TSC_DEADLINE_TIMER,
    KVM_CAP_USER_MEMORY,
};
use kvm_ioctls::{Kvm, VmFd};

/// The device of KVM.
pub const DEVICE: &str = "/dev/kvm";

/// The only version of the KVM API since Linux 2.6.22 (api.rst, 4.1).
const API_VERSION: i32 = 12;

/// Something KVM must be able to do for every machine.
#[derive(Debug)]
pub struct Capability {
    /// As KVM_CHECK_EXTENSION knows it.
    pub number: u32,
    /// Its name in the KVM API.
    pub name: &'static str,
    /// What skiff does with it.
    pub purpose: &'static str,
}

const fn needs(number: u32, name: &'static str, purpose: &'static str) -> Capability {
    Capability { number, name, purpose }
}

/// All that skiff needs of KVM on every host. KVM_CAP_XCRS and KVM_CAP_XSAVE are not among them: a KVM on a processor
/// without XSAVE lacks them, and its guests do not miss them. KVM_CAP_X2APIC_API is asked for where it is used, in
/// machines of more than 255 vCPUs.
pub const REQUIRED: [Capability; 11] = [
    needs(KVM_CAP_USER_MEMORY, "KVM_CAP_USER_MEMORY", "guest memory"),
    needs(KVM_CAP_SET_TSS_ADDR, "KVM_CAP_SET_TSS_ADDR", "real mode on Intel"),
    needs(KVM_CAP_SET_IDENTITY_MAP_ADDR, "KVM_CAP_SET_IDENTITY_MAP_ADDR", "real mode on Intel"),
    needs(KVM_CAP_EXT_CPUID, "KVM_CAP_EXT_CPUID", "the guest's CPUID"),
    needs(KVM_CAP_IRQCHIP, "KVM_CAP_IRQCHIP", "interrupt controllers in the kernel"),
    needs(KVM_CAP_PIT2, "KVM_CAP_PIT2", "the timer in the kernel"),
    needs(KVM_CAP_IRQ_ROUTING, "KVM_CAP_IRQ_ROUTING", "MSI-X interrupts"),
    needs(KVM_CAP_IRQFD, "KVM_CAP_IRQFD", "interrupts of devices"),
    needs(KVM_CAP_IOEVENTFD, "KVM_CAP_IOEVENTFD", "doorbells of devices"),
    needs(KVM_CAP_IOEVENTFD_ANY_LENGTH, "KVM_CAP_IOEVENTFD_ANY_LENGTH", "doorbells of any width"),
    needs(KVM_CAP_TSC_DEADLINE_TIMER, "KVM_CAP_TSC_DEADLINE_TIMER", "the guest's timer"),
];

/// Why there is no usable KVM. Shown as one line: the finding, then the remedy.
#[derive(Debug, thiserror::Error)]
#[error("{}; {}", self.finding(), self.remedy())]
pub enum KvmError {
    /// No device node.
    Missing {
        /// The device.
        path: PathBuf,
        /// Says what to do.
        processor: Processor,
    },
    /// The device may not be opened.
    NoRights {
        /// The device.
        path: PathBuf,
    },
    /// The device does not open for another reason.
    Open {
        /// The device.
        path: PathBuf,
        /// What open(2) says.
        cause: io::Error,
        /// Says what to do.
        processor: Processor,
    },
    /// The file is no KVM device, or one of another age.
    ApiVersion {
        /// The device.
        path: PathBuf,
        /// What KVM_GET_API_VERSION says; -1 from something that is not KVM.
        found: i32,
    },
    /// A capability is missing.
    Lacks(&'static Capability),
}

impl KvmError {
    /// What is wrong, without the remedy.
    pub fn finding(&self) -> String {
        match self {
            Self::Missing { path, .. } => format!("{}: no such device", path.display()),
            Self::NoRights { path } => format!("{}: permission denied", path.display()),
            Self::Open { path, cause, .. } => format!("{}: {cause}", path.display()),
            Self::ApiVersion { path, found } => {
                format!("{}: KVM API version {found}, but {API_VERSION} is needed", path.display())
            }
            Self::Lacks(capability) => {
                format!("{DEVICE}: this KVM lacks {} ({})", capability.name, capability.purpose)
            }
        }
    }

    /// What to do, without what is wrong.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Missing { processor, .. } | Self::Open { processor, .. } => processor.remedy(),
            Self::NoRights { .. } => "add yourself to its group with \"sudo usermod -aG kvm $USER\", then log in again",
            Self::ApiVersion { .. } => {
                "it should be the character device that the kvm module makes; \"sudo modprobe kvm\" makes it"
            }
            Self::Lacks(_) => "a host with VT-x or SVM has it in Linux 5.4 or newer",
        }
    }
}

/// Opens [`DEVICE`] and checks that it can do all that is [`REQUIRED`].
pub fn open() -> Result<Kvm, KvmError> {
    let kvm = open_under(Path::new("/"))?;
    match REQUIRED.iter().find(|capability| !has(&kvm, capability)) {
        Some(capability) => Err(KvmError::Lacks(capability)),
        None => Ok(kvm),
    }
}

/// A VM, empty (KVM_CREATE_VM). A signal interrupts the call, also one without a handler, such as those by which an
/// io_uring that was just closed is taken apart; it is then made again.
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result,
        }
    }
}

/// Whether `kvm` has `capability`.
pub fn has(kvm: &Kvm, capability: &Capability) -> bool {
    kvm.check_extension_raw(u64::from(capability.number)) > 0
}

/// Opens the KVM device of the host whose files are under `root`, and checks its version; not its capabilities.
pub fn open_under(root: &Path) -> Result<Kvm, KvmError> {
    let path = root.join(DEVICE.trim_start_matches('/'));
    // A path without NUL always converts: `root` names an existing folder.
    let name = CString::new(path.as_os_str().as_bytes()).unwrap_or_default();
    let kvm = match Kvm::new_with_path(name) {
        Ok(kvm) => kvm,
        Err(error) => {
            let cause = io::Error::from_raw_os_error(error.errno());
            return Err(match cause.kind() {
                io::ErrorKind::NotFound => KvmError::Missing { path, processor: Processor::under(root) },
                io::ErrorKind::PermissionDenied => KvmError::NoRights { path },
                _ => KvmError::Open { path, cause, processor: Processor::under(root) },
            });
        }
    };
    match kvm.get_api_version() {
        API_VERSION => Ok(kvm),
        found => Err(KvmError::ApiVersion { path, found }),
    }
}

/// What the processor offers for virtualisation, by the flags in /proc/cpuinfo.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Processor {
    /// Intel's VT-x.
    Vmx,
    /// AMD's SVM.
    Svm,
    /// Neither, in a virtual machine.
    NoneInGuest,
    /// Neither, on the hardware itself.
    None,
}

impl Processor {
    /// The processor of the host whose files are under `root`.
    pub fn under(root: &Path) -> Self {
        let cpuinfo = std::fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default();
        let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
        let has = |name| flags.split_ascii_whitespace().any(|flag| flag == name);
        match () {
            () if has("vmx") => Self::Vmx,
            () if has("svm") => Self::Svm,
            () if has("hypervisor") => Self::NoneInGuest,
            () => Self::None,
        }
    }

    /// What to do on such a host to get a /dev/kvm.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::Vmx => {
                "load the module with \"sudo modprobe kvm_intel\"; if it refuses, enable VT-x in the BIOS setup"
            }
            Self::Svm => "load the module with \"sudo modprobe kvm_amd\"; if it refuses, enable SVM in the BIOS setup",
            Self::NoneInGuest => {
                "this is a virtual machine without VT-x or SVM; switch on nested virtualisation in its hypervisor \
                 (QEMU: -cpu host)"
            }
            Self::None => "the processor shows neither VT-x nor SVM; enable virtualisation in the BIOS setup",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::thread;
    use std::time::{Duration, Instant};

    use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

    #[test]
    fn signals_do_not_keep_a_machine_from_being_made() {
        let kvm = match open() {
            Ok(kvm) => kvm,
            Err(error) => {
                skip::because(error);
                return;
            }
        };
        let signal = SIGRTMIN() + 3;
        register_signal_handler(signal, nothing).unwrap();
        let maker = thread::spawn(move || (0..20).try_for_each(|_| create_vm(&kvm).map(drop)));
        // From more often than a machine is made to less often, wherever that is.
        for pause in (1..=50).map(|n| n * 100).cycle() {
            if maker.is_finished() {
                break;
            }
            maker.kill(signal).unwrap();
            let now = Instant::now();
            while now.elapsed() < Duration::from_micros(pause) {}
        }
        maker.join().unwrap().unwrap();
    }

    fn host(cpu_flags: &str) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("proc")).unwrap();
        fs::create_dir_all(root.path().join("dev")).unwrap();
        fs::write(root.path().join("proc/cpuinfo"), format!("processor\t: 0\nflags\t\t: fpu {cpu_flags} sse\n"))
            .unwrap();
        root
    }

    #[test]
    fn a_missing_device_gets_the_remedy_of_its_processor() {
        for (flags, remedy) in [
            ("vmx", "sudo modprobe kvm_intel"),
            ("svm hypervisor", "sudo modprobe kvm_amd"),
            ("hypervisor", "nested virtualisation"),
            ("svme", "BIOS setup"),
        ] {
            let root = host(flags);
            let error = open_under(root.path()).unwrap_err();
            assert!(matches!(error, KvmError::Missing { .. }), "{error:?}");
            let line = error.to_string();
            let start = format!("{}: no such device; ", root.path().join("dev/kvm").display());
            assert!(line.starts_with(&start) && line.contains(remedy) && !line.contains('\n'), "{line}");
        }
    }

    #[test]
    fn a_file_is_not_kvm() {
        let root = host("vmx");
        fs::write(root.path().join("dev/kvm"), "").unwrap();
        let error = open_under(root.path()).unwrap_err();
        assert!(matches!(error, KvmError::ApiVersion { found: -1, .. }), "{error:?}");
    }

    #[test]
    fn a_device_that_does_not_open_says_why() {
        let root = host("svm");
        fs::create_dir(root.path().join("dev/kvm")).unwrap();
        let error = open_under(root.path()).unwrap_err();
        assert!(matches!(error, KvmError::Open { .. }), "{error:?}");
        assert!(error.to_string().contains("Is a directory"), "{error}");
    }

    #[test]
    fn every_error_is_one_line_that_ends_with_its_remedy() {
        for error in [
            KvmError::NoRights { path: DEVICE.into() },
            KvmError::ApiVersion { path: DEVICE.into(), found: 11 },
            KvmError::Lacks(&REQUIRED[0]),
        ] {
            let line = error.to_string();
            assert!(line.starts_with("/dev/kvm: ") && line.ends_with(error.remedy()) && !line.contains('\n'), "{line}");
        }
        assert_eq!(
            KvmError::Lacks(&REQUIRED[8]).to_string(),
            "/dev/kvm: this KVM lacks KVM_CAP_IOEVENTFD (doorbells of devices); a host with VT-x or SVM has \
             it in Linux 5.4 or newer"
        );
    }

    #[test]
    fn the_numbers_are_those_of_the_kernel() {
        // include/uapi/linux/kvm.h
        for (name, number) in [
            ("KVM_CAP_IRQCHIP", 0),
            ("KVM_CAP_USER_MEMORY", 3),
            ("KVM_CAP_EXT_CPUID", 7),
            ("KVM_CAP_IRQFD", 32),
            ("KVM_CAP_IOEVENTFD", 36),
            ("KVM_CAP_IOEVENTFD_ANY_LENGTH", 122),
        ] {
            let capability = REQUIRED.iter().find(|capability| capability.name == name).unwrap();
            assert_eq!(capability.number, number, "{name}");
        }
    }
}
