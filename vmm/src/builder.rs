//! Builds one machine from its configuration and opened resources. After [`Board::connect`] nothing about it changes
//! but what the guest writes. Main thread.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, anyhow, bail};
use boot::Subject;
use boot::acpi::{self, AcpiConfig, PortDevice};
use devices::acpi::{PowerButton, SleepRegisters};
use devices::bus::BusDevice;
use devices::cmos::Cmos;
use devices::debug_exit::DebugExit;
use devices::i8042::I8042;
use devices::pause::PauseLine;
use devices::pci::root::{ConfigPorts, Ecam, MemoryWindow, PciDevice, PciRoot};
use devices::power::{PowerLine, PowerRequest};
use devices::pvpanic::Pvpanic;
use devices::serial::Serial;
use devices::virtio::blk::errors::Errors;
use devices::virtio::blk::{Blk, BlkOptions};
use devices::virtio::device::VirtioDevice;
use devices::virtio::net::Net;
use devices::virtio::pci::VirtioPci;
use devices::virtio::rng::Rng;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap, kvm_pit_config};
use kvm_ioctls::{Cap, Error, Kvm, VcpuFd, VmFd};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::config::{BootProtocol, Discard, VmConfig, format_size};
use crate::console::Console;
use crate::cpuid::{self, Topology};
use crate::exit::{ExitLine, ExitReason};
use crate::irq::KvmInterrupts;
use crate::layout::{self, Layout, gsi, port};
use crate::vcpu::{Buses, Vcpu};
use crate::vm::Resources;
use crate::{kvm, memory, regs, tsc};

/// The i8042's command port, and the command that pulses the reset line.
const RESET_PORT: u16 = port::I8042 + 4;
const RESET_COMMAND: u8 = 0xfe;

/// A machine that is ready to run. Fields drop in their order: the vCPUs before the memory they run in.
pub struct Machine {
    /// The vCPUs, to be started.
    pub vcpus: Vec<Vcpu>,
    /// COM1, for console input.
    pub serial: Arc<Serial>,
    /// What SIGTERM presses.
    pub power_button: PowerButton,
    /// The virtio devices: stopped, which drains and flushes them, when the machine ends.
    pub functions: Vec<Arc<VirtioPci>>,
    _vm: Arc<VmFd>,
    _memory: Arc<GuestMemoryMmap>,
}

/// A machine without its console, which comes last: opening it shows, in an emptied file or a raw terminal, so nothing
/// that a mistake of the user can prevent may come after it.
pub struct Board {
    vcpus: Vec<VcpuFd>,
    buses: Buses,
    interrupts: Arc<KvmInterrupts>,
    power_button: PowerButton,
    functions: Vec<Arc<VirtioPci>>,
    exit: Arc<ExitLine>,
    vm: Arc<VmFd>,
    memory: Arc<GuestMemoryMmap>,
}

impl Board {
    /// The whole machine, with COM1 on `console`.
    ///
    /// # Errors
    /// If the host gives no eventfd.
    pub fn connect(mut self, console: &mut Console) -> anyhow::Result<Machine> {
        let serial = add_com1(&mut self.buses, &self.interrupts, console)?;
        let Self { vcpus, buses, power_button, functions, exit, vm, memory, .. } = self;
        let buses = Arc::new(buses);
        let vcpu = |(id, fd)| Vcpu { id, fd, buses: buses.clone(), exit: exit.clone(), memory: memory.clone() };
        let vcpus = (0..).zip(vcpus).map(vcpu).collect();
        Ok(Machine { vcpus, serial, power_button, functions, _vm: vm, _memory: memory })
    }
}

/// What a machine is built from.
pub struct VmBuilder<'a> {
    /// `/dev/kvm`, checked.
    pub kvm: &'a Kvm,
    /// What the user asked for.
    pub config: &'a VmConfig,
    /// What the user named, opened.
    pub resources: &'a Resources,
    /// Where the end of the machine is announced.
    pub exit: &'a Arc<ExitLine>,
    /// Where a disk pauses the machine.
    pub pause: &'a Arc<PauseLine>,
}

impl VmBuilder<'_> {
    /// Builds all but the console: VM, memory, devices, firmware tables, kernel, vCPUs, in this order.
    ///
    /// # Errors
    /// One line that names the option and the remedy. Nothing runs then, and no file was touched.
    pub fn build(&self) -> anyhow::Result<Board> {
        let supported =
            self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM does not tell its CPUID leaves")?;
        let layout = Layout::new(self.config.memory.size, cpuid::address_bits(&supported)).with_context(|| {
            let (size, bits) = (format_size(self.config.memory.size), cpuid::address_bits(&supported));
            format!("--memory {size}: this CPU's guests address {bits} bits of memory; give the guest less")
        })?;
        let (vm, extended_destination) = self.create_vm()?;
        let memory = memory::map(&self.config.memory, &layout.ram)?;
        memory::register(&vm, &memory)?;
        // After the memory: KVM_SET_USER_MEMORY_REGION would wait out the grace period that these begin (milliseconds).
        create_interrupt_controllers(&vm)?;

        let interrupts = Arc::new(KvmInterrupts::new(vm.clone(), extended_destination));
        let mut buses = Buses::default();
        self.add_board(&mut buses);
        let power_button = power_button(&interrupts)?;
        let functions = self.add_pci(&mut buses, &layout, &memory, &interrupts)?;

        acpi::write(&memory, layout::ACPI_TABLES, &self.acpi_config(&layout))?;
        boot::reset_vector::write(&memory, RESET_PORT as u8, RESET_COMMAND)?;
        let loaded = self.load_kernel(&memory, &layout)?;
        let vcpus = self.create_vcpus(&vm, &supported, extended_destination).map_err(|error| {
            let no_files = error.root_cause().downcast_ref().is_some_and(|it: &Error| it.errno() == libc::EMFILE);
            let remedy = if no_files { "; raise the limit of open files (ulimit -n)" } else { "" };
            anyhow!("--cpus {}: {error:#}{remedy}", self.config.cpus)
        })?;
        regs::set(&vcpus[0], &loaded.state).context("KVM refuses the registers of the first vCPU")?;
        let exit = self.exit.clone();
        Ok(Board { vcpus, buses, interrupts, power_button, functions, exit, vm, memory })
    }

    /// The VM, empty, and whether its MSI destinations may be extended.
    fn create_vm(&self) -> anyhow::Result<(Arc<VmFd>, bool)> {
        let limit = self.kvm.get_max_vcpus() as u64;
        let cpus = u64::from(self.config.cpus);
        if cpus > limit {
            bail!(
                "--cpus {cpus}: KVM on this host runs at most {limit} vCPUs in one machine; use --cpus {limit} or less"
            );
        }
        let vm = kvm::create_vm(self.kvm).context("KVM cannot create a machine (KVM_CREATE_VM)")?;
        // With more vCPUs than 8 bits of APIC id can name, KVM must take 32-bit ones.
        let extended_destination = cpus > 255;
        if extended_destination {
            const USE_32BIT_IDS_NO_BROADCAST_QUIRK: u64 = 0b11;
            let mut x2apic = kvm_enable_cap { cap: Cap::X2ApicApi as u32, ..Default::default() };
            x2apic.args[0] = USE_32BIT_IDS_NO_BROADCAST_QUIRK;
            vm.enable_cap(&x2apic)
                .context("--cpus: more than 255 vCPUs need KVM_CAP_X2APIC_API; use --cpus 255 or less")?;
        }
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).context("KVM_SET_IDENTITY_MAP_ADDR")?;
        vm.set_tss_address(layout::KVM_TSS as usize).context("KVM_SET_TSS_ADDR")?;
        Ok((Arc::new(vm), extended_destination))
    }

    /// The vCPUs, with CPUID and MSRs, but not yet the registers of the first.
    fn create_vcpus(&self, vm: &VmFd, supported: &CpuId, extended_destination: bool) -> anyhow::Result<Vec<VcpuFd>> {
        let named = |id: u32| move || format!("KVM cannot create vCPU {id}");
        let vcpus = (0..self.config.cpus)
            .map(|id| vm.create_vcpu(u64::from(id)).with_context(named(id)))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let topology = Topology {
            cpus: self.config.cpus,
            tsc_deadline: self.kvm.check_extension(Cap::TscDeadlineTimer),
            extended_destination,
            invariant_tsc: tsc::is_invariant(vm, supported),
        };
        for (id, vcpu) in (0..).zip(&vcpus) {
            vcpu.set_cpuid2(&topology.leaves(supported, id)).with_context(named(id))?;
            regs::set_msrs(vcpu).with_context(named(id))?;
        }
        Ok(vcpus)
    }

    /// The devices of the board that have neither interrupts nor threads.
    fn add_board(&self, buses: &mut Buses) {
        let exit = self.exit.clone();
        let power: PowerLine = Arc::new(move |request| {
            exit.raise(match request {
                PowerRequest::Poweroff => ExitReason::Poweroff,
                PowerRequest::Reset => ExitReason::Reset,
                PowerRequest::Panic => ExitReason::Panic,
                PowerRequest::DebugExit(value) => ExitReason::DebugExit(value),
            });
        });
        let mut add = |port: u16, ports, device: Arc<dyn BusDevice>| buses.pio.insert(u64::from(port), ports, device);
        add(port::I8042, devices::i8042::PORTS, Arc::new(I8042::new(power.clone())));
        add(port::RTC, devices::cmos::PORTS, Arc::new(Cmos::default()));
        add(port::ACPI_SLEEP, devices::acpi::SLEEP_PORTS, Arc::new(SleepRegisters::new(power.clone())));
        add(port::PVPANIC, devices::pvpanic::PORTS, Arc::new(Pvpanic::new(power.clone())));
        if let Some(port) = self.config.debug_exit {
            add(port, devices::debug_exit::PORTS, Arc::new(DebugExit::new(power)));
        }
    }

    /// The root bus with every virtio device on it, BARs assigned.
    fn add_pci(
        &self,
        buses: &mut Buses,
        layout: &Layout,
        memory: &Arc<GuestMemoryMmap>,
        interrupts: &Arc<KvmInterrupts>,
    ) -> anyhow::Result<Vec<Arc<VirtioPci>>> {
        let disks = self.config.disks.iter().zip(&self.resources.disks).enumerate().map(|(number, (config, open))| {
            let options = BlkOptions {
                number,
                serial: config.serial.clone(),
                engines: open.engines.clone().with_threads(config.thread_pool_max),
                queues: config.queues,
                queue_size: config.queue_size,
                poll: config.poll,
                merge: config.merge,
                unmap: config.discard == Discard::Unmap,
                statistics: self.resources.statistics[number].clone(),
                limits: config.limits,
                abandon: self.exit.forced().clone(),
                errors: Some(Errors { read: config.rerror, write: config.werror, pause: self.pause.clone() }),
            };
            let device: Box<dyn VirtioDevice> = Box::new(Blk::new(open.disk.clone(), &options));
            (device, config.ioeventfd)
        });

        let nets = self.resources.nets.iter().map(|open| {
            let device: Box<dyn VirtioDevice> = Box::new(Net::new(open.backend.clone(), open.options.clone()));
            (device, open.ioeventfd)
        });

        let rng: Box<dyn VirtioDevice> = Box::new(Rng::new().context("no source of random numbers")?);

        let mut functions = Vec::new();
        let mut next_gsi = gsi::IOAPIC_PINS;
        for (device, ioeventfd) in disks.chain(nets).chain([(rng, true)]) {
            let function =
                VirtioPci::new(device, memory.clone(), next_gsi, interrupts.clone(), interrupts.clone(), ioeventfd)
                    .context("no eventfds for a virtio device; raise the limit of open files (ulimit -n)")?;
            next_gsi += u32::from(function.vectors());
            functions.push(function);
        }
        let root = PciRoot::new(functions.iter().map(|function| function.clone() as Arc<dyn PciDevice>).collect())?;
        root.assign_bars(layout::PCI_WINDOW_32, layout.pci_window_64.clone().unwrap_or(0..0))?;

        let root = Arc::new(root);
        let length = |range: &std::ops::Range<u64>| range.end - range.start;
        buses.pio.insert(u64::from(port::PCI_CONFIG), 8, Arc::new(ConfigPorts::new(root.clone())));
        buses.mmio.insert(layout::PCI_ECAM.start, length(&layout::PCI_ECAM), Arc::new(Ecam::new(root.clone())));
        for window in [Some(&layout::PCI_WINDOW_32), layout.pci_window_64.as_ref()].into_iter().flatten() {
            let device = Arc::new(MemoryWindow::new(root.clone(), window.start));
            buses.mmio.insert(window.start, length(window), device);
        }
        Ok(functions)
    }

    fn acpi_config(&self, layout: &Layout) -> AcpiConfig {
        AcpiConfig {
            apic_ids: (0..self.config.cpus).collect(),
            local_apic: layout::LAPIC,
            io_apic: layout::IOAPIC,
            ecam: layout::PCI_ECAM.start as u32,
            last_bus: 0,
            pci_window_32: layout::PCI_WINDOW_32.start as u32..layout::PCI_WINDOW_32.end as u32,
            pci_window_64: layout.pci_window_64.clone(),
            serial: Some(PortDevice { port: port::COM1, gsi: Some(gsi::COM1) }),
            rtc: PortDevice { port: port::RTC, gsi: None },
            power_button_gsi: gsi::POWER_BUTTON,
            sleep_control: port::ACPI_SLEEP,
            sleep_status: port::ACPI_SLEEP + 1,
            reset_port: RESET_PORT,
            reset_value: RESET_COMMAND,
            pvpanic: Some(port::PVPANIC),
        }
    }

    fn load_kernel(&self, memory: &GuestMemoryMmap, layout: &Layout) -> anyhow::Result<boot::Loaded> {
        let request = boot::Request {
            kernel: &self.resources.kernel,
            initrd: self.resources.initrd.as_ref(),
            cmdline: &self.config.cmdline,
            protocol: match self.config.boot_protocol {
                BootProtocol::Auto => boot::Protocol::Auto,
                BootProtocol::Linux => boot::Protocol::Linux,
                BootProtocol::Pvh => boot::Protocol::Pvh,
            },
            e820: &boot::e820::map(&layout.ram, &[layout::LOW_RESERVED, layout::PCI_ECAM]),
            rsdp: layout::ACPI_TABLES.start,
        };
        boot::load(memory, &request).map_err(|error| {
            let named = |path: &Path| path.display().to_string();
            let subject = match (error.subject(), &self.config.initrd) {
                (Subject::Kernel, _) => format!("--kernel {}", named(&self.config.kernel)),
                (Subject::Initrd, Some(path)) => format!("--initrd {}", named(path)),
                (Subject::Initrd, None) => "--initrd".into(),
                (Subject::Cmdline, _) => "--cmdline".into(),
                (Subject::Memory, _) => format!("--memory {}", format_size(self.config.memory.size)),
            };
            anyhow::Error::new(error).context(subject)
        })
    }
}

fn add_com1(buses: &mut Buses, interrupts: &KvmInterrupts, console: &mut Console) -> anyhow::Result<Arc<Serial>> {
    let interrupt = EventFd::new(EFD_NONBLOCK).context("no eventfd for COM1")?;
    interrupts.attach_pin(gsi::COM1, &interrupt).context("KVM_IRQFD for COM1")?;
    let serial = console.attach(interrupt).context("no eventfd for COM1")?;
    buses.pio.insert(u64::from(port::COM1), devices::serial::PORTS, serial.clone());
    Ok(serial)
}

fn power_button(interrupts: &Arc<KvmInterrupts>) -> anyhow::Result<PowerButton> {
    let event = EventFd::new(EFD_NONBLOCK).context("no eventfd for the power button")?;
    interrupts.attach_pin(gsi::POWER_BUTTON, &event).context("KVM_IRQFD for the power button")?;
    let interrupts = interrupts.clone();
    Ok(PowerButton::new(event, Box::new(move || interrupts.pin_is_enabled(gsi::POWER_BUTTON))))
}

fn create_interrupt_controllers(vm: &VmFd) -> anyhow::Result<()> {
    vm.create_irq_chip().context("KVM cannot create its interrupt controllers (KVM_CREATE_IRQCHIP)")?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).context("KVM cannot create its timer (KVM_CREATE_PIT2)")
}
