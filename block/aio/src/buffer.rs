//! Memory for I/O that lives as long as anybody, the kernel included, may touch it.
//!
//! An [`IoBuffer`] is a piece of memory and a counted reference to whatever owns it: our own
//! allocation, a guest's RAM, a queue's payload area. Clones and slices share the memory. An
//! operation in flight holds a clone, so the memory outlives the operation even when the future
//! that started it is gone.
//!
//! The content is shared with the kernel and perhaps with a guest, so it is only ever reached by
//! raw copies, never by a reference to the bytes: whoever changes it meanwhile can spoil the
//! content that is read, not the program that reads it.

// UNSAFETY: this module turns owned and foreign memory into pointers for the kernel and copies
// through them.
#![expect(
    unsafe_code,
    reason = "raw memory shared with the kernel is this module's subject"
)]

mod exposed;
mod shared;
mod spare;
mod words;

use std::alloc::{Layout, handle_alloc_error};
use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::rc::Rc;
use std::sync::Arc;

pub use self::exposed::ExposedMemory;
pub use self::shared::SharedMemory;
use self::spare::Piece;

/// Alignment of memory allocated here, in bytes: enough for direct I/O on every block size.
const ALIGNMENT: usize = 4096;
/// Allocations of this many bytes and more are mapped, so that untouched pages cost nothing.
const MAP_THRESHOLD: usize = 128 << 10;

/// A shared, counted piece of memory that I/O is done with; belongs to one thread.
#[derive(Clone)]
pub struct IoBuffer {
    // A raw pointer, which also keeps the type from being sent to another thread.
    ptr: *mut u8,
    len: usize,
    owner: Rc<dyn Any>,
}

impl IoBuffer {
    /// Allocates `len` zero bytes at a 4096-byte boundary; large sizes take memory when touched.
    pub fn zeroed(len: usize) -> IoBuffer {
        let memory = Memory::zeroed(len);
        let ptr = memory.ptr.as_ptr();
        IoBuffer {
            ptr,
            len,
            owner: Rc::new(memory),
        }
    }

    /// Takes over a vector's memory, without copying and with whatever alignment it has.
    pub fn from_vec(mut v: Vec<u8>) -> IoBuffer {
        let (ptr, len) = (v.as_mut_ptr(), v.len());
        IoBuffer {
            ptr,
            len,
            owner: Rc::new(v),
        }
    }

    /// Allocates aligned memory holding a copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> IoBuffer {
        let memory = Memory::uninitialised(bytes.len());
        let ptr = memory.ptr.as_ptr();
        // SAFETY: the allocation above is `bytes.len()` bytes long and nobody else has it yet.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), ptr, bytes.len()) };
        IoBuffer {
            ptr,
            len: bytes.len(),
            owner: Rc::new(memory),
        }
    }

    /// Wraps `len` bytes of foreign memory at `ptr`, kept alive by `owner`.
    ///
    /// # Safety
    ///
    /// The memory must be valid for reads and writes until `owner` is dropped, and nobody may
    /// hold a Rust reference to it while this buffer or a clone of it exists. Other processes,
    /// guests and the kernel may change it at any time.
    pub unsafe fn from_raw(ptr: *mut u8, len: usize, owner: Rc<dyn Any>) -> IoBuffer {
        IoBuffer { ptr, len, owner }
    }

    /// The number of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no byte in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes `range` of this buffer, as a buffer that shares the memory.
    ///
    /// # Panics
    ///
    /// When the range does not lie inside the buffer.
    pub fn slice(&self, range: Range<usize>) -> IoBuffer {
        self.clone().into_slice(range)
    }

    /// Like [`slice`](Self::slice), but gives this handle up.
    pub(crate) fn into_slice(self, range: Range<usize>) -> IoBuffer {
        self.check(range.start, range.end);
        IoBuffer {
            // SAFETY: `range` lies inside the buffer, as checked above.
            ptr: unsafe { self.ptr.add(range.start) },
            len: range.end - range.start,
            owner: self.owner,
        }
    }

    /// The address of the first byte.
    pub fn addr(&self) -> usize {
        self.ptr.addr()
    }

    /// A pointer to the first byte, valid as long as this buffer or a clone of it.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// Copies `bytes` into the buffer, from offset `at` on.
    ///
    /// # Panics
    ///
    /// When they do not fit.
    pub fn write_at(&self, at: usize, bytes: &[u8]) {
        self.check(at, at.saturating_add(bytes.len()));
        // SAFETY: the range was checked; the memory is valid while `owner` is. `copy`, because
        // nothing keeps a caller from holding `bytes` in the same foreign memory.
        unsafe { ptr::copy(bytes.as_ptr(), self.ptr.add(at), bytes.len()) };
    }

    /// Copies bytes out of the buffer, from offset `at` on, until `out` is full.
    ///
    /// # Panics
    ///
    /// When the buffer does not hold so many.
    pub fn read_at(&self, at: usize, out: &mut [u8]) {
        self.check(at, at.saturating_add(out.len()));
        // SAFETY: as in `write_at`.
        unsafe { ptr::copy(self.ptr.add(at), out.as_mut_ptr(), out.len()) };
    }

    /// A copy of the content.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut v = Vec::with_capacity(self.len);
        // SAFETY: the vector has room for `len` bytes, all of which are written before it is told.
        unsafe {
            ptr::copy_nonoverlapping(self.ptr, v.as_mut_ptr(), self.len);
            v.set_len(self.len);
        }
        v
    }

    /// Sets every byte to `byte`.
    pub fn fill(&self, byte: u8) {
        // SAFETY: the whole buffer is valid for writes while `owner` is.
        unsafe { ptr::write_bytes(self.ptr, byte, self.len) };
    }

    /// Gives the memory behind the bytes `range` back to the system, as far as these are whole
    /// pages of [`SharedMemory`] or of a large buffer made by [`zeroed`](Self::zeroed): they read as
    /// zeroes then, and take memory again when touched. Other bytes stay as they are.
    ///
    /// # Panics
    ///
    /// When the range does not lie inside the buffer.
    pub fn release(&self, range: Range<usize>) {
        self.check(range.start, range.end);
        let is_ours = match self.owner.downcast_ref::<Memory>() {
            Some(memory) => matches!(memory.source, Source::Mapping),
            None => self.owner.is::<Arc<SharedMemory>>(),
        };
        let start = (self.addr() + range.start).next_multiple_of(ALIGNMENT) - self.addr();
        let end = (self.addr() + range.end) & !(ALIGNMENT - 1);
        let Some(len) = end.checked_sub(self.addr() + start) else {
            return;
        };
        if is_ours && len > 0 {
            // SAFETY: these are pages of our own anonymous mapping, which the owner keeps alive;
            // as with every transfer, whoever uses the bytes meanwhile gets other bytes at worst.
            unsafe { libc::madvise(self.ptr.add(start).cast(), len, libc::MADV_DONTNEED) };
        }
    }

    /// Copies the whole of `from` to offset `at`; the two may overlap.
    ///
    /// # Panics
    ///
    /// When it does not fit.
    pub(crate) fn copy_from(&self, at: usize, from: &IoBuffer) {
        self.check(at, at.saturating_add(from.len));
        // SAFETY: both ranges are valid while their owners are, and `copy` allows overlap.
        unsafe { ptr::copy(from.ptr, self.ptr.add(at), from.len) };
    }

    /// Whether every byte is zero.
    pub fn is_zero(&self) -> bool {
        const LANES: usize = 8;
        const STEP: usize = LANES * size_of::<u64>();
        let at = |offset: usize| {
            // SAFETY: only called with offsets below `len`.
            unsafe { self.ptr.add(offset).read() }
        };
        // Data that is not zero mostly shows it at one of its ends.
        if self.len == 0 {
            return true;
        }
        if at(0) != 0 || at(self.len - 1) != 0 {
            return false;
        }
        let whole = self.len - self.len % STEP;
        for offset in (0..whole).step_by(STEP) {
            // SAFETY: `STEP` bytes from `offset` on lie inside the buffer; unaligned is allowed.
            let block = unsafe { self.ptr.add(offset).cast::<[u64; LANES]>().read_unaligned() };
            if block.iter().fold(0, |all, lane| all | lane) != 0 {
                return false;
            }
        }
        (whole..self.len).all(|offset| at(offset) == 0)
    }

    fn check(&self, start: usize, end: usize) {
        assert!(
            start <= end && end <= self.len,
            "bytes {start}..{end} of a buffer of {} bytes",
            self.len
        );
    }
}

impl fmt::Debug for IoBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoBuffer({} bytes at {:p})", self.len, self.ptr)
    }
}

/// Something with the alignment of our memory.
#[repr(align(4096))]
struct Page;
const _: () = assert!(align_of::<Page>() == ALIGNMENT, "the same number twice");

/// Memory of our own, freed when the last buffer over it goes.
struct Memory {
    ptr: NonNull<u8>,
    len: usize,
    source: Source,
}

enum Source {
    /// Nothing was allocated: the length is zero.
    Nothing,
    Small(Piece),
    Mapping,
}

impl Memory {
    fn zeroed(len: usize) -> Memory {
        let memory = Memory::uninitialised(len);
        if matches!(memory.source, Source::Small(_)) {
            // SAFETY: `len` bytes were just allocated. A fresh mapping is zero already.
            unsafe { ptr::write_bytes(memory.ptr.as_ptr(), 0, len) };
        }
        memory
    }

    fn uninitialised(len: usize) -> Memory {
        if len == 0 {
            return Memory {
                ptr: NonNull::<Page>::dangling().cast(),
                len,
                source: Source::Nothing,
            };
        }
        if len >= MAP_THRESHOLD {
            let Some(ptr) = map(len) else {
                let layout = Layout::from_size_align(len, ALIGNMENT);
                handle_alloc_error(layout.unwrap_or(Layout::new::<Page>()));
            };
            return Memory {
                ptr,
                len,
                source: Source::Mapping,
            };
        }
        let piece = Piece::take(len);
        Memory {
            ptr: piece.ptr(),
            len,
            source: Source::Small(piece),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        match std::mem::replace(&mut self.source, Source::Nothing) {
            Source::Nothing => {}
            Source::Small(piece) => piece.give_back(),
            Source::Mapping => {
                // SAFETY: `ptr` and `len` are those of our own mapping, and this is the last
                // owner.
                unsafe { libc::munmap(self.ptr.as_ptr().cast(), self.len) };
            }
        }
    }
}

fn map(len: usize) -> Option<NonNull<u8>> {
    map_at(Place::Any, len)
}

/// Where a mapping is to be.
#[derive(Clone, Copy)]
enum Place {
    Any,
    /// At this address if it is free.
    Rather(usize),
    /// At this address or nowhere.
    Only(usize),
}

fn map_at(place: Place, len: usize) -> Option<NonNull<u8>> {
    let (address, flags) = match place {
        Place::Any => (0, 0),
        Place::Rather(address) => (address, 0),
        Place::Only(address) => (address, libc::MAP_FIXED_NOREPLACE),
    };
    // SAFETY: an anonymous private mapping that replaces none touches nothing that exists.
    let ptr = unsafe {
        libc::mmap(
            ptr::without_provenance_mut(address),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags,
            -1,
            0,
        )
    };
    if ptr == libc::MAP_FAILED {
        return None;
    }
    if matches!(place, Place::Only(address) if address != ptr.addr()) {
        // A kernel before 4.17, which takes the address for a wish.
        // SAFETY: it is the mapping just made, which nobody knows yet.
        unsafe { libc::munmap(ptr, len) };
        return None;
    }
    // Where huge pages are the rule, one touched byte would take two megabytes. Kernels without
    // them refuse, and nothing is lost.
    // SAFETY: the advice is about pages of the mapping just made.
    unsafe { libc::madvise(ptr, len, libc::MADV_NOHUGEPAGE) };
    NonNull::new(ptr.cast())
}
