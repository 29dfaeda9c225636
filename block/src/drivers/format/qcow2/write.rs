//! Allocating writes: clusters are taken, the caller writes them, and the commit links them into the L2 table.
//!
//! From the plan to its end the guest clusters are in flight: whoever wants to change them waits. What the caller writes covers, beside
//! the payload, the parts of the clusters (or subclusters) around it that become visible with it: copied from what the guest reads
//! there now, or zeroes, or nothing where the file is known to read as zeroes. Nothing refers to the clusters until the commit, so a
//! failure or a crash before it changes nothing for the guest.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use smallvec::{SmallVec, smallvec};
use stord_aio::Errno;
use stord_aio::sync::Notify;

use super::Image;
use super::alloc::AllocError;
use super::cache::Slice;
use super::layout::{
    BadEntry, COMPRESSED, COPIED, CompressedRun, Mapping, OFFSET_MASK, SUBCLUSTERS, Subclusters,
};
use super::map::{Entry, Position};
use super::meta::Meta;
use super::options::FreeReason;
use super::table::space;
use crate::driver::{
    BACKING, ExtentKind, IoFuture, PieceSource, WriteCommit, WritePiece, WritePlan,
};

/// Why there is no plan yet.
pub(super) enum Obstacle {
    /// Something has changed; look again.
    Again,
    /// The clusters are in flight.
    Wait(IoFuture<'static>),
    Alloc(AllocError),
    Bad(BadEntry, u64),
}

impl Obstacle {
    /// Waits from now on until the clusters are given back.
    pub(super) fn wait(ended: Arc<Notify>) -> Self {
        let ended = ended.notified_owned();
        Self::Wait(Box::pin(async move {
            ended.await;
            Ok(())
        }))
    }
}

impl<E: Into<AllocError>> From<E> for Obstacle {
    fn from(error: E) -> Self {
        Self::Alloc(error.into())
    }
}

/// Where the bytes of a guest cluster will be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// In the cluster that it has.
    Same(u64),
    /// In a new one.
    New,
}

/// Guest clusters that get their place, and the part of them that is written.
struct Linking {
    cluster: u64,
    count: u64,
    /// The host offset of the first.
    host: u64,
    target: Target,
    written: Range<u64>,
}

/// Clusters in flight; the commit of a plan.
struct Allocation {
    image: Arc<Image>,
    linking: Linking,
    is_over: bool,
}

impl Image {
    /// Plans a write from `offset` on.
    pub(super) async fn prepare_write(
        self: &Arc<Self>,
        offset: u64,
        len: u64,
    ) -> Result<WritePlan, Errno> {
        self.arm().await?;
        self.relieve().await?;
        let position = self.position(offset);
        loop {
            self.make_table_writable(position.l1_index).await?;
            if self.load_slice(position).await?.is_none() {
                continue;
            }
            let planned = {
                let mut meta = self.meta();
                let planned = self.plan(&mut meta, position, offset, len);
                self.note_places(&meta);
                planned
            };
            match planned {
                Ok(plan) => return Ok(plan),
                Err(obstacle) => self.overcome(obstacle).await?,
            }
        }
    }

    /// Waits for what is in the way, or says why it stays there.
    pub(super) async fn overcome(&self, obstacle: Obstacle) -> Result<(), Errno> {
        match obstacle {
            Obstacle::Again => Ok(()),
            Obstacle::Wait(ended) => ended.await,
            Obstacle::Alloc(error) => self.provide(error).await,
            Obstacle::Bad(BadEntry::Unaligned(offset), guest) => {
                let message =
                    format!("Data cluster offset {offset:#x} unaligned (guest offset: {guest:#x})");
                Err(self.corruption(true, &message).await)
            }
            Obstacle::Bad(bad, guest) => Err(self.bad_entry(bad, guest).await),
        }
    }

    fn plan(
        self: &Arc<Self>,
        meta: &mut Meta,
        position: Position,
        offset: u64,
        len: u64,
    ) -> Result<WritePlan, Obstacle> {
        let bits = self.geometry.cluster_bits;
        let slice = self.slices.get(position.slice).ok_or(Obstacle::Again)?;
        let first = offset >> bits;
        if let Some(ended) = meta.inflight.holder_of(first) {
            return Err(Obstacle::wait(ended));
        }
        let slice_end = (position.slice + 1) << self.slice_shift();
        let mut end = (offset + len).min(slice_end);
        if let Some(taken) = meta.inflight.next_after(first) {
            end = end.min(taken << bits);
        }
        self.check_slice(meta, &slice);
        if let Some(extent) = self.run_in_place(&slice, position, offset, end - offset)
            && let ExtentKind::Data {
                child,
                offset: host,
            } = extent.kind
        {
            self.check_data(meta, &slice, host, extent.len)?;
            let payload = WritePiece {
                guest: offset,
                len: extent.len,
                child,
                offset: host,
                source: PieceSource::Payload,
            };
            return Ok(WritePlan {
                pieces: smallvec![payload],
                len: extent.len,
                commit: None,
            });
        }
        self.plan_allocation(meta, &slice, position, offset..end)
    }

    fn plan_allocation(
        self: &Arc<Self>,
        meta: &mut Meta,
        slice: &Slice,
        position: Position,
        request: Range<u64>,
    ) -> Result<WritePlan, Obstacle> {
        let bits = self.geometry.cluster_bits;
        let first = request.start >> bits;
        let (target, count) = self.target_run(slice, position.entry, request.clone())?;
        let (host, count, fresh) = match target {
            Target::Same(host) => {
                self.check_data(meta, slice, host, count << bits)?;
                (host, count, false)
            }
            Target::New if self.geometry.data_file => (first << bits, count, false),
            Target::New => {
                let run = space(meta)?.allocate(count)?;
                (run.cluster << bits, run.count, run.fresh)
            }
        };
        let end = request.end.min((first + count) << bits);
        let last = position.entry + usize::try_from(count - 1).unwrap_or(0);
        let (low, head) = self.low_edge(self.entry(slice, position.entry), target, request.start);
        let (high, tail) = self.high_edge(self.entry(slice, last), target, end);
        let to_host = |guest: u64| host + (guest - (first << bits));
        let mut pieces: SmallVec<[WritePiece; 3]> = SmallVec::new();
        for (range, source) in [
            (low..request.start, head),
            (request.start..end, PieceSource::Payload),
            (end..high, tail),
        ] {
            let is_there_already = source == PieceSource::Zeroes && fresh;
            if !range.is_empty() && !is_there_already {
                pieces.push(WritePiece {
                    guest: range.start,
                    len: range.end - range.start,
                    child: self.data_child(),
                    offset: to_host(range.start),
                    source,
                });
            }
        }
        meta.inflight.take(first..first + count);
        let linking = Linking {
            cluster: first,
            count,
            host,
            target,
            written: low..high,
        };
        let commit = Box::new(Allocation {
            image: Arc::clone(self),
            linking,
            is_over: false,
        });
        Ok(WritePlan {
            pieces,
            len: end - request.start,
            commit: Some(commit),
        })
    }

    /// Where the clusters of the request will be, and how many of them, from the first on, can be dealt with alike.
    fn target_run(
        &self,
        slice: &Slice,
        index: usize,
        request: Range<u64>,
    ) -> Result<(Target, u64), Obstacle> {
        let bits = self.geometry.cluster_bits;
        let first = request.start >> bits;
        let most = ((request.end - 1) >> bits) - first + 1;
        let target_of = |number: u64| {
            let guest = (first + number) << bits;
            let at = index + usize::try_from(number).unwrap_or(usize::MAX);
            self.mapping(self.entry(slice, at), guest)
                .map_err(|bad| Obstacle::Bad(bad, guest))
                .map(|mapping| match mapping {
                    Mapping::ReservedZero { host, copied: true } => Some(Target::Same(host)),
                    Mapping::Data { host, copied: true } if self.geometry.extended_l2 => {
                        Some(Target::Same(host))
                    }
                    Mapping::Data { copied: true, .. } => None,
                    _ => Some(Target::New),
                })
        };
        let target = target_of(0)?.ok_or(Obstacle::Again)?;
        let fits = |number: u64| match (target, target_of(number)) {
            (Target::New, Ok(Some(Target::New))) => true,
            (Target::Same(host), Ok(Some(Target::Same(next)))) => next == host + (number << bits),
            _ => false,
        };
        let count = (1..most).take_while(|&number| fits(number)).count() as u64 + 1;
        Ok((target, count))
    }

    /// Where the bytes for a piece come from that the guest reads from subclusters (or a cluster) with nothing stored.
    fn source_of_unstored(&self, zero: bool, guest: u64) -> PieceSource {
        let behind = self
            .children
            .with(BACKING, |node| node.map_or(0, |node| node.size()));
        if zero || guest >= behind {
            PieceSource::Zeroes
        } else {
            PieceSource::Existing
        }
    }

    /// How far before `offset` the write has to begin, and with what.
    fn low_edge(&self, entry: Entry, target: Target, offset: u64) -> (u64, PieceSource) {
        let start = self.geometry.cluster_start(offset);
        let mapping = self.mapping(entry, start).unwrap_or(Mapping::Unallocated);
        match mapping {
            Mapping::Compressed => return (start, PieceSource::Existing),
            _ if self.geometry.extended_l2 => {}
            Mapping::Data { .. } => return (start, PieceSource::Existing),
            Mapping::Unallocated => return (start, self.source_of_unstored(false, start)),
            Mapping::Zero | Mapping::ReservedZero { .. } => return (start, PieceSource::Zeroes),
        }
        let (allocated, zero) = (entry.subclusters.allocated(), entry.subclusters.zero());
        let (number, sub_start) = self.subcluster_of(offset);
        let is_stored = allocated >> number & 1 == 1;
        if is_stored && target != Target::New {
            return (offset, PieceSource::Existing);
        }
        let first_stored =
            start + (u64::from(allocated.trailing_zeros()) << self.geometry.subcluster_bits());
        if target == Target::New && allocated != 0 && first_stored < sub_start || is_stored {
            return (sub_start.min(first_stored), PieceSource::Existing);
        }
        (
            sub_start,
            self.source_of_unstored(zero >> number & 1 == 1, sub_start),
        )
    }

    /// How far behind `end` the write has to go on, and with what.
    fn high_edge(&self, entry: Entry, target: Target, end: u64) -> (u64, PieceSource) {
        let start = self.geometry.cluster_start(end - 1);
        let (high, source) = self.unclipped_high_edge(entry, target, start, end);
        // A data file is no longer than the disk.
        let limit = if self.geometry.data_file {
            self.size.load(Ordering::Acquire).max(end)
        } else {
            u64::MAX
        };
        (high.min(limit), source)
    }

    fn unclipped_high_edge(
        &self,
        entry: Entry,
        target: Target,
        start: u64,
        end: u64,
    ) -> (u64, PieceSource) {
        let cluster_end = start + self.geometry.cluster_size();
        let mapping = self.mapping(entry, start).unwrap_or(Mapping::Unallocated);
        match mapping {
            Mapping::Compressed => return (cluster_end, PieceSource::Existing),
            _ if self.geometry.extended_l2 => {}
            Mapping::Data { .. } => return (cluster_end, PieceSource::Existing),
            Mapping::Unallocated => return (cluster_end, self.source_of_unstored(false, end)),
            Mapping::Zero | Mapping::ReservedZero { .. } => {
                return (cluster_end, PieceSource::Zeroes);
            }
        }
        let (allocated, zero) = (entry.subclusters.allocated(), entry.subclusters.zero());
        let (number, sub_start) = self.subcluster_of(end - 1);
        let sub_end = sub_start + self.geometry.subcluster_size();
        let is_stored = allocated >> number & 1 == 1;
        if is_stored && target != Target::New {
            return (end, PieceSource::Existing);
        }
        let last_stored = start
            + (u64::from(SUBCLUSTERS - allocated.leading_zeros())
                << self.geometry.subcluster_bits());
        if target == Target::New && last_stored > sub_end || is_stored {
            return (sub_end.max(last_stored), PieceSource::Existing);
        }
        (
            sub_end,
            self.source_of_unstored(zero >> number & 1 == 1, end),
        )
    }

    /// The number of the subcluster of a guest offset in its cluster, and where it starts.
    pub(super) fn subcluster_of(&self, guest: u64) -> (u32, u64) {
        let bits = self.geometry.subcluster_bits();
        let number = self.geometry.in_cluster(guest) >> bits;
        (u32::try_from(number).unwrap_or(0), guest >> bits << bits)
    }

    /// Compares a slice's entries with the places of metadata, unless that has been done since those last changed.
    fn check_slice(&self, meta: &Meta, slice: &Slice) {
        let places = self.metadata_places.load(Ordering::Acquire);
        if slice.checked.load(Ordering::Acquire) == places {
            return;
        }
        let Some(space) = &meta.space else { return };
        let words = self.geometry.entry_words();
        let hits = |index: usize| {
            let word = slice.word(index * words);
            let is_data = word & COMPRESSED == 0 && word & OFFSET_MASK != 0;
            is_data
                && space
                    .places
                    .hit(
                        (word & OFFSET_MASK) >> self.geometry.cluster_bits,
                        &self.geometry,
                    )
                    .is_some()
        };
        if self.geometry.data_file || !(0..self.slice_entries()).any(hits) {
            slice.checked.store(places, Ordering::Release);
        }
    }

    /// Refuses a write of data to where metadata is. Most slices are known to be harmless as a whole.
    fn check_data(&self, meta: &Meta, slice: &Slice, host: u64, len: u64) -> Result<(), Obstacle> {
        if slice.checked.load(Ordering::Acquire) == self.metadata_places.load(Ordering::Acquire)
            || self.geometry.data_file
        {
            return Ok(());
        }
        let Some(space) = &meta.space else {
            return Ok(());
        };
        let bits = self.geometry.cluster_bits;
        let clusters = host >> bits..=(host + len - 1) >> bits;
        let hit = |cluster| {
            let kind = space.places.hit(cluster, &self.geometry)?;
            Some(AllocError::Overlap { kind, cluster })
        };
        match clusters.into_iter().find_map(hit) {
            Some(overlap) => Err(overlap.into()),
            None => Ok(()),
        }
    }

    /// Gives up what an entry refers to, once that is no longer on disk.
    pub(super) fn free_entry(&self, meta: &mut Meta, entry: Entry, discard: Option<FreeReason>) {
        if self.geometry.data_file {
            return;
        }
        let bits = self.geometry.cluster_bits;
        let stamp = self.pins.stamp();
        if entry.word & COMPRESSED != 0 {
            let run = CompressedRun::decode(entry.word, bits);
            let (first, last) = (run.offset >> bits, (run.offset + run.len - 1) >> bits);
            self.decompressed.forget(entry.word);
            meta.frees.push(first, last - first + 1, discard, stamp);
        } else if entry.word & OFFSET_MASK != 0 {
            meta.frees
                .push((entry.word & OFFSET_MASK) >> bits, 1, discard, stamp);
        }
    }

    /// Puts the clusters' new entries into a slice.
    fn link(&self, meta: &mut Meta, slice: &Arc<Slice>, linking: &Linking) {
        let geometry = &self.geometry;
        for number in 0..linking.count {
            let guest = (linking.cluster + number) << geometry.cluster_bits;
            let index = self.position(guest).entry;
            let old = self.entry(slice, index);
            let word = (linking.host + (number << geometry.cluster_bits)) | COPIED;
            if geometry.extended_l2 {
                let written = self.subclusters_in(guest, &linking.written);
                let kept = if linking.target == Target::New {
                    0
                } else {
                    old.subclusters.allocated()
                };
                let zero = if old.word & COMPRESSED != 0 {
                    0
                } else {
                    old.subclusters.zero() & !written
                };
                slice.set(2 * index, &[word, Subclusters::new(kept | written, zero).0]);
            } else {
                slice.set(index, &[word]);
            }
            if linking.target == Target::New {
                self.free_entry(meta, old, None);
            }
        }
        meta.l2.mark(slice);
    }

    /// The subclusters of the cluster at `guest` that a guest range touches.
    pub(super) fn subclusters_in(&self, guest: u64, range: &Range<u64>) -> u32 {
        let end = guest + self.geometry.cluster_size();
        let (low, high) = (range.start.clamp(guest, end), range.end.clamp(guest, end));
        if low >= high {
            return 0;
        }
        let (first, _) = self.subcluster_of(low);
        let (last, _) = self.subcluster_of(high - 1);
        Subclusters::range(first, last - first + 1)
    }
}

impl WriteCommit for Allocation {
    fn commit(mut self: Box<Self>) -> IoFuture<'static> {
        Box::pin(async move {
            let image = Arc::clone(&self.image);
            let position = image.position(self.linking.cluster << image.geometry.cluster_bits);
            loop {
                image.load_slice(position).await?;
                let mut meta = image.meta();
                let Some(slice) = image.slices.get(position.slice) else {
                    continue;
                };
                image.link(&mut meta, &slice, &self.linking);
                meta.inflight.give_back(self.linking.cluster);
                self.is_over = true;
                return Ok(());
            }
        })
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        let image = &self.image;
        let mut meta = image.meta();
        meta.inflight.give_back(self.linking.cluster);
        if self.linking.target == Target::New && !image.geometry.data_file {
            let cluster = self.linking.host >> image.geometry.cluster_bits;
            meta.frees
                .push_unlinked(cluster, self.linking.count, image.pins.stamp());
        }
    }
}
