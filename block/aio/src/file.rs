//! Files read and written at offsets, whole: short transfers, interruptions and requests larger
//! than the kernel takes at once are dealt with here and nowhere else.
//!
//! - A read is short only at the end of the file. A write is whole or has failed; when it failed,
//!   any part of it may have been written.
//! - A transfer of more than 1024 buffers or 2 GiB goes to the kernel in parts, one after the
//!   other.
//! - What needs no waiting for a device is done at once, see `inline`; the rest by the engine.
//! - "Not supported" is always ENOTSUP, whichever of its names the kernel used.

pub mod attributes;
pub(crate) mod inline;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;

use self::inline::OpenFile;
use crate::executor::{self, GoOn, yield_now};
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
    /// Blocking threads, but for what needs no waiting.
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
    file: Arc<OpenFile>,
    engine: Engine,
    batch: u32,
}

impl File {
    /// Takes over a descriptor.
    pub fn new(fd: OwnedFd, engine: Engine) -> File {
        File {
            file: Arc::new(OpenFile::new(fd)),
            engine,
            batch: 0,
        }
    }

    /// The same file, whose operations are submitted as soon as `batch` of them are queued, rather
    /// than when the context's turn ends; 0 leaves it to the context.
    #[must_use]
    pub fn with_batch(self, batch: u32) -> File {
        File { batch, ..self }
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
            let (result, rest) = self.transfer(action, part).await;
            match result? {
                0 => break,
                count => done += count,
            }
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
            let (result, rest) = self.transfer(action, part).await;
            match result {
                Ok(0) => return Err(Errno::ENOSPC),
                Ok(count) => done += count,
                // The file system knows no durable write.
                Err(Errno::EOPNOTSUPP) if durable && !flush => flush = true,
                Err(errno) => return Err(errno),
            }
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
        let (source, target) = (Arc::clone(&self.file), Arc::clone(&to.file));
        pool::run(move || {
            syscall::copy_range(source.fd().as_fd(), from, target.fd().as_fd(), at, len)
        })
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
        self.try_transfer(offset, Action::Read { offset }, dst)
    }

    /// Writes all of `src` if that needs no waiting for a device, on any thread. `None` when it
    /// does; part of it may have been written then, so the whole has to be written again.
    pub fn try_write(&self, offset: u64, src: &IoVec) -> Option<Result<(), Errno>> {
        let action = Action::Write {
            offset,
            durable: false,
        };
        match self.try_transfer(offset, action, src)? {
            Ok(count) if count < src.len() => None,
            result => Some(result.map(drop)),
        }
    }

    fn try_transfer(
        &self,
        offset: u64,
        action: Action,
        buffers: &IoVec,
    ) -> Option<Result<u64, Errno>> {
        if let Err(errno) = check(offset, buffers.len()) {
            return Some(Err(errno));
        }
        if !self.file.is_promising(action, buffers.len()) || buffers.buffers().len() > MAX_BUFFERS {
            return None;
        }
        match count(self.file.attempt(action, buffers)?) {
            Err(Errno::EAGAIN | Errno::EOPNOTSUPP | Errno::EINTR) => None,
            result => Some(result),
        }
    }

    /// The descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.fd().as_fd()
    }

    /// One attempt at a read or write that the kernel accepted or refused for good: how much was
    /// moved, and the buffers that are left.
    async fn transfer(&self, action: Action, mut part: IoVec) -> (Result<u64, Errno>, IoVec) {
        let result = self.attempt(action, &mut part).await;
        let rest = match result {
            Ok(count) if count >= part.len() => IoVec::new(),
            Ok(count) => part.slice(count..part.len()),
            Err(_) => part,
        };
        (result, rest)
    }

    /// An operation without data.
    async fn simple(&self, action: Action) -> Result<(), Errno> {
        self.attempt(action, &mut IoVec::new()).await.map(drop)
    }

    /// Starts the operation until it is neither interrupted nor put off.
    async fn attempt(&self, action: Action, buffers: &mut IoVec) -> Result<u64, Errno> {
        let mut by_thread = self.engine == Engine::Threads;
        let is_promising = self.file.is_promising(action, buffers.len());
        let at_once = is_promising && go_on(buffers.len()).await;
        loop {
            let inline = if at_once {
                self.file.attempt(action, buffers)
            } else {
                None
            };
            let result = match inline {
                Some(result) => result,
                None => {
                    let done = self
                        .submit(action, std::mem::take(buffers), by_thread)
                        .await;
                    *buffers = done.buffers;
                    done.result
                }
            };
            match count(result) {
                Err(Errno::EINTR) => {}
                // A descriptor opened with O_NONBLOCK; a blocking thread waits for it all the
                // same.
                Err(Errno::EAGAIN) if !by_thread => by_thread = true,
                result => return result,
            }
        }
    }

    fn submit(&self, action: Action, buffers: IoVec, by_thread: bool) -> Op {
        let request = Request {
            descriptor: Descriptor::Shared(Arc::clone(&self.file)),
            action,
            buffers,
            batch: self.batch,
        };
        executor::with(|local| {
            if by_thread {
                local.submit_to_pool(request)
            } else {
                local.submit(request)
            }
        })
    }
}

/// Waits until the task may transfer so many bytes at once; false when it may not at all.
async fn go_on(bytes: u64) -> bool {
    match executor::with(|local| local.may_go_on(bytes)) {
        GoOn::Now => true,
        GoOn::AfterOthers => {
            yield_now().await;
            true
        }
        GoOn::ByEngine => false,
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
