//! Transfers that need not wait for a device are done at once, by a plain system call, instead of
//! going through the engine: a ring adds half as much again to a read from the page cache, and
//! hands what it cannot do without sleeping, such as every buffered write to ext4 and everything
//! on tmpfs, to a kernel thread, which costs several times the transfer itself.
//!
//! - On a file system in memory, all operations are of that kind. (Memory may have been swapped
//!   out; so may our own.)
//! - On others a buffered file is asked with RWF_NOWAIT, until it turns out not to support that;
//!   and seldom, once it turns out that the data is mostly not there.
//! - ext4 knows no RWF_NOWAIT for buffered writes, but hardly ever waits in a small one: it copies
//!   into the page cache and reserves space in memory. Handing such a write to another thread and
//!   back costs ten times the write. So it is made at once, and timed: one that had to wait (for
//!   the journal, or because too much memory is dirty) sends those after it through the engine, for
//!   a time that grows with every such wait.
//! - Direct I/O always has a device to wait for.
//!
//! A task that finds everything at once would never let others run, so each poll of a task has a
//! budget of such transfers.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::statfs::{EXT4_SUPER_MAGIC, HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};

use crate::iovec::IoVec;
use crate::op::Action;
use crate::syscall;

/// A range in memory that is allocated or freed in some 100 us, in bytes.
const SMALL_RANGE: u64 = 1 << 20;

/// How a file's operations relate to waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waiting {
    /// Nothing waits: the file lives in memory.
    Never,
    /// What the page cache has need not wait.
    Sometimes,
    /// Everything goes to the device.
    Always,
}

/// A descriptor, and what is known about doing its operations at once.
#[derive(Debug)]
pub(crate) struct OpenFile {
    fd: OwnedFd,
    waiting: Waiting,
    reads: Luck,
    writes: Luck,
    /// What is known of writes that the kernel cannot be asked to make without waiting; `None`
    /// where they are not to be tried.
    untested_writes: Option<Waits>,
}

impl AsRawFd for OpenFile {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl OpenFile {
    pub(crate) fn new(fd: OwnedFd) -> OpenFile {
        let kind = fstatfs(&fd).map(|fs| fs.filesystem_type());
        let is_in_memory = kind == Ok(TMPFS_MAGIC) || kind == Ok(HUGETLBFS_MAGIC);
        // O_PATH and the like, for which this fails, are not transferred anyway.
        let is_direct = fcntl(&fd, FcntlArg::F_GETFL)
            .is_ok_and(|flags| OFlag::from_bits_retain(flags).contains(OFlag::O_DIRECT));
        let waiting = match (is_in_memory, is_direct) {
            (true, _) => Waiting::Never,
            (false, false) => Waiting::Sometimes,
            (false, true) => Waiting::Always,
        };
        OpenFile {
            fd,
            waiting,
            reads: Luck::default(),
            writes: Luck::default(),
            untested_writes: (kind == Ok(EXT4_SUPER_MAGIC)).then(Waits::default),
        }
    }

    pub(crate) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Whether no operation on the file waits for a device.
    pub(crate) fn never_waits(&self) -> bool {
        self.waiting == Waiting::Never
    }

    /// Whether it is worth trying to do an operation of so many bytes at once.
    pub(crate) fn is_promising(&self, action: Action, bytes: u64) -> bool {
        match self.waiting {
            // Allocating and freeing memory takes its time.
            Waiting::Never => match action {
                Action::Fallocate { len, .. } => len <= SMALL_RANGE,
                _ => true,
            },
            Waiting::Always => false,
            Waiting::Sometimes => {
                let luck = self.luck(action);
                luck.is_some_and(Luck::is_promising)
                    || self
                        .without_asking(action)
                        .is_some_and(|waits| bytes <= SMALL_WRITE && waits.is_over(Instant::now()))
            }
        }
    }

    /// Tries to do an operation at once. `None` when the engine has to do it; else what the system
    /// call gave.
    pub(crate) fn attempt(&self, action: Action, buffers: &IoVec) -> Option<i32> {
        if self.never_waits() {
            return Some(syscall::attempt(self.as_raw_fd(), action, buffers));
        }
        if let Some(waits) = self.without_asking(action) {
            let begun = Instant::now();
            let result = syscall::attempt(self.as_raw_fd(), action, buffers);
            waits.learn(begun, Instant::now());
            return Some(result);
        }
        let luck = self.luck(action)?;
        let result = syscall::attempt_nowait(self.as_raw_fd(), action, buffers);
        luck.learn(result);
        (result >= 0).then_some(result)
    }

    /// What is known of operations of this kind, if the kernel cannot be asked not to wait in them.
    fn without_asking(&self, action: Action) -> Option<&Waits> {
        match action {
            Action::Write { durable: false, .. } if self.writes.is_hopeless() => {
                self.untested_writes.as_ref()
            }
            _ => None,
        }
    }

    fn luck(&self, action: Action) -> Option<&Luck> {
        match action {
            Action::Read { .. } => Some(&self.reads),
            Action::Write { durable: false, .. } => Some(&self.writes),
            _ => None,
        }
    }
}

/// Tells whether another attempt is worth its cost. Contexts share it without ordering: a lost
/// update costs an attempt, nothing else.
#[derive(Debug, Default)]
struct Luck {
    /// How many attempts in a row failed, or [`HOPELESS`].
    failures: AtomicU32,
}

/// After so many failures in a row, only every so-many-th operation is attempted.
const PATIENCE: u32 = 16;
/// The file does not support attempts.
const HOPELESS: u32 = u32::MAX;

impl Luck {
    fn is_hopeless(&self) -> bool {
        self.failures.load(Ordering::Relaxed) == HOPELESS
    }

    fn is_promising(&self) -> bool {
        let failures = self.failures.load(Ordering::Relaxed);
        if failures < PATIENCE {
            return true;
        }
        if failures == HOPELESS {
            return false;
        }
        // Counts the operations passed over, too.
        let next = (failures + 1) % (2 * PATIENCE);
        self.failures.store(next.max(PATIENCE), Ordering::Relaxed);
        next == 0
    }

    fn learn(&self, result: i32) {
        let failures = self.failures.load(Ordering::Relaxed);
        if result >= 0 {
            if failures != 0 {
                self.failures.store(0, Ordering::Relaxed);
            }
            return;
        }
        let next = match Errno::from_raw(result.wrapping_neg()) {
            Errno::EAGAIN => (failures + 1).min(PATIENCE),
            Errno::EOPNOTSUPP => HOPELESS,
            // An error to be reported by the engine's attempt.
            _ => return,
        };
        self.failures.store(next, Ordering::Relaxed);
    }
}

/// A write of at most so many bytes is made at once where the kernel cannot be asked.
const SMALL_WRITE: u64 = 32 << 10;
/// A write that took longer has waited for something; less may only mean that another thread ran.
const WAITED: Duration = Duration::from_millis(4);
/// For so long, after the first wait, nothing is tried; and at most for so long.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// When writes at once had to wait, and until when no more are tried. Contexts share it without
/// ordering, as [`Luck`].
#[derive(Debug, Default)]
struct Waits {
    /// Nanoseconds on the process's clock.
    pause_until: AtomicU64,
    /// Length of the last pause in nanoseconds.
    pause: AtomicU64,
}

impl Waits {
    fn is_over(&self, now: Instant) -> bool {
        match self.pause_until.load(Ordering::Relaxed) {
            0 => true,
            until => nanoseconds(now) >= until,
        }
    }

    fn learn(&self, begun: Instant, ended: Instant) {
        let pause = self.pause.load(Ordering::Relaxed);
        if ended - begun <= WAITED {
            let until = self.pause_until.load(Ordering::Relaxed);
            // All went well for as long as the last pause was: the next will be a short one.
            if pause != 0 && nanoseconds(ended) >= until.saturating_add(pause) {
                self.pause.store(0, Ordering::Relaxed);
                self.pause_until.store(0, Ordering::Relaxed);
            }
            return;
        }
        let [first, longest] = [FIRST_PAUSE, LONGEST_PAUSE].map(as_nanoseconds);
        let pause = pause.saturating_mul(2).clamp(first, longest);
        self.pause.store(pause, Ordering::Relaxed);
        let until = nanoseconds(ended).saturating_add(pause);
        self.pause_until.store(until, Ordering::Relaxed);
    }
}

fn nanoseconds(time: Instant) -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    as_nanoseconds(time.saturating_duration_since(*START.get_or_init(|| time)))
}

fn as_nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK: Duration = Duration::from_micros(5);
    const SLOW: Duration = Duration::from_millis(9);

    #[test]
    fn a_write_that_waited_pauses_those_after_it_longer_each_time() {
        let waits = Waits::default();
        let mut now = Instant::now();
        assert!(waits.is_over(now));
        waits.learn(now, now + QUICK);
        assert!(waits.is_over(now));
        let mut expected = FIRST_PAUSE;
        for _ in 0..12 {
            waits.learn(now, now + SLOW);
            now += SLOW;
            assert!(!waits.is_over(now + expected - QUICK));
            now += expected;
            assert!(waits.is_over(now));
            expected = (2 * expected).min(LONGEST_PAUSE);
        }
    }

    #[test]
    fn a_long_time_without_waits_forgets_the_pauses() {
        let waits = Waits::default();
        let mut now = Instant::now();
        for _ in 0..3 {
            waits.learn(now, now + SLOW);
            now += SLOW + LONGEST_PAUSE;
        }
        waits.learn(now, now + QUICK);
        waits.learn(now, now + SLOW);
        now += SLOW;
        assert!(!waits.is_over(now + FIRST_PAUSE - QUICK));
        assert!(waits.is_over(now + FIRST_PAUSE));
    }
}
