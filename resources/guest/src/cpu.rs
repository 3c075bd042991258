//! The processor as the rest of the guest sees it from level 3: ports, MSRs, interrupts, time, device memory.

use core::arch::{asm, x86_64::_rdtsc};
use core::sync::atomic::{AtomicU64, Ordering};

unsafe extern "C" {
    static exception_stubs: [[u8; 16]; 32];
    static interrupt_stubs: [[u8; 64]; 32];
    static interrupt_descriptors: [[AtomicU64; 2]; 256];
    static interrupts: [AtomicU64; 256];
    static interrupts_total: AtomicU64;
    static end_of_interrupt: AtomicU64;
}

/// The functions of `privileged_call` in entry.s, in the order of its table.
#[derive(Clone, Copy)]
enum Call {
    In8,
    In16,
    In32,
    Out8,
    Out16,
    Out32,
    ReadMsr,
    FlushTlb,
    EnableInterrupts,
    Wait,
}

/// First interrupt vector that has a handler; there are 32.
const FIRST_VECTOR: u8 = 0x20;
/// Vector of the timer that bounds [`sleep`].
const TIMER_VECTOR: u8 = 0x3e;
const SPURIOUS_VECTOR: u8 = 0x3f;

const IA32_APIC_BASE: u32 = 0x1b;
const APIC_ID: u64 = 0x20;
const APIC_EOI: u64 = 0xb0;
const APIC_SPURIOUS: u64 = 0xf0;
const APIC_TIMER: u64 = 0x320;
const APIC_TIMER_COUNT: u64 = 0x380;
const APIC_TIMER_DIVIDE: u64 = 0x3e0;

fn call(function: Call, first: u64, second: u64) -> u64 {
    let answer;
    // SAFETY: entry.s defines what each function does and that only RAX, RCX, RDX and the flags change.
    unsafe {
        asm!("call privileged_call", inout("rax") function as u64 => answer, in("rdi") first, in("rsi") second,
            out("rcx") _, out("rdx") _);
    }
    answer
}

/// An access width of ports, configuration space and device memory.
pub(crate) trait Width: Copy + PartialEq + Into<u64> {
    const BYTES: u64;
    fn port_in(port: u16) -> Self;
    fn port_out(port: u16, value: Self);
}

macro_rules! width {
    ($type:ty, $in:ident, $out:ident) => {
        impl Width for $type {
            const BYTES: u64 = size_of::<$type>() as u64;
            fn port_in(port: u16) -> Self {
                call(Call::$in, port.into(), 0) as $type
            }
            fn port_out(port: u16, value: Self) {
                call(Call::$out, port.into(), value.into());
            }
        }
    };
}
width!(u8, In8, Out8);
width!(u16, In16, Out16);
width!(u32, In32, Out32);

/// Reads an I/O port.
pub(crate) fn port_in<T: Width>(port: u16) -> T {
    T::port_in(port)
}

/// Writes an I/O port.
pub(crate) fn port_out<T: Width>(port: u16, value: T) {
    T::port_out(port, value);
}

/// A physical address that is accessed as a device's registers are: whole, in order, in the width of the type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mmio(pub(crate) u64);

impl Mmio {
    /// Reads at `offset`.
    pub(crate) fn read<T: Copy>(self, offset: u64) -> T {
        // SAFETY: memory is mapped one to one; a wrong address is an exception, which ends the guest with a message.
        unsafe { ((self.0 + offset) as *const T).read_volatile() }
    }

    /// Writes at `offset`.
    pub(crate) fn write<T: Copy>(self, offset: u64, value: T) {
        // SAFETY: as in `read`; the devices get no address of Rust's own objects but atomics and raw memory.
        unsafe { ((self.0 + offset) as *mut T).write_volatile(value) }
    }
}

fn local_apic() -> Mmio {
    Mmio(call(Call::ReadMsr, IA32_APIC_BASE.into(), 0) & 0x000f_ffff_ffff_f000)
}

/// Fills the interrupt gates, enables the local APIC and interrupts.
pub(crate) fn init() {
    for vector in 0..64_u8 {
        // SAFETY: entry.s defines these symbols with these sizes, and fills the tables nowhere else.
        let (gate, stub) = unsafe {
            let stub = match vector.checked_sub(FIRST_VECTOR) {
                None => exception_stubs[usize::from(vector)].as_ptr() as u64,
                Some(index) => interrupt_stubs[usize::from(index)].as_ptr() as u64,
            };
            (&interrupt_descriptors[usize::from(vector)], stub)
        };
        // Present, interrupt gate, code segment 8 (Intel SDM volume 3, 6.14.1).
        let low = (stub & 0xffff) | (8 << 16) | (0x8e00 << 32) | ((stub >> 16 & 0xffff) << 48);
        gate[0].store(low, Ordering::Relaxed);
        gate[1].store(stub >> 32, Ordering::Release);
    }
    let base = call(Call::ReadMsr, IA32_APIC_BASE.into(), 0);
    assert!(base & 0xc00 == 0x800, "the local APIC is not in xAPIC mode: IA32_APIC_BASE {base:#x}");
    let apic = local_apic();
    // SAFETY: an atomic that entry.s defines and only reads.
    unsafe { end_of_interrupt.store(apic.0 + APIC_EOI, Ordering::Release) };
    apic.write(APIC_SPURIOUS, 0x100 | u32::from(SPURIOUS_VECTOR));
    apic.write(APIC_TIMER_DIVIDE, 0b1011_u32);
    apic.write(APIC_TIMER, u32::from(TIMER_VECTOR));
    // The two 8259: firmware may have left its timer running.
    port_out(0x21, 0xff_u8);
    port_out(0xa1, 0xff_u8);
    call(Call::EnableInterrupts, 0, 0);
}

/// The APIC id of this processor: where MSI messages go.
pub(crate) fn apic_id() -> u8 {
    (local_apic().read::<u32>(APIC_ID) >> 24) as u8
}

/// How often the interrupt `vector` arrived.
pub(crate) fn interrupt_count(vector: u8) -> u64 {
    // SAFETY: an atomic that entry.s defines and increments.
    unsafe { interrupts[usize::from(vector)].load(Ordering::Acquire) }
}

/// How many interrupts arrived; pass it to [`sleep`] after having looked whether there is anything to do.
pub(crate) fn interrupts_seen() -> u64 {
    // SAFETY: as above.
    unsafe { interrupts_total.load(Ordering::Acquire) }
}

/// Halts until an interrupt arrives, unless one did since `seen` was read; at most about a second.
pub(crate) fn sleep(seen: u64) {
    let apic = local_apic();
    apic.write(APIC_TIMER_COUNT, 1_000_000_000_u32);
    call(Call::Wait, seen, 0);
    apic.write(APIC_TIMER_COUNT, 0_u32);
}

/// Forgets cached translations after a change of the page tables.
pub(crate) fn flush_tlb() {
    call(Call::FlushTlb, 0, 0);
}

/// Clears the interrupt descriptor table and faults, so that the processor shuts down.
pub(crate) fn triple_fault() -> ! {
    // SAFETY: the tables are not needed any more.
    for gate in unsafe { &interrupt_descriptors } {
        gate[0].store(0, Ordering::Release);
    }
    loop {
        call(Call::FlushTlb, 0, 0);
    }
}

/// The time stamp counter.
pub(crate) fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has it, and CR4.TSD is clear.
    unsafe { _rdtsc() }
}

/// A moment after which waiting makes no sense. Counted in TSC ticks, whose rate the guest does not know: between 1 and
/// 5 GHz wherever it runs.
pub(crate) struct Deadline(u64);

impl Deadline {
    /// Between 3 and 17 seconds: what must happen is late beyond doubt.
    pub(crate) fn long() -> Self {
        Self(ticks() + (1 << 34))
    }

    /// Between 7 and 34 milliseconds: what must not happen had its chance.
    pub(crate) fn short() -> Self {
        Self(ticks() + (1 << 25))
    }

    /// Whether it is over.
    pub(crate) fn passed(&self) -> bool {
        core::hint::spin_loop();
        ticks() >= self.0
    }
}

/// Waits until `done`; `false` when it took too long.
pub(crate) fn wait_until(mut done: impl FnMut() -> bool) -> bool {
    let deadline = Deadline::long();
    loop {
        if done() {
            return true;
        }
        if deadline.passed() {
            return done();
        }
    }
}

/// Lets some milliseconds go by in which something would happen if it were wrong.
pub(crate) fn settle() {
    let deadline = Deadline::short();
    while !deadline.passed() {}
}
