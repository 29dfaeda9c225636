//! L2 tables of the active image: made where there is none, copied where a snapshot shares them.

use std::sync::atomic::Ordering;

use stord_aio::{Errno, IoBuffer};

use super::Image;
use super::alloc::{AllocError, Run, Space};
use super::l1::L2Table;
use super::layout::{COPIED, OFFSET_MASK};
use super::meta::Meta;
use super::options::{FreeReason, Overlap};
use super::refcount::Missing;
use crate::driver::FILE;

impl Image {
    /// Sees to it that the L1 entry names an L2 table that only the active image uses.
    pub(super) async fn make_table_writable(&self, l1_index: usize) -> Result<(), Errno> {
        loop {
            match self.l1.load().table(l1_index) {
                Some(L2Table { copied: true, .. }) => return Ok(()),
                Some(L2Table { offset, .. }) => self.copy_table(l1_index, offset).await?,
                None => self.make_table(l1_index).await?,
            }
        }
    }

    /// Runs `f` on the metadata until it needs nothing more to be loaded.
    pub(super) async fn with_space<T>(
        &self,
        mut f: impl FnMut(&mut Meta) -> Result<T, AllocError>,
    ) -> Result<T, Errno> {
        loop {
            let result = {
                let mut meta = self.meta();
                let result = f(&mut meta);
                self.note_places(&meta);
                result
            };
            match result {
                Ok(value) => return Ok(value),
                Err(error) => self.provide(error).await?,
            }
        }
    }

    /// Does what an allocation waits for, or says why it cannot be.
    pub(super) async fn provide(&self, error: AllocError) -> Result<(), Errno> {
        match error {
            AllocError::Missing(missing) => self.provide_refcounts(missing).await,
            AllocError::WriteBack => self.write_back().await,
            AllocError::NoSpace => Err(Errno::ENOSPC),
            AllocError::NotSupported => Err(Errno::ENOTSUP),
            AllocError::Overlap { kind, cluster } => {
                let message =
                    format!("Preventing invalid write on metadata (overlaps with {kind})");
                let bits = self.geometry.cluster_bits;
                let place = cluster << bits..(cluster + 1) << bits;
                Err(self.corruption_at(true, &message, Some(place)).await)
            }
        }
    }

    /// Loads refcounts, or says why they cannot be.
    pub(super) async fn provide_refcounts(&self, missing: Missing) -> Result<(), Errno> {
        match missing {
            Missing::Slice(slice) => self.load_refcounts(slice).await,
            Missing::BadBlock { index, offset } => {
                let message =
                    format!("Refblock offset {offset:#x} unaligned (reftable index: {index:#x})");
                Err(self.corruption(true, &message).await)
            }
        }
    }

    async fn load_refcounts(&self, slice: u64) -> Result<(), Errno> {
        loop {
            let Some(_flight) = self.loading_refcounts.begin(slice).await else {
                continue;
            };
            let (offset, len) = {
                let mut meta = self.meta();
                let Some(space) = meta
                    .space
                    .as_mut()
                    .filter(|space| !space.refcounts.holds(slice))
                else {
                    return Ok(());
                };
                match space.refcounts.slice_offset(slice) {
                    Ok(Some(offset)) => (offset, space.refcounts.slice_bytes()),
                    _ => return Ok(()),
                }
            };
            let buffer = IoBuffer::zeroed(len);
            self.children
                .read(FILE, offset, buffer.clone().into())
                .await?;
            if let Some(space) = &mut self.meta().space {
                space.refcounts.insert(slice, buffer.to_vec());
            }
            return Ok(());
        }
    }

    async fn make_table(&self, l1_index: usize) -> Result<(), Errno> {
        self.with_space(|meta| {
            if self.l1.load().table(l1_index).is_some() {
                return Ok(());
            }
            let run = space(meta)?.allocate(1)?;
            self.link_table(meta, l1_index, run);
            meta.l2.new_tables.insert(l1_index, run.fresh);
            Ok(())
        })
        .await
    }

    /// Names a table in the L1 table in memory.
    fn link_table(&self, meta: &mut Meta, l1_index: usize, run: Run) {
        self.l1.load().set(
            l1_index,
            (run.cluster << self.geometry.cluster_bits) | COPIED,
        );
        meta.l2.l1.insert(l1_index);
        if let Some(space) = &mut meta.space {
            space.places.add_cluster(run.cluster, Overlap::ACTIVE_L2);
        }
    }

    /// Lets overwrites notice that metadata has come to lie elsewhere.
    pub(super) fn note_places(&self, meta: &Meta) {
        if let Some(space) = &meta.space {
            self.metadata_places
                .store(space.places.version(), Ordering::Release);
        }
    }

    /// Copies an L2 table that a snapshot refers to, too. It has not been changed in memory, so the file has it as it is.
    async fn copy_table(&self, l1_index: usize, old: u64) -> Result<(), Errno> {
        let Some(_flight) = self.copying.begin(l1_index as u64).await else {
            return Ok(());
        };
        if self.l1.load().table(l1_index)
            != Some(L2Table {
                offset: old,
                copied: false,
            })
        {
            return Ok(());
        }
        if self.geometry.in_cluster(old) != 0 {
            let message = format!("L2 table offset {old:#x} unaligned (L1 index: {l1_index:#x})");
            return Err(self.corruption(true, &message).await);
        }
        let len = usize::try_from(self.geometry.cluster_size()).map_err(|_| Errno::ENOMEM)?;
        let content = IoBuffer::zeroed(len);
        self.children
            .read(FILE, old, content.clone().into())
            .await?;
        let run = self.with_space(|meta| space(meta)?.allocate(1)).await?;
        let new = run.cluster << self.geometry.cluster_bits;
        let written = self.children.write(FILE, new, content.into(), false).await;
        let mut meta = self.meta();
        if let Err(errno) = written {
            meta.frees.push_unlinked(run.cluster, 1, self.pins.stamp());
            return Err(errno);
        }
        self.link_table(&mut meta, l1_index, run);
        self.note_places(&meta);
        let old = (old & OFFSET_MASK) >> self.geometry.cluster_bits;
        let stamp = self.pins.stamp();
        meta.frees.push(old, 1, Some(FreeReason::Other), stamp);
        Ok(())
    }
}

/// The space, which is known before anything is allocated.
pub(super) fn space(meta: &mut Meta) -> Result<&mut Space, AllocError> {
    meta.space.as_mut().ok_or(AllocError::NoSpace)
}
