//! Aligned memory that was given back, kept for the next buffer of its size on the same thread.
//!
//! Small buffers come and go with every request that is not aligned or needs metadata. Taking each
//! from the heap would cost more than most of what is done with it, and aligned pieces that are
//! freed between others leave holes that little else fits into.

// UNSAFETY: allocates and frees aligned memory.
#![expect(unsafe_code, reason = "aligned memory comes from the raw allocator")]

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::ptr::NonNull;

use super::ALIGNMENT;

/// The most bytes that a thread keeps.
const MOST: usize = 256 << 10;

/// A piece of aligned memory, valid until it is freed by whoever owns this.
#[derive(Debug)]
pub(super) struct Piece {
    ptr: NonNull<u8>,
    layout: Layout,
}

impl Piece {
    /// Takes at least `len` bytes, which is not zero; what they contain is not defined.
    pub(super) fn take(len: usize) -> Piece {
        let layout = len
            .checked_next_multiple_of(ALIGNMENT)
            .and_then(|size| Layout::from_size_align(size, ALIGNMENT).ok())
            .unwrap_or_else(|| panic!("a buffer of {len} bytes is larger than memory"));
        // Fails only while the thread ends.
        let spare = SPARE.try_with(|spare| spare.borrow_mut().take(layout));
        if let Ok(Some(piece)) = spare {
            return piece;
        }
        // SAFETY: the layout's size is not zero, because `len` is not.
        let Some(ptr) = NonNull::new(unsafe { alloc(layout) }) else {
            handle_alloc_error(layout)
        };
        Piece { ptr, layout }
    }

    pub(super) fn ptr(&self) -> NonNull<u8> {
        self.ptr
    }

    /// Gives the memory back; nobody may use it any more.
    pub(super) fn give_back(self) {
        let mut piece = Some(self);
        // Where the thread ends, the closure does not run.
        let _ = SPARE.try_with(|spare| {
            piece = piece
                .take()
                .and_then(|piece| spare.borrow_mut().keep(piece));
        });
        if let Some(piece) = piece {
            piece.free();
        }
    }

    fn free(self) {
        // SAFETY: `ptr` came from `alloc` with this layout, and its only owner is gone after this.
        unsafe { dealloc(self.ptr.as_ptr(), self.layout) };
    }
}

#[derive(Default)]
struct Spare {
    pieces: Vec<Piece>,
    bytes: usize,
}

impl Spare {
    fn take(&mut self, layout: Layout) -> Option<Piece> {
        let fits = |piece: &Piece| piece.layout == layout;
        let at = self.pieces.iter().rposition(fits)?;
        self.bytes -= layout.size();
        Some(self.pieces.swap_remove(at))
    }

    /// Keeps a piece, or gives it back where there is no room.
    fn keep(&mut self, piece: Piece) -> Option<Piece> {
        if self.bytes + piece.layout.size() > MOST {
            return Some(piece);
        }
        self.bytes += piece.layout.size();
        self.pieces.push(piece);
        None
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        self.pieces.drain(..).for_each(Piece::free);
    }
}

thread_local! {
    static SPARE: RefCell<Spare> = RefCell::default();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again_by_buffers_of_its_size() {
        let (first, other) = (Piece::take(4096), Piece::take(8192));
        let (address, elsewhere) = (first.ptr(), other.ptr());
        first.give_back();
        other.give_back();
        let again = Piece::take(512);
        assert_eq!(again.ptr(), address);
        assert_eq!(again.layout.size(), ALIGNMENT);
        assert_ne!(Piece::take(4096).ptr(), elsewhere);
        assert_eq!(Piece::take(5000).ptr(), elsewhere);
    }

    #[test]
    fn no_more_is_kept_than_agreed() {
        let pieces: Vec<Piece> = (0..100).map(|_| Piece::take(64 << 10)).collect();
        pieces.into_iter().for_each(Piece::give_back);
        SPARE.with_borrow(|spare| {
            assert_eq!(spare.bytes, MOST);
            assert_eq!(spare.pieces.len(), MOST / (64 << 10));
        });
    }
}
