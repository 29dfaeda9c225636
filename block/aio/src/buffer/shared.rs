//! Memory that buffers on several contexts share.

// UNSAFETY: as in the module above, memory is turned into pointers for the kernel.

use std::fmt;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;

use super::{IoBuffer, map};

/// Zeroed memory that any context can make a buffer of; it lives as long as the last of these.
///
/// The contexts have to agree on who uses it when: as everywhere here, bytes that two use at a time
/// are mixed up at worst.
pub struct SharedMemory {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: the memory belongs to no thread, and it is only ever reached by raw copies.
unsafe impl Send for SharedMemory {}
// SAFETY: as above; the structure itself never changes.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Maps `len` bytes, not zero, which take memory when they are touched. `None` when there is no
    /// room for them.
    pub fn zeroed(len: usize) -> Option<Arc<SharedMemory>> {
        let ptr = map(len)?;
        Some(Arc::new(SharedMemory { ptr, len }))
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

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: it is our own mapping, and buffers over it keep this structure alive.
        unsafe { libc::munmap(self.ptr.as_ptr().cast(), self.len) };
    }
}

impl fmt::Debug for SharedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedMemory({} bytes at {:p})", self.len, self.ptr)
    }
}
