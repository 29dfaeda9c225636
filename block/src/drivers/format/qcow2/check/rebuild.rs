//! A new refcount structure, made from the references alone.
//!
//! It is written into clusters that nothing refers to, not even the old structure, and comes into force with one write of the header.
//! Until then the image is what it was.

use std::collections::BTreeMap;
use std::ops::Range;

use super::counters::Counters;
use super::file::ImageFile;
use super::report::CheckError;
use super::survey::Survey;
use crate::drivers::format::qcow2::header::Header;
use crate::drivers::format::qcow2::layout::{MAX_REFTABLE_BYTES, REFTABLE_OFFSET_MASK};
use crate::drivers::format::qcow2::refcount::pack;

/// Free clusters, in ascending order.
pub(super) struct Space {
    /// Clusters that are still in use although no reference is counted.
    held: Counters,
    /// No cluster before this one is free.
    cursor: u64,
}

impl Space {
    pub(super) fn new() -> Self {
        Self {
            held: Counters::default(),
            cursor: 1,
        }
    }

    fn is_free(&self, survey: &Survey, cluster: u64) -> bool {
        survey.is_free(cluster) && self.held.get(cluster) == 0
    }

    /// Takes `count` free clusters in a row, past the file's end if need be. References to clusters that come to lie within the file
    /// by that are counted from now on.
    pub(super) fn take(&mut self, survey: &mut Survey, count: u64) -> Range<u64> {
        while !self.is_free(survey, self.cursor) {
            self.cursor += 1;
        }
        let mut start = self.cursor;
        while let Some(used) = (start..start + count).find(|&c| !self.is_free(survey, c)) {
            start = used + 1;
        }
        let taken = start..start + count;
        survey.include(taken.end);
        survey.references.add(taken.clone(), 1, 1);
        taken
    }
}

/// A structure in the making.
struct Plan {
    space: Space,
    /// The cluster of each block.
    blocks: BTreeMap<u64, u64>,
    table: Range<u64>,
}

/// Makes the structure and puts it into force, in the header in memory too.
pub(super) async fn rebuild(
    file: &ImageFile,
    header: &mut Header,
    survey: &mut Survey,
    reftable: &[u64],
) -> Result<(), CheckError> {
    let mut plan = Plan {
        space: Space::new(),
        blocks: BTreeMap::new(),
        table: 0..0,
    };
    plan.let_go_of_old(header, survey, reftable);
    plan.place(survey)?;
    plan.write(file, survey).await?;
    file.flush().await.map_err(CheckError::Flush)?;
    let bits = survey.geometry.cluster_bits;
    let clusters = plan.table.end - plan.table.start;
    header.raw.refcount_table_offset = (plan.table.start << bits).into();
    header.raw.refcount_table_clusters = u32::try_from(clusters)
        .map_err(|_| CheckError::TableTooLarge)?
        .into();
    file.write_header(header).await
}

impl Plan {
    /// Counts the old structure no more. Where it shares a cluster it stays counted: the cluster is in use anyway.
    fn let_go_of_old(&mut self, header: &Header, survey: &mut Survey, reftable: &[u64]) {
        if survey.overflow {
            // A count of one may stand for more.
            return;
        }
        let geometry = survey.geometry;
        let start = header.raw.refcount_table_offset.get() >> geometry.cluster_bits;
        let len = u64::from(header.raw.refcount_table_clusters.get());
        let blocks = reftable
            .iter()
            .filter(|&&entry| geometry.in_cluster(entry) == 0 && entry != 0)
            .map(|entry| (entry & REFTABLE_OFFSET_MASK) >> geometry.cluster_bits);
        for cluster in (start..start + len).chain(blocks) {
            if cluster < survey.clusters && survey.references.get(cluster) == 1 {
                survey.references.subtract(cluster..cluster + 1);
                self.space.held.add(cluster..cluster + 1, 1, 1);
            }
        }
    }

    /// Finds places until everything that is counted has a block, the new structure itself included. Every round adds much less than
    /// the one before.
    fn place(&mut self, survey: &mut Survey) -> Result<(), CheckError> {
        let bits = survey.geometry.refblock_bits();
        loop {
            let mut new = Vec::new();
            let mut from = 0;
            while let Some(cluster) = survey.references.first(from..u64::MAX) {
                let block = cluster >> bits;
                if !self.blocks.contains_key(&block) {
                    new.push(block);
                }
                from = (block + 1) << bits;
            }
            for &block in &new {
                let cluster = self.space.take(survey, 1).start;
                self.blocks.insert(block, cluster);
            }
            let entries = self.blocks.keys().last().map_or(0, |last| last + 1);
            if entries > MAX_REFTABLE_BYTES / 8 {
                return Err(CheckError::TableTooLarge);
            }
            let clusters = survey.geometry.clusters_for(entries * 8);
            if clusters > self.table.end - self.table.start {
                survey.references.subtract(self.table.clone());
                self.table = self.space.take(survey, clusters);
            } else if new.is_empty() {
                return Ok(());
            }
        }
    }

    async fn write(&self, file: &ImageFile, survey: &Survey) -> Result<(), CheckError> {
        let geometry = survey.geometry;
        let cluster = geometry.cluster_size();
        let offset = |number: u64| number << geometry.cluster_bits;
        for (&block, &number) in &self.blocks {
            let bytes = block_content(survey, block);
            let at = offset(number);
            file.write(at, &bytes)
                .await
                .map_err(|errno| CheckError::write("a refcount block", at, errno))?;
        }
        let len = (self.table.end - self.table.start) * cluster;
        let mut table = vec![0; usize::try_from(len).map_err(|_| CheckError::TableTooLarge)?];
        for (&block, &number) in &self.blocks {
            let at = usize::try_from(block * 8).map_err(|_| CheckError::TableTooLarge)?;
            table[at..at + 8].copy_from_slice(&offset(number).to_be_bytes());
        }
        let at = offset(self.table.start);
        file.write(at, &table)
            .await
            .map_err(|errno| CheckError::write("the refcount table", at, errno))
    }
}

fn block_content(survey: &Survey, block: u64) -> Vec<u8> {
    let geometry = survey.geometry;
    let len = usize::try_from(geometry.cluster_size()).expect("at most 2 MiB");
    let mut bytes = vec![0; len];
    let first = block << geometry.refblock_bits();
    let end = first + (1 << geometry.refblock_bits());
    for (cluster, count) in survey.references.iter(first..end) {
        let index = usize::try_from(cluster - first).expect("at most 2^24 entries");
        pack(&mut bytes, index, geometry.refcount_order, count);
    }
    bytes
}
