//! Zero writes and discards: changes of entries alone. Clusters in flight are waited for; space that is given up goes through the same
//! quarantine as any other.
//!
//! Where the guest gave a range up, the file below may lose its content at once: whether a crash brings back the old content or zeroes
//! there, both are right.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use stord_aio::{Errno, IoBuffer};

use super::Image;
use super::cache::Slice;
use super::layout::{COMPRESSED, COPIED, Mapping, OFFSET_MASK, Subclusters, ZERO};
use super::map::Entry;
use super::meta::Meta;
use super::options::FreeReason;
use super::write::Obstacle;
use crate::driver::{BACKING, DATA_FILE, ZeroFlags};

/// What becomes of the entries of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// They read as zeroes and keep their space.
    Zero,
    /// They read as zeroes and give their space up.
    ZeroAndUnmap,
    /// They give their space up; where something lies behind the image, they read as zeroes.
    Discard,
    /// They are emptied.
    Drop,
}

/// What came of changing some entries of a slice.
#[derive(Default)]
struct Changed {
    /// Up to here, in guest bytes.
    end: u64,
    /// Space that has been given up and whose content is of no more use, in bytes of the data child.
    discards: Vec<Range<u64>>,
}

impl Image {
    /// Makes a range read as zeroes.
    pub(super) async fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<(), Errno> {
        let unmap = flags.contains(ZeroFlags::MAY_UNMAP);
        let change = match (self.geometry.version, unmap) {
            (3, true) => Change::ZeroAndUnmap,
            (3, false) => Change::Zero,
            // Version 2 has no zero flag, but what is not there reads as zeroes if nothing lies behind.
            (_, true) if !self.has_backing() => Change::Drop,
            _ => return Err(Errno::ENOTSUP),
        };
        self.arm().await?;
        if self.geometry.data_file_raw {
            let below = flags - ZeroFlags::DURABLE;
            self.children
                .write_zeroes(DATA_FILE, offset, len, below)
                .await?;
        }
        self.change_range(offset, offset + len, change).await
    }

    /// Gives a range up.
    pub(super) async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        if self.geometry.version < 3 && self.has_backing() {
            // What lies behind would show.
            return Err(Errno::ENOTSUP);
        }
        self.arm().await?;
        if self.geometry.data_file_raw {
            // Both views of the data file must agree on the content.
            self.children
                .write_zeroes(DATA_FILE, offset, len, ZeroFlags::MAY_UNMAP)
                .await?;
        }
        self.change_range(offset, offset + len, Change::Discard)
            .await
    }

    /// Whether anything lies behind the image, now or when it is opened with what its header names.
    pub(super) fn has_backing(&self) -> bool {
        self.children.node(BACKING).is_some() || self.header().backing_file.is_some()
    }

    /// Changes the entries of a range that is aligned to subclusters, or reaches the disk's end.
    pub(super) async fn change_range(
        &self,
        start: u64,
        end: u64,
        change: Change,
    ) -> Result<(), Errno> {
        let unit = self.geometry.subcluster_size();
        let end = end.checked_next_multiple_of(unit).ok_or(Errno::EFBIG)?;
        let has_backing = self.has_backing();
        let mut at = start;
        while at < end {
            self.relieve().await?;
            let position = self.position(at);
            let nothing_there = self.l1.load().table(position.l1_index).is_none();
            if nothing_there && (!has_backing || change == Change::Drop) {
                at = ((at >> self.geometry.l1_shift()) + 1) << self.geometry.l1_shift();
                continue;
            }
            self.make_table_writable(position.l1_index).await?;
            if self.load_slice(position).await?.is_none() {
                continue;
            }
            // What is given up here must not be used again before it has been discarded below.
            let _pin = self.pins.hold();
            let changed = {
                let mut meta = self.meta();
                let changed = self.change_slice(&mut meta, at..end, change, has_backing);
                self.note_places(&meta);
                changed
            };
            match changed {
                Ok(changed) => {
                    self.discard_below(&changed.discards).await?;
                    at = changed.end;
                }
                Err(obstacle) => self.overcome(obstacle).await?,
            }
        }
        Ok(())
    }

    fn change_slice(
        &self,
        meta: &mut Meta,
        range: Range<u64>,
        change: Change,
        has_backing: bool,
    ) -> Result<Changed, Obstacle> {
        let position = self.position(range.start);
        let slice = self.slices.get(position.slice).ok_or(Obstacle::Again)?;
        let bits = self.geometry.cluster_bits;
        let end = range.end.min((position.slice + 1) << self.slice_shift());
        let mut changed = Changed {
            end: range.start,
            discards: Vec::new(),
        };
        while changed.end < end {
            let cluster = changed.end >> bits;
            if let Some(ended) = meta.inflight.holder_of(cluster) {
                if changed.end == range.start {
                    return Err(Obstacle::wait(ended));
                }
                break;
            }
            let within = changed.end..end.min((cluster + 1) << bits);
            self.change_cluster(
                meta,
                &slice,
                within.clone(),
                change,
                has_backing,
                &mut changed.discards,
            )?;
            changed.end = within.end;
        }
        Ok(changed)
    }

    /// Changes the entry of one cluster, of which `range` may be a part.
    fn change_cluster(
        &self,
        meta: &mut Meta,
        slice: &Arc<Slice>,
        range: Range<u64>,
        change: Change,
        has_backing: bool,
        discards: &mut Vec<Range<u64>>,
    ) -> Result<(), Obstacle> {
        let guest = self.geometry.cluster_start(range.start);
        let index = self.position(guest).entry;
        let old = self.entry(slice, index);
        let mapping = self
            .mapping(old, guest)
            .map_err(|bad| Obstacle::Bad(bad, guest))?;
        let is_whole = range.end - range.start == self.geometry.cluster_size();
        let new = if is_whole {
            self.changed_entry(old, mapping, change, has_backing)
        } else {
            self.changed_subclusters(old, mapping, guest, &range)?
        };
        if new == old {
            return Ok(());
        }
        if self.geometry.extended_l2 {
            slice.set(2 * index, &[new.word, new.subclusters.0]);
        } else {
            slice.set(index, &[new.word]);
        }
        meta.l2.mark(slice);
        let host = old.word & OFFSET_MASK;
        let is_stored = matches!(mapping, Mapping::Data { .. } | Mapping::ReservedZero { .. });
        let gave_up = is_whole && change != Change::Zero;
        let discard_now = gave_up
            && is_stored
            && old.word & COPIED != 0
            && self.options.passes(FreeReason::Request);
        if discard_now && !self.geometry.data_file_raw {
            note_discard(discards, host..host + self.geometry.cluster_size());
        }
        if new.word & (OFFSET_MASK | COMPRESSED) != old.word & (OFFSET_MASK | COMPRESSED) {
            self.free_entry(meta, old, (!discard_now).then_some(FreeReason::Request));
        }
        Ok(())
    }

    fn changed_entry(
        &self,
        old: Entry,
        mapping: Mapping,
        change: Change,
        has_backing: bool,
    ) -> Entry {
        let is_allocated = !matches!(mapping, Mapping::Unallocated | Mapping::Zero);
        let zeroed = |word: u64| Entry {
            word: if self.geometry.extended_l2 {
                word
            } else {
                word | ZERO
            },
            subclusters: if self.geometry.extended_l2 {
                Subclusters::ALL_ZERO
            } else {
                Subclusters(0)
            },
        };
        let empty = Entry {
            word: 0,
            subclusters: Subclusters(0),
        };
        let keeps =
            mapping != Mapping::Compressed && (change == Change::Zero || self.options.no_unref);
        let kept = if keeps { old.word } else { 0 };
        match change {
            Change::Drop => empty,
            // Nothing is there and nothing lies behind: it reads as zeroes.
            _ if !is_allocated && !has_backing => old,
            Change::Discard if self.geometry.version < 3 => empty,
            Change::Zero | Change::ZeroAndUnmap | Change::Discard => zeroed(kept),
        }
    }

    /// The entry when some subclusters of a cluster read as zeroes.
    fn changed_subclusters(
        &self,
        old: Entry,
        mapping: Mapping,
        guest: u64,
        range: &Range<u64>,
    ) -> Result<Entry, Obstacle> {
        if mapping == Mapping::Compressed || !self.geometry.extended_l2 {
            return Err(super::alloc::AllocError::NotSupported.into());
        }
        let zeroed = self.subclusters_in(guest, range);
        Ok(Entry {
            word: old.word,
            subclusters: Subclusters::new(
                old.subclusters.allocated() & !zeroed,
                old.subclusters.zero() | zeroed,
            ),
        })
    }

    async fn discard_below(&self, discards: &[Range<u64>]) -> Result<(), Errno> {
        for range in discards {
            // A hint: that it fails changes nothing.
            let _ = self
                .children
                .discard(self.data_child(), range.start, range.end - range.start)
                .await;
        }
        Ok(())
    }

    /// Writes zeroes as data, from inside the driver.
    pub(super) async fn write_zero_data(
        self: &Arc<Self>,
        start: u64,
        end: u64,
    ) -> Result<(), Errno> {
        const STEP: u64 = 1 << 20;
        let mut at = start;
        while at < end {
            let plan = self.prepare_write(at, (end - at).min(STEP)).await?;
            for piece in &plan.pieces {
                let len = usize::try_from(piece.len).map_err(|_| Errno::ENOMEM)?;
                let bytes = IoBuffer::zeroed(len);
                if piece.source == crate::driver::PieceSource::Existing {
                    self.read_guest(piece.guest, bytes.clone().into()).await?;
                }
                self.children
                    .write(piece.child, piece.offset, bytes.into(), false)
                    .await?;
            }
            if let Some(commit) = plan.commit {
                commit.commit().await?;
            }
            at += plan.len;
        }
        Ok(())
    }

    /// The guest-visible length in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }
}

fn note_discard(discards: &mut Vec<Range<u64>>, range: Range<u64>) {
    match discards.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => discards.push(range),
    }
}
