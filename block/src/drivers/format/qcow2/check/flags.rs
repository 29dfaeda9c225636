//! The copied flags of the active L1 and L2 tables: set where the refcount is exactly one, and only there.

use super::blocks::{Blocks, Comparison};
use super::file::ImageFile;
use super::report::CheckError;
use super::survey::{Subject, Survey, Uses, read_tables};
use super::tables::{Kind, entries};
use crate::drivers::format::qcow2::layout::{COPIED, OFFSET_MASK};

/// Bytes that are written together.
const SECTOR: usize = 512;

/// What was found of flags.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct FlagCount {
    /// Wrong ones that are still there.
    pub(super) corruptions: u64,
    pub(super) fixed: u64,
}

/// Checks the flags against the refcounts on disk.
pub(super) struct Flags<'a> {
    pub(super) subject: Subject<'a>,
    pub(super) blocks: &'a Blocks<'a>,
    pub(super) comparison: &'a Comparison,
    pub(super) repairs: bool,
}

impl Flags<'_> {
    pub(super) async fn check(&self, survey: &mut Survey) -> Result<FlagCount, CheckError> {
        let mut count = FlagCount::default();
        self.check_l1(survey, &mut count).await?;
        let mut from = 0;
        loop {
            let batch = survey.tables_from(from);
            let Some((last, _)) = batch.last() else {
                return Ok(count);
            };
            from = last + 1;
            // An L1 entry without an offset names no table, whatever else it says.
            let is_active = |(offset, uses): &(u64, Uses)| *offset != 0 && uses.active > 0;
            let batch: Vec<_> = batch.into_iter().filter(is_active).collect();
            let contents = read_tables(self.subject.file, &survey.geometry, &batch).await?;
            for ((offset, uses), words) in batch.into_iter().zip(contents) {
                self.check_l2(survey, &mut count, offset, &words, uses.active)
                    .await?;
            }
        }
    }

    /// Whether the refcount of a cluster on disk is one; `None` where it cannot be read.
    async fn is_exclusive(
        &self,
        survey: &Survey,
        cluster: u64,
    ) -> Result<Option<bool>, CheckError> {
        if cluster >= survey.clusters {
            let stored = self.blocks.stored(cluster).await?;
            return Ok(stored.map(|stored| stored == 1));
        }
        let readable = self.blocks.is_readable(cluster);
        Ok(readable.then(|| self.comparison.exclusive.get(cluster) == 1))
    }

    async fn check_l1(&self, survey: &mut Survey, count: &mut FlagCount) -> Result<(), CheckError> {
        let raw = &self.subject.header.raw;
        let (offset, size) = (raw.l1_table_offset.get(), u64::from(raw.l1_size.get()));
        let file = self.subject.file;
        let table = file
            .read_table(offset, size)
            .await
            .map_err(|errno| CheckError::read("the L1 table", offset, errno))?;
        let bits = survey.geometry.cluster_bits;
        let mut mended = table.clone();
        for (entry, at) in mended.iter_mut().zip((offset..).step_by(8)) {
            let place = *entry & OFFSET_MASK;
            if place == 0 {
                continue;
            }
            let exclusive = self.is_exclusive(survey, place >> bits).await?;
            if exclusive.is_some_and(|exclusive| exclusive != (*entry & COPIED != 0)) {
                let shown = *entry;
                survey
                    .notes
                    .add(|| format!("L1 entry at {at:#x} has a wrong copied flag: {shown:#x}"));
                *entry ^= COPIED;
                count.corruptions += 1;
            }
        }
        let clusters = offset >> bits..survey.geometry.clusters_for(offset + size * 8);
        let alone = clusters
            .into_iter()
            .all(|cluster| survey.references.get(cluster) == 1);
        if self.repairs && count.corruptions > 0 {
            if alone {
                write_changes(file, offset, &table, &mended).await?;
                count.fixed = count.corruptions;
                count.corruptions = 0;
            } else {
                survey.leave_alone(offset);
            }
        }
        Ok(())
    }

    async fn check_l2(
        &self,
        survey: &mut Survey,
        count: &mut FlagCount,
        offset: u64,
        words: &[u64],
        uses: u64,
    ) -> Result<(), CheckError> {
        let geometry = survey.geometry;
        let own = offset >> geometry.cluster_bits;
        if self.is_exclusive(survey, own).await?.is_none() {
            return Ok(());
        }
        let mut mended = words.to_vec();
        let mut wrong = 0;
        for (index, word, subclusters) in entries(words, &geometry) {
            let Kind::Standard { offset: place, .. } = Kind::of(word, subclusters, &geometry)
            else {
                continue;
            };
            let exclusive = if geometry.data_file {
                Some(true)
            } else {
                self.is_exclusive(survey, place >> geometry.cluster_bits)
                    .await?
            };
            if exclusive.is_some_and(|exclusive| exclusive != (word & COPIED != 0)) {
                survey.notes.add(|| {
                    format!("entry {index} of the L2 table at {offset:#x} has a wrong copied flag: {word:#x}")
                });
                mended[index * geometry.entry_words()] ^= COPIED;
                wrong += 1;
            }
        }
        if wrong == 0 {
            return Ok(());
        }
        if self.repairs && survey.is_only_table(offset) {
            write_changes(self.subject.file, offset, words, &mended).await?;
            count.fixed += wrong;
        } else {
            count.corruptions += wrong * uses;
            if self.repairs {
                survey.leave_alone(offset);
            }
        }
        Ok(())
    }
}

/// Writes those sectors of a table of numbers that have changed.
pub(super) async fn write_changes(
    file: &ImageFile,
    offset: u64,
    old: &[u64],
    new: &[u64],
) -> Result<(), CheckError> {
    let sectors = old.chunks(SECTOR / 8).zip(new.chunks(SECTOR / 8));
    for ((old, new), at) in sectors.zip((offset..).step_by(SECTOR)) {
        if old != new {
            let bytes: Vec<u8> = new.iter().flat_map(|word| word.to_be_bytes()).collect();
            file.write(at, &bytes)
                .await
                .map_err(|errno| CheckError::write("a table", at, errno))?;
        }
    }
    Ok(())
}
