//! A report from fixed figures.

use super::*;
use crate::bench::{Axes, Latency, Manifest, Sample};
use crate::bench::{Cell, Completion, Place, Plan};
use block::cache::CacheMode;
use block::engine::Aio;
use block::engine::threads::DEFAULT_THREADS;
use guest::workload::Mix;
use std::collections::BTreeMap;
use std::time::Duration;

fn sample(iops: f64, vcpu: bool) -> Sample {
    let latency_us = Latency { mean: 50.0, min: 20.0, p50: 40.0, p99: 123.45, p999: 200.0, max: 1000.0 };
    Sample {
        seconds: 1.0,
        requests: 1000,
        iops,
        bytes_per_second: 4096.0 * iops,
        latency_us,
        vcpu_us: vcpu.then_some(20.0),
        io_us: 3.456,
        io_switches: 0.5,
        kicks: vcpu.then_some(0.25),
        interrupts: vcpu.then_some(0.0),
        batch: Some(8.0),
        submissions: vcpu.then_some(0.125),
    }
}

/// A cell with pairs of requests per second, ours and the host's.
fn measured(bs: u32, aio: impl Into<Option<Aio>>, ioeventfd: bool, pairs: &[(f64, f64)]) -> Measured {
    let work = Work { content: Content::Written, rw: Mix::RandRead, bs, depth: 32, queues: 1, busy: 0 };
    let way = Way { aio: aio.into(), ioeventfd, ..Way::default() };
    let mut measured = Measured::new(Cell { work, way }, None);
    let round =
        |&(ours, host)| BTreeMap::from([(Subject::Skiff, sample(ours, true)), (Subject::Host, sample(host, false))]);
    measured.rounds = pairs.iter().map(round).collect();
    measured.sum_up();
    measured
}

fn manifest() -> Manifest {
    let axes = Axes {
        contents: vec![Content::Written],
        mixes: vec![(Mix::RandRead, None)],
        blocks: vec![4096],
        depths: vec![32],
        queues: vec![1],
        busy: vec![0],
        engines: vec![Some(Aio::Threads)],
        caches: vec![CacheMode::None],
        ioeventfds: vec![true],
        polls: vec![100],
        merges: vec![true],
        pools: vec![DEFAULT_THREADS],
        completions: vec![Completion::Poll],
    };
    let place = Place::Own("/nonexistent".into(), 1 << 30);
    let (runtime, warm_up) = (Duration::from_secs(1), Duration::ZERO);
    let against = vec![Subject::Host];
    let plan = Plan { axes, place, runtime, warm_up, repeat: 3, against, if_there: false, pin: false, seed: 7 };
    let manifest = Manifest::new(&plan, &plan.subjects());
    let (kernel, processor) = ("6.1".to_owned(), "A processor".to_owned());
    Manifest { skiff: "0.1.0", kernel, processor, cpus: 2, kvm: Some(KvmKind::Hardware), ..manifest }
}

#[test]
fn tables() {
    let mut failed = measured(1 << 20, Aio::IoUring, true, &[]);
    failed.errors.push("it did not start".to_owned());
    let mut cells = vec![
        measured(4096, Aio::Threads, true, &[(40e3, 80e3), (41e3, 80e3), (60e3, 80e3)]),
        measured(4096, Aio::Native, false, &[(82e3, 100e3), (80e3, 100e3), (84e3, 100e3)]),
        measured(1 << 20, Aio::Threads, true, &[(1000.0, 1000.0), (1100.0, 1000.0), (1050.0, 1000.0)]),
        failed,
    ];
    cells.insert(3, measured(1 << 20, None, true, &[(2000.0, 1000.0); 3]));
    cells[3].chosen = Some(Aio::IoUring);
    let results = Results {
        schema: 2,
        complete: false,
        left_out: vec!["firecracker is left out: it is gone".to_owned()],
        manifest: manifest(),
        cells,
    };
    let expected = "\
skiff 0.1.0, Linux 6.1, A processor x 2, hardware KVM
disk: /nonexistent, files of 1G; 3 x 1 s a cell, seed 7

written file, randread 4k, depth 32
  engine   cache                  IOPS                               / host                p50 us   p99 us   io us  kicks   intr  batch  calls
  threads  none                 41.0k? (40.0k-60.0k)    #####         0.51? (0.50-0.75)      40.0    123.5    3.46   0.25   0.00   8.00   0.12
* native   none,ioeventfd=off   82.0k  (80.0k-84.0k)    ##########    0.82  (0.80-0.84)      40.0    123.5    3.46   0.25   0.00   8.00   0.12

written file, randread 1m, depth 32
  engine   cache         MiB/s                               / host                p50 us   p99 us   io us  kicks   intr  batch  calls
  threads  none          1050  (1000-1100)      #####         1.05  (1.00-1.10)      40.0    123.5    3.46   0.25   0.00   8.00   0.12
* auto     none          2000  (2000-2000)      ##########    2.00  (2.00-2.00)      40.0    123.5    3.46   0.25   0.00   8.00   0.12
  auto is io_uring
  io_uring none             -
  failed: it did not start

* fastest   ? the interval is wider than 20 %: worthless
(low-high): the true median is there with 75 % confidence (--repeat 6: 95 %)
io us: CPU time of a request in all threads but the vCPU's
kicks, intr, calls: doorbells, interrupts, io_submit or io_uring_enter calls for a request
batch: requests that went to the engine at once
firecracker is left out: it is gone
INTERRUPTED: not all was measured
";
    let shown = results.to_string();
    assert_eq!(shown, expected, "{shown}");
}

#[test]
fn the_json_form_is_the_documented_one() {
    let cells = vec![measured(4096, Aio::Native, true, &[(50.0, 100.0)])];
    let results = Results { schema: 2, complete: true, left_out: Vec::new(), manifest: manifest(), cells };
    let json: serde_json::Value = serde_json::from_str(&results.to_json()).unwrap();
    let text = include_str!("../../../../docs/bench.md");
    let documented: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
    let mut paths = Vec::new();
    collect(&json, "", &mut paths);
    for path in &paths {
        assert!(documented.contains(&path.as_str()), "{path} is not documented");
    }
    for path in documented.iter().filter(|path| !path.starts_with("--")) {
        assert!(paths.iter().any(|found| found == path), "{path} is not in the JSON");
    }
    assert_eq!(json["cells"][0]["summary"]["host"]["ratio"]["median"], 0.5);
    assert_eq!(json["cells"][0]["aio"], "native");
}

#[test]
fn comma_separated_values() {
    let cells = vec![measured(4096, Aio::Native, false, &[(50.0, 100.0), (60.0, 100.0)])];
    let csv = Results { schema: 2, complete: true, left_out: Vec::new(), manifest: manifest(), cells }.to_csv();
    let lines: Vec<&str> = csv.strip_suffix("\r\n").unwrap().split("\r\n").collect();
    assert_eq!(lines.len(), 1 + 4);
    let cell = "written,randread,4096,32,1,0,native,,none,off,100,on,64,poll,2";
    let ours =
        format!("{cell},skiff,1,1000,60,245760,50,20,40,123.45,200,1000,20,3.456,0.5,0.25,0,8,0.125,55,50,60,,,");
    let host =
        format!("{cell},host,1,1000,100,409600,50,20,40,123.45,200,1000,,3.456,0.5,,,8,,100,100,100,0.55,0.5,0.6");
    assert_eq!(lines[3..], [ours, host]);
    assert!(lines.iter().all(|line| line.split(',').count() == lines[0].split(',').count()));
}

/// The paths of all fields, those of every subject under the name SUBJECT.
fn collect(value: &serde_json::Value, path: &str, paths: &mut Vec<String>) {
    match value {
        serde_json::Value::Object(fields) => {
            for (key, value) in fields {
                let key = if ["skiff", "host"].contains(&key.as_str()) && path != "manifest" { "SUBJECT" } else { key };
                let path = if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
                let inner = value.is_object() || value.get(0).is_some_and(serde_json::Value::is_object);
                if !inner && !paths.contains(&path) {
                    paths.push(path.clone());
                }
                collect(value, &path, paths);
            }
        }
        serde_json::Value::Array(items) => items.iter().for_each(|item| {
            if item.is_object() {
                collect(item, path, paths);
            }
        }),
        _ => {}
    }
}
