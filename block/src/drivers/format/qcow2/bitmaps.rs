//! Persistent bitmaps: loaded when the image opens, marked as in use on disk before the first change of the image, and stored when it
//! closes. A bitmap that was in use when the power was cut is inconsistent from then on, as the format has it: it is kept, reported, and
//! good for nothing but removal.
//!
//! Storing writes everything to new places, bits before tables before the directory before the header; only then is the space of what
//! was there before given back. So a cut leaves the old state (bitmaps in use) or the new one, and at worst lost space.
//!
//! What we do not understand (extra data that its maker did not declare harmless) is neither used nor changed.

mod directory;
mod extension;
mod store;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use stord_aio::{Errno, IoBuffer};
use stord_qmp::Error;

use self::directory::{
    AUTO, GRANULARITY_BITS, IN_USE, MAX_BYTES, MAX_NAME, MAX_TABLE, Stored, entry_bytes,
};
use super::header::{BitmapsExtension, read_bytes};
use super::layout::{MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS, OFFSET_MASK};
use super::{Image, Qcow2};
use crate::bitmap::{BitmapState, Bitmaps, DirtyBitmap, STORED_PIECE};
use crate::driver::{BitmapStore, DriverFuture, FILE};

pub(super) use self::directory::Directory;

/// In bitmap table entries: bits that must be zero.
const TABLE_RESERVED: u64 = 0xff00_0000_0000_01fe;
/// In bitmap table entries without an offset: the bits are all ones.
const ALL_ONES: u64 = 1;

impl BitmapStore for Qcow2 {
    fn bitmaps(&self) -> Arc<Bitmaps> {
        Arc::clone(&self.0.bitmaps)
    }

    fn check_new(&self, name: &str, granularity_bits: u32) -> Result<(), Error> {
        self.0.check_new_bitmap(name, granularity_bits)
    }

    fn remove<'a>(&'a self, name: &'a str) -> DriverFuture<'a> {
        Box::pin(async move {
            self.0
                .remove_bitmap(name)
                .await
                .map_err(|errno| Error::os(format!("Failed to remove bitmap '{name}'"), errno))
        })
    }
}

impl Image {
    fn directory(&self) -> Directory {
        Directory::clone(&self.directory.load())
    }

    /// Loads what the header's extension leads to.
    pub(super) async fn load_bitmaps(&self) -> Result<(), Error> {
        let Some(extension) = self.header().bitmaps else {
            return Ok(());
        };
        let directory = self.read_directory(&extension).await?;
        // The newest comes first; the directory has the oldest first.
        for stored in &directory.list {
            if !stored.is_understood() {
                tracing::warn!(
                    "qcow2: bitmap '{}' has extra data that is not known, and is not used",
                    stored.name()
                );
                continue;
            }
            let bitmap = self.load_bitmap(stored).await?;
            self.bitmaps.add(Arc::new(bitmap));
        }
        self.directory.store(Arc::new(directory));
        Ok(())
    }

    async fn read_directory(&self, extension: &BitmapsExtension) -> Result<Directory, Error> {
        // Past the file's end there are zeroes, which are no entry.
        let in_file = self
            .children
            .size(FILE)
            .saturating_sub(extension.directory_offset);
        if extension.directory_size > in_file.saturating_add(self.geometry.cluster_size()) {
            return Err(Error::generic("Broken bitmap directory"));
        }
        let len = usize::try_from(extension.directory_size).unwrap_or(usize::MAX);
        let bytes = read_bytes(
            &self.children,
            extension.directory_offset,
            len,
            "Failed to read bitmap directory",
        )
        .await?;
        Directory::decode(&bytes, extension, &self.geometry, self.size())
    }

    async fn load_bitmap(&self, stored: &Stored) -> Result<DirtyBitmap, Error> {
        let name = stored.name();
        if self.bitmaps.find(&name).is_some() {
            return Err(Error::generic(format!("Bitmap already exists: {name}")));
        }
        let mut state = BitmapState::PERSISTENT;
        if !self.writable {
            state |= BitmapState::READ_ONLY;
        }
        if stored.is_in_use() {
            // Its bits mean nothing, and may be any number.
            state |= BitmapState::INCONSISTENT;
            return Ok(DirtyBitmap::new(name, stored.granularity_bits, 0, state));
        }
        if stored.flags & AUTO != 0 {
            state |= BitmapState::ENABLED;
        }
        let bitmap = DirtyBitmap::new(name, stored.granularity_bits, self.size(), state);
        let table = self.bitmap_table(stored).await.map_err(|errno| {
            let name = stored.name();
            Error::os(
                format!("Could not read bitmap_table table from image for bitmap '{name}'"),
                errno,
            )
        })?;
        self.load_bits(&bitmap, &table).await.map_err(|errno| {
            let name = stored.name();
            Error::os(format!("Could not read bitmap '{name}' from image"), errno)
        })?;
        Ok(bitmap)
    }

    /// The table of a bitmap up to its last entry that is not zero.
    async fn bitmap_table(&self, stored: &Stored) -> Result<Vec<u64>, Errno> {
        let table = self
            .read_table(stored.table_offset, u64::from(stored.table_size))
            .await?;
        let is_right = |entry: &u64| {
            let offset = entry & OFFSET_MASK;
            entry & TABLE_RESERVED == 0
                && (offset == 0 || entry & ALL_ONES == 0)
                && self.geometry.in_cluster(offset) == 0
        };
        if table.iter().all(is_right) {
            Ok(table)
        } else {
            Err(Errno::EINVAL)
        }
    }

    async fn load_bits(&self, bitmap: &DirtyBitmap, table: &[u64]) -> Result<(), Errno> {
        let cluster = self.geometry.cluster_size();
        let end = bitmap.stored_bytes();
        let piece = STORED_PIECE as u64;
        for (number, &entry) in (0u64..).zip(table) {
            let start = number * cluster;
            let len = cluster.min(end.saturating_sub(start));
            if entry == 0 || len == 0 {
                continue;
            }
            let by_pieces = cluster.is_multiple_of(piece);
            if entry & OFFSET_MASK == 0 && by_pieces {
                let pieces = start / piece..(start + len).div_ceil(piece);
                bitmap.load_ones(as_index(pieces));
                continue;
            }
            let len = usize::try_from(len).map_err(|_| Errno::ENOMEM)?;
            let bytes = if entry & OFFSET_MASK == 0 {
                vec![0xff; len]
            } else {
                let buffer = IoBuffer::zeroed(len);
                let read = self
                    .children
                    .read(FILE, entry & OFFSET_MASK, buffer.clone().into());
                read.await?;
                buffer.to_vec()
            };
            if by_pieces {
                bitmap.load(as_index(start / piece..start / piece).start, &bytes);
            } else {
                bitmap.load_some(start, &bytes);
            }
        }
        Ok(())
    }

    /// Says on disk that the bitmaps there are out of date, before the first change of the image makes them so.
    pub(super) async fn mark_bitmaps_in_use(&self) -> Result<(), Errno> {
        let mut directory = self.directory();
        let mut changed = false;
        for stored in &mut directory.list {
            // One that we do not understand and that records nothing stays right.
            if !stored.is_in_use() && (stored.is_understood() || stored.flags & AUTO != 0) {
                stored.flags |= IN_USE;
                changed = true;
            }
        }
        if !changed {
            return Ok(());
        }
        let bytes = IoBuffer::copy_of(&directory.encode());
        self.children
            .write(FILE, directory.offset, bytes.into(), false)
            .await?;
        self.children.flush(FILE).await?;
        self.directory.store(Arc::new(directory));
        Ok(())
    }

    fn check_new_bitmap(&self, name: &str, granularity_bits: u32) -> Result<(), Error> {
        if self.geometry.version < 3 {
            return Err(Error::generic(
                "Cannot store dirty bitmaps in qcow2 v2 files",
            ));
        }
        if name.len() > MAX_NAME {
            return Err(Error::generic(
                "Name length exceeds maximum (1023 characters)",
            ));
        }
        if granularity_bits > *GRANULARITY_BITS.end() {
            return Err(Error::generic(
                "Granularity exceeds maximum (2147483648 bytes)",
            ));
        }
        if granularity_bits < *GRANULARITY_BITS.start() {
            return Err(Error::generic("Granularity is under minimum (512 bytes)"));
        }
        let bytes = (self.size() >> granularity_bits).div_ceil(8);
        let most = MAX_BYTES.min(MAX_TABLE.saturating_mul(self.geometry.cluster_size()));
        if bytes > most {
            return Err(Error::generic(
                "Too much space will be occupied by the bitmap. Use larger granularity",
            ));
        }
        let list = self.bitmaps.list();
        let stored = list
            .iter()
            .filter(|bitmap| bitmap.is(BitmapState::PERSISTENT));
        let (mut count, mut size) = (1u64, entry_bytes(name));
        for bitmap in stored {
            count += 1;
            size += entry_bytes(bitmap.name());
        }
        if count > u64::from(MAX_BITMAPS) {
            return Err(Error::generic(
                "Maximum number of persistent bitmaps is already reached",
            ));
        }
        if size > MAX_BITMAP_DIRECTORY_BYTES {
            return Err(Error::generic("Not enough space in the bitmap directory"));
        }
        Ok(())
    }

    /// Says why bitmaps keep the image at its length.
    pub(super) fn check_bitmaps_resize(&self) -> Result<(), Error> {
        for stored in &self.directory.load().list {
            let name = stored.name();
            let Some(bitmap) = self.bitmaps.find(&name) else {
                return Err(Error::generic(
                    "Cannot resize qcow2 with persistent bitmaps that were not loaded into memory",
                ));
            };
            crate::bitmap::check(&bitmap, crate::bitmap::Use::Change)?;
        }
        Ok(())
    }

    /// Notes that the image on disk is as it is in memory, bitmaps included: before the next change, all has to be announced anew.
    pub(super) fn disarm(&self) {
        self.armed.store(false, Ordering::Release);
    }
}

fn as_index(range: Range<u64>) -> Range<usize> {
    let index = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
    index(range.start)..index(range.end)
}
