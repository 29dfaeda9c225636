//! Making files for `blockdev-create`.

use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{FallocateFlags, OFlag, fallocate, open as open_path};
use nix::sys::stat::{Mode, fstat};
use nix::sys::uio::pwrite;
use nix::unistd::{fsync, ftruncate};
use stord_aio::Errno;
use stord_aio::file::attributes;
use stord_qmp::Error;
use stord_qmp::schema::create::{BlockdevCreateOptionsFile, PreallocMode};

use super::lock::Locks;
use crate::graph::Permissions;
use crate::job::JobControl;
use crate::job::create::CreateError;

/// The extent size hint where the user gives none.
const DEFAULT_EXTENT_SIZE_HINT: i64 = 1 << 20;

/// Zeroes are written in pieces of this many bytes.
const PIECE: usize = 1 << 20;

/// Says what is wrong with the options.
///
/// # Errors
/// In the reference's wording.
pub fn check(options: &BlockdevCreateOptionsFile) -> Result<(), Error> {
    if options.preallocation == Some(PreallocMode::Metadata) {
        return Err(Error::generic("Unsupported preallocation mode: metadata"));
    }
    if i64::try_from(options.size).is_err() {
        return Err(failed("Could not resize file", Errno::EINVAL));
    }
    hint_bytes(options.extent_size_hint).map(|_| ())
}

/// Makes the file, or empties the one that is there, and gives it its size. Blocks; for the pool.
///
/// # Errors
/// In the reference's wording. A file that was made or emptied stays, as there, and the error says so.
pub fn create(
    options: &BlockdevCreateOptionsFile,
    control: &JobControl,
) -> Result<(), CreateError> {
    check(options)?;
    let filename = &options.filename;
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_CLOEXEC;
    let fd = open_path(filename.as_str(), flags, Mode::from_bits_truncate(0o644))
        .map_err(|errno| failed(&format!("Could not create '{filename}'"), errno))?;
    let locks = lock(&fd, filename)?;
    ftruncate(&fd, 0)
        .map_err(|errno| failed(&format!("Could not clear file '{filename}'"), errno))?;
    if options.nocow == Some(true) {
        // As in the reference, what the file system lacks is not missed.
        let _ = attributes::disable_copy_on_write(fd.as_fd());
    }
    set_extent_size_hint(&fd, options.extent_size_hint)
        .and_then(|()| allocate(&fd, options, control))
        .map_err(|error| CreateError {
            error,
            left: Some(what_is_left(&fd, filename)),
        })?;
    locks.commit();
    Ok(())
}

fn what_is_left(fd: &OwnedFd, filename: &str) -> String {
    let length = fstat(fd).map_or(0, |stat| stat.st_size);
    format!("'{filename}' stays, without what it held before: it has {length} bytes now")
}

fn lock(fd: &OwnedFd, filename: &str) -> Result<Locks, Error> {
    let kept = fd.try_clone().map_err(|source| {
        Error::generic("Could not duplicate a file descriptor").with_source(source)
    })?;
    let locks = Locks::new(Locks::supported(fd).then_some(kept));
    locks.prepare(
        Permissions::WRITE | Permissions::RESIZE,
        Permissions::all() - Permissions::RESIZE,
        filename,
    )?;
    Ok(locks)
}

fn hint_bytes(hint: Option<i64>) -> Result<u32, Error> {
    u32::try_from(hint.unwrap_or(DEFAULT_EXTENT_SIZE_HINT))
        .map_err(|_| Error::generic("Extent size hint is too large"))
}

fn set_extent_size_hint(fd: &OwnedFd, hint: Option<i64>) -> Result<(), Error> {
    let bytes = hint_bytes(hint)?;
    if bytes == 0 {
        return Ok(());
    }
    match attributes::set_extent_size_hint(fd.as_fd(), bytes) {
        Err(errno) if hint.is_some() && !matches!(errno, Errno::ENOTTY | Errno::ENOTSUP) => {
            Err(failed("Could not set extent size hint", errno))
        }
        // Only a hint: a file system without it goes without it.
        _ => Ok(()),
    }
}

fn allocate(
    fd: &OwnedFd,
    options: &BlockdevCreateOptionsFile,
    control: &JobControl,
) -> Result<(), Error> {
    let size =
        i64::try_from(options.size).map_err(|_| failed("Could not resize file", Errno::EINVAL))?;
    match options.preallocation.unwrap_or(PreallocMode::Off) {
        PreallocMode::Falloc if size > 0 => {
            fallocate(fd, FallocateFlags::empty(), 0, size)
                .map_err(|errno| failed("Could not preallocate data for the new file", errno))?;
        }
        PreallocMode::Full => write_zeroes(fd, size, control)?,
        // `check` let no other mode pass.
        PreallocMode::Off | PreallocMode::Metadata | PreallocMode::Falloc => {}
    }
    ftruncate(fd, size).map_err(|errno| failed("Could not resize file", errno))
}

fn write_zeroes(fd: &OwnedFd, size: i64, control: &JobControl) -> Result<(), Error> {
    let zeroes = vec![0; PIECE];
    let mut at = 0;
    while at < size && !control.is_cancelled() {
        let left = usize::try_from(size - at).unwrap_or(PIECE).min(PIECE);
        let written = pwrite(fd, zeroes.get(..left).unwrap_or_default(), at)
            .map_err(|errno| failed("Could not write zeros for preallocation", errno))?;
        at += i64::try_from(written).unwrap_or(0);
    }
    fsync(fd).map_err(|errno| failed("Could not flush file to disk", errno))
}

fn failed(what: &str, errno: Errno) -> Error {
    Error::os(what, errno)
}
