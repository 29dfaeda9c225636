//! Counts what refers to each cluster of the image file: the refcounts as they ought to be.
//!
//! The whole metadata is read once, and nothing is believed: a reference past the file's end or to an unaligned place is an error. Memory
//! grows with what is referred to, not with sizes that the image claims.

use std::collections::BTreeMap;

use stord_aio::{Errno, IoBuffer};
use zerocopy::FromBytes;

use super::Image;
use super::layout::{
    COMPRESSED, CompressedRun, Mapping, OFFSET_MASK, REFTABLE_OFFSET_MASK, RawBitmapEntry,
    Subclusters,
};
use super::map::Entry;
use crate::driver::FILE;

/// log2 of the clusters counted in one piece of memory.
const PIECE_BITS: u32 = 8;
const PIECE: usize = 1 << PIECE_BITS;

/// Why references cannot be counted.
#[derive(Debug, thiserror::Error)]
pub(super) enum CountError {
    /// Metadata that cannot be right.
    #[error("{0}")]
    Corrupt(String),
    /// The file cannot be read.
    #[error("{}", super::header::strerror(*.0))]
    Io(Errno),
}

impl From<Errno> for CountError {
    fn from(errno: Errno) -> Self {
        Self::Io(errno)
    }
}

/// References by cluster.
#[derive(Debug, Default)]
pub(super) struct References {
    pieces: BTreeMap<u64, Box<[u32; PIECE]>>,
}

impl References {
    pub(super) fn get(&self, cluster: u64) -> u64 {
        let piece = self.pieces.get(&(cluster >> PIECE_BITS));
        piece.map_or(0, |piece| u64::from(piece[Self::index(cluster)]))
    }

    pub(super) fn add(&mut self, cluster: u64, count: u64) {
        for cluster in cluster..cluster + count {
            let piece = self
                .pieces
                .entry(cluster >> PIECE_BITS)
                .or_insert_with(|| Box::new([0; PIECE]));
            let place = &mut piece[Self::index(cluster)];
            *place = place.saturating_add(1);
        }
    }

    /// Takes one reference to each of these clusters back.
    pub(super) fn remove(&mut self, cluster: u64, count: u64) {
        for cluster in cluster..cluster + count {
            if let Some(piece) = self.pieces.get_mut(&(cluster >> PIECE_BITS)) {
                let place = &mut piece[Self::index(cluster)];
                *place = place.saturating_sub(1);
            }
        }
    }

    fn index(cluster: u64) -> usize {
        usize::try_from(cluster & (PIECE as u64 - 1)).expect("less than a piece")
    }

    /// One more than the last cluster that is referred to.
    pub(super) fn end(&self) -> u64 {
        let Some((number, piece)) = self.pieces.last_key_value() else {
            return 0;
        };
        let last = piece
            .iter()
            .rposition(|&count| count != 0)
            .map_or(0, |index| index + 1);
        (number << PIECE_BITS) + last as u64
    }
}

impl Image {
    /// Counts all references that the image contains.
    pub(super) async fn count_references(&self) -> Result<References, CountError> {
        let mut references = References::default();
        let header = self.header().clone();
        let raw = &header.raw;
        references.add(0, 1);
        self.count_structure(
            &mut references,
            raw.l1_table_offset.get(),
            u64::from(raw.l1_size.get()) * 8,
        )?;
        let active: Vec<u64> = self.l1.load().entries().collect();
        self.count_tables(&mut references, &active).await?;

        self.count_structure(
            &mut references,
            raw.snapshots_offset.get(),
            self.snapshots.table_bytes,
        )?;
        for snapshot in &self.snapshots.list {
            let bytes = u64::from(snapshot.l1_size) * 8;
            self.count_structure(&mut references, snapshot.l1_offset, bytes)?;
            let tables = self
                .read_table(snapshot.l1_offset, u64::from(snapshot.l1_size))
                .await?;
            self.count_tables(&mut references, &tables).await?;
        }

        let reftable_clusters = u64::from(raw.refcount_table_clusters.get());
        let (offset, bytes) = (
            raw.refcount_table_offset.get(),
            reftable_clusters << self.geometry.cluster_bits,
        );
        self.count_structure(&mut references, offset, bytes)?;
        for entry in self.read_table(offset, bytes / 8).await? {
            let block = entry & REFTABLE_OFFSET_MASK;
            if block != 0 {
                self.count_structure(&mut references, block, self.geometry.cluster_size())?;
            }
        }
        self.count_bitmaps(&mut references).await?;
        Ok(references)
    }

    /// Counts a structure that starts a cluster.
    fn count_structure(
        &self,
        references: &mut References,
        offset: u64,
        bytes: u64,
    ) -> Result<(), CountError> {
        if bytes == 0 {
            return Ok(());
        }
        if self.geometry.in_cluster(offset) != 0 {
            return Err(CountError::Corrupt(format!(
                "offset {offset:#x} is not aligned to a cluster"
            )));
        }
        self.count_bytes(references, offset, bytes)
    }

    /// Counts every cluster that a range of bytes touches.
    fn count_bytes(
        &self,
        references: &mut References,
        offset: u64,
        bytes: u64,
    ) -> Result<(), CountError> {
        let bits = self.geometry.cluster_bits;
        let end = offset.saturating_add(bytes);
        if end.saturating_sub(self.children.size(FILE)) >= self.geometry.cluster_size() {
            return Err(CountError::Corrupt(format!(
                "offset {offset:#x} is beyond the end of the file"
            )));
        }
        let (first, last) = (offset >> bits, (end - 1) >> bits);
        references.add(first, last - first + 1);
        Ok(())
    }

    async fn count_tables(
        &self,
        references: &mut References,
        l1: &[u64],
    ) -> Result<(), CountError> {
        for entry in l1 {
            let table = entry & OFFSET_MASK;
            if table != 0 {
                self.count_structure(references, table, self.geometry.cluster_size())?;
                let words = self
                    .read_table(table, self.geometry.cluster_size() / 8)
                    .await?;
                for entry in words.chunks(self.geometry.entry_words()) {
                    self.count_entry(references, entry)?;
                }
            }
        }
        Ok(())
    }

    fn count_entry(&self, references: &mut References, words: &[u64]) -> Result<(), CountError> {
        let [word, ..] = words else { return Ok(()) };
        if word & COMPRESSED != 0 {
            if self.geometry.data_file {
                return Err(CountError::Corrupt(
                    "a compressed cluster in an image with a data file".to_owned(),
                ));
            }
            let run = CompressedRun::decode(*word, self.geometry.cluster_bits);
            return self.count_bytes(references, run.offset, run.len);
        }
        if self.geometry.data_file {
            return Ok(());
        }
        let entry = Entry {
            word: *word,
            subclusters: Subclusters(words.get(1).copied().unwrap_or(0)),
        };
        match self.mapping(entry, 0) {
            Ok(Mapping::Data { host, .. } | Mapping::ReservedZero { host, .. }) => {
                self.count_structure(references, host, self.geometry.cluster_size())
            }
            Ok(_) => Ok(()),
            Err(bad) => Err(CountError::Corrupt(format!(
                "invalid L2 entry {word:#x} ({bad:?})"
            ))),
        }
    }

    async fn count_bitmaps(&self, references: &mut References) -> Result<(), CountError> {
        let Some(bitmaps) = self.header().bitmaps else {
            return Ok(());
        };
        self.count_structure(references, bitmaps.directory_offset, bitmaps.directory_size)?;
        let len = usize::try_from(bitmaps.directory_size).map_err(|_| Errno::ENOMEM)?;
        let buffer = IoBuffer::zeroed(len);
        self.children
            .read(FILE, bitmaps.directory_offset, buffer.clone().into())
            .await?;
        let directory = buffer.to_vec();
        let mut rest = directory.as_slice();
        for _ in 0..bitmaps.count {
            let Ok((entry, _)) = RawBitmapEntry::read_from_prefix(rest) else {
                return Err(CountError::Corrupt(
                    "the bitmap directory is too short".to_owned(),
                ));
            };
            let len = size_of::<RawBitmapEntry>()
                + usize::from(entry.name_size.get())
                + entry.extra_data_size.get() as usize;
            rest = rest.get(len.next_multiple_of(8)..).unwrap_or_default();
            let (table, entries) = (entry.table_offset.get(), u64::from(entry.table_size.get()));
            self.count_structure(references, table, entries * 8)?;
            for entry in self.read_table(table, entries).await? {
                let data = entry & OFFSET_MASK;
                if data != 0 {
                    self.count_structure(references, data, self.geometry.cluster_size())?;
                }
            }
        }
        Ok(())
    }
}
