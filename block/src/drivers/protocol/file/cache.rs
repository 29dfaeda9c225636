//! The page cache of a file, to be dropped where another host may have written to the file.

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::stat::fstat;
use nix::unistd::fdatasync;
use stord_aio::{File, IoBuffer, IoVec};
use stord_qmp::Error;

/// The smallest page there is; looking at each of them finds larger ones too.
const PAGE: usize = 4096;

/// Drops what the page cache has of the file, after writing it out. With `check` it fails where something is left.
///
/// # Errors
/// The file cannot be written out, or something is left.
pub(super) fn drop_pages(file: &File, check: bool) -> Result<(), Error> {
    fdatasync(file.fd()).map_err(|errno| Error::os("flush failed", errno))?;
    // Only advice: where it is not taken, the cache is coherent or nobody can help it.
    let advised = posix_fadvise(file.fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    advised.map_err(|errno| Error::os("fadvise failed", errno))?;
    match check && has_pages(file) {
        true => Err(Error::generic("page cache still in use!")),
        false => Ok(()),
    }
}

/// Whether any byte can be read without waiting for storage.
fn has_pages(file: &File) -> bool {
    let length = fstat(file.fd()).map_or(0, |stat| u64::try_from(stat.st_size).unwrap_or(0));
    let byte = IoVec::from(IoBuffer::zeroed(1));
    let mut offsets = (0..length).step_by(PAGE);
    offsets.any(|offset| file.try_read(offset, &byte).is_some())
}
