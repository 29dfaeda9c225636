//! Loading of L2 slices. Several requests for one slice make one read.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use stord_aio::{Errno, IoBuffer};

use super::Image;
use super::cache::Slice;
use super::layout::COMPRESSED;
use super::map::Position;
use crate::driver::FILE;

impl Image {
    /// Makes the metadata of `offset` available to `map_read`, or says why that cannot be.
    pub(super) async fn load(&self, offset: u64) -> Result<(), Errno> {
        if self.unusable.load(Ordering::Acquire) {
            return Err(Errno::ENOMEDIUM);
        }
        let position = self.position(offset);
        let Some(slice) = self.load_slice(position).await? else {
            return Ok(());
        };
        let guest = self.geometry.cluster_start(offset);
        let entry = slice.consistent(|| self.entry(&slice, position.entry));
        match entry.map(|entry| self.mapping(entry, guest)) {
            Some(Err(bad)) => Err(self.bad_entry(bad, guest).await),
            _ => Ok(()),
        }
    }

    /// The slice at a position, read if it is not in memory; `None` where there is no L2 table.
    pub(super) async fn load_slice(&self, position: Position) -> Result<Option<Arc<Slice>>, Errno> {
        loop {
            if let Some(slice) = self.slices.get(position.slice) {
                return Ok(Some(slice));
            }
            let Some(_flight) = self.loading.begin(position.slice).await else {
                continue;
            };
            if let Some(slice) = self.slices.get(position.slice) {
                return Ok(Some(slice));
            }
            return self.read_slice(position).await;
        }
    }

    async fn read_slice(&self, position: Position) -> Result<Option<Arc<Slice>>, Errno> {
        let Some(table) = self.l1.load().table(position.l1_index) else {
            return Ok(None);
        };
        if self.geometry.in_cluster(table.offset) != 0 {
            let message = format!(
                "L2 table offset {:#x} unaligned (L1 index: {:#x})",
                table.offset, position.l1_index
            );
            return Err(self.corruption(true, &message).await);
        }
        let words = self.slice_entries() * self.geometry.entry_words();
        let slice = if self.meta().l2.new_tables.contains_key(&position.l1_index) {
            Slice::empty(position.slice, words)
        } else {
            let buffer = IoBuffer::zeroed(words * 8);
            let at = table.offset + self.offset_in_table(position.slice);
            self.children.read(FILE, at, buffer.clone().into()).await?;
            Slice::from_disk(position.slice, &buffer)
        };
        let slice = Arc::new(slice);
        loop {
            let inserted = {
                let _meta = self.meta();
                self.slices.insert(Arc::clone(&slice))
            };
            match inserted {
                Ok(()) => return Ok(Some(slice)),
                // Everything that could make room is dirty.
                Err(_) => self.write_back().await?,
            }
        }
    }

    /// Bytes from the start of its L2 table to a slice.
    pub(super) fn offset_in_table(&self, slice: u64) -> u64 {
        let slices_per_table = 1u64 << (self.geometry.cluster_bits - self.options.slice_bits);
        (slice & (slices_per_table - 1)) << self.options.slice_bits
    }

    /// The compressed cluster's entry at `offset`, if it is one now.
    pub(super) async fn compressed_entry(&self, offset: u64) -> Result<Option<u64>, Errno> {
        let position = self.position(offset);
        let Some(slice) = self.load_slice(position).await? else {
            return Ok(None);
        };
        let entry = slice.consistent(|| self.entry(&slice, position.entry));
        let word = entry.map_or(0, |entry| entry.word);
        Ok((word & COMPRESSED != 0).then_some(word))
    }
}
