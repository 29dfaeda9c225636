//! Space that is kept for bytes which read as zeroes. Nobody needs to know of it to read or write; it is told to who asks for a map of
//! the image.

use stord_aio::{Errno, IoBuffer};

use super::Image;
use super::cache::Slice;
use super::layout::{Mapping, REFTABLE_OFFSET_MASK};
use super::refcount::unpack;
use crate::driver::{Extent, ExtentKind, FILE};
use crate::io;

impl Image {
    /// The space of the zeroes from `offset` on, as far as it lies in one piece; `None` if the metadata is not in memory any more.
    pub(super) fn reserved(&self, offset: u64, len: u64) -> Option<Extent> {
        let position = self.position(offset);
        let slice = self.slices.get(position.slice)?;
        let in_cluster = self.geometry.in_cluster(offset);
        let first = self.host_of(&slice, position.entry, offset - in_cluster)?;
        let mut known = self.geometry.cluster_size() - in_cluster;
        let mut index = position.entry + 1;
        while known < len
            && index < self.slice_entries()
            && self.host_of(&slice, index, offset + known) == Some(first + in_cluster + known)
        {
            known += self.geometry.cluster_size();
            index += 1;
        }
        Some(Extent {
            kind: ExtentKind::Data {
                child: self.data_child(),
                offset: first + in_cluster,
            },
            len: known.min(len),
        })
    }

    fn host_of(&self, slice: &Slice, index: usize, guest: u64) -> Option<u64> {
        match self.mapping(self.entry(slice, index), guest) {
            Ok(Mapping::ReservedZero { host, .. } | Mapping::Data { host, .. }) => Some(host),
            _ => None,
        }
    }

    /// Whether clearly more clusters are in use than the file has space for: then there is data that was never written, because its
    /// place was reserved when the image was made. The measure is the reference's. Worked out once.
    pub(super) async fn holds_unwritten(&self) -> Result<bool, Errno> {
        if let Some(&known) = self.unwritten.get() {
            return Ok(known);
        }
        let file = self.children.node(FILE).ok_or(Errno::ENOMEDIUM)?;
        let stored = match io::allocated_size(&file).await {
            Ok(bytes) => bytes >> self.geometry.cluster_bits,
            // A server does not say what its disk takes up.
            Err(Errno::ENOTSUP) => return Ok(*self.unwritten.get_or_init(|| false)),
            Err(errno) => return Err(errno),
        };
        let threshold = (stored.saturating_mul(10) / 9).max(stored.saturating_add(2));
        let answer = self.clusters_in_use(threshold).await? >= threshold;
        Ok(*self.unwritten.get_or_init(|| answer))
    }

    /// Clusters of the file with a refcount; counts no further than `enough`.
    async fn clusters_in_use(&self, enough: u64) -> Result<u64, Errno> {
        let geometry = &self.geometry;
        let (offset, clusters) = {
            let header = self.header();
            (
                header.raw.refcount_table_offset.get(),
                u64::from(header.raw.refcount_table_clusters.get()),
            )
        };
        let end = geometry.clusters_for(self.children.size(FILE));
        let blocks = end.div_ceil(1 << geometry.refblock_bits());
        let entries = (clusters << (geometry.cluster_bits - 3)).min(blocks);
        let table = self.read_table(offset, entries).await?;
        let len = usize::try_from(geometry.cluster_size()).map_err(|_| Errno::ENOMEM)?;
        let mut count = 0;
        for (entry, block) in table.into_iter().zip(0u64..) {
            let place = entry & REFTABLE_OFFSET_MASK;
            if place == 0 || geometry.in_cluster(place) != 0 || count >= enough {
                continue;
            }
            let content = IoBuffer::zeroed(len);
            let read = self.children.read(FILE, place, content.clone().into());
            read.await?;
            let bytes = content.to_vec();
            let first = block << geometry.refblock_bits();
            let in_file = (end - first).min(1 << geometry.refblock_bits());
            let in_file = usize::try_from(in_file).map_err(|_| Errno::ENOMEM)?;
            let used = (0..in_file).filter(|&at| unpack(&bytes, at, geometry.refcount_order) != 0);
            count += used.count() as u64;
        }
        Ok(count)
    }
}
