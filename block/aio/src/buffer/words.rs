//! Little-endian words in memory that somebody else reads and writes at the same time: each is
//! read and written as a whole, in an order that both sides can rely on.

// UNSAFETY: as in the module above, places in raw memory become atomic words.

use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use super::IoBuffer;

macro_rules! word {
    ($load:ident, $store:ident, $word:ty, $atomic:ty) => {
        /// Reads the word at `at` bytes from the beginning.
        ///
        /// # Panics
        ///
        /// When it is not inside, or its address no multiple of its size.
        #[inline]
        pub fn $load(&self, at: usize, ordering: Ordering) -> $word {
            let place = self.place::<$word>(at);
            // SAFETY: the word is aligned and inside the buffer, whose memory lives as long as its
            // owner; nobody makes references into it.
            <$word>::from_le(unsafe { <$atomic>::from_ptr(place) }.load(ordering))
        }

        /// Writes the word at `at` bytes from the beginning.
        ///
        /// # Panics
        ///
        /// As for reading.
        #[inline]
        pub fn $store(&self, at: usize, value: $word, ordering: Ordering) {
            let place = self.place::<$word>(at);
            // SAFETY: as for reading.
            unsafe { <$atomic>::from_ptr(place) }.store(value.to_le(), ordering);
        }
    };
}

impl IoBuffer {
    word!(load_u16, store_u16, u16, AtomicU16);
    word!(load_u32, store_u32, u32, AtomicU32);

    #[inline]
    fn place<T>(&self, at: usize) -> *mut T {
        self.check(at, at.saturating_add(size_of::<T>()));
        let place = self.ptr.wrapping_add(at).cast::<T>();
        assert!(place.is_aligned(), "a word at an odd place");
        place
    }
}
