//! Everything that an L1 table leads to: its L2 tables, and what these refer to. Refcounts of all of it go up or down together, and the
//! flags that say "refcount is exactly one" are made to agree with the refcounts.
//!
//! What is here works on tables as they are on disk, while no request is in flight and nothing in memory waits to be written.

use std::ops::Range;

use stord_aio::{Errno, IoBuffer};

use super::super::Image;
use super::super::alloc::Space;
use super::super::layout::{COMPRESSED, COPIED, CompressedRun, Mapping, OFFSET_MASK, Subclusters};
use super::super::map::Entry;
use super::super::refcount::Missing;
use super::super::table::space;
use crate::driver::FILE;

/// Clusters in a row.
type Run = Range<u64>;

/// A refcount that cannot go up.
enum Raise {
    Missing(Missing),
    /// The cluster is in use, and its refcount says that it is not.
    Unused,
    /// The refcount is the highest that its width can hold.
    Highest,
}

impl From<Missing> for Raise {
    fn from(missing: Missing) -> Self {
        Self::Missing(missing)
    }
}

fn raise(space: &mut Space, cluster: u64, highest: u64) -> Result<(), Raise> {
    match space.refcounts.get(cluster)? {
        0 => Err(Raise::Unused),
        count if count >= highest => Err(Raise::Highest),
        count => Ok(space.refcounts.set(cluster, count + 1)?),
    }
}

impl Image {
    /// Raises the refcount of everything that the L1 table leads to. After a failure all refcounts are what they were.
    ///
    /// # Errors
    /// `EINVAL` where a refcount cannot go up, and what reading says.
    pub(super) async fn raise_tree(&self, l1: &[u64]) -> Result<(), Errno> {
        let mut raised = 0;
        let result = self.raise_counting(l1, &mut raised).await;
        if result.is_err() && self.lower_tree(l1, raised).await.is_err() {
            tracing::error!("qcow2: space is lost until the image is checked");
        }
        result
    }

    async fn raise_counting(&self, l1: &[u64], raised: &mut u64) -> Result<(), Errno> {
        for &entry in l1 {
            for run in self.uses_of(entry).await? {
                for cluster in run {
                    self.raise_one(cluster).await?;
                    *raised += 1;
                }
            }
            self.relieve().await?;
        }
        Ok(())
    }

    async fn raise_one(&self, cluster: u64) -> Result<(), Errno> {
        let highest = self.geometry.max_refcount();
        loop {
            let raised = {
                let mut meta = self.meta();
                let space = space(&mut meta).map_err(|_| Errno::EIO)?;
                raise(space, cluster, highest)
            };
            match raised {
                Ok(()) => return Ok(()),
                Err(Raise::Missing(missing)) => self.provide_refcounts(missing).await?,
                Err(Raise::Highest) => return Err(Errno::EINVAL),
                Err(Raise::Unused) => {
                    let message = format!("Cluster {cluster:#x} is used, but its refcount is 0");
                    return Err(self.corruption(false, &message).await);
                }
            }
        }
    }

    /// Lowers the refcount of the first `limit` clusters that the L1 table leads to, and discards what becomes free.
    ///
    /// # Errors
    /// What reading says. What has not been lowered then is lost until the image is checked.
    pub(super) async fn lower_tree(&self, l1: &[u64], mut limit: u64) -> Result<(), Errno> {
        for &entry in l1 {
            if limit == 0 {
                return Ok(());
            }
            for run in self.uses_of(entry).await? {
                let end = run.start + (run.end - run.start).min(limit);
                limit -= end - run.start;
                self.lower_run(run.start..end, self.options.pass_snapshot)
                    .await?;
            }
            self.relieve().await?;
        }
        Ok(())
    }

    /// Lowers the refcount of clusters that a structure took up; `discards` what becomes free.
    pub(in super::super) async fn lower_structure(
        &self,
        offset: u64,
        bytes: u64,
        discards: bool,
    ) -> Result<(), Errno> {
        let first = offset >> self.geometry.cluster_bits;
        self.lower_run(first..first + self.geometry.clusters_for(bytes), discards)
            .await
    }

    async fn lower_run(&self, run: Run, discards: bool) -> Result<(), Errno> {
        let mut free: Vec<Run> = Vec::new();
        let mut at = run.start;
        while at < run.end {
            let lowered = match &mut self.meta().space {
                Some(space) => space.release(at),
                None => return Err(Errno::EIO),
            };
            match lowered {
                Ok(Some(0)) => match free.last_mut() {
                    Some(last) if last.end == at => last.end += 1,
                    _ => free.push(at..at + 1),
                },
                Ok(Some(_)) => {}
                Ok(None) => {
                    tracing::warn!("qcow2: cluster {at:#x} is freed more often than it is used");
                }
                Err(missing) => {
                    self.provide_refcounts(missing).await?;
                    continue;
                }
            }
            at += 1;
        }
        if discards {
            let bits = self.geometry.cluster_bits;
            for run in free {
                let (start, len) = (run.start << bits, (run.end - run.start) << bits);
                // A discard is a hint; that it fails changes nothing.
                let _ = self.children.discard(FILE, start, len).await;
            }
        }
        Ok(())
    }

    /// The clusters that the L2 table of an L1 entry refers to, and then its own.
    async fn uses_of(&self, l1_entry: u64) -> Result<Vec<Run>, Errno> {
        let table = l1_entry & OFFSET_MASK;
        if table == 0 {
            return Ok(Vec::new());
        }
        let words = self.l2_table(table).await?;
        let mut runs: Vec<Run> = Vec::new();
        for words in words.chunks(self.geometry.entry_words()) {
            let Some(run) = self.uses_of_entry(words).await? else {
                continue;
            };
            match runs.last_mut() {
                Some(last) if last.end == run.start => last.end = run.end,
                _ => runs.push(run),
            }
        }
        let own = table >> self.geometry.cluster_bits;
        runs.push(own..own + 1);
        Ok(runs)
    }

    async fn uses_of_entry(&self, words: &[u64]) -> Result<Option<Run>, Errno> {
        let [word, ..] = words else { return Ok(None) };
        let bits = self.geometry.cluster_bits;
        if word & COMPRESSED != 0 {
            let run = CompressedRun::decode(*word, bits);
            let last = (run.offset + run.len - 1) >> bits;
            return Ok(Some(run.offset >> bits..last + 1));
        }
        let entry = Entry {
            word: *word,
            subclusters: Subclusters(words.get(1).copied().unwrap_or(0)),
        };
        match self.mapping(entry, 0) {
            Ok(Mapping::Data { host, .. } | Mapping::ReservedZero { host, .. }) => {
                Ok(Some(host >> bits..(host >> bits) + 1))
            }
            Ok(_) => Ok(None),
            Err(bad) => {
                let message = format!("L2 entry {word:#x} cannot be right ({bad:?})");
                Err(self.corruption(false, &message).await)
            }
        }
    }

    async fn l2_table(&self, offset: u64) -> Result<Vec<u64>, Errno> {
        if self.geometry.in_cluster(offset) != 0 {
            let message = format!("L2 table offset {offset:#x} unaligned");
            return Err(self.corruption(false, &message).await);
        }
        self.read_table(offset, self.geometry.cluster_size() / 8)
            .await
    }

    /// Clears the flags in tables that only snapshots use; there they mean nothing, but the active image is about to use them.
    pub(super) async fn clear_flags(&self, l1: &[u64]) -> Result<(), Errno> {
        for entry in l1 {
            let table = entry & OFFSET_MASK;
            if table == 0 {
                continue;
            }
            let old = self.l2_table(table).await?;
            let mut new = old.clone();
            for word in new.iter_mut().step_by(self.geometry.entry_words()) {
                if *word & COMPRESSED == 0 {
                    *word &= !COPIED;
                }
            }
            self.write_changed(table, &old, &new).await?;
        }
        Ok(())
    }

    /// Makes the flags of the active image agree with the refcounts, in the tables on disk and in memory.
    pub(super) async fn settle_flags(&self) -> Result<(), Errno> {
        let l1 = self.l1.load_full();
        let old: Vec<u64> = (0..l1.len()).map(|index| l1.get(index)).collect();
        let mut new = old.clone();
        for (index, entry) in new.iter_mut().enumerate() {
            if *entry & OFFSET_MASK != 0 {
                self.settle_table(index, *entry & OFFSET_MASK).await?;
                *entry = self.with_flag(*entry).await?;
                l1.set(index, *entry);
            }
        }
        let start = self.header().raw.l1_table_offset.get();
        self.write_changed(start, &old, &new).await
    }

    async fn settle_table(&self, l1_index: usize, table: u64) -> Result<(), Errno> {
        let old = self.l2_table(table).await?;
        let mut new = old.clone();
        for word in new.iter_mut().step_by(self.geometry.entry_words()) {
            if *word & COMPRESSED == 0 && *word & OFFSET_MASK != 0 {
                *word = self.with_flag(*word).await?;
            }
        }
        self.write_changed(table, &old, &new).await?;
        let slice_words = self.slice_entries() * self.geometry.entry_words();
        let first = (l1_index as u64) << (self.geometry.cluster_bits - self.options.slice_bits);
        let _meta = self.meta();
        for (number, words) in (first..).zip(new.chunks(slice_words)) {
            if let Some(slice) = self.slices.get(number) {
                for (index, word) in words.iter().enumerate() {
                    slice.set(index, &[*word]);
                }
            }
        }
        Ok(())
    }

    /// The entry with the flag that fits its refcount.
    async fn with_flag(&self, entry: u64) -> Result<u64, Errno> {
        let cluster = (entry & OFFSET_MASK) >> self.geometry.cluster_bits;
        loop {
            let count = match &mut self.meta().space {
                Some(space) => space.refcounts.get(cluster),
                None => return Err(Errno::EIO),
            };
            match count {
                Ok(1) => return Ok(entry | COPIED),
                Ok(_) => return Ok(entry & !COPIED),
                Err(missing) => self.provide_refcounts(missing).await?,
            }
        }
    }

    /// Writes the sectors of a table that have changed.
    async fn write_changed(&self, offset: u64, old: &[u64], new: &[u64]) -> Result<(), Errno> {
        const ENTRIES: usize = 64;
        let differs = |&sector: &usize| {
            let range = sector * ENTRIES..new.len().min((sector + 1) * ENTRIES);
            old.get(range.clone()) != new.get(range)
        };
        let changed: Vec<usize> = (0..new.len().div_ceil(ENTRIES)).filter(differs).collect();
        let (Some(first), Some(last)) = (changed.first(), changed.last()) else {
            return Ok(());
        };
        let end = new.len().min((last + 1) * ENTRIES);
        let bytes: Vec<u8> = new
            .get(first * ENTRIES..end)
            .unwrap_or_default()
            .iter()
            .flat_map(|word| word.to_be_bytes())
            .collect();
        let at = offset + (first * ENTRIES * 8) as u64;
        self.children
            .write(FILE, at, IoBuffer::copy_of(&bytes).into(), false)
            .await
    }
}
