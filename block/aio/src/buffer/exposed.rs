//! Memory that another process has mapped, too: the rings and the data of a device that it serves.
//!
//! The other side gets a descriptor of this memory and of nothing else. It can change every byte
//! at any time, and cannot take one away: the file is sealed, so that touching the memory never
//! raises SIGBUS because somebody has made it shorter.

// UNSAFETY: as in the module above, memory is turned into pointers for the kernel.

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::rc::Rc;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;

use super::IoBuffer;

/// Zeroed memory behind a descriptor; any context can make a buffer of it, and it lives as long as
/// the last of these.
pub struct ExposedMemory {
    ptr: NonNull<u8>,
    len: usize,
    file: OwnedFd,
}

// SAFETY: the memory belongs to no thread, and it is only ever reached by raw copies and atomic
// operations.
unsafe impl Send for ExposedMemory {}
// SAFETY: as above; the structure itself never changes.
unsafe impl Sync for ExposedMemory {}

impl ExposedMemory {
    /// Maps `len` bytes, not zero, which take memory when they are touched.
    ///
    /// # Errors
    ///
    /// The file cannot be made, or there is no room for the mapping.
    pub fn new(name: &CStr, len: usize) -> io::Result<Arc<ExposedMemory>> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = memfd_create(name, flags)?;
        let size = i64::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        ftruncate(&file, size)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let ptr = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        if ptr == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // A process forked from this one has no business in it, and nothing is lost where the
        // kernel refuses.
        // SAFETY: the advice is about pages of the mapping just made.
        unsafe { libc::madvise(ptr, len, libc::MADV_DONTFORK) };
        let ptr = NonNull::new(ptr.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Arc::new(ExposedMemory { ptr, len, file }))
    }

    /// The number of bytes.
    #[expect(clippy::len_without_is_empty, reason = "it never is")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// What the other process has to map, from its beginning.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The address of the first byte in this process.
    pub fn addr(&self) -> usize {
        self.ptr.as_ptr().addr()
    }

    /// A buffer over all of it, for the calling thread.
    pub fn buffer(self: &Arc<Self>) -> IoBuffer {
        IoBuffer {
            ptr: self.ptr.as_ptr(),
            len: self.len,
            owner: Rc::new(Arc::clone(self)),
        }
    }
}

impl Drop for ExposedMemory {
    fn drop(&mut self) {
        // SAFETY: it is our own mapping, and buffers over it keep this structure alive.
        unsafe { libc::munmap(self.ptr.as_ptr().cast(), self.len) };
    }
}

impl fmt::Debug for ExposedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ExposedMemory({} bytes at {:p})", self.len, self.ptr)
    }
}
