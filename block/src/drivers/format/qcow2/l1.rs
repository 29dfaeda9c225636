//! The L1 table in memory: read by every request without a lock, changed under the image's metadata lock.
//!
//! It is kept in pieces that exist only where entries are set, so a header that claims a huge table costs no memory. A table that
//! grows shares its pieces with the shorter one that readers may still hold.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use stord_aio::{Errno, IoBuffer};

use super::layout::{COPIED, OFFSET_MASK};
use crate::driver::FILE;
use crate::graph::Children;

const PIECE: usize = 512;

type Piece = Arc<[AtomicU64]>;

/// The table.
#[derive(Debug)]
pub(super) struct L1 {
    pieces: Box<[OnceLock<Piece>]>,
    len: usize,
}

impl L1 {
    pub(super) fn empty(len: usize) -> Self {
        Self {
            pieces: (0..len.div_ceil(PIECE)).map(|_| OnceLock::new()).collect(),
            len,
        }
    }

    /// Reads `len` entries from `offset` in the image file; past the file's end they are empty.
    pub(super) async fn read(children: &Children, offset: u64, len: usize) -> Result<Self, Errno> {
        const STEP: usize = 64 << 10;
        let table = Self::empty(len);
        let in_file = children.size(FILE).saturating_sub(offset);
        let bytes = usize::try_from(in_file.min(len as u64 * 8)).unwrap_or(len * 8);
        let mut at = 0;
        while at < bytes {
            let step = STEP.min((bytes - at).next_multiple_of(8));
            let buffer = IoBuffer::zeroed(step);
            children
                .read(FILE, offset + at as u64, buffer.clone().into())
                .await?;
            if !buffer.is_zero() {
                let words = buffer.to_vec();
                for (index, word) in (at / 8..len).zip(words.chunks_exact(8)) {
                    let entry = word.try_into().map_or(0, u64::from_be_bytes);
                    if entry != 0 {
                        table.set(index, entry);
                    }
                }
            }
            at += step;
        }
        Ok(table)
    }

    /// A longer table with the same entries. From then on only the new one is changed.
    pub(super) fn grown(&self, len: usize) -> Self {
        let mut table = Self::empty(len.max(self.len));
        for (new, old) in table.pieces.iter_mut().zip(&self.pieces) {
            if let Some(piece) = old.get() {
                *new = OnceLock::from(Arc::clone(piece));
            }
        }
        table
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The entry; 0 past the end.
    pub(super) fn get(&self, index: usize) -> u64 {
        let piece = self.pieces.get(index / PIECE).and_then(OnceLock::get);
        piece.map_or(0, |piece| piece[index % PIECE].load(Ordering::Acquire))
    }

    /// The entries that are not empty.
    pub(super) fn entries(&self) -> impl Iterator<Item = u64> {
        let pieces = self.pieces.iter().filter_map(OnceLock::get);
        let entries =
            pieces.flat_map(|piece| piece.iter().map(|entry| entry.load(Ordering::Acquire)));
        entries.filter(|&entry| entry != 0)
    }

    /// Sets an entry within the table's length.
    pub(super) fn set(&self, index: usize, entry: u64) {
        if let Some(piece) = self.pieces.get(index / PIECE) {
            piece.get_or_init(empty_piece)[index % PIECE].store(entry, Ordering::Release);
        }
    }

    /// Where the L2 table is, and whether only the active L1 table refers to it.
    pub(super) fn table(&self, index: usize) -> Option<L2Table> {
        let entry = self.get(index);
        let offset = entry & OFFSET_MASK;
        (offset != 0).then_some(L2Table {
            offset,
            copied: entry & COPIED != 0,
        })
    }
}

fn empty_piece() -> Piece {
    (0..PIECE).map(|_| AtomicU64::new(0)).collect()
}

/// An L1 entry that names a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct L2Table {
    /// Bytes into the image file.
    pub(super) offset: u64,
    /// Its refcount is exactly one.
    pub(super) copied: bool,
}
