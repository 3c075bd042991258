//! Several queues, and queues of other sizes.

use std::fs;

use super::*;

/// Activates `blk` with a queue for each of `guests`.
fn activate_all(blk: &mut Blk, guests: &[Guest]) {
    blk.activate(Activation {
        memory: guests[0].memory.clone(),
        features: guests[0].features,
        queues: guests.iter().map(Guest::queue).collect(),
        interrupt: Arc::new(Lines(guests.iter().map(|guest| guest.line.clone()).collect())),
    })
    .unwrap();
}

/// One sector out and back again.
fn echo(guest: &mut Guest, sector: u64) {
    let (out, back, content) = (guest.base + DATA, guest.base + DATA + 512, pattern(512, sector as usize));
    guest.fill(out, &content);
    assert_eq!(guest.request(OUT, sector, &[readable(out, 512)]), (OK, 1));
    assert_eq!(guest.request(IN, sector, &[writable(back, 512)]), (OK, 513));
    assert!(guest.bytes(back, 512) == content);
}

#[test]
fn tells_how_many_queues_it_has_and_how_long_they_are() {
    for (queues, size) in [(1, 4), (2, 256), (64, 1024)] {
        let blk = Image::new().open_with(queues, size, Aio::Threads);
        assert_eq!(blk.queue_sizes(), vec![size; queues.into()]);
        // VIRTIO_BLK_F_MQ and num_queues: only of several.
        assert_eq!(blk.features() & 1 << 12 != 0, queues > 1);
        let (mut seg_max, mut num_queues) = ([0; 4], [0; 2]);
        blk.read_config(12, &mut seg_max);
        blk.read_config(34, &mut num_queues);
        assert_eq!(u32::from_le_bytes(seg_max), u32::from(size) - 2);
        assert_eq!(u16::from_le_bytes(num_queues), if queues > 1 { queues } else { 0 });
    }
}

#[test]
fn every_queue_works_on_the_same_disk() {
    for aio in [Aio::Threads, Aio::IoUring] {
        let image = Image::new();
        let mut blk = image.open_with(4, 256, aio);
        let mut guests = Guest::many(PLAIN, 4, 256);
        activate_all(&mut blk, &guests);
        for round in 0..3 {
            for (n, guest) in (0..).zip(&mut guests) {
                echo(guest, round * 8 + n);
            }
        }
        // What one queue wrote another reads.
        let content = guests[3].bytes(guests[3].base + DATA, 512);
        let back = guests[1].base + DATA + 512;
        assert_eq!(guests[1].request(IN, 19, &[writable(back, 512)]), (OK, 513));
        assert!(guests[1].bytes(back, 512) == content);
        blk.reset();
        let file = fs::read(&image.path).unwrap();
        assert!((0..3).flat_map(|round| (0..4).map(move |n| round * 8 + n)).all(|sector| {
            let at = sector * 512;
            file[at..at + 512] == pattern(512, sector)
        }));
    }
}

/// A driver that knows nothing of several queues enables the first, others more than one but not all.
#[test]
fn queues_that_are_not_enabled_are_not_missed() {
    let image = Image::new();
    let mut blk = image.open_with(4, 256, Aio::Threads);
    let mut guests = Guest::many(PLAIN, 4, 256);
    let some: Vec<_> = guests.drain(..2).collect();
    for enabled in [&some[..1], &some[1..], &some[..]] {
        blk.activate(Activation {
            memory: some[0].memory.clone(),
            features: PLAIN,
            queues: enabled.iter().map(Guest::queue).collect(),
            interrupt: Arc::new(Lines(some.iter().map(|guest| guest.line.clone()).collect())),
        })
        .unwrap();
        blk.reset();
    }
    let mut some = some;
    activate_all(&mut blk, &some);
    for guest in &mut some {
        echo(guest, 5);
    }
}

/// A broken queue stops its device, all queues of it, and no other; a reset repairs it.
#[test]
fn a_broken_queue_stops_its_device_until_the_reset() {
    let (image, other_image) = (Image::new(), Image::new());
    let mut blk = image.open_with(3, 256, Aio::Threads);
    let mut guests = Guest::many(PLAIN, 3, 256);
    let (mut other, mut other_guest) = (other_image.open(false, None), Guest::new(PLAIN));
    other_guest.activate(&mut other);
    for broken in 0..3 {
        activate_all(&mut blk, &guests);
        for guest in &mut guests {
            echo(guest, 9);
        }
        guests[broken].driver.set_avail_idx(1000);
        guests[broken].kick.write(1).unwrap();
        wait(&guests[0].line.reset);
        for worker in &blk.workers {
            while !worker.is_finished() {
                std::thread::yield_now();
            }
        }
        for guest in &mut guests {
            let (_, status) = guest.offer(FLUSH, 0, &[]);
            guest.kick.write(1).unwrap();
            assert_eq!(guest.bytes(status, 1), [UNTOUCHED]);
        }
        echo(&mut other_guest, 9);
        assert!(guests[0].line.reset.read().is_err(), "said once");
        blk.reset();
        guests.iter_mut().for_each(Guest::restart);
    }
    activate_all(&mut blk, &guests);
    for guest in &mut guests {
        echo(guest, 11);
    }
}

/// A transfer of one queue may wait for those of another, on blocks that both write: none is left to its driver meanwhile.
#[test]
fn a_reset_stops_all_queues_at_once() {
    let mut blk = Image::new().open_with(2, 256, Aio::Threads);
    let told = [(); 2].map(|()| EventFd::new(EFD_NONBLOCK).unwrap());
    for own in 0..2 {
        let [own, other] = [own, 1 - own].map(|queue| told[queue].try_clone().unwrap());
        let body = move |stop: EventFd| {
            wait(&stop);
            own.write(1).unwrap();
            wait(&other);
        };
        blk.workers.push(Worker::spawn("blk0", body).unwrap());
    }
    blk.reset();
}

#[test]
fn a_queue_may_have_any_size() {
    for size in [4, 64, 1024] {
        for aio in [Aio::Threads, Aio::IoUring] {
            let image = Image::new();
            let mut blk = image.open_with(1, size, aio);
            let mut guest = Guest::many(PLAIN, 1, size).remove(0);
            // As full as it gets, and with the longest chain SEG_MAX allows.
            for sector in 0..u64::from(size) / 4 {
                guest.offer(
                    IN,
                    sector,
                    &[writable(DATA + sector * 1024, 512), writable(DATA + sector * 1024 + 512, 512)],
                );
            }
            assert_eq!(guest.driver.free(), 0);
            guest.activate(&mut blk);
            for _ in 0..size / 4 {
                guest.turn();
            }
            let pieces: Vec<_> = (0..u64::from(size) - 2).map(|n| readable(DATA + n * 512, 512)).collect();
            let content = pattern(pieces.len() * 512, 3);
            guest.fill(DATA, &content);
            assert_eq!(guest.request(OUT, 1, &pieces), (OK, 1));
            assert!(fs::read(&image.path).unwrap()[512..512 + content.len()] == content);
        }
    }
}
