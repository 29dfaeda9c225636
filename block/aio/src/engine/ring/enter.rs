//! The one system call of the loop: `io_uring_enter`, on a ring that its thread has registered
//! with the kernel where that is possible, which saves the look-up of the descriptor each time.

// UNSAFETY: system calls with structures that no crate wraps in a way that fits here.
#![expect(unsafe_code, reason = "io_uring_enter and io_uring_register")]

use std::os::fd::RawFd;
use std::ptr;

use io_uring::EnterFlags;
use io_uring::types::Timespec;
use nix::errno::Errno;

use crate::engine::Wait;

/// A ring as its thread enters it.
pub(super) struct Entrance {
    /// The descriptor, or its number among the thread's registered rings.
    ring: i32,
    flags: EnterFlags,
}

/// `struct io_uring_rsrc_update` of linux/io_uring.h.
#[repr(C)]
struct Registration {
    offset: u32,
    reserved: u32,
    data: u64,
}

/// `struct io_uring_getevents_arg` of linux/io_uring.h.
#[repr(C)]
struct Limits {
    signal_mask: u64,
    signal_mask_size: u32,
    min_wait_us: u32,
    timeout: u64,
}

impl Entrance {
    /// Registers a ring of the calling thread. The registration ends with the thread, or with the
    /// ring.
    pub(super) fn new(fd: RawFd) -> Entrance {
        const REGISTER_RING_FDS: libc::c_uint = 20;
        const ONE: libc::c_uint = 1;
        let mut registration = Registration {
            // Any free place.
            offset: u32::MAX,
            reserved: 0,
            data: u64::from(fd.cast_unsigned()),
        };
        // SAFETY: the kernel reads and writes the one structure, which lives across the call.
        let registered = unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                fd,
                REGISTER_RING_FDS,
                &raw mut registration,
                ONE,
            )
        };
        // Kernels before 5.18 have none.
        match (registered, i32::try_from(registration.offset)) {
            (1, Ok(ring)) => Entrance {
                ring,
                flags: EnterFlags::REGISTERED_RING,
            },
            _ => Entrance {
                ring: fd,
                flags: EnterFlags::empty(),
            },
        }
    }

    /// Submits so many entries, and waits for a completion as allowed. Completions that wait to be
    /// posted are posted when `collect` says so, or when this waits.
    ///
    /// # Errors
    ///
    /// Those of io_uring_enter(2).
    pub(super) fn enter(&self, submit: usize, wait: Wait, collect: bool) -> Result<(), Errno> {
        let submit = u32::try_from(submit).unwrap_or(u32::MAX);
        let mut flags = self.flags;
        if collect || wait != Wait::No {
            flags |= EnterFlags::GETEVENTS;
        }
        let least = u32::from(wait != Wait::No);
        let Wait::AtMost(time) = wait else {
            // SAFETY: no memory is passed.
            return unsafe { self.call(submit, least, flags, ptr::null(), 0) };
        };
        let time = Timespec::new()
            .sec(time.as_secs())
            .nsec(time.subsec_nanos());
        let limits = Limits {
            signal_mask: 0,
            signal_mask_size: 0,
            min_wait_us: 0,
            timeout: (&raw const time).addr() as u64,
        };
        flags |= EnterFlags::EXT_ARG;
        // SAFETY: `limits` and the time it points to live across the call.
        unsafe { self.call(submit, least, flags, &raw const limits, size_of::<Limits>()) }
    }

    /// # Safety
    ///
    /// `limits` must be null or a structure of `size` bytes.
    unsafe fn call(
        &self,
        submit: u32,
        least: u32,
        flags: EnterFlags,
        limits: *const Limits,
        size: usize,
    ) -> Result<(), Errno> {
        // SAFETY: passed on to the caller. What the submitted entries point to is the business of
        // those who pushed them.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_uring_enter,
                self.ring,
                submit,
                least,
                flags.bits(),
                limits,
                size,
            )
        };
        Errno::result(result).map(drop)
    }
}
