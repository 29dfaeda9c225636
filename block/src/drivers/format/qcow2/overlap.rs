//! Where metadata lies, so that no data is ever written over it.
//!
//! Tables and blocks of one cluster are in a set by cluster; structures of several clusters are ranges. A slice of an L2 table is
//! compared with the set once, before the first overwrite through it, and again only after metadata has come to lie elsewhere.

use stord_aio::Errno;

use super::Image;
use super::layout::{Geometry, OFFSET_MASK, REFTABLE_OFFSET_MASK};
use super::options::Overlap;

/// A hash set of cluster numbers, made for many lookups that find nothing.
#[derive(Debug, Default)]
struct ClusterSet {
    /// A power of two of places, at most half of them taken; 0 is free.
    places: Vec<u64>,
    len: usize,
}

impl ClusterSet {
    fn start(&self, cluster: u64) -> usize {
        let hash = cluster.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        usize::try_from(hash).unwrap_or(0) & (self.places.len() - 1)
    }

    fn contains(&self, cluster: u64) -> bool {
        if self.places.is_empty() {
            return false;
        }
        let mut at = self.start(cluster);
        loop {
            match self.places[at] {
                0 => return false,
                found if found == cluster => return true,
                _ => at = (at + 1) & (self.places.len() - 1),
            }
        }
    }

    fn insert(&mut self, cluster: u64) {
        if cluster == 0 || self.contains(cluster) {
            return;
        }
        if 2 * (self.len + 1) > self.places.len() {
            let larger = (4 * (self.len + 1)).next_power_of_two().max(64);
            let old = std::mem::replace(&mut self.places, vec![0; larger]);
            self.len = 0;
            old.into_iter()
                .filter(|&cluster| cluster != 0)
                .for_each(|cluster| self.insert(cluster));
        }
        let mut at = self.start(cluster);
        while self.places[at] != 0 {
            at = (at + 1) & (self.places.len() - 1);
        }
        self.places[at] = cluster;
        self.len += 1;
    }
}

/// The places of metadata that writes are checked against.
#[derive(Debug, Default)]
pub(super) struct Places {
    checks: Option<Overlap>,
    active_l2: ClusterSet,
    refcount_blocks: ClusterSet,
    inactive_l2: ClusterSet,
    /// Offset, bytes and kind.
    ranges: Vec<(u64, u64, Overlap)>,
    /// Counts the changes.
    version: u64,
}

impl Places {
    pub(super) fn new(checks: Overlap) -> Self {
        Self {
            checks: Some(checks),
            ..Self::default()
        }
    }

    /// Counts on from these places, which this one replaces.
    fn succeed(&mut self, old: &Self) {
        self.version += old.version + 1;
    }

    /// The number of changes so far; never 0 once there was one.
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    fn checks(&self, kind: Overlap) -> bool {
        self.checks.is_some_and(|checks| checks.contains(kind))
    }

    /// Notes a structure of any length; it replaces an earlier one of a kind that there is once.
    pub(super) fn add_range(&mut self, offset: u64, bytes: u64, kind: Overlap) {
        self.version += 1;
        if kind != Overlap::INACTIVE_L1 {
            self.ranges.retain(|(_, _, other)| *other != kind);
        }
        if self.checks(kind) && bytes > 0 {
            self.ranges.push((offset, bytes, kind));
        }
    }

    /// Notes an L2 table or a refcount block in this cluster.
    pub(super) fn add_cluster(&mut self, cluster: u64, kind: Overlap) {
        if self.checks(kind) {
            self.version += 1;
            match kind {
                Overlap::ACTIVE_L2 => self.active_l2.insert(cluster),
                Overlap::INACTIVE_L2 => self.inactive_l2.insert(cluster),
                _ => self.refcount_blocks.insert(cluster),
            }
        }
    }

    /// What a write of this cluster would hit, as the reference calls it.
    pub(super) fn hit(&self, cluster: u64, geometry: &Geometry) -> Option<&'static str> {
        let (start, end) = (
            cluster << geometry.cluster_bits,
            (cluster + 1) << geometry.cluster_bits,
        );
        if self.checks(Overlap::MAIN_HEADER) && cluster == 0 {
            return Some("qcow2_header");
        }
        let hits = |(offset, bytes, _): &&(u64, u64, Overlap)| {
            *offset < end && start < offset.saturating_add(*bytes)
        };
        if let Some((_, _, kind)) = self.ranges.iter().find(hits) {
            return Some(match *kind {
                Overlap::ACTIVE_L1 => "active L1 table",
                Overlap::REFCOUNT_TABLE => "refcount table",
                Overlap::SNAPSHOT_TABLE => "snapshot table",
                Overlap::BITMAP_DIRECTORY => "bitmap directory",
                _ => "inactive L1 table",
            });
        }
        if self.active_l2.contains(cluster) {
            return Some("active L2 table");
        }
        if self.refcount_blocks.contains(cluster) {
            return Some("refcount block");
        }
        self.inactive_l2
            .contains(cluster)
            .then_some("inactive L2 table")
    }
}

impl Image {
    /// Finds out anew where metadata lies, after much of it has moved. Space that it has left is free for data again.
    pub(super) async fn refresh_places(&self) -> Result<(), Errno> {
        let inactive_l2 = self.inactive_l2().await?;
        let mut meta = self.meta();
        if let Some(space) = &mut meta.space {
            let mut places = self.collect_places(space.refcounts.table(), &inactive_l2);
            places.succeed(&space.places);
            space.places = places;
        }
        self.note_places(&meta);
        Ok(())
    }

    /// Collects where metadata lies now. Entries of inactive L1 tables are given by the caller, who read them.
    pub(super) fn collect_places(&self, reftable: &[u64], inactive_l2: &[u64]) -> Places {
        let header = self.header();
        let bits = self.geometry.cluster_bits;
        let mut places = Places::new(self.options.overlap);
        let l1 = self.l1.load();
        let snapshots = self.snapshots.load();
        places.add_range(
            header.raw.l1_table_offset.get(),
            l1.len() as u64 * 8,
            Overlap::ACTIVE_L1,
        );
        let reftable_bytes = u64::from(header.raw.refcount_table_clusters.get()) << bits;
        places.add_range(
            header.raw.refcount_table_offset.get(),
            reftable_bytes,
            Overlap::REFCOUNT_TABLE,
        );
        places.add_range(
            header.raw.snapshots_offset.get(),
            snapshots.table_bytes,
            Overlap::SNAPSHOT_TABLE,
        );
        if let Some(bitmaps) = header.bitmaps {
            places.add_range(
                bitmaps.directory_offset,
                bitmaps.directory_size,
                Overlap::BITMAP_DIRECTORY,
            );
        }
        for snapshot in &snapshots.list {
            places.add_range(
                snapshot.l1_offset,
                u64::from(snapshot.l1_size) * 8,
                Overlap::INACTIVE_L1,
            );
        }
        for entry in l1.entries() {
            places.add_cluster((entry & OFFSET_MASK) >> bits, Overlap::ACTIVE_L2);
        }
        for entry in reftable {
            places.add_cluster(
                (entry & REFTABLE_OFFSET_MASK) >> bits,
                Overlap::REFCOUNT_BLOCK,
            );
        }
        for entry in inactive_l2 {
            places.add_cluster((entry & OFFSET_MASK) >> bits, Overlap::INACTIVE_L2);
        }
        places
    }
}
