//! The CMOS real-time clock and its RAM: an MC146818 with the century byte of the PC. Accessed on vCPU threads.
//!
//! The time is computed from the host's clock at each access, so the device needs no thread and no timer. It keeps UTC.
//! What a guest sets is kept as an offset to the host's clock. Interrupts (alarm, periodic, update-ended) are not
//! offered: their enable bits can be stored, and register C reads as 0.

use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::bus::BusDevice;

/// Number of consecutive ports: index 0x70, data 0x71.
pub const PORTS: u64 = 2;

/// The CMOS index of the century byte, for the FADT's `CENTURY` field.
pub const CENTURY: u8 = 0x32;

const INDEX_PORT: u64 = 0;
const DATA_PORT: u64 = 1;
/// Bit 7 of the index port masks NMIs on a PC; there are 128 bytes.
const INDEX_MASK: u8 = 0x7f;
const SIZE: usize = 128;

// Registers (MC146818 data sheet, "Address map").
const SECONDS: u8 = 0;
const MINUTES: u8 = 2;
const HOURS: u8 = 4;
const DAY_OF_WEEK: u8 = 6;
const DAY_OF_MONTH: u8 = 7;
const MONTH: u8 = 8;
const YEAR: u8 = 9;
const REGISTER_A: u8 = 10;
const REGISTER_B: u8 = 11;
const REGISTER_C: u8 = 12;
const REGISTER_D: u8 = 13;

const A_UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// The divider chain is held in reset by 0b110 and 0b111 in bits 6:4. Once it is let go, half a second passes until the
/// next update.
const A_DIVIDER_RESET: u8 = 0b110 << 4;
/// 32768 Hz time base, 1024 Hz periodic rate.
const A_DEFAULT: u8 = 0x26;
const B_SET: u8 = 1 << 7;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;
const D_VALID: u8 = 1 << 7;
const HOURS_PM: u8 = 1 << 7;

const SECOND: i128 = 1_000_000_000;
/// Update in progress shows this long before the time changes (MC146818, t_BUC).
const BEFORE_UPDATE: i128 = 244_000;
/// How long a guest may take to read a coherent time, having seen that no update is in progress. Longer than t_BUC,
/// because each of its reads leaves the guest.
const LATCH_LASTS: i128 = 10_000_000;

/// The RTC at ports 0x70 and 0x71.
pub struct Cmos {
    clock: Clock,
    state: Mutex<State>,
}

/// Nanoseconds since 1970-01-01 00:00 UTC.
type Clock = Box<dyn Fn() -> i128 + Send + Sync>;

struct State {
    index: u8,
    /// The RAM. Of the time registers only while `B_SET` stops the clock.
    bytes: [u8; SIZE],
    /// The guest's clock minus the host's, in nanoseconds.
    offset: i128,
    /// When (by the host's clock) the time was latched, and the second that the guest's clock showed.
    latch: Option<(i128, i64)>,
}

impl Default for Cmos {
    /// An RTC that shows the host's time.
    fn default() -> Self {
        Self::with_clock(Box::new(|| match SystemTime::now().duration_since(UNIX_EPOCH) {
            Ok(after) => after.as_nanos().cast_signed(),
            Err(before) => -before.duration().as_nanos().cast_signed(),
        }))
    }
}

impl Cmos {
    fn with_clock(clock: Clock) -> Self {
        let mut bytes = [0; SIZE];
        bytes[usize::from(REGISTER_A)] = A_DEFAULT;
        bytes[usize::from(REGISTER_B)] = B_24_HOURS;
        Self { clock, state: Mutex::new(State { index: 0, bytes, offset: 0, latch: None }) }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for Cmos {
    /// The index port cannot be read back, as on a PC.
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (DATA_PORT, Some(byte)) = (offset, data.first_mut()) {
            *byte = self.state().read((self.clock)());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (port, byte) in (offset..).zip(data) {
            match port {
                INDEX_PORT => self.state().index = byte & INDEX_MASK,
                DATA_PORT => self.state().write(*byte, (self.clock)()),
                _ => {}
            }
        }
    }
}

impl State {
    fn stored(&self, register: u8) -> u8 {
        self.bytes[usize::from(register & INDEX_MASK)]
    }

    fn store(&mut self, register: u8, value: u8) {
        self.bytes[usize::from(register & INDEX_MASK)] = value;
    }

    fn is_set(&self) -> bool {
        self.stored(REGISTER_B) & B_SET != 0
    }

    fn divider_is_reset(&self) -> bool {
        self.stored(REGISTER_A) & A_DIVIDER_RESET == A_DIVIDER_RESET
    }

    fn read(&mut self, now: i128) -> u8 {
        match self.index {
            REGISTER_A => self.read_register_a(now),
            REGISTER_C => 0,
            REGISTER_D => D_VALID,
            register if is_time(register) && !self.is_set() => {
                let time = self.latched(now);
                self.encode(register, &DateTime::from_unix(time))
            }
            register => self.stored(register),
        }
    }

    fn read_register_a(&mut self, now: i128) -> u8 {
        let updating = !self.is_set() && (now + self.offset).rem_euclid(SECOND) >= SECOND - BEFORE_UPDATE;
        if updating {
            return self.stored(REGISTER_A) | A_UPDATE_IN_PROGRESS;
        }
        self.latch = None;
        self.latched(now);
        self.stored(REGISTER_A)
    }

    /// The second that the time registers show: for a moment the same one, so that they belong together.
    fn latched(&mut self, now: i128) -> i64 {
        match self.latch {
            Some((at, time)) if (0..LATCH_LASTS).contains(&(now - at)) => time,
            _ => {
                let time = self.unix_time(now);
                self.latch = Some((now, time));
                time
            }
        }
    }

    fn unix_time(&self, now: i128) -> i64 {
        (now + self.offset).div_euclid(SECOND) as i64
    }

    fn write(&mut self, value: u8, now: i128) {
        match self.index {
            REGISTER_A => {
                let was_reset = self.divider_is_reset();
                self.store(REGISTER_A, value & !A_UPDATE_IN_PROGRESS);
                if was_reset && !self.divider_is_reset() {
                    self.set_clock(self.unix_time(now), SECOND / 2, now);
                }
            }
            REGISTER_B => self.write_register_b(value, now),
            REGISTER_C | REGISTER_D => {}
            register if is_time(register) && !self.is_set() => {
                self.load_time_registers(now);
                self.store(register, value);
                self.set_clock_from_registers(now);
            }
            register => self.store(register, value),
        }
    }

    fn write_register_b(&mut self, value: u8, now: i128) {
        let (was_set, will_be_set) = (self.is_set(), value & B_SET != 0);
        if !was_set && will_be_set {
            self.load_time_registers(now);
        }
        self.store(REGISTER_B, value);
        if was_set && !will_be_set {
            self.set_clock_from_registers(now);
        }
    }

    fn load_time_registers(&mut self, now: i128) {
        let time = DateTime::from_unix(self.unix_time(now));
        for register in TIME_REGISTERS {
            self.store(register, self.encode(register, &time));
        }
    }

    fn set_clock_from_registers(&mut self, now: i128) {
        let fraction = if self.divider_is_reset() { SECOND / 2 } else { (now + self.offset).rem_euclid(SECOND) };
        self.set_clock(self.decode().to_unix(), fraction, now);
    }

    fn set_clock(&mut self, time: i64, fraction: i128, now: i128) {
        self.offset = i128::from(time) * SECOND + fraction - now;
        self.latch = None;
    }

    /// A time register's content in the data mode and hour mode of register B.
    fn encode(&self, register: u8, time: &DateTime) -> u8 {
        let number = |value: i64| {
            let value = value.rem_euclid(100) as u8;
            if self.stored(REGISTER_B) & B_BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
        };
        match register {
            SECONDS => number(time.second),
            MINUTES => number(time.minute),
            HOURS if self.stored(REGISTER_B) & B_24_HOURS != 0 => number(time.hour),
            HOURS => {
                let afternoon = if time.hour >= 12 { HOURS_PM } else { 0 };
                afternoon | number((time.hour + 11) % 12 + 1)
            }
            DAY_OF_WEEK => number(time.weekday),
            DAY_OF_MONTH => number(time.day),
            MONTH => number(time.month),
            YEAR => number(time.year),
            _ => number(time.year.div_euclid(100)),
        }
    }

    /// The time in the stored registers. What is out of range counts as the nearest that is not.
    fn decode(&self) -> DateTime {
        let number = |byte: u8| {
            i64::from(if self.stored(REGISTER_B) & B_BINARY != 0 { byte } else { (byte >> 4) * 10 + (byte & 0xf) })
        };
        let stored = |register| number(self.stored(register));
        let hour = if self.stored(REGISTER_B) & B_24_HOURS != 0 {
            stored(HOURS)
        } else {
            let afternoon = if self.stored(HOURS) & HOURS_PM != 0 { 12 } else { 0 };
            number(self.stored(HOURS) & !HOURS_PM) % 12 + afternoon
        };
        DateTime {
            year: stored(CENTURY).min(99) * 100 + stored(YEAR).min(99),
            month: stored(MONTH).clamp(1, 12),
            day: stored(DAY_OF_MONTH).clamp(1, 31),
            weekday: 1,
            hour: hour.min(23),
            minute: stored(MINUTES).min(59),
            second: stored(SECONDS).min(59),
        }
    }
}

const TIME_REGISTERS: [u8; 8] = [SECONDS, MINUTES, HOURS, DAY_OF_WEEK, DAY_OF_MONTH, MONTH, YEAR, CENTURY];

fn is_time(register: u8) -> bool {
    TIME_REGISTERS.contains(&register)
}

/// A moment in the proleptic Gregorian calendar, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct DateTime {
    year: i64,
    /// 1 to 12.
    month: i64,
    /// 1 to 31.
    day: i64,
    /// 1 is Sunday. Follows from the date and is not looked at by [`to_unix`](Self::to_unix).
    weekday: i64,
    hour: i64,
    minute: i64,
    second: i64,
}

const SECONDS_PER_DAY: i64 = 86400;
/// Days from 0000-01-01 to 1970-01-01, which was a Thursday.
const UNIX_EPOCH_DAY: i64 = 719_528;
const THURSDAY: i64 = 5;
/// Days before each month of a year that is not a leap year.
const DAYS_BEFORE_MONTH: [i64; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];

/// Days from 0000-01-01 to the first of January of `year`: 365 a year, and one for each leap year on the way.
fn days_before_year(year: i64) -> i64 {
    let multiples_of = |n: i64| (year + n - 1).div_euclid(n);
    365 * year + multiples_of(4) - multiples_of(100) + multiples_of(400)
}

/// Days from the first of January to the first of `month` (1 to 12).
fn days_before_month(year: i64, month: i64) -> i64 {
    let leap = days_before_year(year + 1) - days_before_year(year) == 366;
    DAYS_BEFORE_MONTH[(month - 1).unsigned_abs() as usize] + i64::from(leap && month > 2)
}

impl DateTime {
    /// The moment `time` seconds after 1970-01-01 00:00 UTC.
    fn from_unix(time: i64) -> Self {
        let (unix_day, second_of_day) = (time.div_euclid(SECONDS_PER_DAY), time.rem_euclid(SECONDS_PER_DAY));
        let day = unix_day + UNIX_EPOCH_DAY;
        // 400 years are 146097 days. The quotient is off by one at most, near the turn of a year.
        let guess = (day * 400).div_euclid(146_097);
        let year = if day < days_before_year(guess) {
            guess - 1
        } else if day >= days_before_year(guess + 1) {
            guess + 1
        } else {
            guess
        };
        let day_of_year = day - days_before_year(year);
        let month = (1..=12).rev().find(|month| days_before_month(year, *month) <= day_of_year).unwrap_or(1);
        Self {
            year,
            month,
            day: day_of_year - days_before_month(year, month) + 1,
            weekday: (unix_day + THURSDAY - 1).rem_euclid(7) + 1,
            hour: second_of_day / 3600,
            minute: second_of_day / 60 % 60,
            second: second_of_day % 60,
        }
    }

    /// Seconds since 1970-01-01 00:00 UTC. A day past the end of its month is one of the next.
    fn to_unix(self) -> i64 {
        let day = days_before_year(self.year) + days_before_month(self.year, self.month) + self.day - 1;
        ((day - UNIX_EPOCH_DAY) * 24 + self.hour) * 3600 + self.minute * 60 + self.second
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fmt::Write as _;
    use std::io::Write as _;
    use std::process::{Command, Stdio};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicI64, Ordering};

    /// 2024-02-29 23:59:58 UTC, a Thursday, by date(1).
    const LEAP_DAY: i64 = 1_709_251_198;

    struct Rtc {
        cmos: Cmos,
        /// Nanoseconds since 1970.
        host: Arc<AtomicI64>,
    }

    impl Rtc {
        fn at(seconds: i64) -> Self {
            let host = Arc::new(AtomicI64::new(seconds * 1_000_000_000));
            let clock = host.clone();
            Self { cmos: Cmos::with_clock(Box::new(move || clock.load(Ordering::SeqCst).into())), host }
        }
        fn pass(&self, nanoseconds: i64) {
            self.host.fetch_add(nanoseconds, Ordering::SeqCst);
        }
        fn get(&self, register: u8) -> u8 {
            let mut data = [0xee];
            self.cmos.write(0, &[register]);
            self.cmos.read(1, &mut data);
            data[0]
        }
        fn set(&self, register: u8, value: u8) {
            self.cmos.write(0, &[register]);
            self.cmos.write(1, &[value]);
        }
        fn time(&self) -> [u8; 8] {
            TIME_REGISTERS.map(|register| self.get(register))
        }
    }

    #[test]
    fn shows_bcd_and_24_hours_after_power_on() {
        let rtc = Rtc::at(LEAP_DAY);
        assert_eq!(rtc.time(), [0x58, 0x59, 0x23, 5, 0x29, 0x02, 0x24, 0x20]);
        assert_eq!(rtc.get(0x0a), 0x26);
        assert_eq!(rtc.get(0x0b), 0x02);
        assert_eq!(rtc.get(0x0c), 0);
        assert_eq!(rtc.get(0x0d), 0x80);
    }

    #[test]
    fn shows_binary_and_12_hours_when_register_b_says_so() {
        let rtc = Rtc::at(LEAP_DAY);
        rtc.set(0x0b, 0x06);
        assert_eq!(rtc.time(), [58, 59, 23, 5, 29, 2, 24, 20]);
        rtc.set(0x0b, 0x00);
        assert_eq!(rtc.get(HOURS), 0x91);
        rtc.pass(2 * 1_000_000_000);
        assert_eq!(rtc.get(HOURS), 0x12, "midnight is 12 am");
        rtc.pass(12 * 3600 * 1_000_000_000);
        assert_eq!(rtc.get(HOURS), 0x92, "noon is 12 pm");
    }

    #[test]
    fn a_time_read_across_a_turn_of_the_second_is_coherent() {
        let rtc = Rtc::at(LEAP_DAY + 1);
        rtc.pass(999_700_000);
        assert_eq!(rtc.get(REGISTER_A) & 0x80, 0, "300 us before the update");
        let time = TIME_REGISTERS.map(|register| {
            rtc.pass(50_000);
            rtc.get(register)
        });
        assert_eq!(time, [0x59, 0x59, 0x23, 5, 0x29, 0x02, 0x24, 0x20]);
        assert_eq!(rtc.get(REGISTER_A) & 0x80, 0);
        assert_eq!(rtc.time(), [0x00, 0x00, 0x00, 6, 0x01, 0x03, 0x24, 0x20]);
    }

    #[test]
    fn update_in_progress_shows_just_before_the_update_only() {
        let rtc = Rtc::at(LEAP_DAY);
        rtc.pass(999_800_000);
        assert_eq!(rtc.get(REGISTER_A), 0xa6);
        rtc.pass(200_000);
        assert_eq!(rtc.get(REGISTER_A), 0x26);
        assert_eq!(rtc.get(SECONDS), 0x59);
    }

    /// As Linux's mc146818_set_time does it.
    #[test]
    fn a_guest_sets_the_clock() {
        let rtc = Rtc::at(LEAP_DAY);
        rtc.pass(700_000_000);
        rtc.set(REGISTER_B, 0x82);
        rtc.set(REGISTER_A, 0x76);
        for (register, value) in TIME_REGISTERS.into_iter().zip([0x30, 0x20, 0x10, 0, 0x31, 0x12, 0x99, 0x19]) {
            rtc.set(register, value);
        }
        rtc.pass(50_000_000);
        assert_eq!(rtc.get(SECONDS), 0x30, "stopped");
        rtc.set(REGISTER_B, 0x02);
        rtc.pass(300_000_000);
        rtc.set(REGISTER_A, 0x26);
        // 1999-12-31 was a Friday.
        assert_eq!(rtc.time(), [0x30, 0x20, 0x10, 6, 0x31, 0x12, 0x99, 0x19]);
        rtc.pass(499_000_000);
        assert_eq!(rtc.get(SECONDS), 0x30);
        rtc.pass(2_000_000);
        rtc.get(REGISTER_A);
        assert_eq!(rtc.get(SECONDS), 0x31, "the first update comes half a second after the divider was let go");
    }

    #[test]
    fn hours_are_set_in_12_hour_mode() {
        let rtc = Rtc::at(LEAP_DAY);
        for (hours, in_24) in [(0x12, 0x00), (0x01, 0x01), (0x11, 0x11), (0x92, 0x12), (0x81, 0x13), (0x91, 0x23)] {
            rtc.set(REGISTER_B, 0x00);
            rtc.set(HOURS, hours);
            assert_eq!(rtc.get(HOURS), hours);
            rtc.set(REGISTER_B, 0x02);
            assert_eq!(rtc.get(HOURS), in_24, "{hours:#x}");
        }
    }

    #[test]
    fn a_single_register_is_set_without_stopping() {
        let rtc = Rtc::at(LEAP_DAY);
        rtc.set(YEAR, 0x25);
        // 2025 has no 29 February.
        assert_eq!(rtc.time(), [0x58, 0x59, 0x23, 7, 0x01, 0x03, 0x25, 0x20]);
    }

    #[test]
    fn ram_reads_back_and_fixed_registers_do_not_change() {
        let rtc = Rtc::at(LEAP_DAY);
        let ram = (0..128).filter(|register| !is_time(*register) && !(0x0a..=0x0d).contains(register));
        for register in ram.clone() {
            rtc.set(register, !register);
        }
        rtc.set(0x0c, 0xff);
        rtc.set(0x0d, 0x00);
        for register in ram {
            assert_eq!(rtc.get(register), !register);
            assert_eq!(rtc.get(register | 0x80), !register, "bit 7 is the NMI mask");
        }
        assert_eq!((rtc.get(0x0c), rtc.get(0x0d)), (0, 0x80));
        let mut data = [0];
        rtc.cmos.read(0, &mut data);
        assert_eq!(data, [0xff], "the index port");
    }

    #[test]
    fn the_default_clock_is_the_hosts() {
        let cmos = Cmos::default();
        let now = (cmos.clock)();
        let printed = Command::new("date").args(["-u", "+%s%N"]).output().unwrap().stdout;
        let later: i128 = String::from_utf8(printed).unwrap().trim().parse().unwrap();
        assert!(now <= later && later <= (cmos.clock)());
    }

    /// Runs date(1) over `times`, and returns what it prints.
    fn date(times: &[i64]) -> Vec<DateTime> {
        let mut date = Command::new("date")
            .args(["-u", "-f", "-", "+%-Y %-m %-d %w %-H %-M %-S"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = String::new();
        for time in times {
            writeln!(lines, "@{time}").unwrap();
        }
        let mut stdin = date.stdin.take().unwrap();
        let feeder = std::thread::spawn(move || stdin.write_all(lines.as_bytes()).unwrap());
        let printed = String::from_utf8(date.wait_with_output().unwrap().stdout).unwrap();
        feeder.join().unwrap();
        let parse = |line: &str| {
            let fields: Vec<i64> = line.split(' ').map(|field| field.parse().unwrap()).collect();
            let [year, month, day, weekday, hour, minute, second] = fields[..] else { panic!("{line}") };
            DateTime { year, month, day, weekday: weekday + 1, hour, minute, second }
        };
        printed.lines().map(parse).collect()
    }

    // 0001-01-01 to 9999-12-31 by date(1), around every turn of a year and at random moments.
    const FIRST: i64 = -62_135_596_800;
    const LAST: i64 = 253_402_300_799;

    #[test]
    fn turns_of_years_are_those_of_date() {
        // A mean year is 31556952 s, so the true turn is at most two days away; 59 days later February ends.
        let years = (0..9999).map(|year| FIRST + year * 31_556_952);
        let around = |time| [-2, -1, 0, 1, 2, 57, 58, 59, 60, 61].map(|days| time + days * SECONDS_PER_DAY);
        let times: Vec<i64> = years.flat_map(around).filter(|time| (FIRST..=LAST).contains(time)).collect();
        let expected = date(&times);
        assert_eq!(expected.len(), times.len());
        for (time, expected) in times.into_iter().zip(expected) {
            assert_eq!(DateTime::from_unix(time), expected, "{time}");
            assert_eq!(expected.to_unix(), time);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn random_moments_are_those_of_date(times in prop::collection::vec(FIRST..=LAST, 500)) {
            let expected = date(&times);
            prop_assert_eq!(expected.len(), times.len());
            for (time, expected) in times.into_iter().zip(expected) {
                prop_assert_eq!(DateTime::from_unix(time), expected);
                prop_assert_eq!(expected.to_unix(), time);
            }
        }
    }

    proptest! {
        #[test]
        fn any_access_is_survived(host in FIRST..LAST / 32, accesses: Vec<(bool, u8, u64, u32)>) {
            let rtc = Rtc::at(host.clamp(-9_000_000_000, 9_000_000_000));
            for (read, width, value, pass) in accesses {
                let width = usize::from(width % 9);
                if read {
                    rtc.cmos.read(value % PORTS, &mut [0; 8][..width]);
                } else {
                    rtc.cmos.write(value % PORTS, &value.to_le_bytes()[..width]);
                }
                rtc.pass(pass.into());
            }
        }
    }
}
