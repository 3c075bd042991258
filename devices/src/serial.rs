//! The serial port: a 16550A whose registers are vm-superio's, with flow control on both sides.
//!
//! Registers are accessed on vCPU threads; input arrives from the main thread through [`Serial::enqueue`].
//!
//! *Output* leaves byte by byte through a [`SerialOutput`], which may hold the vCPU back while its sink is slow. That
//! happens outside the lock of the registers, so the main thread is never held back with it.
//!
//! *Input* follows the RS-232 handshake: nothing is delivered until the guest is ready to receive, which means that it
//! asserts RTS (modem control register) or takes receive interrupts (interrupt enable register). What is typed while a
//! guest still boots is thereby not lost in the resets by which its driver probes the port.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial as Registers};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// Number of consecutive ports that a 16550 occupies.
pub const PORTS: u64 = 8;

// Registers by offset, and their bits (16550A data sheet, "Registers").
const DATA: u8 = 0;
const INTERRUPT_ENABLE: u8 = 1;
const RECEIVED_DATA_INTERRUPT: u8 = 1 << 0;
const TRANSMITTER_EMPTY_INTERRUPT: u8 = 1 << 1;
const INTERRUPT_IDENTIFICATION: u8 = 2;
const IDENTIFIES_NONE: u8 = 0b001;
const IDENTIFIES_TRANSMITTER_EMPTY: u8 = 0b010;
const IDENTIFIES_RECEIVED_DATA: u8 = 0b100;
const FIFOS_ENABLED: u8 = 0b11 << 6;
const FIFO_CONTROL: u8 = 2;
const RECEIVE_FIFO_RESET: u8 = 1 << 1;
const LINE_CONTROL: u8 = 3;
const DIVISOR_LATCH_ACCESS: u8 = 1 << 7;
const MODEM_CONTROL: u8 = 4;
const REQUEST_TO_SEND: u8 = 1 << 1;
const LOOPBACK: u8 = 1 << 4;
const LINE_STATUS: u8 = 5;
const DATA_READY: u8 = 1 << 0;

/// Where the bytes go that the guest transmits. Called on vCPU threads.
pub trait SerialOutput: Send + Sync {
    /// Takes one byte. May hold the caller back while the sink is slow, but not once [`release`](Self::release) was
    /// called; then a byte that finds no place is lost.
    fn put(&self, byte: u8);

    /// Lets every held back [`put`](Self::put) go, now and from now on: the machine stops.
    fn release(&self);
}

/// A 16550A with 64-byte FIFO on the [bus](crate::bus) ([`PORTS`] ports). The interrupt is edge-triggered.
pub struct Serial {
    line: Mutex<Line>,
    output: Arc<dyn SerialOutput>,
    room: EventFd,
    fifo_size: usize,
}

struct Line {
    registers: Registers<Interrupt, NoEvents, Transmitter>,
    interrupt_enable: u8,
    modem_control: u8,
    /// A transmitter interrupt that the registers forgot before it was shown.
    transmitter_empty: bool,
    /// The host has input that did not fit.
    starving: bool,
}

impl Serial {
    /// A port after power-on. An interrupt is a write to `interrupt`; `room` is written when [`enqueue`](Self::enqueue)
    /// had to leave bytes behind and can take some again.
    pub fn new(interrupt: EventFd, output: Arc<dyn SerialOutput>, room: EventFd) -> Self {
        let registers = Registers::new(Interrupt(interrupt), Transmitter(None));
        let fifo_size = registers.fifo_capacity();
        let line = Line { registers, interrupt_enable: 0, modem_control: 0, transmitter_empty: false, starving: false };
        Self { line: Mutex::new(line), output, room, fifo_size }
    }

    /// Puts as much of `input` as the guest can receive now into the FIFO and returns how many bytes that is. If it is
    /// not all, the caller keeps the rest and comes back when `room` is readable. Never blocks.
    pub fn enqueue(&self, input: &[u8]) -> usize {
        let mut line = self.line();
        // The only errors are a full FIFO, and an interrupt eventfd that is pending already.
        let taken = if line.listens() {
            let taken = input.len().min(line.registers.fifo_capacity());
            let _ = line.registers.enqueue_raw_bytes(&input[..taken]);
            taken
        } else {
            0
        };
        line.starving = taken < input.len();
        taken
    }

    /// Lets vCPUs go that a slow output holds back, now and from now on. Called before they are joined.
    pub fn release(&self) {
        self.output.release();
    }

    fn line(&self) -> std::sync::MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_register(&self, offset: u8) -> u8 {
        let mut line = self.line();
        let value = line.read(offset);
        self.tell_room(&mut line);
        value
    }

    fn write_register(&self, offset: u8, value: u8) {
        let sent = {
            let mut line = self.line();
            line.write(offset, value, self.fifo_size);
            self.tell_room(&mut line);
            line.registers.writer_mut().0.take()
        };
        if let Some(byte) = sent {
            self.output.put(byte);
        }
    }

    /// Once the FIFO is empty, not at each byte: one turn of the main thread then refills it whole.
    fn tell_room(&self, line: &mut Line) {
        if line.starving && line.listens() && line.registers.fifo_capacity() == self.fifo_size {
            line.starving = false;
            // Fails only when the counter is full, and then it is readable.
            let _ = self.room.write(1);
        }
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (port, byte) in (offset..).zip(data) {
            *byte = self.read_register(port as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (port, byte) in (offset..).zip(data) {
            self.write_register(port as u8, *byte);
        }
    }
}

impl Line {
    fn listens(&self) -> bool {
        self.modem_control & LOOPBACK == 0
            && (self.modem_control & REQUEST_TO_SEND != 0 || self.interrupt_enable & RECEIVED_DATA_INTERRUPT != 0)
    }

    fn read(&mut self, offset: u8) -> u8 {
        if offset == INTERRUPT_IDENTIFICATION { self.identify() } else { self.registers.read(offset) }
    }

    /// The enabled interrupt that comes first by priority. vm-superio shows two as the sum of their codes, which is the
    /// code of a third, and forgets both, also while there are data to receive; a driver that goes by the code would
    /// leave them lying.
    fn identify(&mut self) -> u8 {
        let shown = self.registers.read(INTERRUPT_IDENTIFICATION);
        let received =
            self.interrupt_enable & RECEIVED_DATA_INTERRUPT != 0 && self.registers.read(LINE_STATUS) & DATA_READY != 0;
        self.transmitter_empty |= shown & IDENTIFIES_TRANSMITTER_EMPTY != 0;
        self.transmitter_empty &= self.interrupt_enable & TRANSMITTER_EMPTY_INTERRUPT != 0;
        let first = if received {
            IDENTIFIES_RECEIVED_DATA
        } else if std::mem::take(&mut self.transmitter_empty) {
            IDENTIFIES_TRANSMITTER_EMPTY
        } else {
            IDENTIFIES_NONE
        };
        FIFOS_ENABLED | first
    }

    fn write(&mut self, offset: u8, value: u8, fifo_size: usize) {
        match offset {
            INTERRUPT_ENABLE if !self.divisor_latch_access() => self.interrupt_enable = value,
            MODEM_CONTROL => self.modem_control = value,
            FIFO_CONTROL if value & RECEIVE_FIFO_RESET != 0 => self.reset_receive_fifo(fifo_size),
            _ => {}
        }
        // The errors are those of the eventfd, which then is pending already; the transmitter has none.
        let _ = self.registers.write(offset, value);
    }

    fn divisor_latch_access(&mut self) -> bool {
        self.registers.read(LINE_CONTROL) & DIVISOR_LATCH_ACCESS != 0
    }

    /// vm-superio ignores the FIFO control register; its FIFO is emptied by reading it.
    fn reset_receive_fifo(&mut self, fifo_size: usize) {
        let line_control = self.registers.read(LINE_CONTROL);
        let _ = self.registers.write(LINE_CONTROL, line_control & !DIVISOR_LATCH_ACCESS);
        while self.registers.fifo_capacity() < fifo_size {
            self.registers.read(DATA);
        }
        let _ = self.registers.write(LINE_CONTROL, line_control);
    }
}

struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Holds the byte that the registers transmit until their lock is released.
struct Transmitter(Option<u8>);

impl Write for Transmitter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 = bytes.first().copied();
        Ok(bytes.len().min(1))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Condvar;
    use std::thread;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    const LINE_STATUS: u64 = 5;

    /// Takes `room` bytes, then holds back.
    #[derive(Default)]
    struct Sink {
        taken: Mutex<(Vec<u8>, usize, bool)>,
        released: Condvar,
    }

    impl SerialOutput for Sink {
        fn put(&self, byte: u8) {
            let taken = self.taken.lock().unwrap();
            let mut taken = self.released.wait_while(taken, |(bytes, room, go)| bytes.len() >= *room && !*go).unwrap();
            taken.0.push(byte);
        }
        fn release(&self) {
            self.taken.lock().unwrap().2 = true;
            self.released.notify_all();
        }
    }

    struct Port {
        serial: Serial,
        sink: Arc<Sink>,
        interrupt: EventFd,
        room: EventFd,
    }

    fn port(output_room: usize) -> Port {
        let (interrupt, room) = (EventFd::new(EFD_NONBLOCK).unwrap(), EventFd::new(EFD_NONBLOCK).unwrap());
        let sink = Arc::new(Sink { taken: Mutex::new((Vec::new(), output_room, false)), ..Sink::default() });
        let serial = Serial::new(interrupt.try_clone().unwrap(), sink.clone(), room.try_clone().unwrap());
        Port { serial, sink, interrupt, room }
    }

    fn get(serial: &Serial, offset: u64) -> u8 {
        let mut data = [0xee];
        serial.read(offset, &mut data);
        data[0]
    }

    fn receive(serial: &Serial) -> Vec<u8> {
        let mut received = Vec::new();
        while get(serial, LINE_STATUS) & DATA_READY != 0 {
            received.push(get(serial, 0));
        }
        received
    }

    #[test]
    fn transmits_every_byte_untouched() {
        let Port { serial, sink, .. } = port(usize::MAX);
        for byte in 0..=255 {
            assert_eq!(get(&serial, LINE_STATUS) & 0x60, 0x60, "transmitter empty");
            serial.write(0, &[byte]);
        }
        assert_eq!(sink.taken.lock().unwrap().0, (0..=255).collect::<Vec<u8>>());
    }

    #[test]
    fn input_waits_until_the_guest_asserts_rts() {
        let Port { serial, room, .. } = port(0);
        assert_eq!(serial.enqueue(b"root\n"), 0);
        // The Linux 8250 driver's probe: loopback with RTS, both off again, both FIFOs reset, a read of the receiver.
        serial.write(4, &[0x12]);
        serial.write(4, &[0x00]);
        serial.write(2, &[0x07]);
        get(&serial, 0);
        assert!(room.read().is_err());
        serial.write(4, &[0x0b]);
        assert_eq!(room.read().unwrap(), 1);
        assert_eq!(serial.enqueue(b"root\n"), 5);
        assert_eq!(receive(&serial), b"root\n");
    }

    #[test]
    fn input_interrupts_a_guest_that_enabled_it() {
        let Port { serial, interrupt, .. } = port(0);
        serial.write(1, &[1]);
        assert!(interrupt.read().is_err());
        assert_eq!(serial.enqueue(b"\x03"), 1);
        assert_eq!(interrupt.read().unwrap(), 1);
        assert_eq!(get(&serial, 2) & 0x0f, 0x04, "received data available");
        assert_eq!(receive(&serial), b"\x03");
    }

    /// 16550A data sheet, "Interrupt Identification Register": the first by priority is shown, received data until it
    /// is read, an empty transmitter until it was shown, and nothing that is not enabled.
    #[test]
    fn interrupts_are_identified_by_priority() {
        let Port { serial, .. } = port(usize::MAX);
        serial.write(1, &[0x03]);
        assert_eq!(serial.enqueue(b"ab"), 2);
        assert_eq!([get(&serial, 2), get(&serial, 2)], [0xc4, 0xc4], "data are there");
        get(&serial, 0);
        assert_eq!(get(&serial, 2), 0xc4, "and still are");
        get(&serial, 0);
        assert_eq!([get(&serial, 2), get(&serial, 2)], [0xc2, 0xc1], "then the transmitter");
        serial.write(0, b"x");
        assert_eq!(serial.enqueue(b"c"), 1);
        assert_eq!(get(&serial, 2), 0xc4);
        serial.write(1, &[0x00]);
        assert_eq!(get(&serial, 2), 0xc1, "nothing is enabled");
        serial.write(1, &[0x02]);
        assert_eq!([get(&serial, 2), get(&serial, 2)], [0xc2, 0xc1], "enabled anew while empty");
    }

    /// The Linux 8250 driver fills the FIFO (16 bytes) at each interrupt of the transmitter and then asks for the next.
    /// 16550A data sheet, "FIFO Interrupt Mode Operation": the interrupt comes when the FIFO is empty, not at each byte.
    #[test]
    fn a_full_transmit_fifo_is_one_interrupt() {
        let Port { serial, sink, interrupt, .. } = port(usize::MAX);
        serial.write(1, &[0x02]);
        for batch in 1..=3 {
            assert_eq!(interrupt.read().unwrap(), 1, "before batch {batch}");
            assert_eq!(get(&serial, 2), 0xc2);
            for byte in 0..16 {
                serial.write(0, &[byte]);
            }
            assert_eq!(get(&serial, LINE_STATUS) & 0x60, 0x60, "drained at once");
        }
        assert_eq!(sink.taken.lock().unwrap().0.len(), 48);
    }

    #[test]
    fn a_baud_rate_is_no_readiness() {
        let Port { serial, room, .. } = port(0);
        assert_eq!(serial.enqueue(b"x"), 0);
        // Divisor 0x0101: with DLAB set, the second register is the high byte of the divisor.
        serial.write(3, &[0x83]);
        serial.write(0, &[1, 1]);
        serial.write(3, &[0x03]);
        assert!(room.read().is_err());
        assert_eq!(serial.enqueue(b"x"), 0);
    }

    #[test]
    fn input_that_does_not_fit_is_left_and_asked_for() {
        let Port { serial, room, .. } = port(0);
        serial.write(4, &[0x03]);
        let input: Vec<u8> = (0..100).collect();
        let taken = serial.enqueue(&input);
        assert!(0 < taken && taken < 100, "{taken}");
        assert_eq!(serial.enqueue(&input[taken..]), 0);
        get(&serial, 0);
        assert!(room.read().is_err(), "not at each byte");
        assert_eq!(receive(&serial), input[1..taken]);
        assert_eq!(room.read().unwrap(), 1);
        assert_eq!(serial.enqueue(&input[taken..]), 100 - taken);
        assert_eq!(receive(&serial), input[taken..]);
        assert!(room.read().is_err(), "nothing was left behind");
    }

    #[test]
    fn fifo_control_resets_the_receiver_whatever_dlab_says() {
        for dlab in [0x03, 0x83] {
            let Port { serial, .. } = port(0);
            serial.write(4, &[0x03]);
            serial.enqueue(b"noise");
            serial.write(3, &[dlab]);
            serial.write(2, &[0x01]);
            assert_eq!(get(&serial, LINE_STATUS) & DATA_READY, DATA_READY, "enabling the FIFO keeps its content");
            serial.write(2, &[0x03]);
            assert_eq!(get(&serial, LINE_STATUS) & DATA_READY, 0);
            assert_eq!(get(&serial, 3), dlab);
        }
    }

    #[test]
    fn a_held_back_vcpu_neither_stops_input_nor_the_end() {
        let Port { serial, sink, .. } = port(1);
        serial.write(4, &[0x03]);
        serial.write(0, b"a");
        thread::scope(|scope| {
            let vcpu = scope.spawn(|| serial.write(0, b"b"));
            assert_eq!(serial.enqueue(b"in"), 2);
            assert_eq!(receive(&serial), b"in");
            serial.release();
            vcpu.join().unwrap();
        });
        assert_eq!(sink.taken.lock().unwrap().0, b"ab");
    }

    proptest! {
        #[test]
        fn any_access_is_survived(accesses: Vec<(u8, u8, u64)>, input: Vec<u8>) {
            let Port { serial, .. } = port(usize::MAX);
            for (kind, width, value) in accesses {
                let width = usize::from(width % 8) + 1;
                let offset = value % (PORTS + 1);
                match kind % 3 {
                    0 => serial.read(offset, &mut [0; 8][..width]),
                    1 => serial.write(offset, &value.to_le_bytes()[..width]),
                    _ => prop_assert!(serial.enqueue(&input) <= input.len()),
                }
            }
        }
    }
}
