//! The results as comma-separated values (RFC 4180): a line for each measurement.

use std::fmt::Write as _;

use block::engine::Aio;

use super::{Measured, Middle, Results, Sample, Subject};

/// The columns. Their meaning is that of the JSON fields of the same names; the last six are of the cell's summary.
const COLUMNS: &str = "content,rw,bs,depth,queues,busy,aio,chosen,cache,ioeventfd,poll_us,merge,thread_pool_max,completion,\
                       round,subject,seconds,requests,iops,bytes_per_second,mean_us,min_us,p50_us,p99_us,p999_us,max_us,\
                       vcpu_us,io_us,io_switches,kicks,interrupts,batch,submissions,iops_median,iops_low,iops_high,ratio_median,ratio_low,\
                       ratio_high";

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
    let (content, rw, aio, cache) = (work.content.name(), work.rw.name(), way.aio_name(), way.cache.name());
    let chosen = measured.chosen.map_or("", Aio::name);
    let switch = |on| if on { "on" } else { "off" };
    let (ioeventfd, merge, completion) = (switch(way.ioeventfd), switch(way.merge), way.completion.name());
    let mut line = format!("{content},{rw},{},{},{},{},", work.bs, work.depth, work.queues, work.busy);
    let _ = write!(line, "{aio},{chosen},{cache},{ioeventfd},{},{merge},", way.poll_us);
    let _ = write!(line, "{},{completion},{round},{},", way.thread_pool_max, subject.name());
    let _ = write!(line, "{},{}", sample.seconds, sample.requests);
    let rates = [sample.iops, sample.bytes_per_second].map(Some);
    let latencies = [latency.mean, latency.min, latency.p50, latency.p99, latency.p999, latency.max].map(Some);
    let costs = [sample.vcpu_us, Some(sample.io_us), Some(sample.io_switches), sample.kicks, sample.interrupts];
    let handed = [sample.batch, sample.submissions];
    let summary = measured.summary.get(&subject);
    let middles = [summary.map(|summary| summary.iops), summary.and_then(|summary| summary.ratio)];
    let middles = middles.into_iter().flat_map(|middle: Option<Middle>| {
        [middle.map(|middle| middle.median), middle.map(|middle| middle.low), middle.map(|middle| middle.high)]
    });
    for figure in rates.into_iter().chain(latencies).chain(costs).chain(handed).chain(middles) {
        line.push(',');
        let _ = figure.map(|figure| write!(line, "{figure}"));
    }
    line + "\r\n"
}
