//! Writing metadata back, in the order that keeps the image on disk consistent at every moment:
//!
//! 1. refcounts, new refcount blocks, new L2 tables: nothing on disk refers to the new ones yet, and the refcounts that go down here are
//!    of clusters that nothing on disk refers to any more;
//! 2. a flush, and then entries of the refcount table for the new blocks, or the header if the table has moved;
//! 3. a flush: data, refcounts and new tables are on disk;
//! 4. changes of L2 tables that exist, and L1 entries for the new ones;
//! 5. if something has been given up: a flush, after which nothing on disk refers to it, and its refcounts go down in memory.
//!
//! What goes to the file is copied out at the beginning, so a change made meanwhile waits for the next time: its data may not be
//! covered by the flush of step 3. A flush that has nothing to separate is left out.

use stord_aio::{Errno, IoBuffer, join_all};

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Image;
use super::cache::{Slice, State};
use super::frees::Free;
use super::layout::Incompatible;
use super::meta::Meta;
use super::refcount::{Missing, RefcountBatch};
use crate::driver::{DATA_FILE, FILE, IoFuture};

// Tests reach the limits, too.

/// Slices of L2 tables written back at a time.
const MAX_SLICES: usize = if cfg!(test) { 7 } else { 2048 };
/// With so many changed slices in memory, writers help to write back.
const DIRTY_SLICES: usize = if cfg!(test) { 20 } else { 1024 };
/// With so many runs of clusters waiting to be used again, writers help.
const WAITING_FREES: usize = if cfg!(test) { 50 } else { 4096 };

type Writes = Vec<(u64, Vec<u8>)>;

/// What one round writes.
#[derive(Default)]
struct Batch {
    refcounts: RefcountBatch,
    /// New L2 tables.
    tables: Writes,
    /// Changes of tables that exist, and of the L1 table.
    changes: Writes,
    slices: Vec<Arc<Slice>>,
    new_tables: Vec<usize>,
    l1: BTreeSet<usize>,
    /// The generation of frees that this round completes.
    completes: Option<u64>,
}

impl Image {
    /// Hands all changed metadata to the file.
    pub(super) async fn write_back(&self) -> Result<(), Errno> {
        let _order = self.writing_back.lock().await;
        self.write_back_all(self.options.lazy_refcounts).await
    }

    /// Writes back if too much has gathered.
    pub(super) async fn relieve(&self) -> Result<(), Errno> {
        let too_much = {
            let meta = self.meta();
            meta.l2.dirty.len() > DIRTY_SLICES
                || meta.frees.len() > WAITING_FREES
                || meta
                    .space
                    .as_ref()
                    .is_some_and(|space| space.refcounts.dirty_slices() > DIRTY_SLICES)
        };
        if too_much {
            self.write_back().await
        } else {
            Ok(())
        }
    }

    pub(super) async fn write_back_all(&self, lazy: bool) -> Result<(), Errno> {
        loop {
            let batch = self.take_batch(lazy);
            let result = self.write_batch(&batch).await;
            let more = self.end_batch(&batch, result.is_ok());
            result?;
            if !more {
                return self.release_frees().await;
            }
        }
    }

    /// Copies out what has changed.
    fn take_batch(&self, lazy: bool) -> Batch {
        let mut meta = self.meta();
        let meta = &mut *meta;
        let mut batch = Batch::default();
        if let Some(space) = &mut meta.space {
            let hold_back = lazy
                && space.refcounts.dirty_slices() <= DIRTY_SLICES
                && !space.refcounts.is_table_moved();
            if !hold_back {
                batch.refcounts = space.refcounts.take_dirty();
            }
        }
        let new_tables = std::mem::take(&mut meta.l2.new_tables);
        for (&l1_index, &fresh) in &new_tables {
            self.take_table(l1_index, fresh, &mut batch);
        }
        let mut rest = Vec::new();
        for slice in std::mem::take(&mut meta.l2.dirty) {
            if new_tables.contains_key(&self.l1_index_of(&slice)) {
                // Taken with its table.
            } else if batch.slices.len() >= MAX_SLICES {
                rest.push(slice);
            } else if let Some(offset) = self.offset_of(&slice) {
                batch.changes.push((offset, slice.to_disk()));
                slice.set_state(State::Writing);
                batch.slices.push(slice);
            }
        }
        batch.new_tables = new_tables.keys().copied().collect();
        // Still new for whoever loads a slice meanwhile.
        meta.l2.new_tables = new_tables;
        batch.l1 = std::mem::take(&mut meta.l2.l1);
        self.take_l1(&mut batch);
        if rest.is_empty() {
            batch.completes = Some(meta.frees.generation);
            meta.frees.generation += 1;
        }
        meta.l2.dirty = rest;
        batch
    }

    /// A new table goes out as a whole, or, where the file reads as zeroes, the part of it that is not empty.
    fn take_table(&self, l1_index: usize, fresh: bool, batch: &mut Batch) {
        let Some(table) = self.l1.load().table(l1_index) else {
            return;
        };
        let per_table = 1u64 << (self.geometry.cluster_bits - self.options.slice_bits);
        let first = l1_index as u64 * per_table;
        let slice_bytes = 1usize << self.options.slice_bits;
        let mut whole = Vec::new();
        for number in 0..per_table {
            let slice = self.slices.get(first + number);
            let content = slice
                .as_ref()
                .map_or_else(|| vec![0; slice_bytes], |slice| slice.to_disk());
            if let Some(slice) = slice {
                slice.set_state(State::Writing);
                batch.slices.push(slice);
            } else if fresh && number > 0 {
                continue;
            }
            if fresh {
                batch
                    .tables
                    .push((table.offset + (number << self.options.slice_bits), content));
            } else {
                whole.extend(content);
            }
        }
        if !fresh {
            batch.tables.push((table.offset, whole));
        }
    }

    /// The pieces of the L1 table that hold changed entries. Every table that it names in memory is on disk when they are written.
    fn take_l1(&self, batch: &mut Batch) {
        const ENTRIES: usize = 64;
        let l1 = self.l1.load();
        let start = self.header().raw.l1_table_offset.get();
        let sectors: BTreeSet<usize> = batch.l1.iter().map(|index| index / ENTRIES).collect();
        for sector in sectors {
            let entries = sector * ENTRIES..(sector + 1) * ENTRIES;
            let bytes = entries
                .flat_map(|index| l1.get(index).to_be_bytes())
                .collect();
            batch.changes.push((start + sector as u64 * 512, bytes));
        }
    }

    async fn write_batch(&self, batch: &Batch) -> Result<(), Errno> {
        self.settle_header().await?;
        self.write_all([&batch.refcounts.writes, &batch.tables])
            .await?;
        if batch.refcounts.changes_table() {
            self.flush_file().await?;
            self.write_all([&batch.refcounts.table_writes, &Vec::new()])
                .await?;
            if batch.refcounts.table_moved.is_some() {
                self.write_moved_reftable().await?;
            }
        }
        if !batch.changes.is_empty() {
            if self.geometry.data_file {
                self.children.flush(DATA_FILE).await?;
            }
            self.flush_file().await?;
            self.write_all([&batch.changes, &Vec::new()]).await?;
        }
        Ok(())
    }

    /// Names the refcount table's new place in the header, and gives up the old one.
    async fn write_moved_reftable(&self) -> Result<(), Errno> {
        let place = self
            .meta()
            .space
            .as_ref()
            .map(|space| (space.refcounts.table_offset, space.refcounts.table_clusters));
        if let Some((offset, clusters)) = place {
            let clusters = u32::try_from(clusters).map_err(|_| Errno::EFBIG)?;
            self.change_header(|header| {
                header.raw.refcount_table_offset = offset.into();
                header.raw.refcount_table_clusters = clusters.into();
            })
            .await?;
        }
        let mut meta = self.meta();
        let old = meta.space.as_mut().and_then(|space| space.old_table.take());
        if let Some((cluster, count)) = old {
            // The header that no longer names it is on disk.
            meta.frees.push_unlinked(cluster, count, self.pins.stamp());
        }
        Ok(())
    }

    /// Notes that a batch is written, or takes it back. True if there is more to write.
    fn end_batch(&self, batch: &Batch, ok: bool) -> bool {
        let mut meta = self.meta();
        let meta = &mut *meta;
        if let Some(space) = &mut meta.space {
            space.refcounts.written(&batch.refcounts, ok);
        }
        for slice in &batch.slices {
            match (slice.state(), ok) {
                (State::Writing, true) => slice.set_state(State::Clean),
                (State::Writing, false) => {
                    slice.set_state(State::Dirty);
                    meta.l2.dirty.push(Arc::clone(slice));
                }
                _ => slice.set_state(State::Dirty),
            }
        }
        if !ok {
            meta.l2.l1.extend(&batch.l1);
            return false;
        }
        for l1_index in &batch.new_tables {
            meta.l2.new_tables.remove(l1_index);
        }
        match batch.completes {
            Some(generation) => {
                meta.frees.written = generation;
                false
            }
            None => true,
        }
    }

    /// Flushes the file; afterwards everything written before is on disk.
    pub(super) async fn flush_file(&self) -> Result<(), Errno> {
        let written = self.meta().frees.written;
        self.children.flush(FILE).await?;
        let mut meta = self.meta();
        meta.frees.durable = meta.frees.durable.max(written);
        Ok(())
    }

    async fn write_all(&self, writes: [&Writes; 2]) -> Result<(), Errno> {
        let futures: Vec<IoFuture<'_>> = writes
            .into_iter()
            .flatten()
            .map(|(offset, bytes)| -> IoFuture<'_> {
                Box::pin(
                    self.children
                        .write(FILE, *offset, IoBuffer::copy_of(bytes).into(), false),
                )
            })
            .collect();
        join_all(futures).await.into_iter().collect()
    }

    /// Lets space go that nothing on disk and nobody in flight refers to.
    async fn release_frees(&self) -> Result<(), Errno> {
        let waits = self.meta().frees.wait_for_flush();
        if waits {
            self.flush_file().await?;
        }
        if self.meta().frees.len() == 0 {
            return Ok(());
        }
        let settled = self.pins.settle();
        let ready = self.meta().frees.take_ready(settled);
        let mut left = ready.into_iter();
        while let Some(free) = left.next() {
            if let Err((errno, rest)) = self.release(free).await {
                self.meta()
                    .frees
                    .put_back(std::iter::once(rest).chain(left));
                return Err(errno);
            }
        }
        Ok(())
    }

    /// Lowers the refcounts of a run, and discards in the file what becomes free. On failure gives the part that is left.
    async fn release(&self, mut free: Free) -> Result<(), (Errno, Free)> {
        while free.count > 0 {
            if free
                .discard
                .is_some_and(|reason| self.options.passes(reason))
            {
                self.discard_last_use(&free)
                    .await
                    .map_err(|errno| (errno, free))?;
            }
            let missing = self.lower(&mut free);
            if let Some(missing) = missing {
                self.provide_refcounts(missing)
                    .await
                    .map_err(|errno| (errno, free))?;
            }
        }
        Ok(())
    }

    /// Lowers refcounts as far as they are in memory.
    fn lower(&self, free: &mut Free) -> Option<Missing> {
        let mut meta = self.meta();
        let space = meta.space.as_mut()?;
        while free.count > 0 {
            match space.release(free.cluster) {
                Ok(Some(_)) => {}
                Ok(None) => tracing::warn!(
                    "qcow2: cluster {:#x} is freed more often than it is used",
                    free.cluster
                ),
                Err(missing) => return Some(missing),
            }
            free.cluster += 1;
            free.count -= 1;
        }
        None
    }

    /// Discards the clusters of a run that are about to become free. Nobody can allocate them before.
    async fn discard_last_use(&self, free: &Free) -> Result<(), Errno> {
        let bits = self.geometry.cluster_bits;
        let mut at = free.cluster;
        let end = free.cluster + free.count;
        while at < end {
            let count = match &mut self.meta().space {
                Some(space) => {
                    // Nothing may come to lie there between the look at the count and the discard.
                    space.end_packing(at);
                    space.refcounts.get(at)
                }
                None => return Ok(()),
            };
            match count {
                Ok(count) => {
                    if count == 1 {
                        // A discard is a hint; that it fails changes nothing.
                        let _ = self.children.discard(FILE, at << bits, 1 << bits).await;
                    }
                    at += 1;
                }
                Err(missing) => self.provide_refcounts(missing).await?,
            }
        }
        Ok(())
    }

    fn l1_index_of(&self, slice: &Slice) -> usize {
        let shift = self.geometry.l2_bits() - self.slice_entry_bits();
        usize::try_from(slice.number() >> shift).unwrap_or(usize::MAX)
    }

    fn offset_of(&self, slice: &Slice) -> Option<u64> {
        let table = self.l1.load().table(self.l1_index_of(slice))?;
        Some(table.offset + self.offset_in_table(slice.number()))
    }

    /// Writes everything out and leaves the image clean.
    pub(super) async fn close(&self) -> Result<(), Errno> {
        self.cleaning.end();
        if self.unusable.load(Ordering::Acquire) {
            return Ok(());
        }
        let stored = self.store_bitmaps().await;
        if !self.armed.load(Ordering::Acquire) {
            return stored;
        }
        self.write_out().await?;
        let is_dirty = self.header().incompatible().contains(Incompatible::DIRTY);
        if is_dirty && !self.unsettled.load(Ordering::Acquire) {
            self.change_header(|header| header.set_incompatible(Incompatible::DIRTY, false))
                .await?;
        }
        self.disarm();
        stored
    }

    /// Brings everything to disk, late refcounts included.
    pub(super) async fn write_out(&self) -> Result<(), Errno> {
        let _order = self.writing_back.lock().await;
        loop {
            let before = self.meta().frees.len();
            self.write_back_all(false).await?;
            if self.is_written(before) {
                break;
            }
        }
        self.flush_file().await
    }

    /// Whether everything is on disk; space that is still pinned stays lost, if the last round has changed nothing about it.
    fn is_written(&self, frees_before: usize) -> bool {
        let meta: &Meta = &self.meta();
        let refcounts_clean = meta
            .space
            .as_ref()
            .is_none_or(|space| space.refcounts.is_clean());
        meta.l2.is_clean()
            && refcounts_clean
            && (meta.frees.len() == 0 || meta.frees.len() == frees_before)
    }
}
