//! Compressed writes: clusters are compressed on the blocking pool, several at a time, packed one behind the other into clusters of the
//! file, written, and linked.
//!
//! The order is that of every allocating write: the refcounts of the clusters touched go up first, the data is written, then the L2
//! entries change in memory; write-back does the rest. From the allocation to its end a guest cluster is in flight. What does not get
//! smaller is written as it is.

use flate2::{Compress, Compression, FlushCompress, Status};
use smallvec::SmallVec;
use std::sync::Arc;

use stord_aio::{Errno, IoBuffer, IoVec, join_all, pool};

use super::Image;
use super::layout::CompressedRun;
use super::meta::Meta;
use super::table::space;
use super::write::Obstacle;
use crate::driver::{FILE, IoFuture, PieceSource};

/// Bytes of guest data that one request has compressed and in memory at a time.
const AT_ONCE: u64 = 1 << 20;
/// Clusters that one request compresses at a time.
const CLUSTERS_AT_ONCE: std::ops::RangeInclusive<u64> = 2..=64;

/// log2 of the window that readers of the format expect.
const WINDOW_BITS: u8 = 12;

/// A guest cluster with a place for its compressed data. Dropping it before it is linked undoes the allocation.
struct Packed {
    image: Arc<Image>,
    /// The number of the guest cluster.
    cluster: u64,
    /// Where the data goes, in bytes of the file.
    offset: u64,
    /// The L2 entry to be.
    word: u64,
    data: IoVec,
    is_over: bool,
}

impl Image {
    /// Writes whole clusters, of which the last may end with the disk, compressed where that makes them smaller.
    pub(super) async fn write_compressed(
        self: &Arc<Self>,
        offset: u64,
        src: IoVec,
    ) -> Result<(), Errno> {
        if self.geometry.data_file {
            return Err(Errno::ENOTSUP);
        }
        let end = offset.checked_add(src.len()).ok_or(Errno::EINVAL)?;
        let ends_well = self.geometry.in_cluster(end) == 0 || end == self.size();
        if self.geometry.in_cluster(offset) != 0 || !ends_well {
            return Err(Errno::EINVAL);
        }
        self.arm().await?;
        let bits = self.geometry.cluster_bits;
        let (least, most) = CLUSTERS_AT_ONCE.into_inner();
        let step = (AT_ONCE >> bits).clamp(least, most) << bits;
        let mut done = 0;
        while done < src.len() {
            let len = (src.len() - done).min(step);
            self.write_some(offset + done, src.slice(done..done + len))
                .await?;
            done += len;
        }
        Ok(())
    }

    async fn write_some(self: &Arc<Self>, offset: u64, src: IoVec) -> Result<(), Errno> {
        let cluster = self.geometry.cluster_size();
        let pieces: Vec<(u64, IoVec)> = (0..src.len().div_ceil(cluster))
            .map(|number| {
                let start = number * cluster;
                let end = src.len().min(start + cluster);
                (offset + start, src.slice(start..end))
            })
            .collect();
        let compressing = pieces.iter().map(|(_, piece)| self.compress(piece));
        let compressed = join_all(compressing.collect()).await;
        let mut packed = Vec::new();
        let mut plain = Vec::new();
        for ((at, piece), compressed) in pieces.into_iter().zip(compressed) {
            match compressed? {
                Some(data) => match self.pack(at, data).await? {
                    Some(place) => packed.push(place),
                    None => plain.push((at, piece)),
                },
                None => plain.push((at, piece)),
            }
        }
        self.write_packed(&packed).await?;
        for place in packed {
            place.link().await?;
        }
        for (at, piece) in plain {
            self.write_plain(at, piece).await?;
        }
        Ok(())
    }

    /// The compressed content of a cluster, where that is smaller.
    async fn compress(&self, piece: &IoVec) -> Result<Option<Vec<u8>>, Errno> {
        let mut content = piece.to_vec();
        let size = usize::try_from(self.geometry.cluster_size()).map_err(|_| Errno::ENOMEM)?;
        content.resize(size, 0);
        let zstd = self.geometry.zstd;
        Ok(pool::compute(move || shrink(&content, zstd)).await)
    }

    /// Takes a place for the data of the guest cluster at `guest`; `None` if no entry can name the only one there is.
    async fn pack(self: &Arc<Self>, guest: u64, data: Vec<u8>) -> Result<Option<Packed>, Errno> {
        self.relieve().await?;
        let position = self.position(guest);
        let len = data.len() as u64;
        loop {
            self.make_table_writable(position.l1_index).await?;
            if self.load_slice(position).await?.is_none() {
                continue;
            }
            let taken = {
                let mut meta = self.meta();
                let taken = self.take_place(&mut meta, guest, len);
                self.note_places(&meta);
                taken
            };
            match taken {
                Ok((offset, word)) => {
                    let packed = Packed {
                        image: Arc::clone(self),
                        cluster: guest >> self.geometry.cluster_bits,
                        offset,
                        word: word.unwrap_or(0),
                        data: IoBuffer::from_vec(data).into(),
                        is_over: false,
                    };
                    // Dropped where no entry can name the place, which gives it back.
                    return Ok(word.map(|_| packed));
                }
                Err(obstacle) => self.overcome(obstacle).await?,
            }
        }
    }

    /// Gives the place and the entry that names it, if one can.
    fn take_place(
        &self,
        meta: &mut Meta,
        guest: u64,
        len: u64,
    ) -> Result<(u64, Option<u64>), Obstacle> {
        let bits = self.geometry.cluster_bits;
        let cluster = guest >> bits;
        if let Some(ended) = meta.inflight.holder_of(cluster) {
            return Err(Obstacle::wait(ended));
        }
        let offset = space(meta)?.allocate_bytes(len)?;
        meta.inflight.take(cluster..cluster + 1);
        Ok((offset, CompressedRun::encode(offset, len, bits)))
    }

    /// Writes the data, what lies side by side in the file as one.
    async fn write_packed(&self, packed: &[Packed]) -> Result<(), Errno> {
        let mut runs: SmallVec<[(u64, IoVec); 4]> = SmallVec::new();
        for place in packed {
            match runs.last_mut() {
                Some((offset, run)) if *offset + run.len() == place.offset => {
                    run.append(place.data.clone());
                }
                _ => runs.push((place.offset, place.data.clone())),
            }
        }
        let writes = runs.into_iter().map(|(offset, run)| -> IoFuture<'_> {
            Box::pin(self.children.write(FILE, offset, run, false))
        });
        join_all(writes.collect()).await.into_iter().collect()
    }

    /// Writes as any other write does, from inside the driver.
    async fn write_plain(self: &Arc<Self>, offset: u64, src: IoVec) -> Result<(), Errno> {
        let mut done = 0;
        while done < src.len() {
            let at = offset + done;
            let plan = self.prepare_write(at, src.len() - done).await?;
            for piece in &plan.pieces {
                let bytes: IoVec = match piece.source {
                    PieceSource::Payload => {
                        let from = piece.guest - offset;
                        src.slice(from..from + piece.len)
                    }
                    PieceSource::Zeroes | PieceSource::Existing => {
                        let len = usize::try_from(piece.len).map_err(|_| Errno::ENOMEM)?;
                        IoBuffer::zeroed(len).into()
                    }
                };
                if piece.source == PieceSource::Existing {
                    self.read_guest(piece.guest, bytes.clone()).await?;
                }
                self.children
                    .write(piece.child, piece.offset, bytes, false)
                    .await?;
            }
            if let Some(commit) = plan.commit {
                commit.commit().await?;
            }
            done += plan.len;
        }
        Ok(())
    }
}

impl Packed {
    /// Puts the entry into its slice; the data is written.
    async fn link(mut self) -> Result<(), Errno> {
        let image = Arc::clone(&self.image);
        let guest = self.cluster << image.geometry.cluster_bits;
        let position = image.position(guest);
        loop {
            image.load_slice(position).await?;
            let mut meta = image.meta();
            let Some(slice) = image.slices.get(position.slice) else {
                continue;
            };
            let old = image.entry(&slice, position.entry);
            // What was kept under this entry was another cluster's, of a time when it had the place.
            image.decompressed.forget(self.word);
            if image.geometry.extended_l2 {
                slice.set(2 * position.entry, &[self.word, 0]);
            } else {
                slice.set(position.entry, &[self.word]);
            }
            image.free_entry(&mut meta, old, None);
            meta.l2.mark(&slice);
            meta.inflight.give_back(self.cluster);
            self.is_over = true;
            return Ok(());
        }
    }
}

impl Drop for Packed {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        let bits = self.image.geometry.cluster_bits;
        let mut meta = self.image.meta();
        meta.inflight.give_back(self.cluster);
        let (first, last) = (
            self.offset >> bits,
            (self.offset + self.data.len() - 1) >> bits,
        );
        meta.frees
            .push_unlinked(first, last - first + 1, self.image.pins.stamp());
    }
}

/// Compresses a cluster; `None` if it does not get smaller.
fn shrink(content: &[u8], zstd: bool) -> Option<Vec<u8>> {
    let mut packed = vec![0; content.len() - 1];
    let len = if zstd {
        zstd::bulk::compress_to_buffer(content, &mut packed, zstd::DEFAULT_COMPRESSION_LEVEL)
            .ok()?
    } else {
        deflate(content, &mut packed)?
    };
    packed.truncate(len);
    Some(packed)
}

fn deflate(content: &[u8], packed: &mut [u8]) -> Option<usize> {
    let mut stream = Compress::new_with_window_bits(Compression::default(), false, WINDOW_BITS);
    match stream.compress(content, packed, FlushCompress::Finish) {
        Ok(Status::StreamEnd) => usize::try_from(stream.total_out()).ok(),
        _ => None,
    }
}
