//! Internal snapshots: made, deleted, and brought back. The space they share with the active image has refcounts above one, which
//! make every write to it go elsewhere.
//!
//! All of it happens in a drained section, on an image whose metadata has been written out, so that tables on disk are as they are in
//! memory. A cut of the power at any moment leaves the image as it was before or as it is afterwards, and at worst with lost space:
//! - what is new (an L1 table, a snapshot table) is on disk before the header that names it, and one write of the header's sector goes
//!   from the old to the new;
//! - refcounts go up before that write, and down after it;
//! - where refcounts and the flags of the active tables that say "refcount is exactly one" change together, in making and deleting, the
//!   header says meanwhile that refcounts may be wrong (the dirty bit), and whoever opens the image after a cut counts them anew.
//!   Version 2 has no such bit: there, a cut at the worst moment leaves flags to be put right by a check, but nothing that is lost.
//!
//! Bringing back needs no such bit: everything that the active image then consists of is shared with the snapshot, so all its flags
//! are off before and after.

mod table;
mod tree;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use stord_aio::{Errno, IoBuffer};
use stord_qmp::Error;
use stord_qmp::schema::node_info::SnapshotInfo;

use super::alloc::Run;
use super::header::Header;
use super::l1::L1;
use super::layout::{Incompatible, MAX_L1_BYTES, OFFSET_MASK};
use super::table::space;
use super::{Image, Qcow2};
use crate::driver::{DriverFuture, FILE, InternalSnapshots, IoFuture, NewSnapshot};

pub(super) use table::{Snapshot, Snapshots};

impl InternalSnapshots for Qcow2 {
    fn list(&self) -> Result<Vec<SnapshotInfo>, Errno> {
        if self.0.geometry.data_file {
            return Err(Errno::ENOTSUP);
        }
        Ok(self.0.snapshots.load().info().unwrap_or_default())
    }

    fn disk_size(&self, index: usize) -> Option<u64> {
        let snapshots = self.0.snapshots.load();
        let size = snapshots.list.get(index)?.disk_size();
        Some(size.unwrap_or_else(|| self.0.size()))
    }

    fn create<'a>(&'a self, new: NewSnapshot) -> IoFuture<'a> {
        Box::pin(async move {
            self.0.ready_for_snapshots().await?;
            let result = self.0.create_snapshot(&new).await;
            self.0.after_snapshots().await?;
            result
        })
    }

    fn delete<'a>(&'a self, index: usize) -> DriverFuture<'a> {
        Box::pin(async move {
            let failed = |what: &'static str| move |errno: Errno| Error::os(what, errno);
            let unlisting = "Failed to remove snapshot from snapshot list";
            self.0
                .ready_for_snapshots()
                .await
                .map_err(failed(unlisting))?;
            let result = match self.0.unlist_snapshot(index).await {
                Ok(deleted) => self
                    .0
                    .free_snapshot(&deleted)
                    .await
                    .map_err(failed("Failed to free the cluster and L1 table")),
                Err(errno) => Err(failed(unlisting)(errno)),
            };
            self.0
                .after_snapshots()
                .await
                .map_err(failed("Failed to write metadata back"))?;
            result
        })
    }

    fn apply<'a>(&'a self, index: usize) -> IoFuture<'a> {
        Box::pin(async move {
            self.0.ready_for_snapshots().await?;
            let result = self.0.apply_snapshot(index).await;
            self.0.after_snapshots().await?;
            result
        })
    }
}

/// A snapshot that the header no longer names.
struct Deleted {
    snapshot: Snapshot,
    l1: Vec<u64>,
    /// Where its table was, and of how many bytes.
    old_table: (u64, u64),
}

impl Image {
    /// Brings the file to the state of the memory.
    async fn ready_for_snapshots(&self) -> Result<(), Errno> {
        if self.geometry.data_file {
            return Err(Errno::ENOTSUP);
        }
        self.arm().await?;
        self.write_out().await
    }

    /// Makes the image fit for requests again, whatever came of the work on its snapshots.
    async fn after_snapshots(&self) -> Result<(), Errno> {
        self.refresh_places().await?;
        self.write_out().await
    }

    /// Announces on disk, with `change`, that refcounts and flags are about to contradict each other.
    async fn begin_unsettled(&self, change: impl FnOnce(&mut Header)) -> Result<(), Errno> {
        self.unsettled.store(true, Ordering::Release);
        let begun = self
            .change_header(|header| {
                header.set_incompatible(Incompatible::DIRTY, true);
                change(header);
            })
            .await;
        if begun.is_err() {
            self.unsettled.store(false, Ordering::Release);
        }
        begun
    }

    /// Takes the announcement back, with `change`: refcounts and flags on disk agree.
    async fn end_unsettled(&self, change: impl FnOnce(&mut Header)) -> Result<(), Errno> {
        let lazy = self.options.lazy_refcounts;
        self.change_header(|header| {
            header.set_incompatible(Incompatible::DIRTY, lazy);
            change(header);
        })
        .await?;
        self.unsettled.store(false, Ordering::Release);
        Ok(())
    }

    async fn create_snapshot(&self, new: &NewSnapshot) -> Result<(), Errno> {
        let active = self.active_l1();
        let l1_size = u32::try_from(active.len()).map_err(|_| Errno::EFBIG)?;
        let shared: Vec<u8> = active
            .iter()
            .flat_map(|entry| (entry & OFFSET_MASK).to_be_bytes())
            .collect();
        let l1 = self.store(shared).await?;
        let mut list = self.snapshots.load().list.clone();
        let id = self.snapshots.load().next_id();
        let l1_offset = l1.map_or(0, |run| self.offset_of_run(run));
        list.push(Snapshot::new(new, id, l1_offset, l1_size, self.size()));
        let table = self.store_table(list).await;
        let (snapshots, table) = match table {
            Ok(stored) => stored,
            Err(errno) => {
                self.give_back(l1);
                return Err(errno);
            }
        };
        let change = self.naming(table, snapshots.list.len())?;
        let old_offset = self.header().raw.snapshots_offset.get();
        let result = async {
            self.begin_unsettled(|_| ()).await?;
            self.raise_tree(&active).await?;
            let listed = async {
                self.write_flags().await?;
                self.end_unsettled(change).await
            };
            let listed = listed.await;
            if listed.is_err() {
                self.lower_tree(&active, u64::MAX).await?;
            }
            listed
        };
        if let Err(errno) = result.await {
            self.give_back(l1);
            self.give_back(table);
            self.settle_again().await;
            return Err(errno);
        }
        let old = self.replace_list(snapshots, old_offset);
        self.lower_structure(old.0, old.1, self.options.pass_snapshot)
            .await
    }

    /// Makes refcounts and flags agree, on disk when this returns.
    async fn write_flags(&self) -> Result<(), Errno> {
        self.settle_flags().await?;
        self.write_out().await
    }

    /// After a failure: what cannot be taken back stays announced, and is put right when the image is opened the next time.
    async fn settle_again(&self) {
        if !self.unsettled.load(Ordering::Acquire) {
            return;
        }
        let settled = async {
            self.settle_header().await?;
            self.write_flags().await?;
            self.end_unsettled(|_| ()).await
        };
        if let Err(errno) = settled.await {
            tracing::error!("qcow2: refcounts stay marked as wrong: {errno}");
        }
    }

    /// The change of the header that names another snapshot table.
    fn naming(
        &self,
        table: Option<Run>,
        count: usize,
    ) -> Result<impl FnOnce(&mut Header) + use<>, Errno> {
        let count = u32::try_from(count).map_err(|_| Errno::EFBIG)?;
        let offset = table.map_or(0, |run| self.offset_of_run(run));
        Ok(move |header: &mut Header| {
            header.raw.snapshots_offset = offset.into();
            header.raw.nb_snapshots = count.into();
        })
    }

    /// Takes over the list that the header names now, and gives place and bytes of the former one's table, which was at `old_offset`.
    fn replace_list(&self, snapshots: Snapshots, old_offset: u64) -> (u64, u64) {
        let old = self.snapshots.swap(Arc::new(snapshots));
        (old_offset, old.table_bytes)
    }

    async fn unlist_snapshot(&self, index: usize) -> Result<Deleted, Errno> {
        let mut list = self.snapshots.load().list.clone();
        if index >= list.len() {
            return Err(Errno::ENOENT);
        }
        let snapshot = list.remove(index);
        let l1 = self.l1_of(&snapshot).await?;
        let (snapshots, table) = self.store_table(list).await?;
        let change = self.naming(table, snapshots.list.len())?;
        let old_offset = self.header().raw.snapshots_offset.get();
        let result = async {
            self.write_out().await?;
            self.begin_unsettled(change).await
        };
        if let Err(errno) = result.await {
            self.give_back(table);
            return Err(errno);
        }
        Ok(Deleted {
            snapshot,
            l1,
            old_table: self.replace_list(snapshots, old_offset),
        })
    }

    /// Gives back what only a snapshot used that is no longer named. A part that cannot be read is lost space.
    async fn free_snapshot(&self, deleted: &Deleted) -> Result<(), Errno> {
        let Deleted {
            snapshot,
            l1,
            old_table,
        } = deleted;
        let discards = self.options.pass_snapshot;
        let lowered = async {
            self.lower_tree(l1, u64::MAX).await?;
            self.lower_structure(
                snapshot.l1_offset,
                u64::from(snapshot.l1_size) * 8,
                discards,
            )
            .await?;
            self.lower_structure(old_table.0, old_table.1, discards)
                .await
        };
        let lowered = lowered.await;
        self.decompressed.clear();
        self.settle_again().await;
        lowered
    }

    async fn apply_snapshot(&self, index: usize) -> Result<(), Errno> {
        let snapshots = self.snapshots.load_full();
        let snapshot = snapshots.list.get(index).ok_or(Errno::ENOENT)?;
        let size = snapshot.disk_size().unwrap_or_else(|| self.size()) & !511;
        let needed = self.geometry.l1_entries_for(size);
        if needed > MAX_L1_BYTES / 8 {
            return Err(Errno::EFBIG);
        }
        let needed = usize::try_from(needed).map_err(|_| Errno::EFBIG)?;
        let shared = self.l1_of(snapshot).await?;
        let old = self.active_l1();
        self.clear_flags(&shared).await?;
        self.raise_tree(&shared).await?;
        let mut entries: Vec<u64> = shared.iter().map(|entry| entry & OFFSET_MASK).collect();
        entries.resize(entries.len().max(needed), 0);
        let switched = self.switch_l1(&entries, size).await;
        if switched.is_err() {
            self.lower_tree(&shared, u64::MAX).await?;
        }
        let old_place = switched?;
        self.lower_tree(&old, u64::MAX).await?;
        self.decompressed.clear();
        self.lower_structure(old_place, old.len() as u64 * 8, self.options.pass_snapshot)
            .await
    }

    /// Makes these entries the active L1 table, and gives the place of the one before. A failure changes nothing.
    async fn switch_l1(&self, entries: &[u64], size: u64) -> Result<u64, Errno> {
        let bytes = entries
            .iter()
            .flat_map(|entry| entry.to_be_bytes())
            .collect();
        let l1_size = u32::try_from(entries.len()).map_err(|_| Errno::EFBIG)?;
        let run = self.store(bytes).await?;
        if let Err(errno) = self.write_out().await {
            self.give_back(run);
            return Err(errno);
        }
        let old = self.header().raw.l1_table_offset.get();
        let offset = run.map_or(0, |run| self.offset_of_run(run));
        let changed = self.change_header(|header| {
            header.raw.l1_table_offset = offset.into();
            header.raw.l1_size = l1_size.into();
            header.raw.size = size.into();
        });
        if let Err(errno) = changed.await {
            self.give_back(run);
            return Err(errno);
        }
        let l1 = L1::empty(entries.len());
        for (index, &entry) in entries.iter().enumerate().filter(|(_, entry)| **entry != 0) {
            l1.set(index, entry);
        }
        {
            let _meta = self.meta();
            self.l1.store(Arc::new(l1));
            self.slices.clear();
        }
        self.size.store(size, Ordering::Release);
        Ok(old)
    }

    fn active_l1(&self) -> Vec<u64> {
        let l1 = self.l1.load();
        (0..l1.len()).map(|index| l1.get(index)).collect()
    }

    /// A snapshot's L1 table.
    async fn l1_of(&self, snapshot: &Snapshot) -> Result<Vec<u64>, Errno> {
        let entries = u64::from(snapshot.l1_size);
        let end = snapshot.l1_offset.checked_add(entries * 8);
        if entries > MAX_L1_BYTES / 8 || self.geometry.in_cluster(snapshot.l1_offset) != 0 {
            return Err(Errno::EINVAL);
        }
        end.ok_or(Errno::EINVAL)?;
        self.read_table(snapshot.l1_offset, entries).await
    }

    fn offset_of_run(&self, run: Run) -> u64 {
        run.cluster << self.geometry.cluster_bits
    }

    /// Writes a snapshot table with these snapshots to a new place.
    async fn store_table(&self, list: Vec<Snapshot>) -> Result<(Snapshots, Option<Run>), Errno> {
        let (snapshots, table) = Snapshots::table(list, self.size())?;
        Ok((snapshots, self.store(table).await?))
    }

    /// Writes a structure to a new place; nothing takes no place.
    async fn store(&self, mut bytes: Vec<u8>) -> Result<Option<Run>, Errno> {
        if bytes.is_empty() {
            return Ok(None);
        }
        let clusters = self.geometry.clusters_for(bytes.len() as u64);
        let run = self
            .with_space(|meta| space(meta)?.allocate_exactly(clusters))
            .await?;
        let len = usize::try_from(clusters << self.geometry.cluster_bits);
        bytes.resize(len.map_err(|_| Errno::ENOMEM)?, 0);
        let written = self
            .children
            .write(
                FILE,
                self.offset_of_run(run),
                IoBuffer::copy_of(&bytes).into(),
                false,
            )
            .await;
        if let Err(errno) = written {
            self.give_back(Some(run));
            return Err(errno);
        }
        Ok(Some(run))
    }

    /// Gives a new place up that nothing on disk names.
    fn give_back(&self, run: Option<Run>) {
        if let Some(Run { cluster, count, .. }) = run {
            let stamp = self.pins.stamp();
            self.meta().frees.push_unlinked(cluster, count, stamp);
        }
    }
}
