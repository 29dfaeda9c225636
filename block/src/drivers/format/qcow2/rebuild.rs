//! Makes refcounts right again in an image whose dirty bit is set, before it is written to.
//!
//! Blocks that exist are written anew in place; blocks that are missing, and a table that is too short, are put behind everything that is
//! referred to. The dirty bit goes last, so that a crash on the way only means to do it again.

use stord_aio::{Errno, IoBuffer};
use stord_qmp::Error;

use super::Image;
use super::header::strerror;
use super::layout::{
    COMPRESSED, COPIED, Geometry, Incompatible, MAX_REFTABLE_BYTES, OFFSET_MASK,
    REFTABLE_OFFSET_MASK,
};
use super::refcount::pack;
use super::references::{CountError, References};
use crate::driver::FILE;

/// The refcount table as it is to be.
struct Table {
    entries: Vec<u64>,
    offset: u64,
    clusters: u64,
    moved: bool,
}

impl Image {
    /// Repairs the refcounts of a dirty image.
    pub(super) async fn repair_dirty(&self) -> Result<(), Error> {
        let failed =
            |reason: String| Error::generic(format!("Could not repair dirty image: {reason}"));
        let mut references = self.count_references().await.map_err(|error| match error {
            CountError::Io(errno) => failed(strerror(errno)),
            CountError::Corrupt(what) => {
                tracing::error!("qcow2: the refcounts cannot be rebuilt: {what}");
                failed(strerror(Errno::EINVAL))
            }
        })?;
        self.rebuild(&mut references)
            .await
            .map_err(|errno| failed(strerror(errno)))
    }

    async fn rebuild(&self, references: &mut References) -> Result<(), Errno> {
        let table = self.plan_table(references).await?;
        self.write_blocks(references, &table).await?;
        self.children.flush(FILE).await?;
        self.write_reftable(&table).await?;
        self.children.flush(FILE).await?;
        if table.moved {
            let clusters = u32::try_from(table.clusters).map_err(|_| Errno::EFBIG)?;
            self.change_header(|header| {
                header.raw.refcount_table_offset = table.offset.into();
                header.raw.refcount_table_clusters = clusters.into();
            })
            .await?;
        }
        self.repair_copied(references).await?;
        self.children.flush(FILE).await?;
        self.change_header(|header| header.set_incompatible(Incompatible::DIRTY, false))
            .await
    }

    /// Finds places for what is missing, and counts these in.
    async fn plan_table(&self, references: &mut References) -> Result<Table, Errno> {
        let geometry = self.geometry;
        let (offset, clusters) = {
            let header = self.header();
            (
                header.raw.refcount_table_offset.get(),
                u64::from(header.raw.refcount_table_clusters.get()),
            )
        };
        let mut entries = self
            .read_table(offset, clusters << (geometry.cluster_bits - 3))
            .await?;
        let file_end = geometry.clusters_for(self.children.size(FILE));
        let mut free = references.end().max(file_end);
        let mut table = Table {
            entries: Vec::new(),
            offset,
            clusters,
            moved: false,
        };
        loop {
            let blocks = blocks_for(references.end(), &geometry);
            if blocks > MAX_REFTABLE_BYTES / 8 {
                return Err(Errno::EFBIG);
            }
            entries.resize(
                entries
                    .len()
                    .max(usize::try_from(blocks).map_err(|_| Errno::EFBIG)?),
                0,
            );
            let mut changed = false;
            for (block, entry) in (0u64..).zip(&mut entries) {
                let range =
                    block << geometry.refblock_bits()..(block + 1) << geometry.refblock_bits();
                if *entry & REFTABLE_OFFSET_MASK == 0
                    && range
                        .into_iter()
                        .any(|cluster| references.get(cluster) != 0)
                {
                    *entry = free << geometry.cluster_bits;
                    references.add(free, 1);
                    free += 1;
                    changed = true;
                }
            }
            if entries.len() as u64 * 8 > table.clusters << geometry.cluster_bits {
                references.remove(table.offset >> geometry.cluster_bits, table.clusters);
                table.clusters =
                    geometry.clusters_for(entries.len() as u64 * 8 + geometry.cluster_size());
                table.offset = free << geometry.cluster_bits;
                table.moved = true;
                references.add(free, table.clusters);
                free += table.clusters;
                changed = true;
            }
            if !changed {
                table.entries = entries;
                return Ok(table);
            }
        }
    }

    async fn write_blocks(&self, references: &References, table: &Table) -> Result<(), Errno> {
        let geometry = &self.geometry;
        let len = usize::try_from(geometry.cluster_size()).map_err(|_| Errno::ENOMEM)?;
        for (block, entry) in (0u64..).zip(&table.entries) {
            let offset = entry & REFTABLE_OFFSET_MASK;
            if offset == 0 {
                continue;
            }
            let mut content = vec![0; len];
            let first = block << geometry.refblock_bits();
            for index in 0..1usize << geometry.refblock_bits() {
                let count = references.get(first + index as u64);
                if count > geometry.max_refcount() {
                    return Err(Errno::ERANGE);
                }
                if count != 0 {
                    pack(&mut content, index, geometry.refcount_order, count);
                }
            }
            self.children
                .write(FILE, offset, IoBuffer::copy_of(&content).into(), false)
                .await?;
        }
        Ok(())
    }

    async fn write_reftable(&self, table: &Table) -> Result<(), Errno> {
        let mut content: Vec<u8> = table
            .entries
            .iter()
            .flat_map(|entry| entry.to_be_bytes())
            .collect();
        let bytes = usize::try_from(table.clusters << self.geometry.cluster_bits)
            .map_err(|_| Errno::ENOMEM)?;
        if table.moved {
            content.resize(bytes, 0);
        } else {
            content.resize(content.len().next_multiple_of(512), 0);
        }
        self.children
            .write(
                FILE,
                table.offset,
                IoBuffer::copy_of(&content).into(),
                false,
            )
            .await
    }

    /// Makes the flags that say "refcount is exactly one" right in the active tables.
    async fn repair_copied(&self, references: &References) -> Result<(), Errno> {
        let bits = self.geometry.cluster_bits;
        let right = |word: u64| {
            let is_single = references.get((word & OFFSET_MASK) >> bits) == 1;
            if is_single {
                word | COPIED
            } else {
                word & !COPIED
            }
        };
        let l1 = self.l1.load();
        let start = self.header().raw.l1_table_offset.get();
        for index in 0..l1.len() {
            let entry = l1.get(index);
            let table = entry & OFFSET_MASK;
            if table == 0 {
                continue;
            }
            if right(entry) != entry {
                l1.set(index, right(entry));
                let bytes = IoBuffer::copy_of(&right(entry).to_be_bytes());
                self.children
                    .write(FILE, start + index as u64 * 8, bytes.into(), false)
                    .await?;
            }
            if self.geometry.data_file {
                continue;
            }
            let words = self
                .read_table(table, self.geometry.cluster_size() / 8)
                .await?;
            for (index, &word) in words
                .iter()
                .enumerate()
                .step_by(self.geometry.entry_words())
            {
                let has_flag = word & COMPRESSED == 0 && word & OFFSET_MASK != 0;
                if has_flag && right(word) != word {
                    let bytes = IoBuffer::copy_of(&right(word).to_be_bytes());
                    self.children
                        .write(FILE, table + index as u64 * 8, bytes.into(), false)
                        .await?;
                }
            }
        }
        Ok(())
    }
}

fn blocks_for(clusters: u64, geometry: &Geometry) -> u64 {
    clusters.div_ceil(1 << geometry.refblock_bits())
}
