//! One attempt of an operation with plain system calls: for blocking threads, for simulations,
//! and for what must not wait.

// UNSAFETY: system calls on raw memory.
#![expect(unsafe_code, reason = "preadv2 and pwritev2 on raw memory")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use nix::errno::Errno;
use smallvec::SmallVec;

use crate::iovec::IoVec;
use crate::op::Action;

/// The most bytes copied by one call, in a round number.
const MAX_COPY: u64 = 1 << 30;

/// Pointers and lengths of an operation's buffers, as the kernel takes them.
pub(crate) type Segments = SmallVec<[libc::iovec; 2]>;

/// Describes buffers. The result is good for as long as somebody keeps the buffers.
pub(crate) fn segments(buffers: &IoVec) -> Segments {
    buffers
        .buffers()
        .iter()
        .map(|buffer| libc::iovec {
            iov_base: buffer.as_ptr().cast(),
            iov_len: buffer.len(),
        })
        .collect()
}

/// Carries out `action` once, blocking as long as it takes. Gives what the system call gave, or a
/// negated errno.
///
/// # Safety
///
/// The segments must be valid memory until this returns, writable for a read.
pub(crate) unsafe fn perform(fd: RawFd, action: Action, segments: &[libc::iovec]) -> i32 {
    // SAFETY: passed on to the caller.
    unsafe { perform_with(fd, action, segments, 0) }
}

unsafe fn perform_with(fd: RawFd, action: Action, segments: &[libc::iovec], flags: i32) -> i32 {
    match action {
        Action::Read { offset } => {
            // SAFETY: passed on to the caller.
            unsafe { transfer(fd, Direction::Read, offset, segments, flags) }
        }
        Action::Write { offset, durable } => {
            let flags = if durable {
                flags | libc::RWF_DSYNC
            } else {
                flags
            };
            // SAFETY: passed on to the caller.
            unsafe { transfer(fd, Direction::Write, offset, segments, flags) }
        }
        Action::Receive(_) => {
            // SAFETY: passed on to the caller.
            result(unsafe { libc::readv(fd, segments.as_ptr(), length(segments)) })
        }
        Action::Send(_) => {
            // SAFETY: passed on to the caller.
            result(unsafe { libc::writev(fd, segments.as_ptr(), length(segments)) })
        }
        // SAFETY: takes no memory.
        Action::Fsync { data_only } => result(unsafe {
            if data_only {
                libc::fdatasync(fd)
            } else {
                libc::fsync(fd)
            }
        } as isize),
        Action::Fallocate { mode, offset, len } => {
            let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else {
                return -(Errno::EFBIG as i32);
            };
            // SAFETY: takes no memory.
            result(unsafe { libc::fallocate(fd, mode, offset, len) } as isize)
        }
        Action::Poll { events } => poll(fd, events, -1),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

/// Reads or writes once. One segment without flags takes the calls that the kernel serves some 10%
/// faster.
///
/// # Safety
///
/// As for [`perform`].
unsafe fn transfer(
    fd: RawFd,
    direction: Direction,
    offset: u64,
    segments: &[libc::iovec],
    flags: i32,
) -> i32 {
    let Ok(offset) = i64::try_from(offset) else {
        return -(Errno::EFBIG as i32);
    };
    let (list, count) = (segments.as_ptr(), length(segments));
    // SAFETY: the caller keeps the segments valid; the calls use `count` of them.
    result(unsafe {
        match (direction, segments) {
            (Direction::Read, [one]) if flags == 0 => {
                libc::pread64(fd, one.iov_base, one.iov_len, offset)
            }
            (Direction::Write, [one]) if flags == 0 => {
                libc::pwrite64(fd, one.iov_base, one.iov_len, offset)
            }
            (Direction::Read, _) => libc::preadv2(fd, list, count, offset, flags),
            (Direction::Write, _) => libc::pwritev2(fd, list, count, offset, flags),
        }
    })
}

/// The kernel takes no more than IOV_MAX segments anyway.
fn length(segments: &[libc::iovec]) -> i32 {
    i32::try_from(segments.len()).unwrap_or(i32::MAX)
}

/// As [`perform`], on the caller's buffers.
pub(crate) fn attempt(fd: RawFd, action: Action, buffers: &IoVec) -> i32 {
    // SAFETY: the caller's buffers live across the call.
    unsafe { perform(fd, action, &segments(buffers)) }
}

/// As [`attempt`], but for a read or write that would have to wait for a device EAGAIN.
pub(crate) fn attempt_nowait(fd: RawFd, action: Action, buffers: &IoVec) -> i32 {
    // SAFETY: the caller's buffers live across the call.
    unsafe { perform_with(fd, action, &segments(buffers), libc::RWF_NOWAIT) }
}

/// The poll(2) events that are there now, among these.
pub(crate) fn poll_now(fd: RawFd, events: u32) -> i32 {
    poll(fd, events, 0)
}

fn poll(fd: RawFd, events: u32, timeout: i32) -> i32 {
    let mut poll = libc::pollfd {
        fd,
        events: i16::try_from(events).unwrap_or(i16::MAX),
        revents: 0,
    };
    // SAFETY: `poll` is one structure that lives across the call.
    match unsafe { libc::poll(&raw mut poll, 1, timeout) } {
        1 => i32::from(poll.revents),
        n => result(n as isize),
    }
}

/// Copies bytes from one file to another inside the kernel. Gives how many, fewer than `len` at
/// the end of the source.
///
/// # Errors
///
/// Those of copy_file_range(2).
pub(crate) fn copy_range(
    source: BorrowedFd<'_>,
    from: u64,
    target: BorrowedFd<'_>,
    at: u64,
    len: u64,
) -> Result<u64, Errno> {
    let offset = |offset| i64::try_from(offset).map_err(|_| Errno::EFBIG);
    let (mut from, mut at) = (offset(from)?, offset(at)?);
    let mut done = 0;
    while done < len {
        let count = usize::try_from((len - done).min(MAX_COPY)).unwrap_or(usize::MAX);
        // SAFETY: the offsets live across the call; no other memory is involved.
        let copied = unsafe {
            libc::copy_file_range(
                source.as_raw_fd(),
                &raw mut from,
                target.as_raw_fd(),
                &raw mut at,
                count,
                0,
            )
        };
        match u64::try_from(copied) {
            Ok(0) => break,
            Ok(copied) => done += copied,
            Err(_) if Errno::last() == Errno::EINTR => {}
            Err(_) if done > 0 => break,
            Err(_) => return Err(Errno::last()),
        }
    }
    Ok(done)
}

/// Tells the kernel that this thread serves its writeback, so that it does not wait for itself.
///
/// # Errors
///
/// When the privilege or the kernel's support is missing.
pub(crate) fn set_io_flusher() -> io::Result<()> {
    /// From linux/prctl.h, 5.6.
    const PR_SET_IO_FLUSHER: libc::c_int = 57;
    const ON: libc::c_ulong = 1;
    const UNUSED: libc::c_ulong = 0;
    // SAFETY: takes no memory.
    if unsafe { libc::prctl(PR_SET_IO_FLUSHER, ON, UNUSED, UNUSED, UNUSED) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn result(n: isize) -> i32 {
    if n < 0 {
        return -(Errno::last_raw());
    }
    // The kernel moves less than 2^31 bytes in one call.
    i32::try_from(n).unwrap_or(i32::MAX)
}

/// Gives memory that was freed in small pieces back to the system. Takes some milliseconds, during
/// which allocations wait.
pub fn return_free_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: this touches only what the allocator has free.
    unsafe {
        libc::malloc_trim(0);
    }
}
