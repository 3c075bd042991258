//! Against a model of the driver and of vhost-net: who has which chain is written down, and not read from the rings.

use proptest::prelude::*;
use vm_memory::Bytes;

use super::*;

const SIZE: u16 = 8;
const LAYOUT: QueueLayout = QueueLayout { size: SIZE, desc: 0x1000, driver: 0x2000, device: 0x3000 };

/// Which of its free chains a driver makes available next.
#[derive(Clone, Copy, Debug)]
enum Next {
    /// The one that came back last, as Linux: often the same one again and again.
    Last,
    /// The one that came back first.
    First,
    Any,
}

/// A queue as driver and kernel have it.
struct Queue {
    memory: GuestMemoryMmap,
    rings: Rings,
    next: Next,
    free: Vec<u16>,
    /// What is in the available ring and not taken yet.
    waiting: Vec<u16>,
    /// What the kernel took, and has neither used nor forgotten.
    batch: Vec<u16>,
    forgotten: Vec<u16>,
    /// The number of the chain that was forgotten first.
    first: Option<u16>,
    added: u16,
    taken: u16,
    used: u16,
    seen: u16,
}

impl Queue {
    /// With all indices at `start`, so that they wrap soon.
    fn new(start: u16, next: Next) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
        let mut rings = Rings::new(&memory, &LAYOUT).unwrap();
        assert_eq!(rings.start, Indices { taken: 0, used: 0 });
        rings.start = Indices { taken: start, used: start };
        for ring in [LAYOUT.driver, LAYOUT.device] {
            memory.write_obj(start, GuestAddress(ring + 2)).unwrap();
        }
        let (added, taken, used, seen) = (start, start, start, start);
        let (waiting, batch, forgotten) = (Vec::new(), Vec::new(), Vec::new());
        let free = (0..SIZE).collect();
        Self { memory, rings, next, free, waiting, batch, forgotten, first: None, added, taken, used, seen }
    }

    /// The driver makes a chain available.
    fn add(&mut self, which: usize) {
        let Some(last) = self.free.len().checked_sub(1) else { return };
        let head = self.free.remove(match self.next {
            Next::Last => last,
            Next::First => 0,
            Next::Any => which % (last + 1),
        });
        let at = LAYOUT.driver + 4 + 2 * u64::from(self.added % SIZE);
        self.memory.write_obj(head, GuestAddress(at)).unwrap();
        self.added = self.added.wrapping_add(1);
        self.memory.write_obj(self.added, GuestAddress(LAYOUT.driver + 2)).unwrap();
        self.waiting.push(head);
    }

    /// The kernel takes the next one.
    fn take(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        self.batch.push(self.waiting.remove(0));
        self.taken = self.taken.wrapping_add(1);
    }

    /// It uses what it took, as a kernel that copies does: in the same order.
    fn use_batch(&mut self) {
        for head in std::mem::take(&mut self.batch) {
            let at = GuestAddress(LAYOUT.device + 4 + 8 * u64::from(self.used % SIZE));
            self.memory.write_obj([u32::from(head), 60], at).unwrap();
            self.used = self.used.wrapping_add(1);
            self.memory.write_obj(self.used, GuestAddress(LAYOUT.device + 2)).unwrap();
        }
    }

    /// It could hand none of them over.
    fn forget_batch(&mut self) {
        let first = self.taken.wrapping_sub(self.batch.len() as u16);
        if !self.batch.is_empty() {
            self.first.get_or_insert(first);
        }
        self.forgotten.append(&mut self.batch);
    }

    /// What the driver finds used since it last looked.
    fn reap(&mut self) -> Vec<[u32; 2]> {
        self.used = self.memory.read_obj(GuestAddress(LAYOUT.device + 2)).unwrap();
        let mut reaped = Vec::new();
        while self.seen != self.used {
            let at = GuestAddress(LAYOUT.device + 4 + 8 * u64::from(self.seen % SIZE));
            reaped.push(self.memory.read_obj::<[u32; 2]>(at).unwrap());
            self.seen = self.seen.wrapping_add(1);
        }
        self.free.extend(reaped.iter().map(|[head, _]| *head as u16));
        reaped
    }

    /// One chain after the other is added, taken and used, and the driver's again.
    fn go_round(&mut self, times: usize) {
        for _ in 0..times {
            self.add(0);
            self.take();
            self.use_batch();
            self.reap();
        }
    }

    /// One of the things that happen in any order. Only while the interface `is_gone` something is forgotten.
    fn step(&mut self, step: (u8, usize), is_gone: bool) {
        match step {
            (0, which) => self.add(which),
            (1, _) => self.take(),
            (2, which) if is_gone && which % 2 == 0 => self.forget_batch(),
            (2, _) => self.use_batch(),
            _ => {
                self.reap();
                self.rings.watch();
            }
        }
    }

    /// Whether the available ring still has all that was taken since the start, or what was forgotten and one more, without the entry
    /// that the driver may be writing; or whether it has nothing to write.
    fn shows_all(&self) -> bool {
        let since = |number| self.added.wrapping_sub(number);
        let is_full = self.waiting.len() + self.forgotten.len() == usize::from(SIZE);
        is_full || since(self.rings.start.taken) < SIZE || self.first.is_none_or(|first| since(first) < SIZE - 1)
    }

    /// What is used now that nobody else used, sorted.
    fn use_forgotten(&mut self) -> (Forgotten, Vec<u16>) {
        self.reap();
        let forgotten = self.rings.use_forgotten(self.taken);
        let mut back: Vec<_> = self.reap().into_iter().map(|[head, len]| (len == 0).then_some(head as u16)).collect();
        back.sort_unstable();
        (forgotten, back.into_iter().collect::<Option<_>>().expect("chains with nothing in them"))
    }
}

#[test]
fn what_was_used_after_something_was_forgotten_is_not_used_again() {
    let mut queue = Queue::new(0xfffe, Next::First);
    (0..5).for_each(|_| queue.add(0));
    for forgets in [false, true, true, false, true] {
        queue.take();
        if forgets { queue.forget_batch() } else { queue.use_batch() }
    }
    assert_eq!(queue.reap(), [[0, 60], [3, 60]]);
    assert_eq!(queue.rings.use_forgotten(queue.taken), Forgotten { used: 3, unknown: 0 });
    assert_eq!(queue.reap(), [[1, 0], [2, 0], [4, 0]]);
    assert_eq!(queue.rings.use_forgotten(queue.taken), Forgotten::default());
}

#[test]
fn one_chain_that_is_made_available_again_and_again_is_found() {
    let mut queue = Queue::new(0, Next::Last);
    for _ in 0..3 {
        queue.go_round(20);
        queue.add(0);
        queue.take();
        queue.forget_batch();
        assert_eq!(queue.use_forgotten(), (Forgotten { used: 1, unknown: 0 }, vec![7]));
    }
}

#[test]
fn what_the_driver_wrote_over_is_not_guessed() {
    let mut queue = Queue::new(0, Next::First);
    queue.add(0);
    queue.take();
    queue.forget_batch();
    queue.go_round(10);
    assert_eq!(queue.use_forgotten(), (Forgotten { used: 0, unknown: 1 }, vec![]));
    // And is no trouble later.
    queue.add(0);
    queue.take();
    let expected = queue.batch.clone();
    queue.forget_batch();
    assert_eq!(queue.use_forgotten(), (Forgotten { used: 1, unknown: 0 }, expected));
}

/// The chain that goes round is the driver's again, so it is not the one that was forgotten long before.
#[test]
fn what_waits_to_be_taken_was_not_forgotten() {
    let mut queue = Queue::new(0, Next::Last);
    queue.add(0);
    queue.take();
    queue.forget_batch();
    queue.go_round(20);
    queue.add(0);
    assert_eq!(queue.use_forgotten(), (Forgotten { used: 0, unknown: 1 }, vec![]));
}

#[test]
fn an_order_that_the_kernel_chose_does_not_matter() {
    let mut queue = Queue::new(0, Next::First);
    (0..6).for_each(|_| queue.add(0));
    (0..6).for_each(|_| queue.take());
    // Of 0 to 5.
    queue.batch = vec![5, 1, 3];
    queue.use_batch();
    assert_eq!(queue.use_forgotten(), (Forgotten { used: 3, unknown: 0 }, vec![0, 2, 4]));
}

/// So many chains that the index says there were only two, of which none was forgotten.
#[test]
fn an_index_that_went_round_is_known_to_have() {
    let mut queue = Queue::new(5, Next::First);
    for number in 0..u16::MAX {
        queue.add(0);
        queue.take();
        queue.use_batch();
        queue.reap();
        if number % 1000 == 0 {
            queue.rings.watch();
        }
    }
    for forgets in [true, false, false] {
        queue.add(0);
        queue.take();
        if forgets { queue.forget_batch() } else { queue.use_batch() }
    }
    let expected = queue.forgotten.clone();
    assert_eq!(queue.use_forgotten(), (Forgotten { used: 1, unknown: 0 }, expected));
    // And begins anew.
    queue.add(0);
    queue.take();
    queue.use_batch();
    queue.rings.watch();
    assert!(!queue.rings.is_far);
}

#[test]
fn indices_and_heads_that_cannot_be_change_nothing() {
    // A used index that the kernel never wrote.
    let mut queue = Queue::new(0, Next::First);
    (0..3).for_each(|_| queue.add(0));
    queue.take();
    queue.forget_batch();
    queue.memory.write_obj(0x4000_u16, GuestAddress(LAYOUT.device + 2)).unwrap();
    assert_eq!(queue.rings.use_forgotten(queue.taken).used, 0);
    assert_eq!(queue.memory.read_obj::<u16>(GuestAddress(LAYOUT.device + 2)).unwrap(), 0x4000);
    // An available index that jumped, and a head that is none.
    for (at, number) in [(LAYOUT.driver + 2, 0x4000_u16), (LAYOUT.driver + 4, SIZE), (LAYOUT.driver + 4, 0xffff)] {
        let mut queue = Queue::new(0, Next::First);
        queue.add(0);
        queue.take();
        queue.forget_batch();
        queue.memory.write_obj(number, GuestAddress(at)).unwrap();
        assert_eq!(queue.rings.use_forgotten(queue.taken), Forgotten { used: 0, unknown: 1 });
        assert_eq!(queue.rings.use_forgotten(queue.taken), Forgotten::default());
    }
}

proptest! {
    /// Whenever the interface goes, again and again, whatever was forgotten comes back once and nothing else does, if the driver has
    /// not written over it; and never what the driver has made available.
    #[test]
    fn every_chain_comes_back(
        losses in prop::collection::vec((
            prop::collection::vec((0..4_u8, 0..8_usize), 0..80), prop::collection::vec((0..4_u8, 0..8_usize), 0..20),
        ), 1..5),
        start: u16,
        next in prop_oneof![Just(Next::Last), Just(Next::First), Just(Next::Any)],
    ) {
        let mut queue = Queue::new(start, next);
        for (before, while_it_is_gone) in losses {
            for step in before {
                queue.step(step, false);
            }
            for step in while_it_is_gone {
                queue.step(step, true);
            }
            // What it took last it does not keep either.
            queue.forget_batch();
            let shows_all = queue.shows_all();
            let (forgotten, back) = queue.use_forgotten();
            prop_assert_eq!(usize::from(forgotten.used), back.len());
            prop_assert!(!back.iter().any(|head| queue.waiting.contains(head)));
            prop_assert_eq!(usize::from(forgotten.used + forgotten.unknown), queue.forgotten.len());
            if shows_all {
                queue.forgotten.sort_unstable();
                prop_assert_eq!(&back, &queue.forgotten);
            }
            // What is lost to the driver stays so.
            (queue.forgotten, queue.first) = (Vec::new(), None);
        }
    }
}
