//! Memory that buffers on several contexts share.

// UNSAFETY: as in the module above, memory is turned into pointers for the kernel.

use std::fmt;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{ALIGNMENT, IoBuffer, Place, map, map_at};

/// The next place for memory that is to lie apart: 16 TiB, far from the program, its heap and its
/// stacks, wherever these are put.
static APART: AtomicUsize = AtomicUsize::new(1 << 44);

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

    /// The same, in a part of the address space that nothing else uses: another process finds the
    /// same address free, see [`zeroed_at`](Self::zeroed_at).
    pub fn zeroed_apart(len: usize) -> Option<Arc<SharedMemory>> {
        let len_in_pages = len.checked_next_multiple_of(ALIGNMENT)?;
        let address = APART.fetch_add(len_in_pages, Ordering::Relaxed);
        let ptr = map_at(Place::Rather(address), len)?;
        Some(Arc::new(SharedMemory { ptr, len }))
    }

    /// The same, at an address. `None` when something is there.
    pub fn zeroed_at(addr: usize, len: usize) -> Option<Arc<SharedMemory>> {
        let ptr = map_at(Place::Only(addr), len)?;
        // What comes apart from now on need not try there.
        APART.fetch_max(addr.saturating_add(len), Ordering::Relaxed);
        Some(Arc::new(SharedMemory { ptr, len }))
    }

    /// Where it is.
    pub fn addr(&self) -> usize {
        self.ptr.addr().get()
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
