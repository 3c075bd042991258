//! One virtual CPU and its thread: enter the guest, answer its exits from the buses, until the machine ends.
#![expect(unsafe_code, reason = "KVM's run area is a C union")]

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use devices::bus::Bus;
use devices::pause::PauseLine;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::exit::{ExitLine, ExitReason};
use crate::{failure, tsc};

/// The two address spaces that an exit can lead to.
#[derive(Default)]
pub struct Buses {
    /// Port I/O.
    pub pio: Bus,
    /// Physical memory that is not RAM.
    pub mmio: Bus,
}

/// A vCPU, ready to run. Built on the main thread, then moved into its own.
pub struct Vcpu {
    /// Its number, also its APIC id.
    pub id: u32,
    /// KVM's side, with CPUID and registers set.
    pub fd: VcpuFd,
    /// Where exits go.
    pub buses: Arc<Buses>,
    /// Where the end of the machine is announced.
    pub exit: Arc<ExitLine>,
    /// For the message when KVM gives up.
    pub memory: Arc<GuestMemoryMmap>,
}

/// The running threads of all vCPUs. Dropping it stops them.
pub struct VcpuThreads {
    hold: Arc<Hold>,
    threads: Vec<JoinHandle<()>>,
}

/// A stack below 2 MiB: a larger one may start with a transparent huge page, which is 2 MiB of host memory for each vCPU.
const STACK_BYTES: usize = 256 << 10;

impl VcpuThreads {
    /// Starts every vCPU in a thread of its own, called `vcpuN`. They stay outside the guest while `pause` is raised.
    pub fn start(vcpus: Vec<Vcpu>, pause: &Arc<PauseLine>) -> io::Result<Self> {
        register_signal_handler(kick_signal(), on_kick)?;
        let hold = Hold { pause: pause.clone(), stop: AtomicBool::new(false), held: Mutex::new(0), on: Condvar::new() };
        let mut running = Self { hold: Arc::new(hold), threads: Vec::new() };
        for vcpu in vcpus {
            let hold = running.hold.clone();
            let thread = thread::Builder::new().name(format!("vcpu{}", vcpu.id)).stack_size(STACK_BYTES);
            running.threads.push(thread.spawn(move || vcpu.run(&hold))?);
        }
        Ok(running)
    }

    /// Brings the vCPUs out of the guest when the machine is paused. Returns at once, `false` if one was not seen to stay
    /// out: call it again soon then, for a kick that arrives just before KVM_RUN is lost.
    pub fn hold(&self) -> bool {
        let all = *self.hold.held() == self.threads.len();
        if !all {
            for thread in &self.threads {
                let _ = thread.kill(kick_signal());
            }
        }
        all
    }

    /// Lets them go on: the line was released.
    pub fn go_on(&self) {
        let _held = self.hold.held();
        self.hold.on.notify_all();
    }

    fn stop(&mut self) {
        self.hold.stop.store(true, Ordering::Release);
        self.go_on();
        for thread in self.threads.drain(..) {
            // A kick that arrives just before KVM_RUN is lost, so it is repeated until the thread is seen to end.
            while !thread.is_finished() {
                let _ = thread.kill(kick_signal());
                thread::sleep(Duration::from_micros(100));
            }
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
    }
}

impl Drop for VcpuThreads {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What keeps vCPUs out of the guest: for good, or while the machine is paused.
struct Hold {
    pause: Arc<PauseLine>,
    stop: AtomicBool,
    /// How many wait for the machine to go on.
    held: Mutex<usize>,
    on: Condvar,
}

impl Hold {
    fn held(&self) -> MutexGuard<'_, usize> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Returns when the machine goes on, or stops.
    fn wait(&self) {
        let mut held = self.held();
        *held += 1;
        while self.pause.is_paused() && !self.is_stopped() {
            held = self.on.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        *held -= 1;
    }
}

/// Interrupts KVM_RUN; its handler does nothing.
fn kick_signal() -> i32 {
    SIGRTMIN()
}

extern "C" fn on_kick(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl Vcpu {
    fn run(mut self, hold: &Hold) {
        while !hold.is_stopped() && !self.exit.is_raised() {
            if hold.pause.is_paused() {
                hold.wait();
                // For the guest's watchdog: the time that passed was not its own. A guest without kvmclock has none.
                let _ = self.fd.kvmclock_ctrl();
                continue;
            }
            if let Some(reason) = self.enter() {
                self.exit.raise(reason);
            }
        }
    }

    /// Runs the guest until its next exit and answers it; a reason when the machine cannot go on.
    fn enter(&mut self) -> Option<ExitReason> {
        let failed = match self.fd.run() {
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.buses.mmio.read(address, data);
                return None;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.buses.mmio.write(address, data);
                return None;
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                let data = std::ptr::from_mut(data);
                let width = self.port_width();
                // SAFETY: the slice is KVM's run area, which nobody else touches while the vCPU is out of the guest.
                for item in unsafe { &mut *data }.chunks_mut(width) {
                    self.buses.pio.read(u64::from(port), item);
                }
                return None;
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                let data = std::ptr::from_ref(data);
                let width = self.port_width();
                // SAFETY: as above.
                for item in unsafe { &*data }.chunks(width) {
                    self.buses.pio.write(u64::from(port), item);
                }
                return None;
            }
            Ok(VcpuExit::X86Rdmsr(read)) => {
                match tsc::read_filtered(read.index) {
                    Some(value) => *read.data = value,
                    None => *read.error = 1,
                }
                return None;
            }
            // Interrupted by a signal, or nothing to do: go in again.
            Ok(VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => return None,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => return None,
            Ok(VcpuExit::Shutdown) => return Some(ExitReason::TripleFault),
            Ok(VcpuExit::InternalError) => failure::Failure::Internal,
            Ok(VcpuExit::FailEntry(reason, cpu)) => failure::Failure::Entry { reason, cpu },
            Ok(other) => failure::Failure::Exit(format!("{other:?}")),
            Err(error) => failure::Failure::Run(error),
        };
        tracing::error!("{}", failure::describe(&mut self.fd, self.id, &self.memory, &failed));
        Some(ExitReason::KvmError)
    }

    /// Bytes of one access: a string instruction gives several at once, to the same port.
    fn port_width(&mut self) -> usize {
        // SAFETY: only called for KVM_EXIT_IO, where `io` is the member KVM filled in.
        let io = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io };
        usize::from(io.size).max(1)
    }
}
