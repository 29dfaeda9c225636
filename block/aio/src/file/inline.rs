//! Transfers that need not wait for a device are done at once, by a plain system call, instead of
//! going through the engine: a ring adds half as much again to a read from the page cache, and
//! hands what it cannot do without sleeping, such as every buffered write to ext4 and everything
//! on tmpfs, to a kernel thread, which costs several times the transfer itself.
//!
//! - On a file system in memory, all operations are of that kind. (Memory may have been swapped
//!   out; so may our own.)
//! - On others a buffered file is asked with RWF_NOWAIT, until it turns out not to support that;
//!   and seldom, once it turns out that the data is mostly not there.
//! - Direct I/O always has a device to wait for.
//!
//! A task that finds everything at once would never let others run, so each poll of a task has a
//! budget of such transfers.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};

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
}

impl AsRawFd for OpenFile {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl OpenFile {
    pub(crate) fn new(fd: OwnedFd) -> OpenFile {
        let is_in_memory = fstatfs(&fd).is_ok_and(|fs| {
            let kind = fs.filesystem_type();
            kind == TMPFS_MAGIC || kind == HUGETLBFS_MAGIC
        });
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
        }
    }

    pub(crate) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Whether no operation on the file waits for a device.
    pub(crate) fn never_waits(&self) -> bool {
        self.waiting == Waiting::Never
    }

    /// Whether it is worth trying to do an operation at once.
    pub(crate) fn is_promising(&self, action: Action) -> bool {
        match self.waiting {
            // Allocating and freeing memory takes its time.
            Waiting::Never => match action {
                Action::Fallocate { len, .. } => len <= SMALL_RANGE,
                _ => true,
            },
            Waiting::Always => false,
            Waiting::Sometimes => self.luck(action).is_some_and(Luck::is_promising),
        }
    }

    /// Tries to do an operation at once. `None` when the engine has to do it; else what the system
    /// call gave.
    pub(crate) fn attempt(&self, action: Action, buffers: &IoVec) -> Option<i32> {
        if self.never_waits() {
            return Some(syscall::attempt(self.as_raw_fd(), action, buffers));
        }
        let luck = self.luck(action)?;
        let result = syscall::attempt_nowait(self.as_raw_fd(), action, buffers);
        luck.learn(result);
        (result >= 0).then_some(result)
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
