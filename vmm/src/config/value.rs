//! The values settings take, each parsed in one place: sizes, switches, numbers, names. An `Err` says what is wrong and
//! what to write instead; the caller puts the flag or file in front. Used on the main thread.

use std::num::{NonZeroU64, NonZeroUsize};
use std::time::Duration;

use block::throttle::LEAST_BURST;
use devices::virtio::blk::{LONGEST_POLL, MAX_QUEUES, QUEUE_SIZE, QUEUE_SIZES};

use crate::layout;

const UNITS: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];

/// Bytes of a size such as `512M`, `2G` or `1.5G`; the units are K, M, G and T, powers of 1024. A bare number is refused:
/// QEMU takes it for MiB, most other tools for bytes.
///
/// # Errors
/// What is wrong and what to write instead.
pub fn size(text: &str) -> Result<u64, String> {
    let unit = text.chars().last().and_then(|last| UNITS.iter().find(|unit| unit.0 == last.to_ascii_uppercase()));
    let Some(&(_, shift)) = unit else {
        return Err(if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
            format!("a size needs a unit; write {text}M for MiB (units: K, M, G, T)")
        } else {
            "not a size; write it like 512M or 2G (units: K, M, G, T)".to_owned()
        });
    };
    let number = &text[..text.len() - 1];
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(fraction) {
        return Err("not a size; write it like 512M or 2G (units: K, M, G, T)".to_owned());
    }
    let large = || "more bytes than 64 bits can count".to_owned();
    let whole: u64 = whole.parse().map_err(|_| large())?;
    let bytes = whole.checked_mul(1 << shift).ok_or_else(large)?;
    bytes.checked_add(fraction_bytes(fraction, shift)?).ok_or_else(large)
}

/// Bytes of `0.fraction` units of `1 << shift`, which must come out whole.
fn fraction_bytes(fraction: &str, shift: u32) -> Result<u64, String> {
    let fraction = fraction.trim_end_matches('0');
    let uneven = || "not a whole number of bytes; use a smaller unit (units: K, M, G, T)".to_owned();
    // Finer than anyone writes, and 12 places of any unit fit the arithmetic below.
    if fraction.len() > 12 {
        return Err(uneven());
    }
    let scale = 10_u128.pow(fraction.len() as u32);
    let scaled = fraction.parse::<u128>().unwrap_or(0) << shift;
    if scaled.is_multiple_of(scale) { Ok((scaled / scale) as u64) } else { Err(uneven()) }
}

/// `bytes` as `--memory` reads it, in the largest unit that leaves a whole number. A number of bytes that is not a multiple
/// of 1024 has no such form and is written as bytes with a B, for messages only.
pub fn format_size(bytes: u64) -> String {
    let unit = UNITS.iter().rev().find(|unit| bytes != 0 && bytes.is_multiple_of(1 << unit.1));
    match unit {
        Some((name, shift)) => format!("{}{name}", bytes >> shift),
        None => format!("{bytes}B"),
    }
}

/// `on` or `off`.
pub(super) fn switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("say on or off".to_owned()),
    }
}

/// A number of vCPUs.
pub(super) fn cpus(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(0) => Err("a machine has at least 1 CPU".to_owned()),
        Ok(count) => Ok(count),
        Err(_) => Err("not a number of CPUs; write it like 2".to_owned()),
    }
}

/// How many queues a disk has.
pub(super) fn queues(text: &str) -> Result<u16, String> {
    let queues = text.parse().ok().filter(|queues| (1..=MAX_QUEUES).contains(queues));
    queues.ok_or_else(|| format!("a disk has 1 to {MAX_QUEUES} queues; leave it out for one a CPU, at most 4"))
}

/// Entries of a disk's queue.
pub(super) fn queue_size(text: &str) -> Result<u16, String> {
    let (least, most) = (*QUEUE_SIZES.start(), *QUEUE_SIZES.end());
    let number = text.parse().unwrap_or(u32::from(QUEUE_SIZE));
    let size = u16::try_from(number).unwrap_or(u16::MAX).clamp(least, most);
    // Of the powers of two not above it.
    let size = 1 << size.ilog2();
    if text.parse() == Ok(size) {
        return Ok(size);
    }
    Err(format!("a queue has a power of two from {least} to {most} entries; write {size}"))
}

/// The most threads a pool may have.
const MOST_THREADS: usize = 64;

/// The most threads of a disk's pool.
pub(super) fn thread_pool_max(text: &str) -> Result<NonZeroUsize, String> {
    let threads = text.parse().ok().filter(|threads: &NonZeroUsize| threads.get() <= MOST_THREADS);
    threads.ok_or_else(|| format!("a pool has 1 to {MOST_THREADS} threads; write it like 16"))
}

/// The longest time a disk's worker looks for work, in microseconds.
pub(super) fn poll(text: &str) -> Result<Duration, String> {
    let most = LONGEST_POLL.as_micros();
    let micros = text.parse::<u16>().ok().filter(|&micros| u128::from(micros) <= most);
    let micros = micros.ok_or_else(|| format!("not 0 to {most} microseconds; write it like 32, or 0 for none"))?;
    Ok(Duration::from_micros(micros.into()))
}

/// Requests a second.
pub(super) fn iops(text: &str) -> Result<NonZeroU64, String> {
    let number = || "not a number of requests a second; write it like 500".to_owned();
    let count = if text.starts_with('+') { Err(number()) } else { text.parse().map_err(|_| number()) };
    NonZeroU64::new(count?).ok_or_else(|| "at least 1 a second; leave it out for no limit".to_owned())
}

/// Bytes a second, a size in whole K.
pub(super) fn bps(text: &str) -> Result<NonZeroU64, String> {
    let bytes = size(text)?;
    if !bytes.is_multiple_of(1 << 10) {
        return Err("not a multiple of 1K".to_owned());
    }
    NonZeroU64::new(bytes).ok_or_else(|| "at least 1K a second; leave it out for no limit".to_owned())
}

/// A time such as `100ms` or `2s`, from 2 ms up to a minute.
pub(super) fn burst(text: &str) -> Result<Duration, String> {
    let unit = [("ms", 1), ("s", 1000)].into_iter().find_map(|unit| Some((text.strip_suffix(unit.0)?, unit.1)));
    let number = unit.and_then(|(number, scale)| Some((number.parse::<u32>().ok()?, scale)));
    let Some((number, scale)) = number.filter(|_| text.starts_with(|first: char| first.is_ascii_digit())) else {
        return Err("not a time; write it like 100ms or 2s".to_owned());
    };
    let burst = Duration::from_millis(u64::from(number) * scale);
    if burst < LEAST_BURST {
        return Err("2ms is the least; with less a disk would not get the whole of its limits".to_owned());
    }
    if burst > Duration::from_secs(60) { Err("a minute is the most".to_owned()) } else { Ok(burst) }
}

/// Whole seconds.
pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<u32>().map_err(|_| "not a number of seconds; write it like 30".to_owned())?;
    Ok(Duration::from_secs(seconds.into()))
}

/// The port of isa-debug-exit, hexadecimal with 0x or decimal; `off` for none.
pub(super) fn debug_exit(text: &str) -> Result<Option<u16>, String> {
    if text == "off" {
        return Ok(None);
    }
    let digits = text.strip_prefix("0x");
    let port = digits.map_or_else(|| text.parse(), |digits| u16::from_str_radix(digits, 16));
    let port = match port {
        Ok(port) if !text.contains('+') => port,
        _ => return Err("not an I/O port; write it like 0x501, or off".to_owned()),
    };
    let Some(last) = port.checked_add(layout::port::DEBUG_EXIT_WIDTH - 1) else {
        return Err("there are no four ports from here on; 0x501 is free".to_owned());
    };
    match layout::port::OCCUPIED.iter().find(|taken| port <= taken.1 && last >= taken.0) {
        Some(taken) => Err(format!("the four ports from here on are not free: {}; 0x501 is", taken.2)),
        None => Ok(Some(port)),
    }
}

/// A disk's name by QEMU's rule: a letter, then letters, digits, `-`, `.` and `_`.
pub(super) fn id(text: &str) -> Result<String, String> {
    let rest = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    if text.as_bytes().first().is_some_and(u8::is_ascii_alphabetic) && text.bytes().all(rest) {
        Ok(text.to_owned())
    } else {
        Err("an id is a letter followed by letters, digits, '-', '.' or '_'".to_owned())
    }
}

/// A disk's serial number (virtio 1.2, 5.2.6: 20 bytes of ASCII).
pub(super) fn disk_serial(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > 20 || !text.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
        return Err("a serial number is 1 to 20 printable ASCII characters".to_owned());
    }
    Ok(text.to_owned())
}

/// The candidate a typing slip away from `word`: at most a third of its letters differ.
pub(crate) fn nearest<'a>(word: &str, candidates: &[&'a str]) -> Option<&'a str> {
    let near = candidates.iter().map(|&candidate| (edits(word, candidate), candidate)).min()?;
    (near.0 <= near.1.len().div_ceil(3)).then_some(near.1)
}

/// Levenshtein's distance in bytes. Words longer than any of ours are as far as they are long.
fn edits(a: &str, b: &str) -> usize {
    if a.len() > 64 {
        return a.len();
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("512M", 536_870_912),
            ("2G", 2_147_483_648),
            ("2g", 2_147_483_648),
            ("1.5G", 1_610_612_736),
            ("65540K", 67_112_960),
            ("1T", 1_099_511_627_776),
            ("0.25K", 256),
            ("0M", 0),
            ("1.500G", 1_610_612_736),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn sizes_that_are_none() {
        let none = "not a size; write it like 512M or 2G (units: K, M, G, T)";
        for text in ["", "G", "-1G", "+1G", "1GB", "1.G", ".5G", "1.2.3G", "1e3M", "0x10M", " 1G", "1é"] {
            assert_eq!(size(text).unwrap_err(), none, "{text}");
        }
        assert_eq!(size("1024").unwrap_err(), "a size needs a unit; write 1024M for MiB (units: K, M, G, T)");
        assert_eq!(size("0.1K").unwrap_err(), "not a whole number of bytes; use a smaller unit (units: K, M, G, T)");
        assert_eq!(size("16777216T").unwrap_err(), "more bytes than 64 bits can count");
        assert_eq!(size("99999999999999999999K").unwrap_err(), "more bytes than 64 bits can count");
    }

    #[test]
    fn sizes_are_written_in_the_largest_whole_unit() {
        for (bytes, text) in
            [(1 << 30, "1G"), (1536 << 20, "1536M"), (4096, "4K"), (1 << 40, "1T"), (5, "5B"), (0, "0B")]
        {
            assert_eq!(format_size(bytes), text);
        }
    }

    #[test]
    fn ports_clear_of_the_other_devices() {
        for (text, port) in [("0x501", 0x501), ("0xf4", 0xf4), ("1281", 0x501), ("0x506", 0x506)] {
            assert_eq!(debug_exit(text), Ok(Some(port)), "{text}");
        }
        assert_eq!(debug_exit("off"), Ok(None));
        for (text, whose) in [("0x3f5", "COM1"), ("0x3ff", "COM1"), ("0x502", "pvpanic"), ("0x64", "the keyboard")] {
            assert!(debug_exit(text).unwrap_err().contains(whose), "{text}");
        }
        for text in ["", "0x", "on", "0x10000", "-1", "+5", "0x+5", "501h"] {
            assert_eq!(debug_exit(text).unwrap_err(), "not an I/O port; write it like 0x501, or off", "{text}");
        }
        assert!(debug_exit("0xffff").is_err());
    }

    #[test]
    fn counts_and_seconds() {
        assert_eq!(cpus("64"), Ok(64));
        assert_eq!(cpus("0").unwrap_err(), "a machine has at least 1 CPU");
        for text in ["", "two", "-1", "1.5", "4294967296"] {
            assert_eq!(cpus(text).unwrap_err(), "not a number of CPUs; write it like 2", "{text}");
        }
        assert_eq!(seconds("0"), Ok(Duration::ZERO));
        assert_eq!(seconds("1.5").unwrap_err(), "not a number of seconds; write it like 30");
    }

    #[test]
    fn queues_of_disks() {
        for (text, count) in [("1", 1), ("64", 64)] {
            assert_eq!(queues(text), Ok(count));
        }
        for text in ["0", "65", "-1", "", "many", "65536"] {
            assert!(queues(text).unwrap_err().starts_with("a disk has 1 to 64 queues; "), "{text}");
        }
        for size in [4, 8, 16, 32, 64, 128, 256, 512, 1024] {
            assert_eq!(queue_size(&size.to_string()), Ok(size));
        }
        for (text, near) in
            [("0", 4), ("2", 4), ("5", 4), ("1000", 512), ("2048", 1024), ("99999", 1024), ("", 256), ("-1", 256)]
        {
            let complaint = format!("a queue has a power of two from 4 to 1024 entries; write {near}");
            assert_eq!(queue_size(text), Err(complaint), "{text}");
        }
    }

    #[test]
    fn threads_of_disks() {
        for threads in [1, 16, 64] {
            assert_eq!(thread_pool_max(&threads.to_string()).map(NonZeroUsize::get), Ok(threads));
        }
        for text in ["0", "65", "-1", "", "many"] {
            assert!(thread_pool_max(text).unwrap_err().starts_with("a pool has 1 to 64 threads; "), "{text}");
        }
    }

    #[test]
    fn polling_of_disks() {
        for (text, micros) in [("0", 0), ("32", 32), ("10000", 10_000)] {
            assert_eq!(poll(text), Ok(Duration::from_micros(micros)));
        }
        for text in ["10001", "-1", "1.5", "", "off", "65536"] {
            assert!(poll(text).unwrap_err().starts_with("not 0 to 10000 microseconds; "), "{text}");
        }
    }

    #[test]
    fn names_of_disks() {
        assert_eq!(id("root-1.a_b"), Ok("root-1.a_b".to_owned()));
        for text in ["", "0", "1disk", "a b", "é", "a/b"] {
            assert!(id(text).is_err(), "{text}");
        }
        assert_eq!(disk_serial("12345678901234567890"), Ok("12345678901234567890".to_owned()));
        for text in ["", "123456789012345678901", "a\tb", "é"] {
            assert!(disk_serial(text).is_err(), "{text}");
        }
    }

    #[test]
    fn slips_are_recognised() {
        let keys = ["path", "readonly", "serial", "id", "ioeventfd"];
        for (word, key) in [("pth", "path"), ("read-only", "readonly"), ("seral", "serial"), ("idd", "id")] {
            assert_eq!(nearest(word, &keys), Some(key));
        }
        assert_eq!(nearest("bandwidth", &keys), None);
        assert_eq!(nearest("", &keys), None);
        assert_eq!(nearest("x", &[]), None);
    }

    #[test]
    fn distances() {
        for (a, b, distance) in [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("flaw", "lawn", 2)] {
            assert_eq!(edits(a, b), distance);
        }
    }

    proptest! {
        #[test]
        fn whole_sizes_survive_being_written(kib in 1..u64::MAX >> 10) {
            prop_assert_eq!(size(&format_size(kib << 10)), Ok(kib << 10));
        }

        #[test]
        fn no_text_panics(text in any::<String>(), near in "[0-9.+x]{0,30}[KMGTkmgt]?") {
            for text in [&text, &near] {
                let _ = (size(text), switch(text), cpus(text), seconds(text), debug_exit(text), id(text));
                let _ = (queues(text), queue_size(text), poll(text), thread_pool_max(text), disk_serial(text), nearest(text, &["path", "readonly"]));
            }
        }
    }
}
