//! The guest's benchmark: whether what it reads and writes is right.

use std::fs;

use super::{Bench, DISK_BYTES, FAILED, MIB, PASSED, patterned};

/// The benchmark with verification: each block it read was right, and each it wrote is on the disk.
#[test]
fn bench_verifies() {
    let Some(bench) = Bench::new() else { return };
    let engines = [("threads", "writeback"), ("threads", "none"), ("native", "none"), ("io_uring", "none")];
    for (aio, cache) in engines {
        for poll in ["on", "off"] {
            let disk = bench.disk("disk.img");
            let option = format!("{},aio={aio},cache={cache}", disk.option());
            let work =
                [("randread", 4096, 100), ("write", 64 << 10, 64), ("randrw", 4096, 300), ("randread", 512, 300)];
            let mut content = 1;
            for (rw, bs, count) in work {
                let words = format!("bench rw={rw} bs={bs} count={count} depth=8 poll={poll} verify=on seed={content}");
                let report = bench.run(&words, &["--disk", &option]);
                assert_eq!(report.code, Some(PASSED), "{option}: {words}");
                report.assert_counted(count, if rw == "write" { count } else { 0 }, rw == "randrw");
                // Sequential writes of 64 x 64 KiB: all 4 MiB have the next pattern. Random ones: every block has either.
                if rw == "write" {
                    content = 2;
                    assert!(disk.content() == patterned(2, 0, DISK_BYTES), "{option}: not what was written");
                }
                if rw == "randrw" {
                    content = 3;
                    let found = disk.content();
                    let written = (0..DISK_BYTES).step_by(4096).filter(|&at| {
                        let block = &found[at..at + 4096];
                        let is_new = block == patterned(3, at, 4096);
                        assert!(is_new || block == patterned(2, at, 4096), "{option}: the block at {at}");
                        is_new
                    });
                    assert!((50..=300).contains(&written.count()), "{option}: half of 300 requests write");
                    fs::write(&disk.0, patterned(3, 0, DISK_BYTES)).expect("the scratch disk is written");
                }
            }
        }
    }
}

/// A file that was resized between two starts has its new size: the guest writes in sequence to what it takes for the end,
/// and then from the start again.
#[test]
fn a_resized_file_is_a_resized_disk() {
    let Some(bench) = Bench::new() else { return };
    let disk = bench.disk("disk.img");
    for (round, mib) in (2..).zip([4, 8, 2]) {
        let file = fs::File::options().write(true).open(&disk.0).expect("the scratch disk is opened");
        file.set_len(mib * MIB as u64).expect("the scratch disk is resized");
        // At least to the end of the largest of them; to that of the smallest twice.
        let count = if mib == 8 { 128 } else { 64 };
        let words = format!("bench rw=write bs=65536 count={count} depth=8 poll=off verify=on seed={}", round - 1);
        let report = bench.run(&words, &["--disk", &disk.option()]);
        assert_eq!(report.code, Some(PASSED), "{mib} MiB");
        assert!(disk.content() == patterned(round, 0, mib as usize * MIB), "{mib} MiB: not what was written");
    }
}

/// What is wrong with a benchmark is told as such.
#[test]
fn failures_of_the_bench_are_told() {
    let Some(bench) = Bench::new() else { return };
    let disk = bench.disk("disk.img");
    let wrong = [
        ("count=10 verify=on seed=3", "", "not ok bench: the number of reads with wrong content is 0xa, not 0x0"),
        ("count=10 rw=randwrite", ",readonly=on", "not ok bench: not so: a disk to be written is not read-only"),
        ("count=10 rw=trim", "", "not ok bench: not so: rw= is "),
        ("count=10 bs=1000", "", "not ok bench: not so: bs= is a multiple of 512"),
        ("count=10 bs=8388608", "", "not ok bench: needs a disk with room for one block"),
        ("count=10 depth=8192", "", "not ok bench: not so: the queue has room"),
        ("runtime=100", "", "not ok bench: not so: runtime= comes with tsc_khz="),
        ("rw=read", "", "not ok bench: not so: runtime= or count="),
    ];
    for (words, option, line) in wrong {
        let report = bench.run(&format!("bench {words}"), &["--disk", &format!("{}{option}", disk.option())]);
        assert_eq!((report.code, report.count(|said| said.starts_with(line))), (Some(FAILED), 1), "{words}");
    }
    disk.assert_untouched();
}
