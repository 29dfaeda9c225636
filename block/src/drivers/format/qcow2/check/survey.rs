//! Who refers to which cluster of the file: every reference in the image is counted, and every entry looked at is checked by itself.
//!
//! A table that several L1 tables name is read once and counted as often as it is named. So the time does not grow with the number of
//! snapshots that share it, nor can a damaged image make it longer than its own length allows.

use std::collections::{BTreeMap, BTreeSet};

use stord_aio::join_all;

use super::counters::Counters;
use super::file::{ImageFile, numbers};
use super::report::{CheckError, Notes, Report};
use super::snapshots::SnapshotTable;
use super::{bitmaps, tables};
use crate::drivers::format::qcow2::header::Header;
use crate::drivers::format::qcow2::layout::{
    Geometry, MAX_L1_BYTES, OFFSET_MASK, REFTABLE_OFFSET_MASK,
};

/// In L1 entries: bits that must be zero.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// L2 tables read at the same time.
const TABLES_AT_ONCE: usize = 16;
/// Bytes of L2 tables read at the same time, unless a single one is larger.
const BYTES_AT_ONCE: u64 = 1 << 20;

/// How often L1 tables name an L2 table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Uses {
    /// The active L1 table.
    pub(super) active: u64,
    /// All of them.
    pub(super) total: u64,
}

/// What the survey is made of.
#[derive(Clone, Copy)]
pub(super) struct Subject<'a> {
    pub(super) file: &'a ImageFile,
    pub(super) header: &'a Header,
    pub(super) snapshots: &'a SnapshotTable,
    /// The refcount table.
    pub(super) reftable: &'a [u64],
    /// Everything is going to be repaired: entries that only reserve a place, and a wrong one, do not count as references.
    pub(super) repairs_all: bool,
}

/// The references, and what was found on the way.
pub(super) struct Survey {
    pub(super) geometry: Geometry,
    file_size: u64,
    /// Clusters of the file, a last one that is not whole included.
    pub(super) clusters: u64,
    /// References to clusters of the file, as far as a refcount can tell.
    pub(super) references: Counters,
    /// References to clusters past the file's end.
    pub(super) beyond: Counters,
    tables: Counters,
    active_tables: Counters,
    /// L2 tables that do not start where a cluster starts.
    unaligned_tables: BTreeMap<u64, Uses>,
    /// How often an L2 table lies on a cluster.
    table_cover: Counters,
    /// L2 tables with entries to empty.
    pub(super) tables_to_mend: BTreeSet<u64>,
    /// The refcount structure has to be made anew.
    pub(super) rebuild: bool,
    /// Some count stands for more references than it says.
    pub(super) overflow: bool,
    pub(super) report: Report,
    pub(super) notes: Notes,
}

impl Survey {
    /// Reads all metadata but the content of refcount blocks.
    pub(super) async fn make(subject: Subject<'_>) -> Result<Self, CheckError> {
        let geometry = subject.header.geometry;
        let file_size = subject.file.size();
        let mut survey = Self {
            geometry,
            file_size,
            clusters: geometry.clusters_for(file_size),
            references: Counters::default(),
            beyond: Counters::default(),
            tables: Counters::default(),
            active_tables: Counters::default(),
            unaligned_tables: BTreeMap::new(),
            table_cover: Counters::default(),
            tables_to_mend: BTreeSet::new(),
            rebuild: false,
            overflow: false,
            report: Report::default(),
            notes: Notes::default(),
        };
        let size = subject.header.raw.size.get() & !511;
        survey.report.total_clusters = geometry.clusters_for(size);
        survey.refer(0, geometry.cluster_size(), 1, "header");
        survey.count_l1_tables(subject).await?;
        survey.count_l2_tables(subject).await?;
        let raw = &subject.header.raw;
        survey.refer(
            raw.snapshots_offset.get(),
            subject.snapshots.bytes,
            1,
            "snapshot table",
        );
        survey.refer(
            raw.refcount_table_offset.get(),
            u64::from(raw.refcount_table_clusters.get()) << geometry.cluster_bits,
            1,
            "refcount table",
        );
        bitmaps::count(&mut survey, subject.file, subject.header).await?;
        survey.count_refcount_blocks(subject);
        Ok(survey)
    }

    /// Notes a corruption found so many times.
    pub(super) fn corrupt(&mut self, times: u64, text: impl FnOnce() -> String) {
        self.report.corruptions = self.report.corruptions.saturating_add(times);
        self.notes.add(text);
    }

    /// Counts references to the clusters of a range.
    pub(super) fn refer(&mut self, offset: u64, len: u64, times: u64, what: &str) {
        if len == 0 || times == 0 {
            return;
        }
        let bits = self.geometry.cluster_bits;
        let end = offset.saturating_add(len);
        let clusters = offset >> bits..((end - 1) >> bits) + 1;
        // The file may end within its last cluster.
        if end.saturating_sub(self.file_size) >= self.geometry.cluster_size() {
            self.corrupt(times, || {
                format!("{what} at {offset:#x} is beyond the end of the file")
            });
            // What is long is a table, of which the beginning says enough.
            let end = clusters.end.min(clusters.start + 4096);
            self.beyond.add(clusters.start..end, times, u64::MAX);
            return;
        }
        self.clusters = self.clusters.max(clusters.end);
        let max = self.geometry.max_refcount();
        let left_out = self.references.add(clusters, times, max);
        if left_out > 0 {
            self.overflow = true;
            self.corrupt(left_out, || {
                format!(
                    "{what} at {offset:#x} has more references than {} bits can count",
                    width_of(max)
                )
            });
        }
    }

    async fn count_l1_tables(&mut self, subject: Subject<'_>) -> Result<(), CheckError> {
        let raw = &subject.header.raw;
        let (offset, entries) = (raw.l1_table_offset.get(), u64::from(raw.l1_size.get()));
        self.refer(offset, entries * 8, 1, "active L1 table");
        let active = Uses {
            active: 1,
            total: 1,
        };
        self.count_l1_entries(subject.file, offset, entries, active)
            .await?;
        for (offset, entries, times) in self.snapshot_l1_segments(subject) {
            let uses = Uses {
                active: 0,
                total: times,
            };
            self.count_l1_entries(subject.file, offset, entries, uses)
                .await?;
        }
        Ok(())
    }

    /// The L1 tables of snapshots, cut into pieces that do not overlap: offset, entries, and how many tables have that piece.
    fn snapshot_l1_segments(&mut self, subject: Subject<'_>) -> Vec<(u64, u64, u64)> {
        let list = &subject.snapshots.list;
        if self.geometry.data_file && !list.is_empty() {
            let count = list.len();
            self.corrupt(1, || {
                format!("{count} snapshots in an image with a data file")
            });
        }
        let mut edges: BTreeMap<u64, i64> = BTreeMap::new();
        for (number, snapshot) in list.iter().enumerate() {
            let (offset, entries) = (snapshot.l1_offset, u64::from(snapshot.l1_entries));
            if self.geometry.in_cluster(offset) != 0 {
                self.corrupt(1, || {
                    format!("L1 table of snapshot {number} at {offset:#x} is not aligned")
                });
                continue;
            }
            if entries > MAX_L1_BYTES / 8 {
                self.corrupt(1, || {
                    format!("L1 table of snapshot {number} is too large: {entries} entries")
                });
                continue;
            }
            self.refer(offset, entries * 8, 1, "L1 table of a snapshot");
            let in_file = self.file_size.saturating_sub(offset).min(entries * 8);
            if in_file > 0 {
                *edges.entry(offset).or_default() += 1;
                *edges.entry(offset + in_file).or_default() -= 1;
            }
        }
        let mut segments = Vec::new();
        let (mut from, mut depth) = (0, 0);
        for (at, change) in edges {
            if let Ok(times @ 1..) = u64::try_from(depth) {
                segments.push((from, (at - from).div_ceil(8), times));
            }
            (from, depth) = (at, depth + change);
        }
        segments
    }

    async fn count_l1_entries(
        &mut self,
        file: &ImageFile,
        offset: u64,
        entries: u64,
        uses: Uses,
    ) -> Result<(), CheckError> {
        let table = file
            .read_table(offset, entries)
            .await
            .map_err(|errno| CheckError::read("an L1 table", offset, errno))?;
        let cluster = self.geometry.cluster_size();
        for (entry, at) in table.into_iter().zip((offset..).step_by(8)) {
            if entry == 0 {
                continue;
            }
            if entry & L1_RESERVED != 0 {
                self.corrupt(uses.total, || {
                    format!("L1 entry at {at:#x} has reserved bits set: {entry:#x}")
                });
            }
            let table = entry & OFFSET_MASK;
            self.refer(table, cluster, uses.total, "L2 table");
            if self.geometry.in_cluster(table) != 0 {
                self.corrupt(uses.total, || {
                    format!("L2 table at {table:#x} is not aligned")
                });
            }
            self.note_table(table, uses);
        }
        Ok(())
    }

    fn note_table(&mut self, offset: u64, uses: Uses) {
        if offset >= self.file_size {
            // All its entries are zero.
            return;
        }
        let bits = self.geometry.cluster_bits;
        let cluster = offset >> bits;
        if self.geometry.in_cluster(offset) == 0 {
            self.tables.add(cluster..cluster + 1, uses.total, u64::MAX);
            self.active_tables
                .add(cluster..cluster + 1, uses.active, u64::MAX);
            self.table_cover
                .add(cluster..cluster + 1, uses.total, u64::MAX);
        } else {
            let known = self.unaligned_tables.entry(offset).or_default();
            known.active += uses.active;
            known.total += uses.total;
            self.table_cover
                .add(cluster..cluster + 2, uses.total, u64::MAX);
        }
    }

    /// The next L2 tables from `from` bytes on, not more than are read at the same time.
    pub(super) fn tables_from(&self, from: u64) -> Vec<(u64, Uses)> {
        let bits = self.geometry.cluster_bits;
        let most = (BYTES_AT_ONCE >> bits).clamp(1, TABLES_AT_ONCE as u64);
        let most = usize::try_from(most).unwrap_or(1);
        let first = self.geometry.clusters_for(from);
        let aligned = self.tables.iter(first..u64::MAX).map(|(cluster, total)| {
            let active = self.active_tables.get(cluster);
            (cluster << bits, Uses { active, total })
        });
        let unaligned = self.unaligned_tables.range(from..);
        let unaligned = unaligned.map(|(offset, uses)| (*offset, *uses)).take(most);
        let mut found: Vec<_> = aligned.take(most).chain(unaligned).collect();
        found.sort_unstable_by_key(|(offset, _)| *offset);
        found.truncate(most);
        found
    }

    async fn count_l2_tables(&mut self, subject: Subject<'_>) -> Result<(), CheckError> {
        let mut from = 0;
        loop {
            let batch = self.tables_from(from);
            let Some((last, _)) = batch.last() else {
                return Ok(());
            };
            from = last + 1;
            let contents = read_tables(subject.file, &self.geometry, &batch).await?;
            for ((offset, uses), words) in batch.into_iter().zip(contents) {
                tables::count(self, offset, &words, uses, subject.repairs_all);
            }
        }
    }

    fn count_refcount_blocks(&mut self, subject: Subject<'_>) {
        let cluster = self.geometry.cluster_size();
        for (index, &entry) in subject.reftable.iter().enumerate() {
            let offset = entry & REFTABLE_OFFSET_MASK;
            let number = offset >> self.geometry.cluster_bits;
            if entry != offset || self.geometry.in_cluster(offset) != 0 {
                self.rebuild = true;
                self.corrupt(1, || {
                    format!("refcount table entry {index} cannot be right: {entry:#x}")
                });
            } else if number >= self.clusters {
                self.rebuild |= subject.repairs_all;
                self.corrupt(1, || {
                    format!("refcount block {index} at {offset:#x} is beyond the end of the file")
                });
            } else if offset != 0 {
                let is_shared = self.references.get(number) > 0;
                self.refer(offset, cluster, 1, "refcount block");
                if is_shared {
                    self.rebuild = true;
                    self.leave_alone(offset);
                }
                // Where counts have one bit, this has been told already.
                if self.references.get(number) != 1 {
                    self.corrupt(1, || {
                        format!("refcount block {index} at {offset:#x} is not alone in its cluster")
                    });
                }
            }
        }
    }

    /// Whether an L2 table can be written to without hitting anything else.
    pub(super) fn is_only_table(&self, offset: u64) -> bool {
        let bits = self.geometry.cluster_bits;
        let last = (offset + self.geometry.cluster_size() - 1) >> bits;
        (offset >> bits..=last)
            .all(|cluster| self.references.get(cluster) == self.table_cover.get(cluster))
    }

    /// Whether the file reaches that far.
    pub(super) fn is_in_file(&self, end: u64) -> bool {
        end <= self.file_size
    }

    /// Lets the file end after so many clusters at least, and counts what was past its end before.
    pub(super) fn include(&mut self, clusters: u64) {
        if clusters <= self.clusters {
            return;
        }
        let max = self.geometry.max_refcount();
        for (cluster, times) in self.beyond.iter(self.clusters..clusters) {
            let left_out = self.references.add(cluster..cluster + 1, times, max);
            self.overflow |= left_out > 0;
        }
        self.clusters = clusters;
    }

    /// Notes that a table must not be written to.
    pub(super) fn leave_alone(&mut self, offset: u64) {
        self.notes.insist(format!(
            "the table at {offset:#x} is left alone: something else lies there, too"
        ));
    }

    /// Whether nothing refers to the cluster.
    pub(super) fn is_free(&self, cluster: u64) -> bool {
        self.references.get(cluster) == 0 && self.beyond.get(cluster) == 0
    }
}

fn width_of(max: u64) -> u32 {
    64 - max.leading_zeros()
}

/// Reads L2 tables, all at the same time.
pub(super) async fn read_tables(
    file: &ImageFile,
    geometry: &Geometry,
    batch: &[(u64, Uses)],
) -> Result<Vec<Vec<u64>>, CheckError> {
    let cluster = geometry.cluster_size();
    let reads = batch
        .iter()
        .map(|&(offset, _)| async move { (offset, file.read(offset, cluster).await) });
    let mut contents = Vec::with_capacity(batch.len());
    for (offset, bytes) in join_all(reads.collect()).await {
        let bytes = bytes.map_err(|errno| CheckError::read("an L2 table", offset, errno))?;
        contents.push(numbers(&bytes).collect());
    }
    Ok(contents)
}
