//! Rate limits of a disk: token buckets, one a limit. Pure: the time is an argument. The workers of a disk's queues share
//! one [`Throttle`] behind a mutex, which exists only where there are limits.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

/// What a bucket holds if nothing is said: what its rate yields in this time.
pub const BURST: Duration = Duration::from_millis(100);

/// The least a bucket may hold: a worker's wait ends up to a millisecond late, and what would not fit into the bucket meanwhile
/// would be lost.
pub const LEAST_BURST: Duration = Duration::from_millis(2);

/// The limits of one quantity, each a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// Reads and writes together.
    pub total: Option<NonZeroU64>,
    /// Reads.
    pub read: Option<NonZeroU64>,
    /// Writes.
    pub write: Option<NonZeroU64>,
}

/// What a disk may do at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests as the guest makes them.
    pub requests: Rates,
    /// Bytes of data, and of what is zeroed.
    pub bytes: Rates,
    /// What an idle disk saves up and may do at once: what each rate yields in this time. At least a request passes even
    /// if it is larger than that; what follows waits the longer.
    pub burst: Duration,
}

/// Which limits besides the total ones a request is subject to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the disk.
    Read,
    /// To the disk.
    Write,
}

/// The limits at work. Requests pass in the order in which they ask, so none starves.
#[derive(Debug)]
pub struct Throttle {
    start: Instant,
    buckets: Vec<Bucket>,
}

/// One limit, as the generic cell rate algorithm has it (ITU-T I.371): `full` is when the bucket will be full again, and
/// tells how much is in it now.
#[derive(Debug)]
struct Bucket {
    /// Only for these; for all if none.
    direction: Option<Direction>,
    /// Counts bytes; else requests.
    bytes: bool,
    /// A second.
    rate: NonZeroU64,
    /// Nanoseconds: what it holds is what the rate yields in this time.
    depth: u64,
    /// Nanoseconds since the start.
    full: u64,
}

impl Throttle {
    /// Full buckets at `now`.
    pub fn new(limits: &Limits, now: Instant) -> Self {
        let Limits { requests, bytes, burst } = limits;
        let mut buckets = Vec::new();
        for (rates, bytes) in [(requests, false), (bytes, true)] {
            let (read, write) = (Some(Direction::Read), Some(Direction::Write));
            for (direction, rate) in [(None, rates.total), (read, rates.read), (write, rates.write)] {
                if let Some(rate) = rate {
                    buckets.push(Bucket { direction, bytes, rate, depth: nanos(*burst), full: 0 });
                }
            }
        }
        Self { start: now, buckets }
    }

    /// A request of `bytes` at `now` takes what it needs, and may go at the time that is returned: `now` or later. Until
    /// then it waits; with several limits it has taken its share of all of them meanwhile.
    pub fn reserve(&mut self, direction: Direction, bytes: u64, now: Instant) -> Instant {
        let at = nanos(now.saturating_duration_since(self.start));
        let go = self.subject(direction).map(|bucket| bucket.reserve(bytes, at)).max().unwrap_or(at);
        // A wait past the end of time is as good as one of a century.
        now.checked_add(Duration::from_nanos(go - at)).unwrap_or(now)
    }

    /// A request that reserved will not go.
    pub fn refund(&mut self, direction: Direction, bytes: u64) {
        self.subject(direction).for_each(|bucket| bucket.full = bucket.full.saturating_sub(bucket.cost(bytes)));
    }

    fn subject(&mut self, direction: Direction) -> impl Iterator<Item = &mut Bucket> {
        self.buckets.iter_mut().filter(move |bucket| bucket.direction.is_none_or(|only| only == direction))
    }
}

impl Bucket {
    /// Nanoseconds in which the rate yields what the request needs, rounded up.
    fn cost(&self, bytes: u64) -> u64 {
        let units = if self.bytes { bytes } else { 1 };
        let cost = (u128::from(units) * 1_000_000_000).div_ceil(u128::from(self.rate.get()));
        u64::try_from(cost).unwrap_or(u64::MAX)
    }

    /// When the request may go. What is larger than the bucket goes when that is full, and leaves a debt.
    fn reserve(&mut self, bytes: u64, now: u64) -> u64 {
        let (cost, full) = (self.cost(bytes), self.full.max(now));
        self.full = full.saturating_add(cost);
        full.saturating_add(cost.min(self.depth)).saturating_sub(self.depth).max(now)
    }
}

/// Up to 584 years.
fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rate(rate: u64) -> Option<NonZeroU64> {
        NonZeroU64::new(rate)
    }

    fn requests(total: u64, burst: Duration) -> Limits {
        Limits { requests: Rates { total: rate(total), ..Rates::default() }, bytes: Rates::default(), burst }
    }

    fn bytes(total: u64, burst: Duration) -> Limits {
        Limits { requests: Rates::default(), bytes: Rates { total: rate(total), ..Rates::default() }, burst }
    }

    /// Milliseconds after the start at which requests that all ask at the start may go.
    fn millis(limits: &Limits, sizes: &[(Direction, u64)]) -> Vec<u128> {
        let start = Instant::now();
        let mut throttle = Throttle::new(limits, start);
        let go = |(direction, bytes): &(Direction, u64)| throttle.reserve(*direction, *bytes, start);
        sizes.iter().map(go).map(|go| (go - start).as_millis()).collect()
    }

    use Direction::{Read, Write};

    #[test]
    fn what_was_saved_up_goes_at_once_and_the_rest_at_the_rate() {
        // 100 a second, and a bucket of half a second: 50 at once, then one each 10 ms.
        let all = millis(&requests(100, Duration::from_millis(500)), &[(Read, 4096); 60]);
        assert!(all[..50].iter().all(|at| *at == 0));
        assert_eq!(all[50..], [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]);
    }

    #[test]
    fn a_request_larger_than_the_bucket_passes_and_the_next_pays() {
        // 1000 bytes a second, and a bucket of 100: 5000 bytes go at once and take five seconds to pay.
        let all = millis(&bytes(1000, Duration::from_millis(100)), &[(Write, 5000), (Write, 100), (Write, 5000)]);
        assert_eq!(all, [0, 5000, 5100]);
        // Slower than one request a bucket, and no bucket at all.
        assert_eq!(millis(&requests(5, Duration::from_millis(100)), &[(Read, 1); 3]), [0, 200, 400]);
        assert_eq!(millis(&requests(5, Duration::ZERO), &[(Read, 1); 3]), [0, 200, 400]);
    }

    #[test]
    fn each_direction_has_its_own_limits_and_a_share_of_the_total() {
        let separate = Rates { total: None, read: rate(10), write: rate(20) };
        let limits = Limits { requests: separate, bytes: Rates::default(), burst: Duration::ZERO };
        let mixed = [(Read, 1), (Write, 1), (Read, 1), (Write, 1)];
        assert_eq!(millis(&limits, &mixed), [0, 0, 100, 50]);
        let limits = Limits { requests: Rates { total: rate(10), ..separate }, ..limits };
        assert_eq!(millis(&limits, &mixed), [0, 100, 200, 300]);
        // Reads are not held up by a limit of writes.
        let limits = Limits { requests: Rates { write: rate(1), ..Rates::default() }, ..limits };
        assert_eq!(millis(&limits, &[(Write, 1), (Write, 1), (Read, 1)]), [0, 1000, 0]);
    }

    #[test]
    fn the_strictest_limit_counts() {
        let limits = Limits { bytes: bytes(1000, Duration::ZERO).bytes, ..requests(10, Duration::ZERO) };
        assert_eq!(millis(&limits, &[(Read, 500), (Read, 1), (Read, 1)]), [0, 500, 501]);
    }

    #[test]
    fn a_refund_is_as_if_nothing_had_been_asked() {
        let (start, limits) = (Instant::now(), bytes(1000, Duration::from_millis(100)));
        let mut throttle = Throttle::new(&limits, start);
        assert_eq!(throttle.reserve(Read, 100, start), start);
        throttle.reserve(Read, 1 << 40, start);
        throttle.refund(Read, 1 << 40);
        assert_eq!(throttle.reserve(Read, 100, start), start + Duration::from_millis(100));
    }

    #[test]
    fn extremes_neither_overflow_nor_stop() {
        let start = Instant::now();
        for limits in [requests(1, Duration::MAX), bytes(1, Duration::ZERO), bytes(u64::MAX, Duration::MAX)] {
            let mut throttle = Throttle::new(&limits, start);
            for bytes in [u64::MAX, 0, 1, u64::MAX] {
                assert!(throttle.reserve(Read, bytes, start) >= start);
            }
        }
    }

    proptest! {
        /// Against the definition: in no window more than the rate yields and the bucket holds. Requests come from
        /// several queues, each of which asks for the next when the last may go, or later.
        #[test]
        fn no_window_has_more_than_rate_and_burst(
            rate in 1..5000_u64, burst in 0..2000_u64, steps in proptest::collection::vec((0..4_usize, 0..3000_u64, 0..50_u64), 1..60),
        ) {
            let (start, depth) = (Instant::now(), rate * burst / 1000);
            let mut throttle = Throttle::new(&bytes(rate, Duration::from_millis(burst)), start);
            let (mut queues, mut gone) = ([start; 4], Vec::new());
            let mut now = start;
            for (queue, size, idle) in steps {
                // Time does not run backwards, whoever asks.
                now = now.max(queues[queue]) + Duration::from_millis(idle);
                queues[queue] = throttle.reserve(Write, size, now);
                prop_assert!(queues[queue] >= now);
                gone.push(((queues[queue] - start).as_nanos(), size));
            }
            prop_assert!(gone.is_sorted_by_key(|(at, _)| *at), "none overtakes, none starves");
            for from in 0..gone.len() {
                let mut sum = 0;
                for (at, size) in &gone[from..] {
                    sum += u128::from(*size);
                    // What is larger than the bucket goes alone into a full one: it counts as what it finds there.
                    let debt = gone[from..].iter().filter(|(_, size)| *size > depth).map(|(_, size)| u128::from(size - depth));
                    let window = at - gone[from].0;
                    let allowed = window * u128::from(rate) / 1_000_000_000 + u128::from(depth) + 1;
                    prop_assert!(sum <= allowed + debt.max().unwrap_or(0), "{sum} in {window} ns");
                }
            }
        }

        /// Whoever always wants more gets the whole rate.
        #[test]
        fn the_rate_is_reached(rate in 1..5000_u64, burst in 0..500_u64, size in 1..3000_u64) {
            let start = Instant::now();
            let mut throttle = Throttle::new(&bytes(rate, Duration::from_millis(burst)), start);
            let mut now = start;
            for _ in 0..100 {
                now = throttle.reserve(Read, size, now);
            }
            // The first goes at once, so 99 have been paid at most.
            let due = Duration::from_nanos(99 * (size * 1_000_000_000).div_ceil(rate));
            prop_assert!(now - start <= due);
        }
    }
}
