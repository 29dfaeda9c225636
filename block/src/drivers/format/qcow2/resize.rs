//! Changes of the guest-visible length. What is new reads as zeroes, whatever lies behind the image or was left in its clusters.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use stord_aio::{Errno, IoBuffer};
use stord_qmp::Error;
use stord_qmp::schema::create::PreallocMode;

use super::Image;
use super::layout::MAX_L1_BYTES;
use super::options::{FreeReason, Overlap};
use super::table::space;
use super::zero::Change;
use crate::driver::{BACKING, DATA_FILE, FILE, WritePiece, ZeroFlags};

/// Zeroes are written in pieces of this many bytes.
const ZEROES: u64 = 1 << 20;

impl Image {
    /// Says why the length cannot become `size` bytes.
    pub(super) fn check_resize(&self, size: u64) -> Result<(), Error> {
        let refuse = |message: &str| Err(Error::generic(message));
        if !size.is_multiple_of(512) {
            return refuse("The new size must be a multiple of 512");
        }
        if self.geometry.version < 3 && !self.snapshots.load().list.is_empty() {
            return refuse("Can't resize a v2 image which has snapshots");
        }
        if self.geometry.l1_entries_for(size) > MAX_L1_BYTES / 8 {
            return refuse("Failed to grow the L1 table: File too large");
        }
        self.check_bitmaps_resize()
    }

    /// Changes the length to `size` bytes.
    pub(super) async fn truncate(
        self: &Arc<Self>,
        size: u64,
        exact: bool,
        preallocation: PreallocMode,
    ) -> Result<(), Errno> {
        if !size.is_multiple_of(512) {
            return Err(Errno::EINVAL);
        }
        if self.geometry.version < 3 && !self.snapshots.load().list.is_empty() {
            // Version 2 does not store the length that a snapshot had.
            return Err(Errno::ENOTSUP);
        }
        self.check_bitmaps_resize().map_err(|_| Errno::ENOTSUP)?;
        self.arm().await?;
        let _order = self.resizing.lock().await;
        let old = self.size();
        if size > old {
            self.grow(old, size, exact, preallocation).await
        } else {
            self.shrink(old, size, exact).await
        }
    }

    async fn grow(
        self: &Arc<Self>,
        old: u64,
        size: u64,
        exact: bool,
        preallocation: PreallocMode,
    ) -> Result<(), Errno> {
        let entries = self.geometry.l1_entries_for(size);
        if entries > MAX_L1_BYTES / 8 {
            return Err(Errno::EFBIG);
        }
        let entries = usize::try_from(entries).map_err(|_| Errno::EFBIG)?;
        // What the header says: the table in memory is longer after a failure.
        let has_room = entries <= self.header().raw.l1_size.get() as usize;
        if !has_room {
            self.grow_l1(entries).await?;
        }
        if self.geometry.data_file && self.children.size(DATA_FILE) < size {
            self.children
                .truncate(DATA_FILE, size, exact, PreallocMode::Off)
                .await?;
        }
        self.zero_new_part(old, size).await?;
        if preallocation != PreallocMode::Off {
            self.preallocate(old, size, preallocation).await?;
        }
        // On disk, too, the new part reads as zeroes before it shows.
        self.write_back().await?;
        if self.geometry.data_file {
            self.children.flush(DATA_FILE).await?;
        }
        self.children.flush(FILE).await?;
        self.set_size(size).await
    }

    async fn zero_new_part(self: &Arc<Self>, old: u64, size: u64) -> Result<(), Errno> {
        let cluster = self.geometry.cluster_size();
        let first_new = old.checked_next_multiple_of(cluster).ok_or(Errno::EFBIG)?;
        // The rest of the last cluster may hold anything.
        let tail = size.min(first_new) - old;
        if tail > 0 {
            let buffer = IoBuffer::zeroed(usize::try_from(tail).map_err(|_| Errno::ENOMEM)?);
            self.read_guest(old, buffer.clone().into()).await?;
            if !buffer.is_zero() {
                self.write_zero_data(old, old + tail).await?;
            }
        }
        if first_new >= size {
            return Ok(());
        }
        let end = size.checked_next_multiple_of(cluster).ok_or(Errno::EFBIG)?;
        self.change_range(first_new, end, Change::Drop).await?;
        let behind = self.children.size(BACKING).min(size);
        if behind > first_new {
            if self.geometry.version < 3 {
                self.write_zero_data(first_new, behind).await?;
            } else {
                let end = behind
                    .checked_next_multiple_of(cluster)
                    .ok_or(Errno::EFBIG)?;
                self.change_range(first_new, end, Change::Zero).await?;
            }
        }
        Ok(())
    }

    /// Allocates all clusters of the new part, which reads as zeroes already, and goes on doing so.
    async fn preallocate(
        self: &Arc<Self>,
        old: u64,
        size: u64,
        mode: PreallocMode,
    ) -> Result<(), Errno> {
        let cluster = self.geometry.cluster_size();
        let start = old.checked_next_multiple_of(cluster).ok_or(Errno::EFBIG)?;
        let last = size.checked_next_multiple_of(cluster).ok_or(Errno::EFBIG)?;
        // A data file is no longer than the disk.
        let end = if self.geometry.data_file { size } else { last };
        let mut at = start;
        while at < end {
            if let Err(errno) = self.preallocate_some(&mut at, end, mode).await {
                // What the first failure left; that this fails, too, changes nothing about it.
                let _ = self.change_range(start, last, Change::Drop).await;
                return Err(errno);
            }
        }
        Ok(())
    }

    async fn preallocate_some(
        self: &Arc<Self>,
        at: &mut u64,
        end: u64,
        mode: PreallocMode,
    ) -> Result<(), Errno> {
        let plan = self.prepare_write(*at, end - *at).await?;
        for piece in &plan.pieces {
            self.reserve(piece, mode).await?;
        }
        if let Some(commit) = plan.commit {
            commit.commit().await?;
        }
        *at += plan.len;
        Ok(())
    }

    /// Makes a piece of a file read as zeroes, with as much space behind it as `mode` wants.
    async fn reserve(&self, piece: &WritePiece, mode: PreallocMode) -> Result<(), Errno> {
        let (child, end) = (piece.child, piece.offset + piece.len);
        let flags = match mode {
            PreallocMode::Full => {
                let mut at = piece.offset;
                while at < end {
                    let len = (end - at).min(ZEROES);
                    let bytes = usize::try_from(len).map_err(|_| Errno::ENOMEM)?;
                    let zeroes = IoBuffer::zeroed(bytes);
                    self.children.write(child, at, zeroes.into(), false).await?;
                    at += len;
                }
                return Ok(());
            }
            PreallocMode::Falloc => ZeroFlags::empty(),
            PreallocMode::Off | PreallocMode::Metadata => ZeroFlags::MAY_UNMAP,
        };
        let length = self.children.size(child);
        if flags.contains(ZeroFlags::MAY_UNMAP) && length < end {
            // Only what is inside a file can be a hole.
            self.children
                .truncate(child, end, true, PreallocMode::Off)
                .await?;
        }
        let in_file = if flags.is_empty() {
            end
        } else {
            end.min(length)
        };
        if piece.offset < in_file {
            self.children
                .write_zeroes(child, piece.offset, in_file - piece.offset, flags)
                .await?;
        }
        Ok(())
    }

    async fn shrink(&self, old: u64, size: u64, exact: bool) -> Result<(), Errno> {
        let cluster = self.geometry.cluster_size();
        let first = size.checked_next_multiple_of(cluster).ok_or(Errno::EFBIG)?;
        let end = old.checked_next_multiple_of(cluster).ok_or(Errno::EFBIG)?;
        self.set_size(size).await?;
        if first < end {
            self.change_range(first, end, Change::Drop).await?;
        }
        if self.geometry.data_file && exact {
            self.children
                .truncate(DATA_FILE, size, exact, PreallocMode::Off)
                .await?;
        }
        Ok(())
    }

    async fn set_size(&self, size: u64) -> Result<(), Errno> {
        self.change_header(|header| header.raw.size = size.into())
            .await?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Moves the L1 table to a place where it has room for `entries`.
    async fn grow_l1(&self, entries: usize) -> Result<(), Errno> {
        let bits = self.geometry.cluster_bits;
        let clusters = self.geometry.clusters_for(entries as u64 * 8);
        let run = self
            .with_space(|meta| space(meta)?.allocate_exactly(clusters))
            .await?;
        let _order = self.writing_back.lock().await;
        let content = loop {
            // A table in the content must be on disk before it, and so must the refcounts of the new place.
            self.write_back_all(self.options.lazy_refcounts).await?;
            let meta = self.meta();
            if meta.l2.l1.is_empty() {
                let grown = self.l1.load().grown(entries);
                let mut content: Vec<u8> = (0..entries)
                    .flat_map(|index| grown.get(index).to_be_bytes())
                    .collect();
                content.resize(
                    usize::try_from(run.count << bits).map_err(|_| Errno::ENOMEM)?,
                    0,
                );
                self.l1.store(Arc::new(grown));
                break content;
            }
        };
        let offset = run.cluster << bits;
        self.children
            .write(FILE, offset, IoBuffer::copy_of(&content).into(), false)
            .await?;
        self.flush_file().await?;
        let (old_offset, old_entries) = {
            let header = self.header();
            (header.raw.l1_table_offset.get(), header.raw.l1_size.get())
        };
        let l1_size = u32::try_from(entries).map_err(|_| Errno::EFBIG)?;
        self.change_header(|header| {
            header.raw.l1_table_offset = offset.into();
            header.raw.l1_size = l1_size.into();
        })
        .await?;
        let mut meta = self.meta();
        let meta = &mut *meta;
        if let Some(space) = &mut meta.space {
            space
                .places
                .add_range(offset, entries as u64 * 8, Overlap::ACTIVE_L1);
        }
        self.note_places(meta);
        let old_clusters = self.geometry.clusters_for(u64::from(old_entries) * 8);
        if old_clusters > 0 {
            let stamp = self.pins.stamp();
            meta.frees.push(
                old_offset >> bits,
                old_clusters,
                Some(FreeReason::Other),
                stamp,
            );
        }
        Ok(())
    }
}
