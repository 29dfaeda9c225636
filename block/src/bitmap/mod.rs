//! Dirty bitmaps: which parts of a node have been written to. Every write, zero and discard of a node sets the bits of its range in
//! every bitmap of the node that records, once it has ended, well or badly.
//!
//! Bits are set from all contexts without a lock. Everything else about bitmaps happens on the control thread while the node is
//! drained. A node without a bitmap that records pays one relaxed load per write.

mod bits;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use bitflags::bitflags;
use openssl::sha::Sha256;
use stord_qmp::Error;
use stord_qmp::schema::node_info::BlockDirtyInfo;

use bits::{Bits, PIECE_BITS, PIECE_BYTES};

bitflags! {
    /// What a bitmap is and may be used for.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct BitmapState: u8 {
        /// Writes set bits.
        const ENABLED = 1;
        /// It is stored with the image when that is closed.
        const PERSISTENT = 1 << 1;
        /// The image it is stored in cannot be written to.
        const READ_ONLY = 1 << 2;
        /// It was not stored properly; its bits mean nothing.
        const INCONSISTENT = 1 << 3;
        /// An operation uses it.
        const BUSY = 1 << 4;
    }
}

/// A bitmap of a node.
#[derive(Debug)]
pub struct DirtyBitmap {
    name: String,
    granularity_bits: u32,
    state: AtomicU8,
    bits: ArcSwap<Bits>,
    /// Other than by writes, it has changed since it was stored.
    changed: AtomicBool,
    /// Held while pieces are made and bits replaced.
    changing: Mutex<()>,
}

impl DirtyBitmap {
    /// A clear bitmap for `size` bytes with `1 << granularity_bits` bytes to a bit.
    pub fn new(name: String, granularity_bits: u32, size: u64, state: BitmapState) -> Self {
        Self {
            name,
            granularity_bits,
            state: AtomicU8::new(state.bits()),
            bits: ArcSwap::from_pointee(Bits::new(size, granularity_bits)),
            changed: AtomicBool::new(false),
            changing: Mutex::new(()),
        }
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// log2 of the bytes that a bit stands for.
    pub fn granularity_bits(&self) -> u32 {
        self.granularity_bits
    }

    /// What it is.
    pub fn state(&self) -> BitmapState {
        BitmapState::from_bits_retain(self.state.load(Ordering::Acquire))
    }

    /// Whether it is all of this.
    pub fn is(&self, state: BitmapState) -> bool {
        self.state().contains(state)
    }

    /// Whether users have changed it since it was stored.
    pub(crate) fn is_changed(&self) -> bool {
        self.changed.load(Ordering::Acquire)
    }

    /// What is stored is what it is.
    pub(crate) fn note_stored(&self) {
        self.changed.store(false, Ordering::Release);
    }

    /// Makes it something, or no longer.
    pub(crate) fn set_state(&self, state: BitmapState, on: bool) {
        self.changed.store(true, Ordering::Release);
        if on {
            self.state.fetch_or(state.bits(), Ordering::AcqRel);
        } else {
            self.state.fetch_and(!state.bits(), Ordering::AcqRel);
        }
    }

    /// The length in bytes of the disk that it is about.
    pub fn size(&self) -> u64 {
        self.bits.load().size
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the bits of a range of bytes. Past the end, the bitmap grows with its disk.
    pub(crate) fn set(&self, offset: u64, len: u64) {
        let Some(last) = len.checked_sub(1).and_then(|rest| offset.checked_add(rest)) else {
            return;
        };
        if last >= self.size() {
            let _order = self.lock();
            if last >= self.size() {
                self.replace_bits(last + 1);
            }
        }
        let range = offset >> self.granularity_bits..(last >> self.granularity_bits) + 1;
        self.set_bits(range);
    }

    fn set_bits(&self, mut range: Range<u64>) {
        while let Some(missing) = self.bits.load().set(range.clone()) {
            let _order = self.lock();
            self.bits.load().make_piece(missing);
            range.start = missing;
        }
    }

    fn replace_bits(&self, size: u64) {
        let resized = self.bits.load().resized(size, self.granularity_bits);
        self.bits.store(Arc::new(resized));
    }

    /// Adapts to another length of the disk: new bits are clear.
    pub(crate) fn resize(&self, size: u64) {
        let _order = self.lock();
        self.replace_bits(size);
    }

    /// Clears all bits.
    pub(crate) fn clear(&self) {
        let _order = self.lock();
        let size = self.bits.load().size;
        let clear = Bits::new(size, self.granularity_bits);
        self.bits.store(Arc::new(clear));
        self.changed.store(true, Ordering::Release);
    }

    /// Sets every bit that covers a dirty part of `other`.
    pub(crate) fn merge(&self, other: &Self) {
        self.changed.store(true, Ordering::Release);
        let (size, shift) = (self.size(), other.granularity_bits);
        for run in other.bits.load().runs() {
            let (start, end) = (run.start << shift, (run.end << shift).min(size));
            self.set(start, end.saturating_sub(start));
        }
    }

    /// Whether the byte at `offset` is dirty, and for how many of the `len` bytes from there the same is true; at least 1.
    pub fn extent(&self, offset: u64, len: u64) -> (bool, u64) {
        let end = offset.saturating_add(len);
        let shift = self.granularity_bits;
        let bits = self.bits.load();
        let last = (end.saturating_sub(1) >> shift) + 1;
        let (is_dirty, bit) = bits.run_at(offset >> shift, last);
        let stop = bit.saturating_mul(1 << shift).min(end);
        (is_dirty, (stop - offset).max(1))
    }

    /// Keeps users from changing it, or no longer.
    pub fn set_busy(&self, busy: bool) {
        if busy {
            self.state
                .fetch_or(BitmapState::BUSY.bits(), Ordering::AcqRel);
        } else {
            self.state
                .fetch_and(!BitmapState::BUSY.bits(), Ordering::AcqRel);
        }
    }

    /// Dirty bytes, in whole granules.
    pub fn dirty_bytes(&self) -> u64 {
        self.bits.load().count() << self.granularity_bits
    }

    /// SHA-256 of the bits, in hexadecimal.
    pub fn sha256(&self) -> String {
        let bits = self.bits.load();
        let mut left = usize::try_from(bits.len.div_ceil(64).max(1) * 8).unwrap_or(usize::MAX);
        let mut hash = Sha256::new();
        let mut index = 0;
        while left > 0 {
            let piece = self.piece(index);
            hash.update(&piece[..left.min(PIECE_BYTES)]);
            left = left.saturating_sub(PIECE_BYTES);
            index += 1;
        }
        hash.finish()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    /// How `query-named-block-nodes` describes it.
    pub(crate) fn info(&self) -> BlockDirtyInfo {
        let state = self.state();
        BlockDirtyInfo {
            name: Some(self.name.clone()),
            count: i64::try_from(self.dirty_bytes()).unwrap_or(i64::MAX),
            granularity: 1 << self.granularity_bits,
            recording: state.contains(BitmapState::ENABLED),
            busy: state.contains(BitmapState::BUSY),
            persistent: state.contains(BitmapState::PERSISTENT),
            inconsistent: state.contains(BitmapState::INCONSISTENT).then_some(true),
        }
    }

    /// Bytes of all bits as they are stored: bit by bit from the lowest bit of the first byte on.
    pub(crate) fn stored_bytes(&self) -> u64 {
        self.bits.load().len.div_ceil(8)
    }

    /// Pieces of [`STORED_PIECE`] bytes that the stored bits consist of.
    #[cfg(test)]
    pub(crate) fn pieces(&self) -> usize {
        self.bits.load().pieces()
    }

    /// A piece of the bits as it is stored; zeroes past the end.
    pub(crate) fn piece(&self, index: usize) -> Vec<u8> {
        match self.bits.load().words(index) {
            Some(words) => words.iter().flat_map(|word| word.to_le_bytes()).collect(),
            None => vec![0; PIECE_BYTES],
        }
    }

    /// Whether a piece has no bit set.
    pub(crate) fn is_piece_clear(&self, index: usize) -> bool {
        let words = self.bits.load().words(index);
        words.is_none_or(|words| words.iter().all(|&word| word == 0))
    }

    /// Takes stored bits, from a multiple of [`STORED_PIECE`] bytes on.
    pub(crate) fn load(&self, first_piece: usize, bytes: &[u8]) {
        let _order = self.lock();
        let bits = self.bits.load();
        for (index, piece) in bytes.chunks(PIECE_BYTES).enumerate() {
            bits.load_piece(first_piece + index, piece);
        }
    }

    /// Sets all bits that are stored in these bytes, both ends multiples of [`STORED_PIECE`] or the end of the bits.
    pub(crate) fn load_ones(&self, pieces: Range<usize>) {
        let _order = self.lock();
        let bits = self.bits.load();
        for index in pieces.start..pieces.end.min(bits.pieces()) {
            bits.fill_piece(index);
        }
    }

    /// Sets the bits of these stored bytes, which are less than a piece or not aligned to one.
    pub(crate) fn load_some(&self, first_byte: u64, bytes: &[u8]) {
        let len = self.bits.load().len;
        for (at, byte) in (first_byte..).zip(bytes) {
            for bit in 0..8 {
                let number = at * 8 + bit;
                if byte >> bit & 1 == 1 && number < len {
                    self.set_bits(number..number + 1);
                }
            }
        }
    }
}

/// What a bitmap is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// Its bits are changed.
    Change,
    /// Its bits are read, or it is switched on or off.
    Read,
    /// It is removed.
    Remove,
}

/// Checks whether a bitmap can be used.
///
/// # Errors
/// Why it cannot, in the reference's words.
pub(crate) fn check(bitmap: &DirtyBitmap, wanted: Use) -> Result<(), Error> {
    let (name, state) = (bitmap.name(), bitmap.state());
    if state.contains(BitmapState::BUSY) {
        return Err(Error::generic(format!(
            "Bitmap '{name}' is currently in use by another operation and cannot be used"
        )));
    }
    if state.contains(BitmapState::READ_ONLY) && wanted != Use::Read {
        return Err(Error::generic(format!(
            "Bitmap '{name}' is readonly and cannot be modified"
        )));
    }
    if state.contains(BitmapState::INCONSISTENT) && wanted != Use::Remove {
        return Err(Error::generic(format!(
            "Bitmap '{name}' is inconsistent and cannot be used"
        ))
        .with_hint("Try block-dirty-bitmap-remove to delete this bitmap from disk"));
    }
    Ok(())
}

/// Bytes of a piece of stored bits.
pub(crate) const STORED_PIECE: usize = PIECE_BYTES;
const _: () = assert!(PIECE_BITS == PIECE_BYTES as u64 * 8);

/// The bitmaps of a node.
#[derive(Debug, Default)]
pub struct Bitmaps {
    /// Some bitmap records.
    recording: AtomicBool,
    /// The newest first.
    list: ArcSwap<Vec<Arc<DirtyBitmap>>>,
}

impl Bitmaps {
    /// All of them, the newest first.
    pub fn list(&self) -> Arc<Vec<Arc<DirtyBitmap>>> {
        self.list.load_full()
    }

    /// The bitmap of this name.
    pub fn find(&self, name: &str) -> Option<Arc<DirtyBitmap>> {
        let list = self.list.load();
        list.iter().find(|bitmap| bitmap.name() == name).cloned()
    }

    /// Notes a change of a range of bytes.
    #[inline]
    pub(crate) fn mark(&self, offset: u64, len: u64) {
        if self.recording.load(Ordering::Relaxed) {
            self.mark_all(offset, len);
        }
    }

    #[cold]
    fn mark_all(&self, offset: u64, len: u64) {
        for bitmap in self.list.load().iter() {
            if bitmap.is(BitmapState::ENABLED) {
                bitmap.set(offset, len);
            }
        }
    }

    pub(crate) fn add(&self, bitmap: Arc<DirtyBitmap>) {
        let mut list = Vec::clone(&self.list.load());
        list.insert(0, bitmap);
        self.replace(list);
    }

    pub(crate) fn remove(&self, name: &str) {
        let mut list = Vec::clone(&self.list.load());
        list.retain(|bitmap| bitmap.name() != name);
        self.replace(list);
    }

    fn replace(&self, list: Vec<Arc<DirtyBitmap>>) {
        self.list.store(Arc::new(list));
        self.refresh();
    }

    /// Looks anew whether any bitmap records; after a change of their states.
    pub(crate) fn refresh(&self) {
        let list = self.list.load();
        let recording = list.iter().any(|bitmap| bitmap.is(BitmapState::ENABLED));
        self.recording.store(recording, Ordering::Release);
    }

    /// Adapts all of them to another length of the node.
    pub(crate) fn resize(&self, size: u64) {
        for bitmap in self.list.load().iter() {
            // The bits of an inconsistent one are not there.
            if !bitmap.is(BitmapState::INCONSISTENT) && bitmap.size() != size {
                bitmap.resize(size);
            }
        }
    }
}
