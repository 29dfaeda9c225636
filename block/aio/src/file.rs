//! Files read and written at offsets, whole: short transfers, interruptions and requests larger
//! than the kernel takes at once are dealt with here and nowhere else.
//!
//! - A read is short only at the end of the file. A write is whole or has failed; when it failed,
//!   any part of it may have been written.
//! - A transfer of more than 1024 buffers or 2 GiB goes to the kernel in parts, one after the
//!   other.
//! - "Not supported" is always ENOTSUP, whichever of its names the kernel used.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::executor;
use crate::iovec::IoVec;
use crate::op::{Action, Descriptor, Op, Request};
use crate::pool;
use crate::syscall;

/// The most buffers that the kernel takes in one call.
const MAX_BUFFERS: usize = 1024;
/// The most bytes that the kernel moves in one call.
const MAX_BYTES: u64 = 0x7fff_f000;

/// Who carries out a file's operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// The context's ring, or blocking threads where there is none.
    #[default]
    Auto,
    /// Blocking threads, but for reads that the page cache can serve.
    Threads,
    /// The context's ring.
    Uring,
}

/// What fallocate does with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallocate {
    /// Frees the range, which then reads as zeroes; the size stays.
    PunchHole,
    /// Makes the range read as zeroes, allocated.
    ZeroRange {
        /// Whether the file's size stays when the range goes beyond it.
        keep_size: bool,
    },
    /// Allocates the range without changing its content.
    Allocate {
        /// Whether the file's size stays when the range goes beyond it.
        keep_size: bool,
    },
}

impl Fallocate {
    fn mode(self) -> i32 {
        let keep = |keep_size| {
            if keep_size {
                libc::FALLOC_FL_KEEP_SIZE
            } else {
                0
            }
        };
        match self {
            Fallocate::PunchHole => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            Fallocate::ZeroRange { keep_size } => libc::FALLOC_FL_ZERO_RANGE | keep(keep_size),
            Fallocate::Allocate { keep_size } => keep(keep_size),
        }
    }
}

/// A file read and written at offsets; clones share the descriptor.
#[derive(Clone, Debug)]
pub struct File {
    fd: Arc<OwnedFd>,
    engine: Engine,
    is_buffered: bool,
}

impl File {
    /// Takes over a descriptor.
    pub fn new(fd: OwnedFd, engine: Engine) -> File {
        let flags = fcntl(&fd, FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
        let is_buffered = flags.is_ok_and(|flags| !flags.contains(OFlag::O_DIRECT));
        File {
            fd: Arc::new(fd),
            engine,
            is_buffered,
        }
    }

    /// Reads from `offset` in bytes until `dst` is full or the file ends. Gives the number of bytes
    /// read.
    ///
    /// # Errors
    ///
    /// Those of preadv(2).
    pub async fn read(&self, offset: u64, mut dst: IoVec) -> Result<u64, Errno> {
        check(offset, dst.len())?;
        let mut done = 0;
        while !dst.is_empty() {
            let part = dst.split_front(MAX_BUFFERS, MAX_BYTES);
            let action = Action::Read {
                offset: offset + done,
            };
            let (count, rest) = self.transfer(action, part).await?;
            if count == 0 {
                break;
            }
            done += count;
            give_back(rest, &mut dst);
        }
        Ok(done)
    }

    /// Writes all of `src` from `offset` in bytes on. With `durable` it is on stable storage
    /// before this is done.
    ///
    /// # Errors
    ///
    /// Those of pwritev(2). ENOSPC also when the file takes nothing and says nothing.
    pub async fn write(&self, offset: u64, mut src: IoVec, durable: bool) -> Result<(), Errno> {
        check(offset, src.len())?;
        let mut done = 0;
        let mut flush = false;
        while !src.is_empty() {
            let part = src.split_front(MAX_BUFFERS, MAX_BYTES);
            let action = Action::Write {
                offset: offset + done,
                durable: durable && !flush,
            };
            let again = part.clone();
            let (count, rest) = match self.transfer(action, part).await {
                // The file system knows no durable write.
                Err(Errno::EOPNOTSUPP) if durable && !flush => {
                    flush = true;
                    give_back(again, &mut src);
                    continue;
                }
                result => result?,
            };
            if count == 0 {
                return Err(Errno::ENOSPC);
            }
            done += count;
            give_back(rest, &mut src);
        }
        if flush {
            self.fsync(true).await?;
        }
        Ok(())
    }

    /// Makes everything written durable: the data and what is needed to find it, or without
    /// `data_only` all metadata too.
    ///
    /// # Errors
    ///
    /// Those of fsync(2).
    pub async fn fsync(&self, data_only: bool) -> Result<(), Errno> {
        self.simple(Action::Fsync { data_only }).await
    }

    /// Allocates, frees or zeroes `len` bytes from `offset` on.
    ///
    /// # Errors
    ///
    /// Those of fallocate(2); ENOTSUP when the file system cannot do it.
    pub async fn fallocate(&self, mode: Fallocate, offset: u64, len: u64) -> Result<(), Errno> {
        check(offset, len)?;
        let mode = mode.mode();
        self.simple(Action::Fallocate { mode, offset, len })
            .await
            .map_err(unify_unsupported)
    }

    /// Copies `len` bytes from `from` in this file to `at` in the file `to`, inside the kernel.
    /// Gives the number of bytes copied, fewer at the end of this file.
    ///
    /// # Errors
    ///
    /// Those of copy_file_range(2); ENOTSUP when these two files need a copy by reading and
    /// writing.
    pub async fn copy_range(&self, from: u64, to: &File, at: u64, len: u64) -> Result<u64, Errno> {
        check(from, len)?;
        check(at, len)?;
        let (source, target) = (Arc::clone(&self.fd), Arc::clone(&to.fd));
        pool::run(move || syscall::copy_range(source.as_fd(), from, target.as_fd(), at, len))
            .await
            .map_err(|errno| match errno {
                // Other file systems, or the same file with overlapping ranges.
                Errno::EXDEV | Errno::EINVAL => Errno::ENOTSUP,
                errno => unify_unsupported(errno),
            })
    }

    /// Reads what can be had without waiting for a device, on any thread. `None` when that is
    /// nothing; else as [`read`](Self::read), but a short read need not be the end of the file.
    pub fn try_read(&self, offset: u64, dst: &IoVec) -> Option<Result<u64, Errno>> {
        if let Err(errno) = check(offset, dst.len()) {
            return Some(Err(errno));
        }
        let result = syscall::try_read(self.fd.as_raw_fd(), offset, dst);
        match count(result) {
            Err(Errno::EAGAIN | Errno::EOPNOTSUPP | Errno::EINTR) => None,
            result => Some(result),
        }
    }

    /// The descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// One successful attempt at a read or write: how much was moved, and the buffers that are
    /// left.
    async fn transfer(&self, action: Action, mut part: IoVec) -> Result<(u64, IoVec), Errno> {
        let mut blocking = self.engine == Engine::Threads;
        loop {
            let done = self.submit(action, part, blocking).await;
            part = done.buffers;
            match count(done.result) {
                Ok(count) => {
                    let whole = part.len();
                    let rest = if count >= whole {
                        IoVec::new()
                    } else {
                        part.slice(count..whole)
                    };
                    return Ok((count, rest));
                }
                Err(Errno::EINTR) => {}
                // A descriptor opened with O_NONBLOCK; a blocking thread waits for it all the
                // same.
                Err(Errno::EAGAIN) if !blocking => blocking = true,
                Err(errno) => return Err(errno),
            }
        }
    }

    /// An operation without data.
    async fn simple(&self, action: Action) -> Result<(), Errno> {
        let blocking = self.engine == Engine::Threads;
        loop {
            let done = self.submit(action, IoVec::new(), blocking).await;
            match count(done.result) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    fn submit(&self, action: Action, buffers: IoVec, blocking: bool) -> Op {
        let request = Request {
            descriptor: Descriptor::Shared(Arc::clone(&self.fd)),
            action,
            buffers,
        };
        executor::with(|local| {
            if blocking {
                local.submit_blocking(request, self.is_buffered)
            } else {
                local.submit(request)
            }
        })
    }
}

/// Refuses ranges that no file can have.
fn check(offset: u64, len: u64) -> Result<(), Errno> {
    match offset.checked_add(len) {
        Some(end) if i64::try_from(end).is_ok() => Ok(()),
        _ => Err(Errno::EFBIG),
    }
}

/// Puts buffers back in front of those that were not tried yet.
fn give_back(mut front: IoVec, rest: &mut IoVec) {
    if !front.is_empty() {
        front.append(std::mem::take(rest));
        *rest = front;
    }
}

fn count(result: i32) -> Result<u64, Errno> {
    u64::try_from(result).map_err(|_| Errno::from_raw(result.wrapping_neg()))
}

fn unify_unsupported(errno: Errno) -> Errno {
    match errno {
        Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ENOTTY => Errno::ENOTSUP,
        errno => errno,
    }
}
