//! Allocation of clusters, in memory: the first free ones in the file are taken, and their refcounts go up at once.
//!
//! Everything here runs under the metadata lock and never waits. What is missing for an answer is named instead; the caller loads it
//! and asks again.

use super::layout::{Geometry, MAX_HOST_OFFSET, MAX_REFTABLE_BYTES};
use super::options::Overlap;
use super::overlap::Places;
use super::refcount::{Missing, Refcounts};

/// Why clusters could not be allocated now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AllocError {
    /// Refcounts have to be loaded, or cannot be right.
    Missing(Missing),
    /// The file cannot be longer, or its refcount table cannot.
    NoSpace,
    /// A cluster that would be written to is metadata of this kind.
    Overlap { kind: &'static str, cluster: u64 },
    /// Metadata has to be written back first.
    WriteBack,
    /// Not with this entry; data has to be written.
    NotSupported,
}

impl From<Missing> for AllocError {
    fn from(missing: Missing) -> Self {
        Self::Missing(missing)
    }
}

/// Clusters that were allocated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// The number of the first.
    pub(super) cluster: u64,
    pub(super) count: u64,
    /// The file reads as zeroes there: nothing has ever been written to it.
    pub(super) fresh: bool,
}

/// The space in the image file: what is taken, by what, and what is free.
#[derive(Debug)]
pub(super) struct Space {
    geometry: Geometry,
    pub(super) refcounts: Refcounts,
    pub(super) places: Places,
    /// No cluster before this one is free.
    cursor: u64,
    /// From this cluster on nothing has been written to the file.
    fresh_from: u64,
    /// The first unused byte of a cluster that compressed data has begun to fill.
    packing: Option<u64>,
    /// The place that the refcount table had before it moved, in clusters, until the header on disk names the new one.
    pub(super) old_table: Option<(u64, u64)>,
}

impl Space {
    /// The space of a file whose first `used` clusters hold something.
    pub(super) fn new(geometry: Geometry, refcounts: Refcounts, places: Places, used: u64) -> Self {
        Self {
            geometry,
            refcounts,
            places,
            cursor: 0,
            fresh_from: used,
            packing: None,
            old_table: None,
        }
    }

    /// Allocates between one and `want` clusters in a row.
    pub(super) fn allocate(&mut self, want: u64) -> Result<Run, AllocError> {
        loop {
            let cluster = self.first_free(self.cursor)?;
            self.cursor = cluster;
            if !self.ensure_block(cluster)? {
                // The cluster has become a refcount block itself, or the table has moved.
                continue;
            }
            let mut count = self.refcounts.free_run(cluster, want);
            if cluster < self.fresh_from {
                count = count.min(self.fresh_from - cluster);
            }
            let run = self.take(cluster, count.max(1))?;
            self.cursor = cluster + run.count;
            return Ok(run);
        }
    }

    /// Allocates exactly `count` clusters in a row, at the first place where there are so many.
    pub(super) fn allocate_exactly(&mut self, count: u64) -> Result<Run, AllocError> {
        self.allocate_exactly_from(self.cursor, count)
    }

    fn allocate_exactly_from(&mut self, from: u64, count: u64) -> Result<Run, AllocError> {
        let mut start = self.first_free(from)?;
        let mut end = start;
        while end < start + count {
            if self.refcounts.get(end)? != 0 {
                start = self.first_free(end)?;
                end = start;
            } else if self.refcounts.has_block(end)? {
                end += 1;
            } else if self.refcounts.block_of(end) >= self.refcounts.capacity() {
                // May take what was free here: look at it again.
                self.grow_table(self.refcounts.block_of(end))?;
            } else {
                // In front of the run: a block within it would cut it short, and the next one again.
                self.add_block(self.refcounts.block_of(end), start)?;
                start += 1;
                end = end.max(start);
            }
        }
        self.take(start, count)
    }

    /// Allocates `len` bytes, less than a cluster, for compressed data: behind the last such data if there is room. Every cluster that
    /// they touch has one reference more then. Gives the offset in bytes of the file.
    pub(super) fn allocate_bytes(&mut self, len: u64) -> Result<u64, AllocError> {
        if let Some(offset) = self.packing
            && self.append_bytes(offset, len)?
        {
            return Ok(offset);
        }
        let run = self.allocate(1)?;
        let offset = run.cluster << self.geometry.cluster_bits;
        self.packing = Some(offset + len);
        Ok(offset)
    }

    /// Takes the bytes from `offset` on, where compressed data has ended; false if that cannot be.
    fn append_bytes(&mut self, offset: u64, len: u64) -> Result<bool, AllocError> {
        let cluster = offset >> self.geometry.cluster_bits;
        let count = self.refcounts.get(cluster)?;
        if count == 0 || count >= self.geometry.max_refcount() {
            return Ok(false);
        }
        let end = offset + len;
        if (end - 1) >> self.geometry.cluster_bits != cluster {
            let next = cluster + 1;
            let is_free = self.refcounts.get(next)? == 0
                && self.refcounts.has_block(next)?
                && self.places.hit(next, &self.geometry).is_none();
            if !is_free {
                return Ok(false);
            }
            self.take(next, 1)?;
        }
        // Loading may have pushed this count out; the next one stays taken then, and is given back.
        if let Err(missing) = self.refcounts.set(cluster, count + 1) {
            if (end - 1) >> self.geometry.cluster_bits != cluster {
                self.refcounts.set(cluster + 1, 0)?;
            }
            return Err(missing.into());
        }
        self.packing = (self.geometry.in_cluster(end) != 0).then_some(end);
        Ok(true)
    }

    /// Sees to it that no more compressed data is put into this cluster.
    pub(super) fn end_packing(&mut self, cluster: u64) {
        let bits = self.geometry.cluster_bits;
        if self.packing.is_some_and(|offset| offset >> bits == cluster) {
            self.packing = None;
        }
    }

    /// Lowers a cluster's refcount by one; gives the new one. `None` if it is zero already.
    pub(super) fn release(&mut self, cluster: u64) -> Result<Option<u64>, Missing> {
        let count = self.refcounts.get(cluster)?;
        let Some(left) = count.checked_sub(1) else {
            return Ok(None);
        };
        self.refcounts.set(cluster, left)?;
        if left == 0 {
            self.end_packing(cluster);
            self.cursor = self.cursor.min(cluster);
        }
        Ok(Some(left))
    }

    fn first_free(&mut self, from: u64) -> Result<u64, AllocError> {
        let mut at = from;
        loop {
            match self.refcounts.next_free(at)? {
                Ok(cluster) => return Ok(cluster),
                Err(next) => {
                    if self.cursor == at {
                        self.cursor = next;
                    }
                    at = next;
                }
            }
        }
    }

    /// Takes clusters that are free and have refcount blocks.
    fn take(&mut self, cluster: u64, count: u64) -> Result<Run, AllocError> {
        let end = cluster + count;
        if end > MAX_HOST_OFFSET >> self.geometry.cluster_bits {
            return Err(AllocError::NoSpace);
        }
        let hit = |cluster| {
            let kind = self.places.hit(cluster, &self.geometry)?;
            Some(AllocError::Overlap { kind, cluster })
        };
        if let Some(overlap) = (cluster..end).find_map(hit) {
            return Err(overlap);
        }
        for taken in cluster..end {
            if let Err(missing) = self.refcounts.set(taken, 1) {
                // Those that are changed stay in memory, so this cannot fail.
                for taken in cluster..taken {
                    self.refcounts.set(taken, 0)?;
                }
                return Err(missing.into());
            }
        }
        let fresh = cluster >= self.fresh_from;
        self.fresh_from = self.fresh_from.max(end);
        Ok(Run {
            cluster,
            count,
            fresh,
        })
    }

    /// Sees to it that the free cluster has a refcount block; false if that changed what is free.
    fn ensure_block(&mut self, cluster: u64) -> Result<bool, AllocError> {
        if self.refcounts.has_block(cluster)? {
            return Ok(true);
        }
        let block = self.refcounts.block_of(cluster);
        if block >= self.refcounts.capacity() {
            self.grow_table(block)?;
        } else {
            self.add_block(block, cluster)?;
        }
        Ok(false)
    }

    /// Makes the free cluster, whose count is in this block or one that is there, a refcount block.
    fn add_block(&mut self, block: u64, cluster: u64) -> Result<(), AllocError> {
        if let Some(kind) = self.places.hit(cluster, &self.geometry) {
            return Err(AllocError::Overlap { kind, cluster });
        }
        if cluster >= MAX_HOST_OFFSET >> self.geometry.cluster_bits {
            return Err(AllocError::NoSpace);
        }
        let offset = cluster << self.geometry.cluster_bits;
        if self.refcounts.block_of(cluster) == block {
            self.refcounts.add_block(block, offset);
            self.take(cluster, 1)?;
        } else {
            // Its count may have to be loaded first.
            self.take(cluster, 1)?;
            self.refcounts.add_block(block, offset);
        }
        self.places.add_cluster(cluster, Overlap::REFCOUNT_BLOCK);
        Ok(())
    }

    /// Moves the refcount table to a place where it can name `block` and more.
    fn grow_table(&mut self, block: u64) -> Result<(), AllocError> {
        if self.old_table.is_some() {
            return Err(AllocError::WriteBack);
        }
        let old = (
            self.refcounts.table_offset >> self.geometry.cluster_bits,
            self.refcounts.table_clusters,
        );
        let old_capacity = self.refcounts.capacity();
        let most = MAX_REFTABLE_BYTES / 8;
        if block >= most {
            return Err(AllocError::NoSpace);
        }
        let blocks = (block + block / 2 + 16).min(most);
        self.refcounts.table_clusters = self.geometry.clusters_for(blocks * 8);
        // Beyond what the old table could name, everything is free and nothing has to be loaded.
        match self.allocate_exactly_from(
            old_capacity << self.geometry.refblock_bits(),
            self.refcounts.table_clusters,
        ) {
            Ok(run) => {
                self.refcounts
                    .move_table(run.cluster << self.geometry.cluster_bits);
                let bytes = run.count << self.geometry.cluster_bits;
                self.places
                    .add_range(self.refcounts.table_offset, bytes, Overlap::REFCOUNT_TABLE);
                self.old_table = Some(old);
                Ok(())
            }
            Err(error) => {
                self.refcounts.table_clusters = old.1;
                self.refcounts.forget_blocks_from(old_capacity);
                Err(error)
            }
        }
    }
}
