//! The results as comma-separated values (RFC 4180): a line for each measurement.

use std::fmt::Write as _;

use super::{Measured, Results, Sample, Subject};

/// The columns. Their meaning is that of the JSON fields of the same names.
const COLUMNS: &str = "content,rw,bs,depth,queues,aio,cache,ioeventfd,poll_us,round,subject,seconds,requests,\
                       iops,bytes_per_second,mean_us,min_us,p50_us,p99_us,p999_us,max_us,vcpu_us,io_us,io_switches,kicks,\
                       interrupts";

impl Results {
    /// The results as CSV, with the names of the columns in the first line. What there is not is empty.
    pub fn to_csv(&self) -> String {
        let mut text = format!("{COLUMNS}\r\n");
        for measured in &self.cells {
            for (round, samples) in (1..).zip(&measured.rounds) {
                for (subject, sample) in samples {
                    text.push_str(&line(measured, round, *subject, sample));
                }
            }
        }
        text
    }
}

fn line(measured: &Measured, round: usize, subject: Subject, sample: &Sample) -> String {
    let (work, way, latency) = (&measured.cell.work, &measured.cell.way, &sample.latency_us);
    let (content, rw, aio, cache) = (work.content.name(), work.rw.name(), way.aio.name(), way.cache.name());
    let mut line = format!("{content},{rw},{},{},{},{aio},{cache},", work.bs, work.depth, work.queues);
    let ioeventfd = if way.ioeventfd { "on" } else { "off" };
    let (poll_us, name) = (way.poll_us, subject.name());
    let _ = write!(line, "{ioeventfd},{poll_us},{round},{name},{},{}", sample.seconds, sample.requests);
    let figures = [sample.iops, sample.bytes_per_second, latency.mean, latency.min, latency.p50, latency.p99];
    let more = [latency.p999, latency.max].into_iter();
    for figure in figures.into_iter().chain(more) {
        let _ = write!(line, ",{figure}");
    }
    let kinds = [sample.vcpu_us, Some(sample.io_us), Some(sample.io_switches), sample.kicks, sample.interrupts];
    for figure in kinds {
        line.push(',');
        let _ = figure.map(|figure| write!(line, "{figure}"));
    }
    line + "\r\n"
}
