//! For tests: every engine, on every kind of image, in every cache mode it goes with.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use tempfile::TempDir;

use super::conformance::{self, Bed, COARSE, DIRECT, Kind, attach, await_completions, memory, op};
use super::merge::Merge;
use super::{Aio, Engine, OpKind};
use crate::cache::CacheMode;
use crate::disk::Disk;
use crate::lock::tests::FORKING;

/// An engine with an image and a cache mode each.
fn combinations() -> impl Iterator<Item = (Aio, Bed)> {
    let kinds = [Kind::Written, Kind::Sparse, Kind::Preallocated, Kind::Tmpfs];
    Aio::ALL.into_iter().flat_map(move |aio| {
        CacheMode::ALL.into_iter().filter(move |&cache| aio.goes_with(cache)).flat_map(move |cache| {
            // Before Linux 6.6 nothing in memory can be opened with O_DIRECT.
            let kinds = kinds.into_iter().filter(move |&kind| kind != Kind::Tmpfs || !cache.is_direct());
            kinds.map(move |kind| (aio, Bed { kind, cache, cases: 4, ..Bed::default() }))
        })
    })
}

fn start(aio: Aio) -> impl Fn(Arc<Disk>) -> Box<dyn Engine> {
    move |disk| aio.start(disk, "test-io").unwrap()
}

#[test]
fn all_move_the_right_bytes() {
    for (aio, bed) in combinations() {
        eprintln!("{aio:?} {bed:?}");
        conformance::bytes(&bed, start(aio));
    }
}

#[test]
fn all_complete_exactly_once() {
    for (aio, bed) in combinations().filter(|(_, bed)| bed.kind == Kind::Written) {
        eprintln!("{aio:?} {bed:?}");
        conformance::exactly_once(&bed, start(aio));
    }
}

#[test]
fn all_refuse_bad_buffers_and_drain() {
    for (aio, bed) in combinations().filter(|(_, bed)| bed.kind != Kind::Tmpfs) {
        eprintln!("{aio:?} {bed:?}");
        conformance::bad_buffers(&bed, start(aio));
        conformance::drain(&bed, start(aio));
    }
}

#[test]
fn all_work_on_block_devices() {
    let _alone = FORKING.lock();
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    match attach(image.path(), 512) {
        Ok(device) => assert!(Command::new("losetup").arg("-d").arg(device).status().unwrap().success()),
        Err(why) => {
            skip::because(why);
            return;
        }
    }
    for sector in [512, 4096] {
        for (aio, bed) in combinations().filter(|(_, bed)| bed.kind == Kind::Written && bed.cache != CacheMode::Unsafe)
        {
            let bed = Bed { kind: Kind::Loop(sector), cases: 2, ..bed };
            eprintln!("{aio:?} {bed:?}");
            conformance::bytes(&bed, start(aio));
            conformance::neighbours(&bed, start(aio));
            conformance::drain(&bed, start(aio));
        }
    }
}

/// An overlay mounted over two empty folders, as containers have one; unmounted when dropped.
struct Overlay(TempDir);

impl Overlay {
    fn new() -> Result<Self, String> {
        // The upper folder must be on a filesystem that keeps extended attributes, and not on an overlay itself.
        let dir = TempDir::new_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        let [lower, upper, work, merged] = ["lower", "upper", "work", "merged"].map(|name| dir.path().join(name));
        for folder in [&lower, &upper, &work, &merged] {
            std::fs::create_dir(folder).unwrap();
        }
        let [lower, upper, work] = [lower, upper, work].map(|path| path.display().to_string());
        let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
        let output = Command::new("mount").args(["-t", "overlay", "overlay", "-o", &options]).arg(merged).output();
        let output = output.map_err(|error| error.to_string())?;
        if output.status.success() { Ok(Self(dir)) } else { Err(String::from_utf8_lossy(&output.stderr).trim().into()) }
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path().join("merged")).status();
    }
}

#[test]
fn all_work_on_overlayfs() {
    let _alone = FORKING.lock();
    let overlay = match Overlay::new() {
        Ok(overlay) => overlay,
        Err(why) => {
            skip::because(why);
            return;
        }
    };
    let folder: &'static Path = Box::leak(overlay.0.path().join("merged").into_boxed_path());
    for (aio, bed) in combinations().filter(|(_, bed)| bed.kind == Kind::Written) {
        let bed = Bed { kind: Kind::In(folder), cases: 3, ..bed };
        eprintln!("{aio:?} {bed:?}");
        conformance::bytes(&bed, start(aio));
        conformance::drain(&bed, start(aio));
    }
}

#[test]
fn all_write_sectors_of_larger_blocks() {
    for aio in Aio::ALL {
        for cache in [CacheMode::None, CacheMode::Directsync] {
            let bed = Bed { cache, alignment: Some(COARSE), cases: 4, ..Bed::default() };
            conformance::bytes(&bed, start(aio));
            conformance::neighbours(&bed, start(aio));
        }
    }
}

/// An engine leaves nothing behind that holds the image, and with it its lock: not even for a moment.
#[test]
fn an_image_is_free_when_its_engine_is_gone() {
    let _alone = FORKING.lock();
    for aio in Aio::ALL {
        let (_dir, path, disk, _) = DIRECT.disk(1 << 20);
        drop(disk);
        for round in 0..50 {
            let disk = Disk::open(&path, false, CacheMode::None, "disk0");
            let disk = disk.unwrap_or_else(|error| panic!("{aio:?}, round {round}: {error}"));
            let mut engine = aio.start(Arc::new(disk), "test-io").unwrap();
            engine.push(op(OpKind::Read, 0, &[(4096, 4096)], &memory(1 << 16)), 0);
            engine.submit();
        }
    }
}

/// The host begins while the owner goes on pushing; neighbours, of which there may be more, are not parted for that.
#[test]
fn many_are_handed_over_before_the_last_is_pushed() {
    for aio in [Aio::Native, Aio::IoUring] {
        let (_dir, _path, disk, _) = DIRECT.disk(1 << 20);
        let memory = memory(1 << 20);
        for (stride, calls) in [(8192, [2, 3]), (4096, [0, 1])] {
            let mut engine = Merge::new(aio.start(disk.clone(), "test-io").unwrap());
            for tag in 0..40 {
                let place = usize::from(tag) * 4096;
                engine.push(op(OpKind::Read, u64::from(tag) * stride, &[(place, 4096)], &memory), tag);
            }
            let before = engine.submissions();
            engine.submit();
            assert_eq!([before, engine.submissions()], calls, "{aio:?}, {stride} bytes apart");
            assert_eq!(engine.merged(), if stride == 4096 { 39 } else { 0 });
            for completion in await_completions(&mut engine, 40) {
                completion.result.unwrap();
            }
        }
    }
}

fn snapshots() -> impl Iterator<Item = (Aio, Bed)> {
    combinations().map(|(aio, bed)| (aio, Bed { snapshot: true, ..bed }))
}

/// Every engine, twice, as one: over an image that nothing is written to.
#[test]
fn all_leave_the_image_of_a_snapshot_alone() {
    for (aio, bed) in snapshots() {
        eprintln!("{aio:?} {bed:?}");
        conformance::bytes(&bed, start(aio));
        conformance::bad_buffers(&bed, start(aio));
        conformance::drain(&bed, start(aio));
    }
    for (aio, bed) in snapshots().filter(|(_, bed)| bed.kind == Kind::Written) {
        conformance::exactly_once(&bed, start(aio));
        // Through two queues: one map, and under O_DIRECT blocks of which each writes a part.
        conformance::neighbours(&bed, start(aio));
        conformance::bytes(&bed, |disk| Box::new(Merge::new(start(aio)(disk))));
        if bed.cache.is_direct() {
            let bed = Bed { alignment: Some(COARSE), ..bed };
            conformance::bytes(&bed, start(aio));
            conformance::neighbours(&bed, start(aio));
        }
    }
}
