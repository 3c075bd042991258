//! Open files for durable writes through the page cache, one for each that goes on. Linux tells of a failed write-back once
//! for each open file (fsync(2)): of two writes that share one, the first to ask is told of the other's error, and the other
//! that all is well. Shared by the threads of a disk's pools.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// The most that are kept open for later.
const KEPT: usize = 16;

/// The open files of one disk besides its own.
#[derive(Debug, Default)]
pub(crate) struct Witnesses {
    state: Mutex<State>,
    /// One that was lent is back, or closed.
    returned: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Lent to nobody.
    idle: Vec<Witness>,
    /// How many are lent, or about to be opened for that.
    lent: usize,
    /// How often one came back.
    returns: u64,
    /// Writes that have failed.
    failures: u64,
}

/// One open file.
#[derive(Debug)]
struct Witness {
    file: File,
    /// [`State::failures`] when it was opened. Once there are more, it would tell of those too.
    failures: u64,
}

impl Witnesses {
    /// Calls `write` with an open file for the inode of `disk` that nobody else has meanwhile. While the host gives no more
    /// of them, waits for one that is lent.
    ///
    /// # Errors
    /// Those of `write`, and when the host gives no open file and none is lent.
    pub(crate) fn lend<T>(&self, disk: &File, write: impl FnOnce(&File) -> io::Result<T>) -> io::Result<T> {
        self.lend_by(|| open_again(disk), write)
    }

    fn lend_by<T>(
        &self,
        open: impl Fn() -> io::Result<File>,
        write: impl FnOnce(&File) -> io::Result<T>,
    ) -> io::Result<T> {
        let witness = self.take(open)?;
        let result = write(&witness.file);
        let mut state = self.lock();
        state.lent -= 1;
        state.returns += 1;
        if result.is_err() {
            state.failures += 1;
        }
        let kept = result.is_ok() && state.idle.len() < KEPT;
        // Before anybody is told that there is room for another.
        let closed = if kept {
            state.idle.push(witness);
            None
        } else {
            Some(witness)
        };
        drop(state);
        drop(closed);
        self.returned.notify_one();
        result
    }

    fn take(&self, open: impl Fn() -> io::Result<File>) -> io::Result<Witness> {
        let mut state = self.lock();
        loop {
            let (failures, returns) = (state.failures, state.returns);
            let idle = state.idle.pop().filter(|witness| witness.failures == failures);
            state.lent += 1;
            drop(state);
            let error = match idle.map_or_else(|| open().map(|file| Witness { file, failures }), Ok) {
                Ok(witness) => return Ok(witness),
                Err(error) => error,
            };
            state = self.lock();
            state.lent -= 1;
            let too_many = matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE));
            // Else there is room again.
            let none = state.idle.is_empty() && state.returns == returns;
            if !too_many || none && state.lent == 0 {
                // Whoever waits may have waited for this one.
                self.returned.notify_one();
                return Err(error);
            }
            if none {
                state = self.returned.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The same file, wherever its name is gone to.
fn open_again(file: &File) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use std::os::fd::FromRawFd;
    use std::os::unix::fs::FileExt;
    use std::path::Path;
    use std::process::Command;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, mpsc};
    use std::thread;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::cache::CacheMode;
    use crate::disk::Disk;
    use crate::engine::conformance::{at, attach, await_completions, memory, op};
    use crate::engine::{Aio, OpKind};
    use crate::lock::tests::FORKING;

    const BLOCK: u64 = 4096;
    const BLOCKS: u64 = 256;

    /// A loop device whose second half cannot be written to, and the memory behind it.
    fn half_broken() -> Result<(Disk, File), String> {
        let _alone = FORKING.lock();
        #[expect(unsafe_code, reason = "the standard library has no such call")]
        // SAFETY: the name is a string of C, and the descriptor is nobody else's.
        let backing = unsafe { File::from_raw_fd(libc::memfd_create(c"half".as_ptr(), libc::MFD_ALLOW_SEALING)) };
        backing.set_len(BLOCKS * BLOCK).unwrap();
        let path = format!("/proc/{}/fd/{}", std::process::id(), backing.as_raw_fd());
        let device = attach(Path::new(&path), 512)?;
        backing.set_len(BLOCKS / 2 * BLOCK).unwrap();
        #[expect(unsafe_code, reason = "the standard library has no such call")]
        // SAFETY: it takes numbers. Writes past the end fail from now on.
        let sealed = unsafe { libc::fcntl(backing.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_GROW) };
        assert_eq!(sealed, 0);
        let disk = Disk::open(&device, false, CacheMode::Writethrough, "disk0").unwrap();
        // It stays until the disk is closed.
        assert!(Command::new("losetup").arg("-d").arg(&device).status().unwrap().success());
        Ok((disk, backing))
    }

    /// What is said to be stable is in the memory behind the device, and what is there was not said to have failed once
    /// nothing fails any more.
    #[test]
    fn each_durable_write_is_told_of_itself() {
        for aio in [Aio::Threads, Aio::IoUring] {
            for round in 1..=40_u8 {
                let (disk, backing) = match half_broken() {
                    Ok(found) => found,
                    Err(reason) => return skip::because(format_args!("no loop device here: {reason}")),
                };
                let memory = memory(1 << 16);
                memory.write_slice(&[round; BLOCK as usize], GuestAddress(at(0))).unwrap();
                let mut engine = aio.start(Arc::new(disk), "test-io").unwrap();
                let mut write = |blocks: &mut dyn Iterator<Item = u64>| {
                    let mut count = 0;
                    for block in blocks {
                        let segments = [(0, BLOCK as usize)];
                        let kind = OpKind::Write { durable: true };
                        engine.push(op(kind, block * BLOCK, &segments, &memory), block as u16);
                        count += 1;
                    }
                    engine.submit();
                    await_completions(&mut *engine, count)
                };
                // Good and bad in turn.
                let mixed = write(&mut (0..BLOCKS).map(|n| n / 2 + n % 2 * BLOCKS / 2));
                let mut failed = 0;
                for done in mixed {
                    if done.result.is_err() {
                        failed += 1;
                        continue;
                    }
                    let mut seen = [0; BLOCK as usize];
                    let count = backing.read_at(&mut seen, done.op.offset).unwrap();
                    assert!(count == seen.len() && seen == [round; _], "{aio:?}: block {} is lost", done.tag);
                }
                assert!(failed >= BLOCKS / 2, "{aio:?}: {failed} failed");
                let good = write(&mut (0..BLOCKS / 2));
                assert!(good.iter().all(|done| done.result.is_ok()), "{aio:?}: told of what is over");
            }
        }
    }

    /// Whoever else has been told of it: what could not be written is not stable.
    #[test]
    fn a_durable_change_is_told_of_what_others_were_told_of() {
        let (disk, _backing) = match half_broken() {
            Ok(found) => found,
            Err(reason) => return skip::because(format_args!("no loop device here: {reason}")),
        };
        let change = |block: u64| {
            disk.file().write_all_at(&[1; BLOCK as usize], block * BLOCK)?;
            // Nobody had this open before, so it is told of an error that nobody was told of yet, and then later ones are not.
            assert_eq!(open_again(disk.file())?.sync_data().is_err(), block >= BLOCKS / 2);
            Ok(())
        };
        disk.change_durably(&mut || change(BLOCKS - 1)).unwrap_err();
        disk.change_durably(&mut || change(0)).unwrap();
    }

    /// Has so many lent at once.
    fn lend_at_once(witnesses: &Witnesses, disk: &File, count: usize) {
        let others = |_: &File| {
            if count > 1 {
                lend_at_once(witnesses, disk, count - 1);
            }
            Ok(())
        };
        witnesses.lend(disk, others).unwrap();
    }

    #[test]
    fn open_files_are_used_again_and_few_are_kept() {
        let (witnesses, disk) = (Witnesses::default(), tempfile::tempfile().unwrap());
        for (at_once, kept) in [(1, 1), (3, 3), (2, 3), (2 * KEPT, KEPT), (1, KEPT)] {
            lend_at_once(&witnesses, &disk, at_once);
            let state = witnesses.lock();
            assert_eq!((state.idle.len(), state.lent), (kept, 0), "{at_once} at once");
        }
    }

    /// A host that gives a single one.
    #[test]
    fn who_gets_no_open_file_waits_for_one_that_is_lent() {
        let too_many = || io::Error::from_raw_os_error(libc::EMFILE);
        for fails in [false, true] {
            let (witnesses, given) = (Witnesses::default(), AtomicBool::new(false));
            let (refused, was_refused) = mpsc::channel();
            let open = || {
                if given.swap(true, Ordering::SeqCst) {
                    refused.send(()).unwrap();
                    return Err(too_many());
                }
                tempfile::tempfile()
            };
            thread::scope(|scope| {
                let mut second = None;
                let first = witnesses.lend_by(open, |_| {
                    second = Some(scope.spawn(|| witnesses.lend_by(open, |_| Ok(()))));
                    was_refused.recv().unwrap();
                    // What failed is closed, and so the host has one again.
                    given.store(!fails, Ordering::SeqCst);
                    if fails { Err(io::ErrorKind::Other.into()) } else { Ok(()) }
                });
                assert_eq!(first.is_err(), fails);
                second.unwrap().join().unwrap().unwrap();
            });
        }
        let none = Witnesses::default().lend_by(|| Err(too_many()), |_| Ok(()));
        assert_eq!(none.unwrap_err().raw_os_error(), Some(libc::EMFILE), "none is lent");
    }
}
