//! Refcounts on disk: compared with the references that were counted, and corrected in place.
//!
//! A block is only written to if nothing else lies in its cluster; otherwise, and where a block is missing, the whole structure has to
//! be made anew (`rebuild`).

use std::ops::Range;

use super::counters::Counters;
use super::file::ImageFile;
use super::report::{CheckError, Notes, Repair};
use super::survey::Survey;
use crate::drivers::format::qcow2::layout::{Geometry, REFTABLE_OFFSET_MASK};
use crate::drivers::format::qcow2::refcount::{pack, unpack};

/// Refcounts that are looked at together.
const COUNTS_AT_ONCE: u64 = 32 << 10;
/// Ranges of freed clusters that are remembered; more stay allocated in the file below.
const MAX_FREED: usize = 64 << 10;

/// Where a refcount block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Nowhere: all its counts are zero.
    Missing,
    At(u64),
    /// Where no block can be.
    Impossible,
}

/// The refcount table in memory, its end left out where the file ends before.
pub(super) struct Blocks<'a> {
    file: &'a ImageFile,
    geometry: Geometry,
    table: &'a [u64],
}

/// What the comparison gave.
#[derive(Default)]
pub(super) struct Comparison {
    pub(super) corruptions: u64,
    pub(super) leaks: u64,
    pub(super) check_errors: u64,
    pub(super) corruptions_fixed: u64,
    pub(super) leaks_fixed: u64,
    /// The last cluster that is counted or referred to.
    pub(super) highest: u64,
    pub(super) rebuild: bool,
    /// Clusters with references whose count on disk is one now.
    pub(super) exclusive: Counters,
    /// Clusters that were given up.
    pub(super) freed: Vec<Range<u64>>,
}

/// A part of a block: the counts of these clusters, and where in the file they are.
struct Piece {
    clusters: Range<u64>,
    place: Place,
}

impl<'a> Blocks<'a> {
    pub(super) fn new(file: &'a ImageFile, geometry: Geometry, table: &'a [u64]) -> Self {
        Self {
            file,
            geometry,
            table,
        }
    }

    fn place(&self, block: u64) -> Place {
        let entry = usize::try_from(block)
            .ok()
            .and_then(|block| self.table.get(block));
        let offset = entry.map_or(0, |entry| entry & REFTABLE_OFFSET_MASK);
        let end = offset.checked_add(self.geometry.cluster_size());
        if offset == 0 {
            Place::Missing
        } else if self.geometry.in_cluster(offset) != 0
            || end.is_none_or(|end| i64::try_from(end).is_err())
        {
            Place::Impossible
        } else {
            Place::At(offset)
        }
    }

    /// The piece with the count of `cluster`, from that cluster on, up to `end`.
    fn piece(&self, cluster: u64, end: u64) -> Piece {
        let bits = self.geometry.refblock_bits();
        let block = cluster >> bits;
        if block >= self.table.len() as u64 {
            return Piece {
                clusters: cluster..end,
                place: Place::Missing,
            };
        }
        let block_end = (block + 1) << bits;
        let place = self.place(block);
        let (end, place) = match place {
            Place::At(offset) => {
                let first = cluster & ((1 << bits) - 1);
                let piece_end = (cluster + 1).next_multiple_of(COUNTS_AT_ONCE);
                let at = offset + ((first << self.geometry.refcount_order) / 8);
                (end.min(block_end).min(piece_end), Place::At(at))
            }
            other => (end.min(block_end), other),
        };
        Piece {
            clusters: cluster..end,
            place,
        }
    }

    /// Compares all counts with the references, and corrects what may be corrected.
    pub(super) async fn compare(
        &self,
        survey: &mut Survey,
        repair: Repair,
    ) -> Result<Comparison, CheckError> {
        let mut judge = Judge {
            references: &survey.references,
            notes: &mut survey.notes,
            cluster_bits: self.geometry.cluster_bits,
            repair,
            found: Comparison::default(),
        };
        let end = survey.clusters;
        let mut at = 0;
        while at < end {
            let piece = self.piece(at, end);
            at = piece.clusters.end;
            match piece.place {
                Place::Missing => judge.take_missing(piece.clusters),
                Place::Impossible => judge.take_unreadable(piece.clusters),
                Place::At(offset) if offset >= self.file.size() => {
                    judge.take_missing(piece.clusters);
                }
                Place::At(offset) => {
                    self.compare_piece(&mut judge, piece.clusters, offset)
                        .await?;
                }
            }
        }
        Ok(judge.found)
    }

    async fn compare_piece(
        &self,
        judge: &mut Judge<'_>,
        clusters: Range<u64>,
        offset: u64,
    ) -> Result<(), CheckError> {
        let order = self.geometry.refcount_order;
        let count = usize::try_from(clusters.end - clusters.start).expect("limited to a piece");
        let len = ((count as u64) << order).div_ceil(8);
        let mut bytes = self
            .file
            .read(offset, len)
            .await
            .map_err(|errno| CheckError::read("a refcount block", offset, errno))?;
        let mut references = vec![0; count];
        judge.references.copy_to(clusters.start, &mut references);
        let mut changed = false;
        for (index, (cluster, &reference)) in clusters.zip(&references).enumerate() {
            let stored = unpack(&bytes, index, order);
            let now = judge.judge(cluster, stored, reference);
            if now != stored {
                pack(&mut bytes, index, order, now);
                changed = true;
            }
        }
        if changed {
            self.file
                .write(offset, &bytes)
                .await
                .map_err(|errno| CheckError::write("a refcount block", offset, errno))?;
        }
        Ok(())
    }

    /// The count of a cluster that nothing in the file refers to; `None` where it cannot be read.
    pub(super) async fn stored(&self, cluster: u64) -> Result<Option<u64>, CheckError> {
        let piece = self.piece(cluster, cluster + 1);
        let offset = match piece.place {
            Place::Missing => return Ok(Some(0)),
            Place::Impossible => return Ok(None),
            Place::At(offset) => offset,
        };
        let order = self.geometry.refcount_order;
        let len = (1u64 << order).div_ceil(8);
        let bytes = self
            .file
            .read(offset, len)
            .await
            .map_err(|errno| CheckError::read("a refcount block", offset, errno))?;
        // Several narrow counts share a byte.
        let per_byte = (8u64 >> order).max(1);
        let index = usize::try_from(cluster % per_byte).expect("less than 8");
        Ok(Some(unpack(&bytes, index, order)))
    }

    /// Sets the counts of clusters whose blocks are there; changes nothing and gives false if one is not.
    pub(super) async fn set(&self, clusters: Range<u64>, count: u64) -> Result<bool, CheckError> {
        let order = self.geometry.refcount_order;
        let mut pieces = Vec::new();
        let mut at = clusters.start;
        while at < clusters.end {
            // Whole bytes, also of narrow counts.
            let piece = self.piece(at & !7, clusters.end.next_multiple_of(8));
            let Place::At(offset) = piece.place else {
                return Ok(false);
            };
            at = piece.clusters.end;
            pieces.push((piece.clusters, offset));
        }
        for (piece, offset) in pieces {
            let len = ((piece.end - piece.start) << order).div_ceil(8);
            let mut bytes = self
                .file
                .read(offset, len)
                .await
                .map_err(|errno| CheckError::read("a refcount block", offset, errno))?;
            for (index, cluster) in piece.enumerate() {
                if clusters.contains(&cluster) {
                    pack(&mut bytes, index, order, count);
                }
            }
            self.file
                .write(offset, &bytes)
                .await
                .map_err(|errno| CheckError::write("a refcount block", offset, errno))?;
        }
        Ok(true)
    }

    /// Whether the count of a cluster can be read at all.
    pub(super) fn is_readable(&self, cluster: u64) -> bool {
        self.place(cluster >> self.geometry.refblock_bits()) != Place::Impossible
    }
}

/// Compares one count after the other.
struct Judge<'a> {
    references: &'a Counters,
    notes: &'a mut Notes,
    cluster_bits: u32,
    repair: Repair,
    found: Comparison,
}

impl Judge<'_> {
    /// Takes clusters that all have a count of zero.
    fn take_missing(&mut self, clusters: Range<u64>) {
        let references = self.references;
        for (cluster, reference) in references.iter(clusters) {
            self.judge(cluster, 0, reference);
        }
    }

    /// Takes clusters whose counts cannot be read.
    fn take_unreadable(&mut self, clusters: Range<u64>) {
        self.found.check_errors += clusters.end - clusters.start;
        self.notes.add(|| {
            format!(
                "the refcount block of the clusters at {:#x} to {:#x} cannot be read",
                clusters.start << self.cluster_bits,
                clusters.end << self.cluster_bits
            )
        });
    }

    /// Takes a count and the references it should have; gives what it is to be from now on.
    fn judge(&mut self, cluster: u64, stored: u64, reference: u64) -> u64 {
        let found = &mut self.found;
        if stored > 0 || reference > 0 {
            found.highest = cluster;
        }
        let fixes = stored != reference
            && stored != 0
            && match self.repair {
                Repair::Nothing => false,
                Repair::Leaks => stored > reference,
                Repair::All => true,
            };
        let now = if fixes { reference } else { stored };
        if now == 1 && reference > 0 {
            found.exclusive.add(cluster..cluster + 1, 1, 1);
        }
        if stored == reference {
            return now;
        }
        found.rebuild |= stored == 0;
        self.notes.add(|| {
            let offset = cluster << self.cluster_bits;
            format!("cluster at {offset:#x} has refcount {stored}, but {reference} references")
        });
        match (stored > reference, fixes) {
            (true, true) => found.leaks_fixed += 1,
            (true, false) => found.leaks += 1,
            (false, true) => found.corruptions_fixed += 1,
            (false, false) => found.corruptions += 1,
        }
        if fixes && reference == 0 {
            found.free(cluster);
        }
        now
    }
}

impl Comparison {
    fn free(&mut self, cluster: u64) {
        let ranges = self.freed.len();
        match self.freed.last_mut() {
            Some(range) if range.end == cluster => range.end += 1,
            _ if ranges < MAX_FREED => self.freed.push(cluster..cluster + 1),
            _ => {}
        }
    }
}
