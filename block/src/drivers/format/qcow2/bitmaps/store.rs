//! Storing and removing: new places first, then the header, then the old places are given back.

use std::ops::Range;
use std::sync::Arc;

use stord_aio::{Errno, IoBuffer};

use super::directory::{AUTO, Directory, Stored};
use super::{ALL_ONES, as_index};
use crate::bitmap::{BitmapState, DirtyBitmap, STORED_PIECE};
use crate::driver::FILE;
use crate::drivers::format::qcow2::Image;
use crate::drivers::format::qcow2::header::BitmapsExtension;
use crate::drivers::format::qcow2::layout::OFFSET_MASK;
use crate::drivers::format::qcow2::options::FreeReason;
use crate::drivers::format::qcow2::table::space;

/// Clusters that a write to the directory's new state took, to be given back if it fails.
type Taken = Vec<Range<u64>>;

impl Image {
    /// Stores the persistent bitmaps, when the image closes. Without bitmaps, or with unchanged ones, does nothing.
    pub(in super::super) async fn store_bitmaps(&self) -> Result<(), Errno> {
        let all = self.bitmaps.list();
        let is_mine = |bitmap: &&Arc<DirtyBitmap>| {
            let state = bitmap.state();
            state.contains(BitmapState::PERSISTENT)
                && !state.intersects(BitmapState::INCONSISTENT | BitmapState::READ_ONLY)
        };
        // The oldest first, as in the directory.
        let bitmaps: Vec<_> = all.iter().rev().filter(is_mine).cloned().collect();
        let old = self.directory();
        let is_stored = |bitmap: &Arc<DirtyBitmap>| {
            let stored = old.find(bitmap.name());
            stored.is_some_and(|stored| !stored.is_in_use()) && !bitmap.is_changed()
        };
        if !self.writable || bitmaps.iter().all(is_stored) {
            return Ok(());
        }
        self.arm().await?;
        let mut taken = Taken::new();
        let result = self.store_all(&bitmaps, &mut taken).await;
        if result.is_err() {
            self.give_clusters_back(&taken);
        }
        result
    }

    async fn store_all(
        &self,
        bitmaps: &[Arc<DirtyBitmap>],
        taken: &mut Taken,
    ) -> Result<(), Errno> {
        let old = self.directory();
        let mut list = Vec::new();
        for bitmap in bitmaps {
            let flags = if bitmap.is(BitmapState::ENABLED) {
                AUTO
            } else {
                0
            };
            let table = self.store_bits(bitmap, taken).await?;
            let granularity = bitmap.granularity_bits();
            let mut stored = Stored::new(bitmap.name(), granularity, flags, table);
            if let Some(old) = old.find(bitmap.name()) {
                stored.keep_extra(old);
            }
            list.push(stored);
        }
        let is_replaced = |stored: &Stored| {
            let name = stored.name();
            bitmaps.iter().any(|bitmap| bitmap.name() == name)
        };
        let (replaced, kept): (Vec<_>, Vec<_>) = old.list.iter().cloned().partition(is_replaced);
        list.extend(kept);
        self.switch_directory(list, &replaced, taken).await?;
        for bitmap in bitmaps {
            bitmap.note_stored();
        }
        Ok(())
    }

    /// Removes a bitmap from the image, if it is stored there.
    pub(super) async fn remove_bitmap(&self, name: &str) -> Result<(), Errno> {
        if self.directory.load().find(name).is_none() {
            return Ok(());
        }
        self.arm().await?;
        let is_removed = |stored: &Stored| stored.name() == name;
        let old = self.directory();
        let (removed, kept): (Vec<_>, Vec<_>) = old.list.into_iter().partition(is_removed);
        let mut taken = Taken::new();
        let result = self.switch_directory(kept, &removed, &mut taken).await;
        if result.is_err() {
            self.give_clusters_back(&taken);
        }
        result
    }

    /// Writes a directory with these bitmaps, has the header name it, and gives back the space of the one before and of the bitmaps
    /// that are no longer in it. After a failure, the header on disk may name the new one.
    async fn switch_directory(
        &self,
        list: Vec<Stored>,
        gone: &[Stored],
        taken: &mut Taken,
    ) -> Result<(), Errno> {
        let old = self.directory();
        let mut new = Directory { offset: 0, list };
        let bytes = new.encode();
        let mut extension = None;
        if !new.list.is_empty() {
            new.offset = self.put_bytes(bytes.clone(), taken).await?;
            extension = Some(BitmapsExtension {
                count: u32::try_from(new.list.len()).map_err(|_| Errno::EFBIG)?,
                directory_offset: new.offset,
                directory_size: bytes.len() as u64,
            });
        }
        self.write_out().await?;
        if let Err(errno) = self.name_bitmaps(extension).await {
            // Nobody knows what is on disk, so nothing is given back, and neither directory counts.
            taken.clear();
            let _ = self.void_bitmaps().await;
            return Err(errno);
        }
        self.directory.store(Arc::new(new));
        let discards = self.options.passes(FreeReason::Other);
        for stored in gone {
            self.free_bitmap(stored).await?;
        }
        if !old.list.is_empty() {
            let len = old.encode().len() as u64;
            self.lower_structure(old.offset, len, discards).await?;
        }
        self.refresh_places().await
    }

    async fn free_bitmap(&self, stored: &Stored) -> Result<(), Errno> {
        let discards = self.options.passes(FreeReason::Other);
        for entry in self.bitmap_table(stored).await? {
            if entry & OFFSET_MASK != 0 {
                self.lower_structure(entry & OFFSET_MASK, self.geometry.cluster_size(), discards)
                    .await?;
            }
        }
        self.lower_structure(
            stored.table_offset,
            u64::from(stored.table_size) * 8,
            discards,
        )
        .await
    }

    /// Writes a bitmap's bits and their table; gives the table's place and entries.
    async fn store_bits(
        &self,
        bitmap: &DirtyBitmap,
        taken: &mut Taken,
    ) -> Result<(u64, u32), Errno> {
        let cluster = self.geometry.cluster_size();
        let end = bitmap.stored_bytes();
        let clusters = self.geometry.clusters_for(end).max(1);
        let mut table = Vec::new();
        for number in 0..clusters {
            let start = number * cluster;
            let len = cluster.min(end.saturating_sub(start));
            let content = bytes_of(bitmap, start..start + len);
            let entry = match content {
                None => 0,
                Some(bytes) if len == cluster && bytes.iter().all(|&byte| byte == 0xff) => ALL_ONES,
                Some(bytes) => self.put_bytes(bytes, taken).await?,
            };
            table.extend(entry.to_be_bytes());
        }
        let entries = u32::try_from(clusters).map_err(|_| Errno::EFBIG)?;
        Ok((self.put_bytes(table, taken).await?, entries))
    }

    /// Writes bytes to a new place.
    async fn put_bytes(&self, mut bytes: Vec<u8>, taken: &mut Taken) -> Result<u64, Errno> {
        let bits = self.geometry.cluster_bits;
        let clusters = self.geometry.clusters_for(bytes.len() as u64);
        let run = self
            .with_space(|meta| space(meta)?.allocate_exactly(clusters))
            .await?;
        taken.push(run.cluster..run.cluster + run.count);
        let len = usize::try_from(clusters << bits).map_err(|_| Errno::ENOMEM)?;
        bytes.resize(len, 0);
        let offset = run.cluster << bits;
        self.children
            .write(FILE, offset, IoBuffer::copy_of(&bytes).into(), false)
            .await?;
        Ok(offset)
    }

    fn give_clusters_back(&self, taken: &Taken) {
        let stamp = self.pins.stamp();
        let mut meta = self.meta();
        for run in taken {
            meta.frees
                .push_unlinked(run.start, run.end - run.start, stamp);
        }
    }
}

/// The stored bytes of a range; `None` if all are zero.
fn bytes_of(bitmap: &DirtyBitmap, range: Range<u64>) -> Option<Vec<u8>> {
    let piece = STORED_PIECE as u64;
    let pieces = as_index(range.start / piece..range.end.div_ceil(piece));
    if pieces.clone().all(|index| bitmap.is_piece_clear(index)) {
        return None;
    }
    let first = range.start / piece * piece;
    let all: Vec<u8> = pieces.flat_map(|index| bitmap.piece(index)).collect();
    let part = as_index(range.start - first..range.end - first);
    let bytes = all.get(part)?.to_vec();
    bytes.iter().any(|&byte| byte != 0).then_some(bytes)
}
