//! Drivers that make anything available: chains, headers, ranges and rings in which nothing need be right. Whatever it was, the
//! disk works for the next driver, and an image that is to stay as it is did.

use block::overlay;
use proptest::prelude::*;

use super::workers::context;
use super::*;
use crate::virtio::driver::Descriptor;

/// What such a driver does.
#[derive(Clone, Debug)]
enum Act {
    /// A request: type, sector, and the rest of its chain.
    Request(u32, u64, Vec<Segment>),
    /// A chain of anything.
    Chain(Vec<Segment>),
    /// An entry of the table says anything; then a head, which may be another.
    Entry(u16, Descriptor, u16),
    /// So many heads were made available, or none, or more than there are.
    Index(u16),
    /// What ranges are read from: sectors and numbers of them, with flags.
    Ranges(Vec<(u64, u32, u32)>),
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => DATA..DATA + 0x1_0000,
        2 => HEADERS..HEADERS + 64,
        1 => RINGS..RINGS + 0x3000,
        1 => MEMORY as u64 - 600..MEMORY as u64 + 8,
        1 => u64::MAX - 600..=u64::MAX,
        1 => any::<u64>(),
    ]
}

fn len() -> impl Strategy<Value = u32> {
    prop_oneof![3 => 0..40_u32, 4 => Just(512_u32), 2 => Just(4096_u32), 2 => 1..8192_u32, 1 => any::<u32>(), 1 => Just(u32::MAX)]
}

fn segment(writable: impl Strategy<Value = bool>) -> impl Strategy<Value = Segment> {
    (address(), len(), writable).prop_map(|(address, len, writable)| Segment {
        address: GuestAddress(address),
        len,
        writable,
    })
}

fn sector() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 0..SECTORS, 2 => SECTORS - 10..SECTORS + 10, 1 => u64::MAX / 512 - 2..=u64::MAX / 512 + 2, 1 => any::<u64>()]
}

fn act() -> impl Strategy<Value = Act> {
    let known = prop_oneof![8 => prop::sample::select(vec![IN, OUT, FLUSH, GET_ID, 11, 13, 14]), 1 => any::<u32>()];
    // Readable ones, then writable ones: as is right, with what is wrong in them.
    let right = (prop::collection::vec(segment(Just(false)), 0..4), prop::collection::vec(segment(Just(true)), 0..4));
    let right = right.prop_map(|(readable, writable)| [readable, writable].concat());
    let entry = (any::<u16>(), address(), len(), any::<u16>(), 0..600_u16, 0..300_u16);
    let range = (sector(), prop_oneof![0..64_u32, any::<u32>()], prop_oneof![4 => 0..2_u32, 1 => any::<u32>()]);
    prop_oneof![
        8 => (known, sector(), right).prop_map(|(kind, sector, chain)| Act::Request(kind, sector, chain)),
        1 => prop::collection::vec(segment(any::<bool>()), 1..6).prop_map(Act::Chain),
        1 => entry.prop_map(|(entry, address, len, flags, next, head)| {
            Act::Entry(entry % QUEUE_SIZE, Descriptor { address, len, flags, next }, head)
        }),
        1 => any::<u16>().prop_map(Act::Index),
        2 => prop::collection::vec(range, 1..8).prop_map(Act::Ranges),
    ]
}

impl Guest {
    fn misbehave(&mut self, act: Act) {
        match act {
            Act::Request(kind, sector, chain) => {
                let (header, status) = self.header(kind, sector);
                self.driver.add(&[vec![header], chain, vec![status]].concat());
            }
            Act::Chain(chain) => drop(self.driver.add(&chain)),
            Act::Entry(entry, descriptor, head) => {
                self.driver.write_descriptor(RINGS, entry, descriptor);
                self.driver.publish(head);
            }
            Act::Index(index) => self.driver.set_avail_idx(index),
            Act::Ranges(ranges) => {
                for (n, (sector, sectors, flags)) in (0..).zip(ranges) {
                    let at = DATA + n * 16;
                    self.fill(at, &sector.to_le_bytes());
                    self.fill(at + 8, &sectors.to_le_bytes());
                    self.fill(at + 12, &flags.to_le_bytes());
                }
            }
        }
    }

    fn worker(&self, disk: &Arc<Disk>, aio: Aio) -> QueueWorker {
        let cache = Arc::new(WriteCache::new(disk.cache()));
        let features = self.features | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        let rules = Rules { size: disk.size(), readonly: false, cache, features, may_unmap: true };
        let engine = Box::new(Merge::new(aio.start(disk.clone(), "test-io").unwrap()));
        QueueWorker::new(context(self, disk.clone(), rules), self.queue(), engine).unwrap()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 240, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_driver_does_the_next_one_has_a_disk(
        drivers in prop::collection::vec(prop::collection::vec(act(), 1..12), 1..4),
        features in prop::sample::select(vec![PLAIN, EVENT_IDX]),
        aio in prop::sample::select(vec![Aio::Threads, Aio::IoUring]),
        snapshot in any::<bool>(),
    ) {
        let image = Image::new();
        fs::write(&image.path, pattern(SECTORS as usize * 512, 3)).unwrap();
        let mut disk = image.disk_as(snapshot, CacheMode::Writeback);
        if snapshot {
            let below = Arc::into_inner(disk).expect("nobody else has it");
            disk = Arc::new(overlay::over(below, &image.path, image.path.parent().unwrap()).unwrap());
        }
        let mut guest = Guest::new(features);
        for acts in drivers {
            for act in acts {
                guest.misbehave(act);
            }
            let worker = guest.worker(&disk, aio);
            let worker = Worker::spawn("blk0-q0", move |stop| worker.run(&stop)).unwrap();
            // Long enough for most of it; what is still in flight is drained.
            std::thread::sleep(Duration::from_millis(2));
            // A panic of its thread goes on here.
            worker.stop();
            guest.restart();
            let worker = guest.worker(&disk, aio);
            let worker = Worker::spawn("blk0-q0", move |stop| worker.run(&stop)).unwrap();
            let content = pattern(1024, 7);
            guest.fill(DATA, &content);
            prop_assert_eq!(guest.request(OUT, 3, &[readable(DATA, 1024)]), (OK, 1));
            guest.driver.set_used_event(1);
            prop_assert_eq!(guest.request(IN, 3, &[writable(DATA + 0x1000, 1024)]), (OK, 1025));
            prop_assert!(guest.bytes(DATA + 0x1000, 1024) == content);
            worker.stop();
            guest.restart();
        }
        if snapshot {
            prop_assert!(fs::read(&image.path).unwrap() == pattern(SECTORS as usize * 512, 3), "the image was written to");
        }
        prop_assert_eq!(fs::metadata(&image.path).unwrap().len(), SECTORS * 512);
    }
}
