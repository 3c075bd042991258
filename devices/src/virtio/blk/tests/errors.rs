//! What becomes of requests that the host fails: rerror and werror, with an engine that fails as it is told.

use std::collections::VecDeque;
use std::fs;

use block::engine::{Completion, Engine, Op};

use super::workers::context;
use super::*;
use crate::pause::PauseLine;
use crate::virtio::blk::errors::OnError;
use crate::virtio::blk::statistics::Kind;

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// Does what a real engine does, but the next transfers fail, one an errno, and leave no trace.
struct Failing {
    engine: Box<dyn Engine>,
    script: Arc<Mutex<VecDeque<i32>>>,
    failed: Vec<Completion>,
}

impl Engine for Failing {
    fn push(&mut self, op: Op, tag: u16) {
        match self.script.lock().unwrap().pop_front() {
            None => self.engine.push(op, tag),
            Some(errno) => {
                self.failed.push(Completion { tag, op, result: Err(io::Error::from_raw_os_error(errno)) });
            }
        }
    }
    fn submit(&mut self) {
        self.engine.submit();
    }
    fn reap(&mut self, completions: &mut Vec<Completion>) {
        completions.append(&mut self.failed);
        self.engine.reap(completions);
    }
    fn has_completed(&mut self) -> bool {
        !self.failed.is_empty() || self.engine.has_completed()
    }
    fn completion_event(&self) -> &EventFd {
        self.engine.completion_event()
    }
    fn drain(&mut self, completions: &mut Vec<Completion>) {
        completions.append(&mut self.failed);
        self.engine.drain(completions);
    }
}

struct Rig {
    image: Image,
    guest: Guest,
    script: Arc<Mutex<VecDeque<i32>>>,
    pause: Arc<PauseLine>,
    statistics: Arc<Statistics>,
    worker: Worker<()>,
}

impl Rig {
    fn new(read: OnError, write: OnError) -> Self {
        let (image, guest) = (Image::new(), Guest::new(PLAIN));
        let (script, statistics): (Arc<Mutex<VecDeque<i32>>>, Arc<Statistics>) = Default::default();
        let pause = Arc::new(PauseLine::new().unwrap());
        let disk = image.disk();
        let engine = Aio::Threads.start(disk.clone(), "blk0-q0-io").unwrap();
        let engine = Failing { engine, script: script.clone(), failed: Vec::new() };
        let errors = Errors { read, write, pause: pause.clone() };
        let cache = Arc::new(WriteCache::new(CacheMode::Writeback));
        let rules = Rules { size: disk.size(), readonly: false, cache, features: guest.features, may_unmap: true };
        let mut context = context(&guest, disk, rules);
        (context.errors, context.statistics) = (Some(errors), statistics.clone());
        let worker = QueueWorker::new(context, guest.queue(), Box::new(engine)).unwrap();
        let worker = Worker::spawn("blk0-q0", move |stop| worker.run(&stop)).unwrap();
        Self { image, guest, script, pause, statistics, worker }
    }

    fn fail(&self, errnos: &[i32]) {
        self.script.lock().unwrap().extend(errnos);
    }

    /// The request at `head` is answered so.
    fn assert_answered(&mut self, head: u16, status: u64, expected: u8) {
        assert_eq!(self.guest.turn().0, head);
        assert_eq!(self.guest.bytes(status, 1), [expected]);
    }

    fn errors(&self) -> Vec<u64> {
        let all = self.statistics.snapshot().remove(0);
        Kind::ALL.iter().zip(all.errors).filter(|(_, count)| *count > 0).map(|(_, count)| count).collect()
    }
}

#[test]
fn each_choice_for_each_error() {
    use OnError::{Enospc, Ignore, Report, Stop};
    for (read, write, kind, errno, expected) in [
        (Report, Stop, IN, EIO, Some(IOERR)),
        (Ignore, Stop, IN, EIO, Some(OK)),
        (Stop, Report, IN, EIO, None),
        (Report, Enospc, IN, ENOSPC, Some(IOERR)),
        (Stop, Report, OUT, EIO, Some(IOERR)),
        (Stop, Ignore, OUT, EIO, Some(OK)),
        (Report, Stop, OUT, EIO, None),
        (Report, Enospc, OUT, EIO, Some(IOERR)),
        (Report, Enospc, OUT, ENOSPC, None),
        (Stop, Report, FLUSH, EIO, Some(IOERR)),
        (Stop, Ignore, FLUSH, EIO, Some(OK)),
        (Report, Stop, FLUSH, EIO, None),
        (Report, Enospc, FLUSH, ENOSPC, None),
    ] {
        let mut rig = Rig::new(read, write);
        rig.fail(&[errno]);
        let data = match kind {
            IN => vec![writable(DATA, 512)],
            OUT => vec![readable(DATA, 512)],
            _ => vec![],
        };
        let (head, status) = rig.guest.offer(kind, 0, &data);
        if let Some(expected) = expected {
            rig.assert_answered(head, status, expected);
            assert!(!rig.pause.is_paused(), "{read:?} {write:?} {kind} {errno}");
        } else {
            rig.guest.kick.write(1).unwrap();
            wait(rig.pause.raised());
            assert!(rig.pause.is_paused());
            let reason = rig.pause.take_reason().unwrap();
            assert!(reason.starts_with("disk disk0: ") && reason.contains(&format!("os error {errno}")), "{reason}");
            assert_eq!(rig.guest.driver.used(), None, "not answered yet");
            rig.pause.release();
            rig.assert_answered(head, status, OK);
        }
        assert_eq!(rig.errors(), [1]);
        rig.worker.stop();
    }
}

#[test]
fn what_was_held_is_done_when_the_machine_goes_on_and_as_often_as_it_takes() {
    let mut rig = Rig::new(OnError::Report, OnError::Stop);
    let content = pattern(4096, 3);
    rig.guest.fill(DATA, &content);
    // Twice, then it works; meanwhile others are served.
    rig.fail(&[ENOSPC]);
    let (head, status) = rig.guest.offer(OUT, 8, &[readable(DATA, 4096)]);
    for again in [true, false] {
        rig.guest.kick.write(1).unwrap();
        wait(rig.pause.raised());
        assert!(rig.pause.take_reason().is_some());
        assert_eq!(rig.guest.request(IN, 0, &[writable(DATA + 0x4000, 512)]), (OK, 513));
        assert!(fs::read(&rig.image.path).unwrap().iter().all(|byte| *byte == 0));
        if again {
            rig.fail(&[ENOSPC]);
        }
        rig.pause.release();
    }
    rig.assert_answered(head, status, OK);
    assert!(fs::read(&rig.image.path).unwrap()[8 * 512..16 * 512] == content);
    assert_eq!(rig.errors(), [2]);
    rig.worker.stop();
}

#[test]
fn several_failures_are_one_pause() {
    let mut rig = Rig::new(OnError::Stop, OnError::Stop);
    rig.fail(&[EIO; 6]);
    let heads: Vec<_> = (0..6).map(|n| rig.guest.offer(IN, n, &[writable(DATA + 512 * n, 512)])).collect();
    rig.guest.kick.write(1).unwrap();
    wait(rig.pause.raised());
    // It takes all six to fail before they can be tried again.
    while rig.errors() != [6] {
        std::thread::yield_now();
    }
    assert!(rig.pause.take_reason().is_some() && rig.pause.take_reason().is_none());
    rig.pause.release();
    for _ in 0..6 {
        rig.guest.turn();
    }
    assert!(heads.iter().all(|(_, status)| rig.guest.bytes(*status, 1) == [OK]));
    rig.worker.stop();
}

#[test]
fn a_reset_forgets_what_was_held() {
    let mut rig = Rig::new(OnError::Report, OnError::Stop);
    rig.fail(&[ENOSPC]);
    let (_, status) = rig.guest.offer(OUT, 0, &[readable(DATA, 512)]);
    rig.guest.kick.write(1).unwrap();
    wait(rig.pause.raised());
    rig.worker.stop();
    assert_eq!(rig.guest.driver.used(), None);
    assert_eq!(rig.guest.bytes(status, 1), [UNTOUCHED]);
    assert_eq!(Arc::strong_count(&rig.guest.memory), 2, "nothing holds the memory");
}

/// What the driver did wrong would be wrong again.
#[test]
fn a_mistake_of_the_driver_does_not_stop_the_machine() {
    let mut rig = Rig::new(OnError::Stop, OnError::Stop);
    assert_eq!(rig.guest.request(IN, 0, &[writable(MEMORY as u64 - 256, 512)]), (IOERR, 1));
    assert_eq!(rig.guest.request(OUT, SECTORS, &[readable(DATA, 512)]), (IOERR, 1));
    assert!(!rig.pause.is_paused());
    rig.worker.stop();
}
