//! Reference counts in memory: the refcount table, and pieces of refcount blocks ("slices"), all under the image's metadata lock.
//!
//! A refcount block that the table on disk does not name yet is *new*: pieces of it that are not in memory are zero, whatever the file
//! holds in its place. It stays new until its whole content and then its table entry have been written.

use std::collections::{BTreeSet, HashMap, VecDeque};

use super::cache::State;
use super::layout::{Geometry, REFTABLE_OFFSET_MASK};

/// Blocks are cached in pieces of at most this many bytes.
const MAX_SLICE: u64 = 4096;

/// What keeps a question about refcounts from being answered at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Missing {
    /// This slice has to be loaded.
    Slice(u64),
    /// The table entry of this block cannot be right.
    BadBlock { index: u64, offset: u64 },
}

#[derive(Debug)]
struct Slice {
    bytes: Vec<u8>,
    state: State,
    used: bool,
}

/// The refcounts of the clusters of the image file.
#[derive(Debug)]
pub(super) struct Refcounts {
    geometry: Geometry,
    /// log2 of the bytes of a slice.
    slice_bits: u32,
    max_slices: usize,
    /// Offsets of the blocks; empty at the end where no block is.
    table: Vec<u64>,
    pub(super) table_offset: u64,
    pub(super) table_clusters: u64,
    /// The table has to be written to its place as a whole, and the header then.
    table_moved: bool,
    slices: HashMap<u64, Slice>,
    /// Slices in memory, in the order in which they are looked at for eviction.
    order: VecDeque<u64>,
    dirty: Vec<u64>,
    new_blocks: BTreeSet<u64>,
}

impl Refcounts {
    pub(super) fn new(
        geometry: Geometry,
        cache_bytes: u64,
        table_offset: u64,
        table_clusters: u64,
    ) -> Self {
        let slice = geometry.cluster_size().min(MAX_SLICE);
        Self {
            geometry,
            slice_bits: slice.trailing_zeros(),
            max_slices: usize::try_from(cache_bytes / slice)
                .unwrap_or(usize::MAX)
                .max(16),
            table: Vec::new(),
            table_offset,
            table_clusters,
            table_moved: false,
            slices: HashMap::new(),
            order: VecDeque::new(),
            dirty: Vec::new(),
            new_blocks: BTreeSet::new(),
        }
    }

    /// Takes the table as read from disk.
    pub(super) fn set_table(&mut self, table: Vec<u64>) {
        self.table = table;
    }

    /// The entries of the table, empty ones at the end left out.
    pub(super) fn table(&self) -> &[u64] {
        &self.table
    }

    /// log2 of the entries of a slice.
    fn slice_entry_bits(&self) -> u32 {
        self.slice_bits + 3 - self.geometry.refcount_order
    }

    fn slice_of(&self, cluster: u64) -> u64 {
        cluster >> self.slice_entry_bits()
    }

    fn index_in_slice(&self, cluster: u64) -> usize {
        let mask = (1u64 << self.slice_entry_bits()) - 1;
        usize::try_from(cluster & mask).expect("less than a slice")
    }

    pub(super) fn block_of(&self, cluster: u64) -> u64 {
        cluster >> self.geometry.refblock_bits()
    }

    fn block_of_slice(&self, slice: u64) -> u64 {
        slice >> (self.geometry.cluster_bits - self.slice_bits)
    }

    fn slices_per_block(&self) -> u64 {
        1 << (self.geometry.cluster_bits - self.slice_bits)
    }

    /// Blocks that the table has room for where it is.
    pub(super) fn capacity(&self) -> u64 {
        self.table_clusters << (self.geometry.cluster_bits - 3)
    }

    /// Where a block is; `None` where there is none.
    fn block_offset(&self, block: u64) -> Result<Option<u64>, Missing> {
        let entry = usize::try_from(block)
            .ok()
            .and_then(|index| self.table.get(index))
            .copied()
            .unwrap_or(0);
        let offset = entry & REFTABLE_OFFSET_MASK;
        if self.geometry.in_cluster(offset) != 0 {
            return Err(Missing::BadBlock {
                index: block,
                offset,
            });
        }
        Ok((offset != 0).then_some(offset))
    }

    /// Whether there is a block for the cluster.
    pub(super) fn has_block(&self, cluster: u64) -> Result<bool, Missing> {
        Ok(self.block_offset(self.block_of(cluster))?.is_some())
    }

    /// Where a slice is on disk.
    pub(super) fn slice_offset(&self, slice: u64) -> Result<Option<u64>, Missing> {
        let block = self.block_offset(self.block_of_slice(slice))?;
        let within = (slice & (self.slices_per_block() - 1)) << self.slice_bits;
        Ok(block.map(|offset| offset + within))
    }

    pub(super) fn slice_bytes(&self) -> usize {
        1 << self.slice_bits
    }

    /// The slice's content, if there is any to look at: `Ok(None)` is all zeroes.
    fn slice(&mut self, number: u64) -> Result<Option<&mut Slice>, Missing> {
        let block = self.block_of_slice(number);
        if self.block_offset(block)?.is_none() {
            return Ok(None);
        }
        let is_new = self.new_blocks.contains(&block);
        match self.slices.get_mut(&number) {
            Some(slice) => {
                slice.used = true;
                Ok(Some(slice))
            }
            None if is_new => Ok(None),
            None => Err(Missing::Slice(number)),
        }
    }

    /// A cluster's refcount.
    pub(super) fn get(&mut self, cluster: u64) -> Result<u64, Missing> {
        let (index, order) = (self.index_in_slice(cluster), self.geometry.refcount_order);
        let slice = self.slice(self.slice_of(cluster))?;
        Ok(slice.map_or(0, |slice| unpack(&slice.bytes, index, order)))
    }

    /// Sets a cluster's refcount; there must be a block for it.
    pub(super) fn set(&mut self, cluster: u64, value: u64) -> Result<(), Missing> {
        let (index, order) = (self.index_in_slice(cluster), self.geometry.refcount_order);
        let number = self.slice_of(cluster);
        if self.slice(number)?.is_none() {
            debug_assert!(
                matches!(self.has_block(cluster), Ok(true)),
                "a refcount without a block"
            );
            let bytes = vec![0; self.slice_bytes()];
            self.insert(number, bytes);
        }
        if let Some(slice) = self.slices.get_mut(&number) {
            pack(&mut slice.bytes, index, order, value);
            match slice.state {
                State::Clean => slice.state = State::Dirty,
                State::Writing => slice.state = State::WritingDirty,
                State::Dirty | State::WritingDirty => return Ok(()),
            }
            self.dirty.push(number);
        }
        Ok(())
    }

    /// The first free cluster from `cluster` on within its slice, or the start of the next slice.
    pub(super) fn next_free(&mut self, cluster: u64) -> Result<Result<u64, u64>, Missing> {
        let (first, order) = (self.index_in_slice(cluster), self.geometry.refcount_order);
        let base = cluster - first as u64;
        let entries = 1usize << self.slice_entry_bits();
        let Some(slice) = self.slice(self.slice_of(cluster))? else {
            return Ok(Ok(cluster));
        };
        let found = (first..entries).find(|&index| unpack(&slice.bytes, index, order) == 0);
        Ok(found
            .map(|index| base + index as u64)
            .ok_or(base + entries as u64))
    }

    /// How many clusters from `cluster` on are free, at most `max`, within its refcount block and as far as memory tells.
    pub(super) fn free_run(&mut self, cluster: u64, max: u64) -> u64 {
        let block_end = (self.block_of(cluster) + 1) << self.geometry.refblock_bits();
        let max = max.min(block_end - cluster);
        let mut count = 0;
        while count < max && matches!(self.get(cluster + count), Ok(0)) {
            count += 1;
        }
        count
    }

    /// Takes a slice in.
    pub(super) fn insert(&mut self, number: u64, bytes: Vec<u8>) {
        let mut looked_at = 0;
        while self.slices.len() >= self.max_slices && looked_at < 2 * self.order.len() {
            looked_at += 1;
            let Some(candidate) = self.order.pop_front() else {
                break;
            };
            match self.slices.get_mut(&candidate) {
                Some(slice) if slice.state == State::Clean && !slice.used => {
                    self.slices.remove(&candidate);
                    break;
                }
                Some(slice) => {
                    slice.used = false;
                    self.order.push_back(candidate);
                }
                None => {}
            }
        }
        let slice = Slice {
            bytes,
            state: State::Clean,
            used: true,
        };
        if self.slices.insert(number, slice).is_none() {
            self.order.push_back(number);
        }
    }

    /// Drops what has not been used since the last call.
    pub(super) fn drop_unused(&mut self) {
        let new_blocks = &self.new_blocks;
        let shift = self.geometry.cluster_bits - self.slice_bits;
        self.slices.retain(|number, slice| {
            slice.state != State::Clean
                || std::mem::take(&mut slice.used)
                // What is not in memory of a new block is zero.
                || new_blocks.contains(&(number >> shift))
        });
        let slices = &self.slices;
        self.order.retain(|number| slices.contains_key(number));
        self.slices.shrink_to_fit();
    }

    /// The number of slices in memory.
    #[cfg(test)]
    pub(super) fn slices(&self) -> usize {
        self.slices.len()
    }

    /// Notes that the table has moved to where it is now.
    pub(super) fn move_table(&mut self, offset: u64) {
        self.table_offset = offset;
        self.table_moved = true;
    }

    /// Whether the slice is in memory.
    pub(super) fn holds(&self, number: u64) -> bool {
        self.slices.contains_key(&number)
    }

    /// Names the place of a block that was not there.
    pub(super) fn add_block(&mut self, block: u64, offset: u64) {
        let index = usize::try_from(block).expect("the table has at most 2^20 entries");
        if self.table.len() <= index {
            self.table.resize(index + 1, 0);
        }
        self.table[index] = offset;
        self.new_blocks.insert(block);
    }

    /// Drops blocks that the table has no room for after all.
    pub(super) fn forget_blocks_from(&mut self, block: u64) {
        self.table
            .truncate(usize::try_from(block).unwrap_or(usize::MAX));
        drop(self.new_blocks.split_off(&block));
        let shift = self.geometry.cluster_bits - self.slice_bits;
        self.slices.retain(|number, _| number >> shift < block);
        self.dirty.retain(|number| number >> shift < block);
    }

    pub(super) fn dirty_slices(&self) -> usize {
        self.dirty.len()
    }

    pub(super) fn is_table_moved(&self) -> bool {
        self.table_moved
    }

    /// Whether nothing has to be written.
    pub(super) fn is_clean(&self) -> bool {
        self.dirty.is_empty() && self.new_blocks.is_empty() && !self.table_moved
    }

    /// Takes out what has to be written: slices of known blocks, whole new blocks, and entries of the table.
    pub(super) fn take_dirty(&mut self) -> RefcountBatch {
        let mut batch = RefcountBatch {
            new_blocks: self.new_blocks.iter().copied().collect(),
            table_moved: self.table_moved.then_some(self.table_offset),
            ..RefcountBatch::default()
        };
        for number in std::mem::take(&mut self.dirty) {
            let is_new = self.new_blocks.contains(&self.block_of_slice(number));
            let offset = self.slice_offset(number);
            if let Some(slice) = self.slices.get_mut(&number) {
                slice.state = State::Writing;
                batch.slices.push(number);
                if let (false, Ok(Some(offset))) = (is_new, offset) {
                    batch.writes.push((offset, slice.bytes.clone()));
                }
            }
        }
        for &block in &batch.new_blocks {
            if let Ok(Some(offset)) = self.block_offset(block) {
                batch.writes.push((offset, self.block_content(block)));
            }
        }
        if self.table_moved {
            let bytes = self.table_clusters << self.geometry.cluster_bits;
            let mut content: Vec<u8> = self
                .table
                .iter()
                .flat_map(|entry| entry.to_be_bytes())
                .collect();
            content.resize(
                usize::try_from(bytes).expect("at most 8 MiB and a cluster"),
                0,
            );
            batch.writes.push((self.table_offset, content));
        } else {
            batch.table_writes = self.table_sectors(&batch.new_blocks);
        }
        batch
    }

    fn block_content(&self, block: u64) -> Vec<u8> {
        let per_block = self.slices_per_block();
        let mut content = Vec::new();
        for number in block * per_block..(block + 1) * per_block {
            match self.slices.get(&number) {
                Some(slice) => content.extend_from_slice(&slice.bytes),
                None => content.resize(content.len() + self.slice_bytes(), 0),
            }
        }
        content
    }

    /// The 512-byte pieces of the table that hold the entries of these blocks.
    fn table_sectors(&self, blocks: &[u64]) -> Vec<(u64, Vec<u8>)> {
        let sectors: BTreeSet<u64> = blocks.iter().map(|block| block / 64).collect();
        let sector = |number: u64| {
            let entry = |index: u64| {
                usize::try_from(index)
                    .ok()
                    .and_then(|index| self.table.get(index))
                    .copied()
                    .unwrap_or(0)
            };
            let bytes =
                (number * 64..(number + 1) * 64).flat_map(|index| entry(index).to_be_bytes());
            (self.table_offset + number * 512, bytes.collect())
        };
        sectors.into_iter().map(sector).collect()
    }

    /// Ends the writing of a batch.
    pub(super) fn written(&mut self, batch: &RefcountBatch, ok: bool) {
        for number in &batch.slices {
            if let Some(slice) = self.slices.get_mut(number) {
                match (slice.state, ok) {
                    (State::Writing, true) => slice.state = State::Clean,
                    (State::Writing, false) => {
                        slice.state = State::Dirty;
                        self.dirty.push(*number);
                    }
                    _ => slice.state = State::Dirty,
                }
            }
        }
        if ok {
            for block in &batch.new_blocks {
                self.new_blocks.remove(block);
            }
            if batch.table_moved == Some(self.table_offset) {
                self.table_moved = false;
            }
        }
    }
}

/// Changes of refcounts on their way to the file.
#[derive(Debug, Default)]
pub(super) struct RefcountBatch {
    slices: Vec<u64>,
    pub(super) new_blocks: Vec<u64>,
    /// The place of a table that was written as a whole.
    pub(super) table_moved: Option<u64>,
    /// Written first.
    pub(super) writes: Vec<(u64, Vec<u8>)>,
    /// Written when the former is on disk.
    pub(super) table_writes: Vec<(u64, Vec<u8>)>,
}

impl RefcountBatch {
    /// The table or its place changes.
    pub(super) fn changes_table(&self) -> bool {
        self.table_moved.is_some() || !self.table_writes.is_empty()
    }
}

/// Entry `index` of a refcount block.
pub(super) fn unpack(bytes: &[u8], index: usize, order: u32) -> u64 {
    if order < 3 {
        let per_byte = 8usize >> order;
        let byte = bytes.get(index / per_byte).copied().unwrap_or(0);
        let shift = (index % per_byte) << order;
        let mask = (1u16 << (1u32 << order)) - 1;
        return u64::from((u16::from(byte) >> shift) & mask);
    }
    let width = 1usize << (order - 3);
    let entry = bytes
        .get(index * width..(index + 1) * width)
        .unwrap_or_default();
    entry
        .iter()
        .fold(0, |value, &byte| value << 8 | u64::from(byte))
}

/// Sets entry `index` of a refcount block to a value that fits.
pub(super) fn pack(bytes: &mut [u8], index: usize, order: u32, value: u64) {
    if order < 3 {
        let per_byte = 8usize >> order;
        let shift = (index % per_byte) << order;
        let mask = (1u16 << (1u32 << order)) - 1;
        if let Some(byte) = bytes.get_mut(index / per_byte) {
            let kept = u16::from(*byte) & !(mask << shift);
            let value = u16::try_from(value & u64::from(mask)).expect("masked to a byte");
            let [low, ..] = (kept | value << shift).to_le_bytes();
            *byte = low;
        }
        return;
    }
    let width = 1usize << (order - 3);
    if let Some(entry) = bytes.get_mut(index * width..(index + 1) * width) {
        entry.copy_from_slice(&value.to_be_bytes()[8 - width..]);
    }
}
