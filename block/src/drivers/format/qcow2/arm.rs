//! What has to be done once before the first change of an image: the header on disk gives up what will no longer hold (features that
//! this driver does not maintain, and with lazy refcounts the promise that refcounts are right), and the refcount table is read.

use std::sync::atomic::Ordering;

use stord_aio::{Errno, IoBuffer};

use super::Image;
use super::alloc::Space;
use super::layout::{Incompatible, OFFSET_MASK};
use super::options::Overlap;
use super::refcount::Refcounts;
use crate::driver::FILE;

impl Image {
    /// Makes the image ready for changes, the first time this is called.
    pub(super) async fn arm(&self) -> Result<(), Errno> {
        if self.unusable.load(Ordering::Acquire) {
            return Err(Errno::ENOMEDIUM);
        }
        if self.armed.load(Ordering::Acquire) {
            return Ok(());
        }
        if !self.writable {
            return Err(Errno::EPERM);
        }
        let _order = self.writing_back.lock().await;
        if self.armed.load(Ordering::Acquire) {
            return Ok(());
        }
        self.prepare_space().await?;
        self.prepare_header().await?;
        self.mark_bitmaps_in_use().await?;
        self.armed.store(true, Ordering::Release);
        Ok(())
    }

    /// Reads the refcount table, unless that has been done.
    pub(super) async fn prepare_space(&self) -> Result<(), Errno> {
        if self.meta().space.is_some() {
            return Ok(());
        }
        let (offset, clusters) = {
            let header = self.header();
            (
                header.raw.refcount_table_offset.get(),
                u64::from(header.raw.refcount_table_clusters.get()),
            )
        };
        let table = self
            .read_table(offset, clusters << (self.geometry.cluster_bits - 3))
            .await?;
        let inactive_l2 = self.inactive_l2().await?;
        let places = self.collect_places(&table, &inactive_l2);
        let mut refcounts =
            Refcounts::new(self.geometry, self.options.refcount_cache, offset, clusters);
        refcounts.set_table(table);
        let used = self.geometry.clusters_for(self.children.size(FILE));
        self.meta().space = Some(Space::new(self.geometry, refcounts, places, used));
        Ok(())
    }

    async fn prepare_header(&self) -> Result<(), Errno> {
        let (keep, clears) = {
            let header = self.header();
            let keep = header.autoclear_to_keep();
            (keep, header.raw.autoclear.get() != keep)
        };
        let lazy = self.options.lazy_refcounts;
        if !clears && !lazy {
            return Ok(());
        }
        self.change_header(|header| {
            header.raw.autoclear = keep.into();
            if lazy {
                header.set_incompatible(Incompatible::DIRTY, true);
            }
        })
        .await
    }

    /// Reads a table of 64-bit entries up to the last that is not zero.
    pub(super) async fn read_table(&self, offset: u64, entries: u64) -> Result<Vec<u64>, Errno> {
        const STEP: u64 = 64 << 10;
        let in_file = self.children.size(FILE).saturating_sub(offset);
        let bytes = in_file.min(entries * 8);
        let mut table = Vec::new();
        let mut zeroes = 0;
        let mut at = 0;
        while at < bytes {
            let step = usize::try_from(STEP.min((bytes - at).next_multiple_of(8)))
                .map_err(|_| Errno::ENOMEM)?;
            let buffer = IoBuffer::zeroed(step);
            self.children
                .read(FILE, offset + at, buffer.clone().into())
                .await?;
            if buffer.is_zero() {
                zeroes += step / 8;
            } else {
                table.resize(table.len() + zeroes, 0);
                zeroes = 0;
                let words = buffer.to_vec();
                table.extend(
                    words
                        .chunks_exact(8)
                        .map(|word| word.try_into().map_or(0, u64::from_be_bytes)),
                );
            }
            at += step as u64;
        }
        table.truncate(usize::try_from(entries).unwrap_or(usize::MAX));
        let used = table
            .iter()
            .rposition(|&entry| entry != 0)
            .map_or(0, |last| last + 1);
        table.truncate(used);
        Ok(table)
    }

    /// The L2 tables of snapshots, if writes are to be checked against them.
    pub(super) async fn inactive_l2(&self) -> Result<Vec<u64>, Errno> {
        let mut tables = Vec::new();
        if self.options.overlap.contains(Overlap::INACTIVE_L2) {
            for snapshot in &self.snapshots.load_full().list {
                let l1 = self
                    .read_table(snapshot.l1_offset, u64::from(snapshot.l1_size))
                    .await?;
                tables.extend(
                    l1.iter()
                        .map(|entry| entry & OFFSET_MASK)
                        .filter(|&offset| offset != 0),
                );
                tables.sort_unstable();
                tables.dedup();
            }
        }
        Ok(tables)
    }
}
