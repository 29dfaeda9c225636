//! Lookups: from a guest offset to an extent, out of the L1 table and the cached slices, without a lock and without waiting.
//!
//! An answer is the longest run that one slice gives. What is not in memory, and whatever cannot be right, is answered with `Load`; the
//! load then reads the slice, or says what is wrong with it.

use std::sync::atomic::Ordering;

use stord_aio::Errno;

use super::Image;
use super::cache::Slice;
use super::layout::{
    BadEntry, COMPRESSED, COPIED, Mapping, OFFSET_MASK, SUBCLUSTERS, Subclusters, ZERO,
};
use crate::driver::{Extent, ExtentKind, Lookup};

/// Entries of L1 looked at for one answer about a range without L2 tables.
const MAX_EMPTY_TABLES: usize = 4096;

/// Where an offset is in the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) l1_index: usize,
    /// The number of the slice, over the whole disk.
    pub(super) slice: u64,
    /// The entry's index within the slice.
    pub(super) entry: usize,
}

/// What a slice says of one cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) word: u64,
    /// Only with extended L2 entries.
    pub(super) subclusters: Subclusters,
}

impl Image {
    /// log2 of the entries of a slice.
    pub(super) fn slice_entry_bits(&self) -> u32 {
        self.options.slice_bits - self.geometry.entry_bits()
    }

    pub(super) fn slice_entries(&self) -> usize {
        1 << self.slice_entry_bits()
    }

    /// log2 of the guest bytes that a slice maps.
    pub(super) fn slice_shift(&self) -> u32 {
        self.geometry.cluster_bits + self.slice_entry_bits()
    }

    pub(super) fn position(&self, offset: u64) -> Position {
        let in_slice = (offset >> self.geometry.cluster_bits) & (self.slice_entries() as u64 - 1);
        Position {
            // A disk has at most 2^31 L1 entries.
            l1_index: usize::try_from(offset >> self.geometry.l1_shift()).unwrap_or(usize::MAX),
            slice: offset >> self.slice_shift(),
            entry: usize::try_from(in_slice).unwrap_or(0),
        }
    }

    /// The entry of a slice. With extended L2 entries the caller sees to it that both words belong together.
    pub(super) fn entry(&self, slice: &Slice, index: usize) -> Entry {
        if self.geometry.extended_l2 {
            Entry {
                word: slice.word(2 * index),
                subclusters: Subclusters(slice.word(2 * index + 1)),
            }
        } else {
            Entry {
                word: slice.word(index),
                subclusters: Subclusters(0),
            }
        }
    }

    /// Decodes an entry for the guest cluster at `guest`.
    pub(super) fn mapping(&self, entry: Entry, guest: u64) -> Result<Mapping, BadEntry> {
        let mapping = Mapping::decode(entry.word, guest, &self.geometry)?;
        if self.geometry.extended_l2 && mapping != Mapping::Compressed {
            entry.subclusters.check(mapping)?;
        }
        Ok(mapping)
    }

    /// Says where the bytes from `offset` on are.
    pub(super) fn map_read(&self, offset: u64, len: u64) -> Result<Lookup<Extent>, Errno> {
        if self.unusable.load(Ordering::Relaxed) {
            return Err(Errno::ENOMEDIUM);
        }
        let position = self.position(offset);
        let found = self.slices.with(position.slice, |slice| {
            self.run(slice, position, offset, len)
        });
        Ok(match found {
            Some(Some(extent)) => Lookup::Ready(extent),
            Some(None) => Lookup::Load,
            None => self
                .without_table(position, offset, len)
                .map_or(Lookup::Load, Lookup::Ready),
        })
    }

    /// Says where the bytes from `offset` on can be overwritten in place.
    pub(super) fn map_write(&self, offset: u64, len: u64) -> Result<Lookup<Extent>, Errno> {
        if self.unusable.load(Ordering::Relaxed) {
            return Err(Errno::ENOMEDIUM);
        }
        if !self.armed.load(Ordering::Acquire) {
            return Ok(Lookup::Load);
        }
        let position = self.position(offset);
        let found = self.slices.with(position.slice, |slice| {
            if slice.checked.load(Ordering::Acquire) != self.metadata_places.load(Ordering::Acquire)
            {
                return None;
            }
            self.run_in_place(slice, position, offset, len)
        });
        Ok(found.flatten().map_or(Lookup::Load, Lookup::Ready))
    }

    fn without_table(&self, position: Position, offset: u64, len: u64) -> Option<Extent> {
        let l1 = self.l1.load();
        let end = offset + len;
        let mut known = offset;
        for index in (position.l1_index..l1.len()).take(MAX_EMPTY_TABLES) {
            if l1.table(index).is_some() || known >= end {
                break;
            }
            known = ((known >> self.geometry.l1_shift()) + 1) << self.geometry.l1_shift();
        }
        (known > offset).then(|| Extent {
            kind: ExtentKind::Unallocated,
            len: known.min(end) - offset,
        })
    }

    /// The run at `offset` that can be written in place.
    pub(super) fn run_in_place(
        &self,
        slice: &Slice,
        position: Position,
        offset: u64,
        len: u64,
    ) -> Option<Extent> {
        let entry = self.entry(slice, position.entry);
        if entry.word & COPIED == 0 {
            return None;
        }
        let mut extent = self.run_where(slice, position, offset, len, COPIED)?;
        match extent.kind {
            ExtentKind::Data { .. } => {
                extent.len = extent.len.min(len);
                Some(extent)
            }
            _ => None,
        }
    }

    /// The run at `offset`.
    pub(super) fn run(
        &self,
        slice: &Slice,
        position: Position,
        offset: u64,
        len: u64,
    ) -> Option<Extent> {
        self.run_where(slice, position, offset, len, 0)
    }

    /// The run at `offset` of data clusters whose entries have all `flags`, or of anything else.
    fn run_where(
        &self,
        slice: &Slice,
        position: Position,
        offset: u64,
        len: u64,
        flags: u64,
    ) -> Option<Extent> {
        if self.geometry.extended_l2 {
            slice.consistent(|| self.run_of_subclusters(slice, position, offset, len, flags))?
        } else {
            self.run_of_clusters(slice, position, offset, len, flags)
        }
    }

    fn run_of_clusters(
        &self,
        slice: &Slice,
        position: Position,
        offset: u64,
        len: u64,
        flags: u64,
    ) -> Option<Extent> {
        let geometry = &self.geometry;
        let in_cluster = geometry.in_cluster(offset);
        let first = self
            .mapping(self.entry(slice, position.entry), offset - in_cluster)
            .ok()?;
        let kind = match first {
            Mapping::Unallocated => ExtentKind::Unallocated,
            Mapping::Zero => ExtentKind::Zero { reserved: false },
            Mapping::ReservedZero { .. } => ExtentKind::Zero { reserved: true },
            Mapping::Data { host, .. } => ExtentKind::Data {
                child: self.data_child(),
                offset: host + in_cluster,
            },
            Mapping::Compressed => ExtentKind::Special,
        };
        let mut known = geometry.cluster_size() - in_cluster;
        let mut index = position.entry + 1;
        while known < len && index < slice.words() && first != Mapping::Compressed {
            let word = slice.word(index);
            let fits = match first {
                Mapping::Data { host, .. } => {
                    let next = host + in_cluster + known;
                    word & (OFFSET_MASK | COMPRESSED | ZERO) == next
                        && next != 0
                        && word & flags == flags
                }
                _ => match (
                    self.mapping(self.entry(slice, index), offset + known),
                    first,
                ) {
                    (Ok(Mapping::ReservedZero { .. }), Mapping::ReservedZero { .. }) => true,
                    (Ok(next), first) => next == first,
                    (Err(_), _) => false,
                },
            };
            if !fits {
                break;
            }
            known += geometry.cluster_size();
            index += 1;
        }
        Some(Extent {
            kind,
            len: known.min(len),
        })
    }

    fn run_of_subclusters(
        &self,
        slice: &Slice,
        position: Position,
        offset: u64,
        len: u64,
        flags: u64,
    ) -> Option<Extent> {
        let geometry = &self.geometry;
        let in_cluster = geometry.in_cluster(offset);
        let (kind, mut known) = self.subcluster_run(slice, position.entry, offset, flags)?;
        let mut index = position.entry + 1;
        // Goes on in the next cluster only where the run reaches this one's end.
        while known < len
            && geometry.in_cluster(in_cluster + known) == 0
            && kind != ExtentKind::Special
            && index < self.slice_entries()
        {
            let Some((next, more)) = self.subcluster_run(slice, index, offset + known, flags)
            else {
                break;
            };
            let fits = match (kind, next) {
                (ExtentKind::Data { offset: first, .. }, ExtentKind::Data { offset: next, .. }) => {
                    next == first + known
                }
                (first, next) => first == next,
            };
            if !fits {
                break;
            }
            known += more;
            index += 1;
        }
        Some(Extent {
            kind,
            len: known.min(len),
        })
    }

    /// What is at `offset` in the cluster of one entry, and for how many bytes within that cluster.
    fn subcluster_run(
        &self,
        slice: &Slice,
        index: usize,
        offset: u64,
        flags: u64,
    ) -> Option<(ExtentKind, u64)> {
        let geometry = &self.geometry;
        let in_cluster = geometry.in_cluster(offset);
        let entry = self.entry(slice, index);
        let mapping = self.mapping(entry, offset - in_cluster).ok()?;
        let host = match mapping {
            Mapping::Compressed => {
                return Some((ExtentKind::Special, geometry.cluster_size() - in_cluster));
            }
            Mapping::Data { host, .. } => Some(host),
            _ => None,
        };
        let subcluster = u32::try_from(in_cluster >> geometry.subcluster_bits()).ok()?;
        let allocated = entry.subclusters.allocated() >> subcluster;
        let zero = entry.subclusters.zero() >> subcluster;
        let left = SUBCLUSTERS - subcluster;
        let (kind, count) = if allocated & 1 == 1 {
            if entry.word & flags != flags {
                return None;
            }
            let kind = ExtentKind::Data {
                child: self.data_child(),
                offset: host? + in_cluster,
            };
            (kind, allocated.trailing_ones())
        } else if zero & 1 == 1 {
            (
                ExtentKind::Zero {
                    reserved: host.is_some(),
                },
                zero.trailing_ones(),
            )
        } else {
            (ExtentKind::Unallocated, (allocated | zero).trailing_zeros())
        };
        let end = u64::from(subcluster + count.min(left)) << geometry.subcluster_bits();
        Some((kind, end - in_cluster))
    }
}
