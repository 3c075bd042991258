#![expect(unsafe_code, reason = "sched_setscheduler")]
//! How the host's scheduler wakes the worker of a pair (sched(7)). By default it takes the CPU from whoever has it, which is best
//! for a frame that somebody waits for. While much is moved, that one is often who sends, so that each frame would be moved
//! by itself, with an interrupt of its own: the worker is a SCHED_BATCH thread then, which gets a CPU that is idle at once, and
//! else waits until the other has done what it can. Owned by the worker.

/// Bytes after one waking that are much: more than what fits a frame of Ethernet or a few.
const MUCH: usize = 16 << 10;

/// Wakings in a row that moved less, after which nobody moves much any more.
const LULL: u32 = 64;

/// The policy of the thread that made this. What its user chose, such as a real-time one, stays.
#[derive(Debug)]
pub(super) struct Schedule {
    /// Whether it is for us to choose.
    free: bool,
    batch: bool,
    /// Wakings since much was moved.
    lull: u32,
}

impl Schedule {
    /// That of this thread.
    pub(super) fn of_this_thread() -> Self {
        // SAFETY: a number only.
        let policy = unsafe { libc::sched_getscheduler(0) };
        Self { free: policy == libc::SCHED_OTHER, batch: false, lull: 0 }
    }

    /// So many bytes were moved since the worker was woken last; it is about to sleep. By the same thread.
    pub(super) fn moved(&mut self, bytes: usize) {
        self.lull = if bytes >= MUCH { 0 } else { self.lull.saturating_add(1) };
        let batch = if self.batch { self.lull < LULL } else { self.lull == 0 };
        if self.free && batch != self.batch {
            self.free = choose(if batch { libc::SCHED_BATCH } else { libc::SCHED_OTHER });
            self.batch = batch;
        }
    }
}

/// Whether the host let this thread have `policy`. If it forbids it, all goes on as before.
fn choose(policy: libc::c_int) -> bool {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the kernel reads the parameters.
    unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) == 0 }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Field 41 of proc(5), `/proc/PID/stat`; fields 1 and 2 end with the parenthesis.
    fn policy() -> libc::c_int {
        let stat = fs::read_to_string("/proc/thread-self/stat").unwrap();
        let (_, fields) = stat.rsplit_once(") ").unwrap();
        fields.split(' ').nth(41 - 3).unwrap().parse().unwrap()
    }

    #[test]
    fn much_makes_it_a_batch_and_a_lull_ends_that() {
        // SCHED_OTHER and SCHED_BATCH of sched(7), linux/sched.h.
        let (other, batch) = (0, 3);
        assert_eq!(policy(), other);
        let mut schedule = Schedule::of_this_thread();
        for _ in 0..3 {
            for bytes in [0, 60, 1514, 16_383] {
                schedule.moved(bytes);
                assert_eq!(policy(), other, "{bytes}");
            }
            schedule.moved(16_384);
            assert_eq!(policy(), batch);
            for _ in 0..63 {
                schedule.moved(66);
            }
            schedule.moved(65_550);
            for _ in 0..63 {
                schedule.moved(66);
                assert_eq!(policy(), batch);
            }
            schedule.moved(66);
            assert_eq!(policy(), other);
        }
    }

    #[test]
    fn what_the_user_chose_stays() {
        assert!(choose(libc::SCHED_BATCH));
        let mut schedule = Schedule::of_this_thread();
        schedule.moved(1 << 20);
        (0..100).for_each(|_| schedule.moved(0));
        assert_eq!(policy(), libc::SCHED_BATCH);
    }
}
