//! Changes of a file's length. A failure leaves the length as it was.

use std::os::fd::BorrowedFd;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::ftruncate;
use stord_aio::Errno;
use stord_qmp::schema::create::PreallocMode;

/// Changes the length from `old` to `new` bytes and reserves the space of what is new. Blocks; for the pool.
pub(super) fn resize(
    fd: BorrowedFd<'_>,
    old: u64,
    new: u64,
    preallocation: PreallocMode,
) -> Result<(), Errno> {
    let offset = |bytes: u64| i64::try_from(bytes).map_err(|_| Errno::EFBIG);
    let (from, to) = (offset(old)?, offset(new)?);
    match preallocation {
        PreallocMode::Off => {}
        PreallocMode::Metadata | PreallocMode::Full => return Err(Errno::ENOTSUP),
        PreallocMode::Falloc if to <= from => {}
        PreallocMode::Falloc => {
            if let Err(errno) = fallocate(fd, FallocateFlags::empty(), from, to - from) {
                // What the first failure left; that this fails, too, changes nothing about it.
                let _ = ftruncate(fd, from);
                return Err(errno);
            }
        }
    }
    ftruncate(fd, to)
}
