//! Flags and the plans they become.

use super::*;
use crate::cli::{Cli, Command};
use block::engine::Aio;
use clap::Parser;
use skiff::bench::{Axes, Place, Plan, Subject};
use std::num::NonZeroUsize;

fn plan(args: &str) -> Result<Plan, String> {
    let words = ["skiff", "bench"].into_iter().chain(args.split_ascii_whitespace());
    let cli = Cli::try_parse_from(words).map_err(|error| error.to_string())?;
    let Command::Bench(bench) = cli.command else { panic!("{cli:?}") };
    bench.plan().map_err(|error| format!("{error:?}"))
}

#[test]
fn the_default_is_quick() {
    let plan = plan("").unwrap();
    assert_eq!(plan.axes, super::tests::plan("--quick").unwrap().axes);
    assert_eq!(plan.place, Place::Own(".".into(), 1 << 30));
    assert_eq!(plan.subjects(), [Subject::Skiff, Subject::Host]);
    // Under two minutes: a second each, a tenth of warm-up, and half a second to start and end a machine.
    assert!(plan.measurements() as u64 * 1600 < 110_000, "{}", plan.measurements());
}

#[test]
fn lists() {
    let plan = plan(
        "--dir /d --size 64M --content hole,written --engines io_uring,native --cache none --depths 1,128 --bs 512,1M \
         --rw read:64K,randrw --queues 1,4 --ioeventfd on,off --poll-us 0,32 --runtime 0.5s --repeat 2 --vs none \
         --pin --seed 9 --merge off,on --thread-pool-max 1,16 --completion interrupt,poll --busy 0,2",
    )
    .unwrap();
    let axes = Axes {
        contents: vec![Content::Hole, Content::Written],
        mixes: vec![(Mix::Read, Some(64 << 10)), (Mix::RandRw, None)],
        blocks: vec![512, 1 << 20],
        depths: vec![1, 128],
        queues: vec![1, 4],
        busy: vec![0, 2],
        engines: vec![Some(Aio::IoUring), Some(Aio::Native)],
        caches: vec![CacheMode::None],
        ioeventfds: vec![true, false],
        polls: vec![0, 32],
        merges: vec![false, true],
        pools: [1, 16].map(|threads| NonZeroUsize::new(threads).unwrap()).to_vec(),
        completions: vec![Completion::Interrupt, Completion::Poll],
    };
    let (runtime, warm_up) = (Duration::from_millis(500), Duration::from_millis(50));
    let place = Place::Own("/d".into(), 64 << 20);
    assert_eq!(
        plan,
        Plan { axes, place, runtime, warm_up, repeat: 2, against: Vec::new(), if_there: false, pin: true, seed: 9 }
    );
}

#[test]
fn an_image_of_the_users_is_not_written_unless_told() {
    for rw in ["randwrite", "write", "read,randrw"] {
        let error = plan(&format!("--disk /dev/vdb --rw {rw}")).unwrap_err();
        assert!(error.contains("would overwrite /dev/vdb; say --destructive"), "{error}");
        assert!(plan(&format!("--disk /dev/vdb --rw {rw} --destructive")).is_ok());
    }
    assert!(plan("--disk /dev/vdb --full").unwrap().axes.mixes.iter().all(|(mix, _)| !mix.writes()));
    assert!(plan("--destructive").is_err());
}

#[test]
fn values_that_are_none() {
    for (args, message) in [
        ("--engines aio", "say one of threads, native, io_uring, auto"),
        ("--engines native,auto,native", "--engines has native twice; say it once"),
        ("--vs none,host", "--vs none compares with nothing; leave out none, or the others"),
        ("--vs all,qemu", "--vs all compares with all that are there; leave out all, or the others"),
        ("--vs qemu,qemu", "--vs has qemu twice; say it once"),
        ("--depths 1,32,1", "--depths has 1 twice; say it once"),
        ("--bs 4K,4096", "--bs has 4K twice; say it once"),
        ("--rw read:4K,read,read:4096", "--rw has read:4K twice; say it once"),
        ("--merge on,on", "--merge has on twice; say it once"),
        ("--thread-pool-max 65", "65 is not in 1..=64"),
        ("--completion irq", "say one of poll, interrupt"),
        ("--cache off", "say one of writeback, none,"),
        ("--rw trim", "say one of randread, randwrite, read, write, randrw"),
        ("--content given", "say one of written, hole, preallocated"),
        ("--bs 1000", "a multiple of 512 bytes, at most 4M"),
        ("--bs 8M", "a multiple of 512 bytes, at most 4M"),
        ("--depths 0", "0 is not in 1..=1024"),
        ("--runtime 0", "seconds between 0.01 and 3600"),
        ("--size 4K --bs 8K", "--size: at least one block"),
        ("--size 4K --rw read:1M", "--size: at least one block"),
        ("--rw read:1000", "a multiple of 512 bytes"),
        ("--engines native --cache writeback", "--engines native goes past the page cache"),
        ("--quick --full", "cannot be used with"),
        ("--disk x --dir y", "cannot be used with"),
    ] {
        let error = plan(args).unwrap_err();
        assert!(error.contains(message), "{args}: {error}");
    }
}
