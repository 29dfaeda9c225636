//! The bits of a bitmap: one for each granule of the disk, in pieces that exist only where bits are set. Setting takes no lock once the
//! piece is there, and any number of contexts set bits at once.
//!
//! Memory follows the bits that are set: pieces that are all zero are not there, and those that a stored bitmap says are all one share
//! their memory.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use arc_swap::ArcSwapOption;

/// 64-bit words of a piece.
const WORDS: usize = 512;
/// Bits of a piece.
pub(super) const PIECE_BITS: u64 = WORDS as u64 * 64;
/// Bytes of a piece, as it is stored.
pub(super) const PIECE_BYTES: usize = WORDS * 8;

type Piece = [AtomicU64; WORDS];

static ALL_ONES: LazyLock<Arc<Piece>> =
    LazyLock::new(|| Arc::new([const { AtomicU64::new(u64::MAX) }; WORDS]));

/// Bits for a disk of one length. A disk of another length has other bits, which may share pieces.
#[derive(Debug)]
pub(super) struct Bits {
    /// The disk's length in bytes.
    pub(super) size: u64,
    /// How many bits there are.
    pub(super) len: u64,
    pieces: Box<[ArcSwapOption<Piece>]>,
}

impl Bits {
    /// Clear bits for `size` bytes with `1 << granularity_bits` bytes to a bit.
    pub(super) fn new(size: u64, granularity_bits: u32) -> Self {
        let mask = (1u64 << granularity_bits) - 1;
        let len = (size >> granularity_bits) + u64::from(size & mask != 0);
        let pieces = usize::try_from(len.div_ceil(PIECE_BITS)).unwrap_or(usize::MAX);
        Self {
            size,
            len,
            pieces: (0..pieces).map(|_| ArcSwapOption::empty()).collect(),
        }
    }

    /// The same bits for another length: what is new is clear, what is gone is forgotten.
    pub(super) fn resized(&self, size: u64, granularity_bits: u32) -> Self {
        let new = Self::new(size, granularity_bits);
        for (place, piece) in new.pieces.iter().zip(&self.pieces) {
            place.store(piece.load_full());
        }
        if new.len < self.len {
            new.clear_from(new.len);
        }
        new
    }

    /// Clears the bits of the last piece from `bit` on.
    fn clear_from(&self, bit: u64) {
        let Some(place) = piece_of(bit).and_then(|index| self.pieces.get(index)) else {
            return;
        };
        let Some(old) = place.load_full() else { return };
        let kept = bit % PIECE_BITS;
        let copy: Piece = std::array::from_fn(|word| {
            let from = word as u64 * 64;
            let mask = low_bits(kept.saturating_sub(from));
            AtomicU64::new(old[word].load(Ordering::Relaxed) & mask)
        });
        place.store(Some(Arc::new(copy)));
    }

    pub(super) fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// Sets the bits of a range that have their piece, from the start on; gives the first bit whose piece is missing.
    pub(super) fn set(&self, range: Range<u64>) -> Option<u64> {
        let mut at = range.start;
        while at < range.end {
            let place = piece_of(at).and_then(|index| self.pieces.get(index))?;
            let end = range.end.min((at / PIECE_BITS + 1) * PIECE_BITS);
            let piece = place.load();
            let Some(piece) = piece.as_ref() else {
                return Some(at);
            };
            set_in(piece, at % PIECE_BITS, end - at);
            at = end;
        }
        None
    }

    /// Makes the piece of this bit. Only one caller at a time.
    pub(super) fn make_piece(&self, bit: u64) {
        if let Some(place) = piece_of(bit).and_then(|index| self.pieces.get(index))
            && place.load().is_none()
        {
            place.store(Some(Arc::new([const { AtomicU64::new(0) }; WORDS])));
        }
    }

    /// Makes all bits of a piece ones, as far as there are that many bits. Only one caller at a time.
    pub(super) fn fill_piece(&self, index: usize) {
        if let Some(place) = self.pieces.get(index) {
            place.store(Some(Arc::clone(&ALL_ONES)));
            if index + 1 == self.pieces.len() && !self.len.is_multiple_of(PIECE_BITS) {
                self.clear_from(self.len);
            }
        }
    }

    /// Takes a piece as it is stored; bits past the end do not count. Only one caller at a time.
    pub(super) fn load_piece(&self, index: usize, bytes: &[u8]) {
        let Some(place) = self.pieces.get(index) else {
            return;
        };
        if bytes.iter().all(|&byte| byte == 0) {
            return;
        }
        let piece: Piece = std::array::from_fn(|word| {
            let mut value = [0; 8];
            let stored = bytes.get(word * 8..).unwrap_or_default();
            for (to, from) in value.iter_mut().zip(stored) {
                *to = *from;
            }
            AtomicU64::new(u64::from_le_bytes(value))
        });
        place.store(Some(Arc::new(piece)));
        if index + 1 == self.pieces.len() && !self.len.is_multiple_of(PIECE_BITS) {
            self.clear_from(self.len);
        }
    }

    /// The words of a piece; `None` where all are zero for want of a piece.
    pub(super) fn words(&self, index: usize) -> Option<[u64; WORDS]> {
        let piece = self.pieces.get(index)?.load_full()?;
        Some(std::array::from_fn(|word| {
            piece[word].load(Ordering::Relaxed)
        }))
    }

    /// How many bits are set.
    pub(super) fn count(&self) -> u64 {
        let words = self.pieces.iter().filter_map(|place| place.load_full());
        words
            .flat_map(|piece| (0..WORDS).map(move |word| piece[word].load(Ordering::Relaxed)))
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Whether a bit is set, and the first bit after it that is otherwise; `end` if that comes first.
    pub(super) fn run_at(&self, bit: u64, end: u64) -> (bool, u64) {
        let mut at = bit;
        let mut is_set = None;
        while at < end {
            let piece = piece_of(at).and_then(|index| self.pieces.get(index)?.load_full());
            let next_piece = (at / PIECE_BITS + 1) * PIECE_BITS;
            let Some(piece) = piece else {
                if *is_set.get_or_insert(false) {
                    break;
                }
                at = next_piece;
                continue;
            };
            while at < next_piece.min(end) {
                let word = usize::try_from(at % PIECE_BITS / 64).unwrap_or(0);
                let word = piece[word].load(Ordering::Relaxed) >> (at % 64);
                let is_set = *is_set.get_or_insert(word & 1 == 1);
                let same = if is_set {
                    word.trailing_ones()
                } else {
                    word.trailing_zeros()
                };
                let left = 64 - at % 64;
                if u64::from(same) < left {
                    return (is_set, (at + u64::from(same)).min(end));
                }
                at += left;
            }
        }
        (is_set.unwrap_or(false), at.min(end))
    }

    /// Runs of set bits.
    pub(super) fn runs(&self) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for index in 0..self.pieces.len() {
            let Some(words) = self.words(index) else {
                continue;
            };
            for (number, mut word) in (0u64..).zip(words) {
                let base = index as u64 * PIECE_BITS + number * 64;
                let mut at = 0u32;
                while word != 0 {
                    let skip = word.trailing_zeros();
                    let ones = (word >> skip).trailing_ones();
                    let start = base + u64::from(at + skip);
                    let end = start + u64::from(ones);
                    match runs.last_mut() {
                        Some(last) if last.end == start => last.end = end,
                        _ => runs.push(start..end),
                    }
                    at += skip + ones;
                    word = word.checked_shr(skip + ones).unwrap_or(0);
                }
            }
        }
        runs
    }
}

fn piece_of(bit: u64) -> Option<usize> {
    usize::try_from(bit / PIECE_BITS).ok()
}

/// The lowest `count` bits.
fn low_bits(count: u64) -> u64 {
    u32::try_from(count)
        .ok()
        .and_then(|count| 1u64.checked_shl(count))
        .map_or(u64::MAX, |bit| bit - 1)
}

fn set_in(piece: &Piece, mut at: u64, mut count: u64) {
    while count > 0 {
        let step = count.min(64 - at % 64);
        let mask = low_bits(step) << (at % 64);
        if let Some(word) = usize::try_from(at / 64)
            .ok()
            .and_then(|word| piece.get(word))
        {
            // Reading first keeps the line shared where the bits are set already.
            if word.load(Ordering::Relaxed) & mask != mask {
                word.fetch_or(mask, Ordering::Relaxed);
            }
        }
        at += step;
        count -= step;
    }
}
