//! A worker over engines that are told what to do.

use std::sync::atomic::{AtomicBool, Ordering};

use block::engine::{Completion, Engine, Op, OpKind};

use super::*;

/// An engine that does nothing until it is drained, and tells what it did at each drain.
struct Stuck {
    ops: Vec<(Op, u16)>,
    submitted: EventFd,
    drained: Arc<Mutex<Vec<Vec<OpKind>>>>,
    completed: EventFd,
}

impl Engine for Stuck {
    fn push(&mut self, op: Op, tag: u16) {
        self.ops.push((op, tag));
    }
    fn submit(&mut self) {
        if !self.ops.is_empty() {
            self.submitted.write(1).unwrap();
        }
    }
    fn reap(&mut self, _: &mut Vec<Completion>) {}
    fn has_completed(&mut self) -> bool {
        false
    }
    fn completion_event(&self) -> &EventFd {
        &self.completed
    }
    fn drain(&mut self, completions: &mut Vec<Completion>) {
        self.drained.lock().unwrap().push(self.ops.iter().map(|(op, _)| op.kind).collect());
        completions.extend(self.ops.drain(..).map(|(op, tag)| Completion { tag, op, result: Ok(()) }));
    }
    fn abandon(&mut self, completions: &mut Vec<Completion>) {
        let canceled = || Err(io::Error::from_raw_os_error(libc::ECANCELED));
        completions.extend(self.ops.drain(..).map(|(op, tag)| Completion { tag, op, result: canceled() }));
    }
}

/// Completes everything at once, inside `submit`, with an error.
struct Failing {
    ops: Vec<(Op, u16)>,
    done: Vec<Completion>,
    completed: EventFd,
}

impl Engine for Failing {
    fn push(&mut self, op: Op, tag: u16) {
        self.ops.push((op, tag));
    }
    fn submit(&mut self) {
        let fail = |(op, tag)| Completion { tag, op, result: Err(io::Error::from_raw_os_error(5)) };
        self.done.extend(self.ops.drain(..).map(fail));
    }
    fn reap(&mut self, completions: &mut Vec<Completion>) {
        completions.append(&mut self.done);
    }
    fn has_completed(&mut self) -> bool {
        !self.done.is_empty()
    }
    fn completion_event(&self) -> &EventFd {
        &self.completed
    }
    fn drain(&mut self, completions: &mut Vec<Completion>) {
        self.submit();
        self.reap(completions);
    }
}

/// Stands for a driver that makes a request available at the worst moment: after the worker found nothing in the ring,
/// before it asks to be notified.
struct Late {
    driver: Arc<Mutex<Driver>>,
    chain: Vec<Segment>,
    completed: EventFd,
}

impl Engine for Late {
    fn push(&mut self, _: Op, _: u16) {}
    fn submit(&mut self) {
        if !self.chain.is_empty() {
            self.driver.lock().unwrap().add(&self.chain);
            self.chain.clear();
        }
    }
    fn reap(&mut self, _: &mut Vec<Completion>) {}
    fn has_completed(&mut self) -> bool {
        false
    }
    fn completion_event(&self) -> &EventFd {
        &self.completed
    }
    fn drain(&mut self, _: &mut Vec<Completion>) {}
}

/// What a worker of `disk` needs besides its queue and its engine.
pub(super) fn context(guest: &Guest, disk: Arc<Disk>, rules: Rules) -> Context {
    Context {
        disk,
        rules,
        serial: [0; 20],
        memory: guest.memory.clone(),
        interrupt: guest.line.clone(),
        log: Arc::default(),
        poll: Duration::ZERO,
        halt: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
        statistics: Arc::default(),
        errors: None,
        limited: None,
        abandon: Arc::default(),
    }
}

fn spawn(guest: &Guest, image: &Image, engine: Box<dyn Engine>) -> Worker<()> {
    let worker = worker(guest, image, engine);
    Worker::spawn("blk0-q0", move |stop| worker.run(&stop)).unwrap()
}

fn worker(guest: &Guest, image: &Image, engine: Box<dyn Engine>) -> QueueWorker {
    worker_with(guest, image, engine, Arc::new(WriteCache::new(CacheMode::Writeback)))
}

pub(super) fn worker_with(
    guest: &Guest,
    image: &Image,
    engine: Box<dyn Engine>,
    cache: Arc<WriteCache>,
) -> QueueWorker {
    let disk = image.disk();
    let rules = Rules { size: disk.size(), readonly: false, cache, features: guest.features, may_unmap: true };
    QueueWorker::new(context(guest, disk, rules), guest.queue(), engine).unwrap()
}

/// What is in flight ends first, for a flush covers only what completed before it (virtio 1.2, 5.2.6.2).
#[test]
fn a_stop_drains_or_abandons_then_flushes_what_was_written_and_answers_nothing() {
    let write = OpKind::Write { durable: false };
    for (abandoned, kind, expected) in [
        (false, IN, vec![vec![OpKind::Read]]),
        (false, OUT, vec![vec![write], vec![OpKind::Flush]]),
        (false, FLUSH, vec![vec![OpKind::Flush]]),
        (true, IN, vec![]),
        (true, OUT, vec![vec![OpKind::Flush]]),
    ] {
        let (image, mut guest) = (Image::new(), Guest::new(PLAIN));
        let (submitted, drained) = (EventFd::new(EFD_NONBLOCK).unwrap(), Arc::default());
        let engine = Stuck {
            ops: Vec::new(),
            submitted: submitted.try_clone().unwrap(),
            drained: Arc::clone(&drained),
            completed: EventFd::new(EFD_NONBLOCK).unwrap(),
        };
        let data = if kind == OUT { readable(DATA, 512) } else { writable(DATA, 512) };
        let (_, status) = guest.offer(kind, 0, &[data]);
        let worker = worker(&guest, &image, Box::new(engine));
        worker.context.abandon.store(abandoned, Ordering::Release);
        let worker = Worker::spawn("blk0-q0", move |stop| worker.run(&stop)).unwrap();
        wait(&submitted);
        worker.stop();
        assert_eq!(*drained.lock().unwrap(), expected);
        assert_eq!(guest.driver.used(), None);
        assert_eq!(guest.bytes(status, 1), [UNTOUCHED]);
        assert!(guest.line.queue.read().is_err());
        assert_eq!(Arc::strong_count(&guest.memory), 2);
    }
}

#[test]
fn a_request_that_came_before_notifications_were_on_is_seen() {
    for features in [PLAIN, EVENT_IDX] {
        let (image, mut guest) = (Image::new(), Guest::new(features));
        let (header, status) = guest.header(GET_ID, 0);
        let driver = Arc::new(Mutex::new(Driver::new(guest.memory.clone(), RINGS, QUEUE_SIZE)));
        let chain = vec![header, writable(DATA, 20), status];
        let completed = EventFd::new(EFD_NONBLOCK).unwrap();
        let worker = spawn(&guest, &image, Box::new(Late { driver: driver.clone(), chain, completed }));
        wait(&guest.line.queue);
        assert_eq!(driver.lock().unwrap().used().map(|used| used.1), Some(21));
        worker.stop();
    }
}

/// Stands for a driver that makes a request available whenever one is answered, so that the ring never runs empty.
struct Endless {
    driver: Driver,
    chain: Vec<Segment>,
    completed: EventFd,
}

impl Engine for Endless {
    fn push(&mut self, _: Op, _: u16) {}
    fn submit(&mut self) {
        while self.driver.used().is_some() {}
        while self.driver.free() >= self.chain.len() {
            self.driver.add(&self.chain);
        }
    }
    fn reap(&mut self, _: &mut Vec<Completion>) {}
    fn has_completed(&mut self) -> bool {
        false
    }
    fn completion_event(&self) -> &EventFd {
        &self.completed
    }
    fn drain(&mut self, _: &mut Vec<Completion>) {}
}

#[test]
fn a_driver_that_never_rests_cannot_keep_the_worker() {
    let (image, mut guest) = (Image::new(), Guest::new(PLAIN));
    let (header, status) = guest.header(0xffff, 0);
    let driver = Driver::new(guest.memory.clone(), RINGS, QUEUE_SIZE);
    let (chain, completed) = (vec![header, status], EventFd::new(EFD_NONBLOCK).unwrap());
    let worker = spawn(&guest, &image, Box::new(Endless { driver, chain, completed }));
    wait(&guest.line.queue);
    let stopped = EventFd::new(EFD_NONBLOCK).unwrap();
    let told = stopped.try_clone().unwrap();
    let thread = std::thread::spawn(move || {
        worker.stop();
        told.write(1).unwrap();
    });
    wait(&stopped);
    thread.join().unwrap();
}

#[test]
fn a_failing_disk_fails_requests_and_completions_inline_are_seen() {
    let (image, mut guest) = (Image::new(), Guest::new(PLAIN));
    let completed = EventFd::new(EFD_NONBLOCK).unwrap();
    let worker = spawn(&guest, &image, Box::new(Failing { ops: Vec::new(), done: Vec::new(), completed }));
    for kind in [IN, FLUSH, IN] {
        assert_eq!(guest.request(kind, 0, &[writable(DATA, 512)]), (IOERR, 1));
    }
    assert_eq!(guest.request(GET_ID, 0, &[writable(DATA, 20)]), (OK, 21));
    worker.stop();
}

/// Says that something has completed when it is told to.
struct Told {
    said: Arc<AtomicBool>,
    completed: EventFd,
}

impl Engine for Told {
    fn push(&mut self, _: Op, _: u16) {}
    fn submit(&mut self) {}
    fn reap(&mut self, _: &mut Vec<Completion>) {}
    fn has_completed(&mut self) -> bool {
        self.said.load(Ordering::Relaxed)
    }
    fn completion_event(&self) -> &EventFd {
        &self.completed
    }
    fn drain(&mut self, _: &mut Vec<Completion>) {}
}

#[test]
fn a_worker_that_looks_for_work_needs_no_notification_and_can_be_stopped() {
    for features in [PLAIN, EVENT_IDX] {
        let (image, mut guest) = (Image::new(), Guest::new(features));
        let said = Arc::new(AtomicBool::new(false));
        let engine = Told { said: said.clone(), completed: EventFd::new(EFD_NONBLOCK).unwrap() };
        let mut worker = worker(&guest, &image, Box::new(engine));
        worker.polling = polling::Polling::learnt(Duration::from_secs(3600));
        let worker = Worker::spawn("blk0-q0", move |stop| worker.run(&stop)).unwrap();
        for count in 1..=3 {
            guest.driver.set_used_event(count - 1);
            let (head, status) = guest.offer(GET_ID, 0, &[writable(DATA, 20)]);
            wait(&guest.line.queue);
            assert_eq!(guest.driver.used(), Some((head, 21)));
            assert_eq!(guest.bytes(status, 1), [OK]);
            // Rings of zeroes ask to be notified of the first.
            assert!(count == 1 || !guest.driver.must_notify(features == EVENT_IDX, 1), "it is awake");
        }
        // What it finds ends the look, and whoever finds something again and again still sees that it is to stop.
        said.store(true, Ordering::Relaxed);
        worker.stop();
    }
}
