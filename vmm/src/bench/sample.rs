#![expect(clippy::cast_precision_loss, clippy::cast_sign_loss, reason = "counts become figures for a report")]
//! One measurement: what the guest or the yardstick counted, in the units of the report.

use guest::workload::{BUCKETS, bucket};
use serde::{Deserialize, Serialize};

use super::usage::Used;

/// Latencies in whatever unit their owner counts.
#[derive(Clone, Debug)]
pub(super) struct Histogram {
    counts: Vec<u64>,
    sum: u64,
    min: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS], sum: 0, min: u64::MAX, max: 0 }
    }
}

/// The first value of a bucket.
fn lowest(index: usize) -> u64 {
    let shift = (index / 32).saturating_sub(1);
    ((index - 32 * shift) as u64) << shift
}

impl Histogram {
    pub(super) fn record(&mut self, value: u64) {
        self.counts[bucket(value)] += 1;
        self.sum += value;
        self.min = self.min.min(value);
        self.max = self.max.max(value);
    }

    pub(super) fn merge(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.sum += other.sum;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    pub(super) fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The value that `share` of all do not exceed, as exactly as the buckets know; 0 of none.
    fn percentile(&self, share: f64) -> u64 {
        let rank = ((self.count() as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        let index = self.counts.iter().position(|count| {
            seen += count;
            seen >= rank
        });
        let Some(index) = index else { return 0 };
        let middle = u64::midpoint(lowest(index), lowest(index + 1) - 1);
        middle.clamp(self.min, self.max)
    }

    /// In microseconds, where `unit` of the values are one.
    fn latency(&self, unit: f64) -> Latency {
        let micros = |value: u64| value as f64 / unit;
        let count = self.count();
        if count == 0 {
            return Latency::default();
        }
        Latency {
            mean: self.sum as f64 / count as f64 / unit,
            min: micros(self.min),
            p50: micros(self.percentile(0.5)),
            p99: micros(self.percentile(0.99)),
            p999: micros(self.percentile(0.999)),
            max: micros(self.max),
        }
    }
}

/// Latencies in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[expect(missing_docs, reason = "statistics with their usual names")]
pub struct Latency {
    pub mean: f64,
    pub min: f64,
    pub p50: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
}

/// One measurement.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sample {
    /// Seconds that counted.
    pub seconds: f64,
    /// Requests completed in that time.
    pub requests: u64,
    /// Requests per second.
    pub iops: f64,
    /// Bytes per second.
    pub bytes_per_second: f64,
    /// From making a request to seeing its completion.
    pub latency_us: Latency,
    /// CPU time of the vCPU per request, in microseconds; all of the time where the guest polls. None on the host.
    pub vcpu_us: Option<f64>,
    /// CPU time of all other threads per request, in microseconds.
    pub io_us: f64,
    /// Context switches of the latter per request.
    pub io_switches: f64,
    /// Doorbells per request. None on the host.
    pub kicks: Option<f64>,
    /// Interrupts per request. None on the host.
    pub interrupts: Option<f64>,
    /// Requests that go to the engine at once. None of QEMU, which does not count them.
    pub batch: Option<f64>,
    /// io_submit or io_uring_enter calls per request. None of QEMU, and of threads, which make a call for each request.
    pub submissions: Option<f64>,
}

/// What is counted, before it is divided.
pub(super) struct Counted {
    /// Bytes of a request.
    pub(super) block: u32,
    /// Requests that counted, and those before and after them too.
    pub(super) started: u64,
    pub(super) seconds: f64,
    pub(super) histogram: Histogram,
    /// The histogram's unit: so many are a microsecond.
    pub(super) unit: f64,
    /// Of the vCPU, and of all else.
    pub(super) used: (Option<Used>, Used),
    pub(super) kicks: Option<u64>,
    pub(super) interrupts: Option<u64>,
    pub(super) handed: Option<Handed>,
}

/// How requests went to the engine, if it is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Handed {
    /// How often some went there at once.
    pub(super) batches: u64,
    /// System calls of the engine that gave them to the kernel; 0 of threads.
    pub(super) submissions: u64,
}

impl Handed {
    /// From the statistics that a running skiff prints (docs/statistics.md), the sum of all queues; nothing of other text.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let queues = text.lines().filter(|line| line.trim_start().starts_with("queue "));
        let mut sum = None::<Self>;
        for line in queues {
            let words: Vec<&str> = line.split([' ', ',']).filter(|word| !word.is_empty()).collect();
            let before = |name: &str| words.windows(2).find(|pair| pair[1] == name)?[0].parse::<u64>().ok();
            let (batches, submissions) = (before("batches")?, before("submissions")?);
            let sum = sum.get_or_insert_default();
            sum.batches += batches;
            sum.submissions += submissions;
        }
        sum
    }
}

impl Counted {
    pub(super) fn sample(&self) -> Sample {
        let requests = self.histogram.count();
        let iops = if self.seconds > 0.0 { requests as f64 / self.seconds } else { 0.0 };
        let each = |count: u64| count as f64 / self.started.max(1) as f64;
        Sample {
            seconds: self.seconds,
            requests,
            iops,
            bytes_per_second: iops * f64::from(self.block),
            latency_us: self.histogram.latency(self.unit),
            vcpu_us: self.used.0.map(|used| each(used.cpu) / 1000.0),
            io_us: each(self.used.1.cpu) / 1000.0,
            io_switches: each(self.used.1.switches),
            kicks: self.kicks.map(each),
            interrupts: self.interrupts.map(each),
            batch: self.handed.map(|handed| self.started as f64 / handed.batches.max(1) as f64),
            submissions: self.handed.filter(|handed| handed.submissions > 0).map(|handed| each(handed.submissions)),
        }
    }
}

/// The line of the guest (resources/guest/README.md).
#[derive(Debug, Deserialize)]
pub(super) struct GuestReport {
    block: u32,
    ticks: u64,
    started: u64,
    kicks: u64,
    interrupts: u64,
    latency_sum: u64,
    latency_min: u64,
    latency_max: u64,
    histogram: Vec<(usize, u64)>,
}

impl GuestReport {
    /// From a line, if it is the one.
    pub(super) fn parse(line: &str) -> Option<Self> {
        let report: Self = serde_json::from_str(line.strip_prefix("bench ")?).ok()?;
        report.histogram.iter().all(|(index, _)| *index < BUCKETS).then_some(report)
    }

    /// With a TSC of `tsc_khz`, the CPU time of the vCPU and of all else, and what the machine counted.
    pub(super) fn sample(&self, tsc_khz: u32, used: (Used, Used), handed: Option<Handed>) -> Sample {
        let (sum, min, max) = (self.latency_sum, self.latency_min, self.latency_max);
        let mut histogram = Histogram { sum, min, max, ..Histogram::default() };
        for &(index, count) in &self.histogram {
            histogram.counts[index] = count;
        }
        let counted = Counted {
            block: self.block,
            started: self.started,
            seconds: self.ticks as f64 / f64::from(tsc_khz) / 1000.0,
            histogram,
            unit: f64::from(tsc_khz) / 1000.0,
            used: (Some(used.0), used.1),
            kicks: Some(self.kicks),
            interrupts: Some(self.interrupts),
            handed,
        };
        counted.sample()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LINE: &str = concat!(
        r#"bench {"block":4096,"ticks":2000000000,"requests":4,"writes":0,"started":5,"errors":0,"mismatches":0,"#,
        r#""kicks":5,"interrupts":0,"latency_sum":260,"latency_min":10,"latency_max":200,"#,
        r#""histogram":[[10,1],[20,1],[30,1],[114,1]]}"#
    );

    #[test]
    fn the_guests_line_in_our_units() {
        let report = GuestReport::parse(LINE).unwrap();
        // 2 GHz: one second, 2000 ticks are a microsecond.
        let used = (Used { cpu: 5_000_000, switches: 1 }, Used { cpu: 10_000, switches: 10 });
        let handed = Handed { batches: 2, submissions: 3 };
        let sample = report.sample(2_000_000, used, Some(handed));
        assert_eq!((sample.seconds, sample.requests, sample.iops), (1.0, 4, 4.0));
        assert_eq!((sample.bytes_per_second, sample.latency_us.mean), (16384.0, 65.0 / 2000.0));
        assert_eq!((sample.vcpu_us, sample.io_us, sample.io_switches), (Some(1000.0), 2.0, 2.0));
        assert_eq!((sample.kicks, sample.interrupts), (Some(1.0), Some(0.0)));
        assert_eq!((sample.batch, sample.submissions), (Some(2.5), Some(0.6)));
        assert_eq!(report.sample(1, used, Some(Handed { submissions: 0, ..handed })).submissions, None);
        let latency = sample.latency_us;
        assert_eq!((latency.min, latency.p50, latency.max), (0.005, 0.01, 0.1));
    }

    #[test]
    fn other_lines_are_not_reports() {
        for line in ["", "bench", "bench {}", "# bench done", r#"{"block":1}"#, &LINE.replace("114", "1920")] {
            assert!(GuestReport::parse(line).is_none(), "{line}");
        }
    }

    #[test]
    fn what_a_machine_counts_of_its_disk() {
        let text = "disk disk0\n  queue 0: 13 requests, 8 batches, 5 merged, 4 submissions, 7 kicks, 6 interrupts\n  \
                    queue 1: 1 requests, 1 batches, 0 merged, 0 submissions, 1 kicks, 1 interrupts\n  batches: 9 of 1\n";
        assert_eq!(Handed::parse(text), Some(Handed { batches: 9, submissions: 4 }));
        assert_eq!((Handed::parse(""), Handed::parse("queue 0: idle\n")), (None, None));
    }

    #[test]
    fn a_measurement_of_nothing_is_zero() {
        let line = r#"bench {"block":512,"ticks":0,"started":0,"kicks":0,"interrupts":0,"latency_sum":0,"latency_min":0,"latency_max":0,"histogram":[]}"#;
        let sample = GuestReport::parse(line).unwrap().sample(1, (Used::default(), Used::default()), None);
        assert_eq!((sample.iops, sample.latency_us), (0.0, Latency::default()));
    }

    fn of(values: impl IntoIterator<Item = u64>) -> Histogram {
        let mut histogram = Histogram::default();
        for value in values {
            histogram.record(value);
        }
        histogram
    }

    proptest! {
        /// Against the definition, on the sorted values: the buckets are 1/32 wide, so their middle is that near.
        #[test]
        fn percentiles_are_those_of_the_values(mut values in prop::collection::vec(0..1_u64 << 40, 1..500), share in 0.0..1.0_f64) {
            let histogram = of(values.iter().copied());
            values.sort_unstable();
            let rank = ((values.len() as f64 * share).ceil() as usize).max(1);
            let (exact, found) = (values[rank - 1], histogram.percentile(share));
            prop_assert!(exact.abs_diff(found) <= exact / 32, "{exact} {found}");
            prop_assert_eq!(histogram.percentile(1.0).max(histogram.max), histogram.max);
        }

        #[test]
        fn merging_is_recording_together(one in prop::collection::vec(any::<u32>(), 0..50), two in prop::collection::vec(any::<u32>(), 0..50)) {
            let wide = |values: &[u32]| values.iter().map(|value| u64::from(*value)).collect::<Vec<_>>();
            let mut merged = of(wide(&one));
            merged.merge(&of(wide(&two)));
            let whole = of(wide(&[one, two].concat()));
            prop_assert_eq!(merged.counts, whole.counts);
            prop_assert_eq!((merged.sum, merged.min, merged.max), (whole.sum, whole.min, whole.max));
        }

        #[test]
        fn a_bucket_begins_where_it_says(index in 0..BUCKETS) {
            prop_assert_eq!(bucket(lowest(index)), index);
            prop_assert!(index == 0 || bucket(lowest(index) - 1) == index - 1);
        }
    }
}
