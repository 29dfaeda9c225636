//! Memory shared with another process or the kernel, mapped for as long as anybody uses it.
//!
//! It is only ever reached by raw copies and by atomic operations on words of it, so that whoever changes it meanwhile can spoil the
//! content that is read, not the program that reads it.

// UNSAFETY: maps files that others have mapped too, and turns places in them into atomic words.
#![expect(
    unsafe_code,
    reason = "memory shared with other processes is this module's subject"
)]

use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use nix::libc;
use nix::sys::stat::{SFlag, fstat};
use stord_aio::{Errno, IoBuffer};

use super::Access;

/// A piece of a file in the memory of this process, unmapped when the last user goes.
pub(crate) struct Mapping {
    /// What was mapped: whole pages.
    base: NonNull<libc::c_void>,
    mapped: usize,
    /// What was asked for, inside.
    start: usize,
    len: usize,
}

// SAFETY: the memory belongs to no thread, and it is only ever reached by raw copies and atomic operations.
unsafe impl Send for Mapping {}
// SAFETY: as above; the structure itself never changes.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of a file from `offset` on, shared with whoever else has it mapped. With `Access::Read`, the memory must only be
    /// read.
    ///
    /// # Errors
    /// `EINVAL` where nothing is asked for, or more than a regular file has; otherwise what mmap(2) says.
    pub(crate) fn new(
        file: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        access: Access,
    ) -> Result<Arc<Self>, Errno> {
        const PAGE: u64 = 4096;
        let status = fstat(file)?;
        let end = u64::try_from(len)
            .ok()
            .and_then(|len| offset.checked_add(len));
        let end = end.filter(|_| len > 0).ok_or(Errno::EINVAL)?;
        // Pages beyond the end of a file are there to be mapped, and kill who touches them.
        let is_file =
            SFlag::from_bits_truncate(status.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFREG;
        if is_file && u64::try_from(status.st_size).is_ok_and(|size| size < end) {
            return Err(Errno::EINVAL);
        }
        let start = offset % PAGE;
        let from = libc::off_t::try_from(offset - start).map_err(|_| Errno::EINVAL)?;
        let start = usize::try_from(start).map_err(|_| Errno::EINVAL)?;
        let mapped = start.checked_add(len).ok_or(Errno::EINVAL)?;
        let protection = match access {
            Access::Read => libc::PROT_READ,
            Access::Write => libc::PROT_READ | libc::PROT_WRITE,
        };
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                mapped,
                protection,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                from,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        let base = NonNull::new(base).ok_or(Errno::EINVAL)?;
        // A process forked from this one has no business in it. A kernel that does not know the advice loses nothing.
        // SAFETY: the advice is about pages of the mapping just made.
        unsafe { libc::madvise(base.as_ptr(), mapped, libc::MADV_DONTFORK) };
        Ok(Arc::new(Self {
            base,
            mapped,
            start,
            len,
        }))
    }

    /// The number of bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// All of it as a buffer of the calling thread. One made with `Access::Read` must only be read from.
    pub(crate) fn buffer(self: &Arc<Self>) -> IoBuffer {
        // SAFETY: `start + len` bytes from `base` on are mapped until the owner goes, which the buffer keeps; nobody makes references
        // into the mapping. Memory that may only be read is never handed out as a destination: `GuestMemory` refuses that.
        unsafe {
            let ptr = self.base.as_ptr().cast::<u8>().add(self.start);
            IoBuffer::from_raw(ptr, self.len, Rc::new(Arc::clone(self)))
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it is our own mapping, and everything over it keeps this structure alive.
        unsafe { libc::munmap(self.base.as_ptr(), self.mapped) };
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({} bytes at {:p})", self.len, self.base)
    }
}

/// Memory in which words are read and written as wholes, by us and by others. All words are little-endian.
#[derive(Clone, Debug)]
pub(crate) struct Words(IoBuffer);

macro_rules! words {
    ($load:ident, $store:ident, $word:ty, $atomic:ty) => {
        /// Reads the word at `at` bytes from the beginning.
        ///
        /// # Panics
        /// When it is not inside, or its address not a multiple of its size.
        #[inline]
        pub(crate) fn $load(&self, at: usize, ordering: Ordering) -> $word {
            let ptr = self.place::<$word>(at);
            // SAFETY: `place` has checked that the word is inside the memory and aligned. The memory lives as long as the buffer.
            <$word>::from_le(unsafe { <$atomic>::from_ptr(ptr) }.load(ordering))
        }

        /// Writes the word at `at` bytes from the beginning.
        ///
        /// # Panics
        /// As for reading.
        #[inline]
        pub(crate) fn $store(&self, at: usize, value: $word, ordering: Ordering) {
            let ptr = self.place::<$word>(at);
            // SAFETY: as for reading.
            unsafe { <$atomic>::from_ptr(ptr) }.store(value.to_le(), ordering);
        }
    };
}

impl Words {
    /// Words in a buffer that begins at a multiple of `alignment` bytes; `None` for another.
    pub(crate) fn new(memory: IoBuffer, alignment: usize) -> Option<Self> {
        memory
            .addr()
            .is_multiple_of(alignment)
            .then_some(Self(memory))
    }

    /// The number of bytes.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Sets bits of the byte at `at`, whatever others do to it meanwhile.
    ///
    /// # Panics
    /// When it is not inside.
    #[inline]
    pub(crate) fn set_bits_u8(&self, at: usize, bits: u8) {
        let ptr = self.place::<u8>(at);
        // SAFETY: as for reading and writing.
        unsafe { AtomicU8::from_ptr(ptr) }.fetch_or(bits, Ordering::SeqCst);
    }

    words!(load_u8, store_u8, u8, AtomicU8);
    words!(load_u16, store_u16, u16, AtomicU16);
    words!(load_u32, store_u32, u32, AtomicU32);
    words!(load_u64, store_u64, u64, AtomicU64);

    #[inline]
    fn place<T>(&self, at: usize) -> *mut T {
        let end = at.checked_add(size_of::<T>());
        assert!(
            end.is_some_and(|end| end <= self.0.len()),
            "a word at {at} of {} bytes",
            self.0.len()
        );
        // Inside the buffer, as was just checked.
        let ptr = self.0.as_ptr().wrapping_add(at).cast::<T>();
        assert!(ptr.is_aligned(), "a word at an odd place");
        ptr
    }
}
