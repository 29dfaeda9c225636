//! The alignment that a file opened with O_DIRECT asks for, found by trying.
//!
//! Reads at offset 0 change nothing, and file systems and devices check the alignment before anything else. The smallest of 512, 1024,
//! 2048 and 4096 that works is taken, once for lengths and once for memory addresses.

use std::os::fd::{AsFd, OwnedFd};

use nix::sys::uio::pread;
use stord_aio::Errno;

use crate::driver::Limits;

const CANDIDATES: [u32; 4] = [512, 1024, 2048, 4096];
const LARGEST: usize = 4096;

/// The limits of an open file.
///
/// # Errors
/// `EINVAL` if no candidate works.
pub(super) fn limits(fd: &OwnedFd, direct: bool) -> Result<Limits, Errno> {
    if !direct {
        return Ok(Limits::default());
    }
    let mut memory = vec![0u8; 3 * LARGEST];
    let aligned = memory.as_ptr().align_offset(LARGEST);
    let room = memory.get_mut(aligned..).ok_or(Errno::ENOMEM)?;
    let request_alignment = smallest(|candidate| read_works(fd, room, 0, candidate as usize))?;
    let memory_alignment = smallest(|candidate| read_works(fd, room, candidate as usize, LARGEST))?;
    Ok(Limits {
        request_alignment,
        memory_alignment,
        ..Limits::default()
    })
}

fn smallest(mut works: impl FnMut(u32) -> bool) -> Result<u32, Errno> {
    CANDIDATES
        .into_iter()
        .find(|candidate| works(*candidate))
        .ok_or(Errno::EINVAL)
}

fn read_works(fd: &OwnedFd, room: &mut [u8], at: usize, len: usize) -> bool {
    room.get_mut(at..at + len)
        .is_some_and(|buffer| pread(fd.as_fd(), buffer, 0) != Err(Errno::EINVAL))
}
