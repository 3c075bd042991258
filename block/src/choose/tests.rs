//! Every row of the two tables; and on this host, that what is chosen works.

use super::*;

use crate::alternatives::{Alternative, alternatives};
use crate::direct::Alignment;
use crate::facts::Host;
use crate::filesystem::Filesystem;

const WORKS: Direct = Direct::Works(Alignment { memory: 4, block: 512 });

fn on(nature: Nature, blocks: Blocks) -> Kind {
    Kind::File { filesystem: Filesystem { name: "testfs", nature }, blocks }
}

/// A written file on a usual filesystem of a host that offers everything.
fn facts() -> Facts {
    Facts {
        path: "disk.img".into(),
        kind: on(Nature::Blocks, Blocks::Written),
        size: 1 << 20,
        direct: WORKS,
        nowait: true,
        host: Host { kernel: "6.1.0".to_owned(), native: Ok(()), io_uring: Ok(()), native_room: Some(65536) },
    }
}

fn unusable(aio: Aio) -> Unusable {
    Unusable::new(aio, "forbidden".to_owned(), "allow it")
}

fn chosen(facts: &Facts, wish: Wish) -> (CacheMode, Vec<Aio>) {
    let choice = choose(facts, wish).unwrap();
    let engines = [&[choice.engines.best()], choice.engines.fallbacks()].concat();
    assert_eq!(engines.last() == Some(&Threads), wish.aio.is_none_or(|aio| aio == Threads), "threads always work");
    assert!(!choice.aio_why.contains('\n') && !choice.cache_why.contains('\n'));
    (choice.cache, engines)
}

const AUTO: Wish = Wish { aio: None, cache: None, access: Access::Write };

fn cached(cache: CacheMode) -> Wish {
    Wish { cache: Some(cache), ..AUTO }
}

#[test]
fn every_row_of_the_cache_modes() {
    let native = Wish { aio: Some(Native), ..AUTO };
    let memory = Facts { kind: on(Nature::Memory, Blocks::Written), ..facts() };
    let missing = Facts { direct: Direct::Missing, ..facts() };
    let failed = Facts { direct: Direct::Failed("Input/output error".to_owned()), ..facts() };
    let coarse = Direct::Works(Alignment { memory: 4096, block: 4096 });
    let cut = Facts { size: 4096 + 512, direct: coarse, ..facts() };
    let table = [
        (&memory, native, CacheMode::None),
        (&memory, AUTO, CacheMode::Writeback),
        (&missing, AUTO, CacheMode::Writeback),
        (&failed, AUTO, CacheMode::Writeback),
        (&cut, AUTO, CacheMode::Writeback),
        (&cut, Wish { access: Access::Read, ..AUTO }, CacheMode::None),
        (&facts(), AUTO, CacheMode::None),
        (&facts(), native, CacheMode::None),
        (&facts(), Wish { access: Access::Snapshot, ..AUTO }, CacheMode::Unsafe),
        (&memory, Wish { access: Access::Snapshot, ..AUTO }, CacheMode::Unsafe),
        (&facts(), Wish { access: Access::Snapshot, ..native }, CacheMode::None),
        (&cut, Wish { access: Access::Snapshot, ..cached(CacheMode::None) }, CacheMode::None),
    ];
    for (facts, wish, cache) in table {
        assert_eq!(chosen(facts, wish).0, cache, "{facts:?}, {wish:?}");
    }
    let why = choose(&failed, AUTO).unwrap().cache_why;
    assert!(why.contains("Input/output error"), "{why}");
}

#[test]
fn every_row_of_the_engines() {
    let file = |nature, blocks| Facts { kind: on(nature, blocks), ..facts() };
    let waits = |facts| Facts { nowait: false, ..facts };
    let written = |nature| file(nature, Blocks::Written);
    let sparse = Blocks::Sparse { allocated: 0 };
    let device = Facts { kind: Kind::Device { rotational: true, backing: None }, ..facts() };
    let (buffered, direct) = (cached(CacheMode::Writethrough), cached(CacheMode::None));
    let readonly = Wish { access: Access::Read, ..direct };
    let snapshot = Wish { access: Access::Snapshot, ..direct };
    let table: &[(Facts, Wish, &[Aio])] = &[
        (waits(written(Nature::Memory)), buffered, &[IoUring, Threads]),
        (facts(), buffered, &[IoUring, Threads]),
        (device.clone(), buffered, &[IoUring, Threads]),
        (waits(written(Nature::Other)), buffered, &[Threads]),
        (waits(written(Nature::Memory)), direct, &[IoUring, Threads]),
        (waits(written(Nature::Other)), direct, &[Threads]),
        (waits(written(Nature::CopyOnWrite)), direct, &[Threads]),
        (device.clone(), snapshot, &[IoUring, Native, Threads]),
        (facts(), snapshot, &[IoUring, Native, Threads]),
        (facts(), Wish { cache: None, ..snapshot }, &[IoUring, Threads]),
        (device, direct, &[Native, IoUring, Threads]),
        (written(Nature::CopyOnWrite), direct, &[IoUring, Threads]),
        (written(Nature::CopyOnWrite), readonly, &[IoUring, Threads]),
        (file(Nature::Blocks, sparse), readonly, &[Native, IoUring, Threads]),
        (facts(), direct, &[Native, IoUring, Threads]),
        (file(Nature::Other, Blocks::Reserved), direct, &[Native, IoUring, Threads]),
        (file(Nature::Blocks, Blocks::Shared), direct, &[IoUring, Native, Threads]),
        (file(Nature::Blocks, sparse), direct, &[IoUring, Native, Threads]),
    ];
    for (facts, wish, engines) in table {
        assert_eq!(chosen(facts, *wish).1, *engines, "{facts:?}, {wish:?}");
    }
}

/// What the host lacks is passed over, and said if it would have been better.
#[test]
fn hosts_that_lack_engines() {
    // The image, what the host lacks, what runs, and what is said to be lacking.
    type Row<'a> = (&'a Kind, &'a [Aio], &'a [Aio], &'a [Aio]);
    let without = |lacks: &[Aio]| {
        let offer = |aio| if lacks.contains(&aio) { Err(unusable(aio)) } else { Ok(()) };
        Host { native: offer(Native), io_uring: offer(IoUring), ..facts().host }
    };
    let sparse = on(Nature::Blocks, Blocks::Sparse { allocated: 4096 });
    let table: &[Row] = &[
        (&facts().kind, &[Native], &[IoUring, Threads], &[Native]),
        (&facts().kind, &[IoUring], &[Native, Threads], &[]),
        (&facts().kind, &[Native, IoUring], &[Threads], &[Native, IoUring]),
        (&sparse, &[IoUring], &[Native, Threads], &[IoUring]),
        (&sparse, &[Native], &[IoUring, Threads], &[]),
        (&sparse, &[Native, IoUring], &[Threads], &[IoUring, Native]),
    ];
    for (kind, lacks, engines, said) in table {
        let facts = Facts { kind: (*kind).clone(), host: without(lacks), ..facts() };
        assert_eq!(chosen(&facts, AUTO).1, *engines, "{facts:?}");
        let missing = choose(&facts, AUTO).unwrap().missing;
        assert_eq!(missing.iter().map(Unusable::aio).collect::<Vec<_>>(), *said);
    }
}

#[test]
fn what_is_asked_for_is_kept_to_or_refused() {
    for aio in Aio::ALL {
        for cache in CacheMode::ALL {
            let wish = Wish { aio: Some(aio), cache: Some(cache), access: Access::Write };
            if aio.goes_with(cache) {
                assert_eq!(chosen(&facts(), wish), (cache, vec![aio]));
            } else {
                assert!(choose(&facts(), wish).unwrap_err().to_string().contains("aio=native needs cache=none"));
            }
        }
    }
    let refusal = |facts: &Facts, wish| {
        let line = choose(facts, wish).unwrap_err().to_string();
        assert!(line.contains("\"disk.img\"") && !line.contains('\n'), "{line}");
        line
    };
    let missing = Facts { direct: Direct::Missing, ..facts() };
    let native = Wish { aio: Some(Native), ..AUTO };
    assert!(
        refusal(&missing, native).contains("the filesystem does not offer O_DIRECT; use aio=io_uring or aio=threads")
    );
    assert!(refusal(&missing, cached(CacheMode::Directsync)).contains("use cache=writethrough"));
    let coarse = Direct::Works(Alignment { memory: 4096, block: 4096 });
    let cut = Facts { size: 512, direct: coarse, ..facts() };
    assert!(refusal(&cut, native).contains("no multiple of the blocks"));
    assert!(refusal(&cut, cached(CacheMode::None)).contains("truncate -s 4096"));
    let host = Host { native: Err(unusable(Native)), ..facts().host };
    let line = refusal(&Facts { host, ..facts() }, native);
    assert!(line.contains("aio=native: forbidden; allow it, or use aio=threads"), "{line}");
}

/// Only what makes a difference is named, with what it leads to.
#[test]
fn what_would_change_it() {
    let named = |facts: &Facts, wish| {
        let others = alternatives(facts, wish, &choose(facts, wish).unwrap());
        let line = |it: Alternative| {
            format!("{} -> {} {}", it.change, it.choice.engines.best().name(), it.choice.cache.name())
        };
        others.into_iter().map(line).collect::<Vec<_>>()
    };
    assert_eq!(named(&facts(), AUTO), [""; 0]);
    let sparse = Facts { kind: on(Nature::Blocks, Blocks::Sparse { allocated: 0 }), ..facts() };
    let written = "had every byte its block (fallocate -l 1048576 \"disk.img\") -> native none";
    assert_eq!(named(&sparse, AUTO), ["with readonly=on -> native none", written]);
    let shared = Facts { kind: on(Nature::Blocks, Blocks::Shared), ..facts() };
    assert!(named(&shared, AUTO)[1].contains("cp --reflink=never \"disk.img\" COPY) -> native none"));
    let host = Host { native: Err(unusable(Native)), ..facts().host };
    assert_eq!(named(&Facts { host, ..facts() }, AUTO), ["were linux-aio usable (allow it) -> native none"]);
    let elsewhere =
        Facts { kind: on(Nature::Memory, Blocks::Written), direct: Direct::Missing, nowait: false, ..facts() };
    assert_eq!(named(&elsewhere, AUTO), ["on a filesystem such as ext4 or xfs -> native none"]);
    let coarse = Direct::Works(Alignment { memory: 4096, block: 4096 });
    let cut = Facts { size: 512, direct: coarse, ..facts() };
    assert!(
        named(&cut, AUTO)
            .contains(&"were the last block whole (truncate -s 4096 \"disk.img\") -> native none".to_owned())
    );
    let asked = Wish { aio: Some(Threads), ..AUTO };
    assert_eq!(named(&facts(), asked), ["left to skiff (aio=auto, cache=auto) -> native none"]);
}
