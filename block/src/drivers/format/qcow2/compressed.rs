//! Compressed clusters: read, decompressed on several processors, and the last few kept. Several requests for one cluster decompress
//! it once.
//!
//! A small read decompresses its cluster up to where it ends; the second one that needs more takes the whole. What was decompressed is
//! kept under the cluster's L2 entry. Entries of compressed clusters never change while they are in use, so what is kept stays right
//! until the space behind an entry is freed ([`Decompressed::forget`]).

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stord_aio::sync::Semaphore;
use stord_aio::{Errno, IoBuffer, IoVec, pool};

use super::Image;
use super::layout::CompressedRun;
use super::single_flight::SingleFlight;
use super::unpack::{Packing, unpack};
use crate::driver::{BACKING, ExtentKind, FILE, IoFuture, Lookup};

/// Bytes of decompressed clusters to keep.
const KEEP_BYTES: usize = 1 << 20;
/// Clusters to keep at least, however large they are.
const KEEP_CLUSTERS: usize = 2;
/// So many clusters are read and decompressed at a time, so that a large request does not hold all of its clusters in memory twice.
const AT_A_TIME: usize = 16;

/// The last decompressed clusters.
#[derive(Debug)]
pub(super) struct Decompressed {
    kept: Mutex<VecDeque<(u64, Arc<Vec<u8>>)>>,
    used: AtomicBool,
    under_way: SingleFlight,
    places: Semaphore,
}

impl Default for Decompressed {
    fn default() -> Self {
        Self {
            kept: Mutex::default(),
            used: AtomicBool::new(false),
            under_way: SingleFlight::default(),
            places: Semaphore::new(AT_A_TIME),
        }
    }
}

impl Decompressed {
    fn lock(&self) -> MutexGuard<'_, VecDeque<(u64, Arc<Vec<u8>>)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is kept of a cluster, from its start on.
    fn get(&self, entry: u64) -> Option<Arc<Vec<u8>>> {
        self.used.store(true, Ordering::Relaxed);
        let mut kept = self.lock();
        let at = kept.iter().position(|(key, _)| *key == entry)?;
        let found = kept.remove(at)?;
        let content = Arc::clone(&found.1);
        kept.push_back(found);
        Some(content)
    }

    fn keep(&self, entry: u64, content: &Arc<Vec<u8>>) {
        let mut kept = self.lock();
        kept.retain(|(key, _)| *key != entry);
        kept.push_back((entry, Arc::clone(content)));
        let mut bytes: usize = kept.iter().map(|(_, content)| content.len()).sum();
        while bytes > KEEP_BYTES && kept.len() > KEEP_CLUSTERS {
            bytes -= kept.pop_front().map_or(0, |(_, content)| content.len());
        }
    }

    /// Drops everything.
    pub(super) fn clear(&self) {
        self.lock().clear();
    }

    /// Drops everything, unless something was looked for since the last call; gives the number of bytes.
    pub(super) fn drop_unused(&self) -> usize {
        let mut kept = self.lock();
        if self.used.swap(false, Ordering::Relaxed) {
            return 0;
        }
        std::mem::take(&mut *kept)
            .iter()
            .map(|(_, content)| content.len())
            .sum()
    }

    /// Drops a cluster whose space is given up.
    pub(super) fn forget(&self, entry: u64) {
        self.lock().retain(|(key, _)| *key != entry);
    }
}

impl Image {
    /// Reads from a compressed cluster. If it has been overwritten meanwhile, reads what is there now.
    pub(super) async fn read_compressed(&self, offset: u64, dst: IoVec) -> Result<(), Errno> {
        let Some(entry) = self.compressed_entry(offset).await? else {
            return self.read_guest(offset, dst).await;
        };
        let start = usize::try_from(self.geometry.in_cluster(offset)).map_err(|_| Errno::EINVAL)?;
        let len = usize::try_from(dst.len()).map_err(|_| Errno::EINVAL)?;
        let end = start.checked_add(len).ok_or(Errno::EINVAL)?;
        let content = self.decompressed(entry, end).await?;
        let bytes = content.get(start..end).ok_or(Errno::EINVAL)?;
        dst.write_at(0, bytes);
        Ok(())
    }

    /// Reads a range of the image as its guest sees it now, from inside the driver.
    pub(super) fn read_guest<'a>(&'a self, offset: u64, dst: IoVec) -> IoFuture<'a> {
        Box::pin(async move {
            let mut done = 0;
            while done < dst.len() {
                let at = offset + done;
                let extent = match self.map_read(at, dst.len() - done)? {
                    Lookup::Ready(extent) => extent,
                    Lookup::Load => {
                        self.load(at).await?;
                        continue;
                    }
                };
                let piece = dst.slice(done..done + extent.len);
                done += extent.len;
                match extent.kind {
                    ExtentKind::Zero { .. } => piece.fill(0),
                    ExtentKind::Unallocated if self.children.node(BACKING).is_none() => {
                        piece.fill(0);
                    }
                    ExtentKind::Unallocated => self.children.read(BACKING, at, piece).await?,
                    ExtentKind::Data { child, offset } => {
                        self.children.read(child, offset, piece).await?;
                    }
                    ExtentKind::Special => self.read_compressed(at, piece).await?,
                }
            }
            Ok(())
        })
    }

    /// The content of a compressed cluster, at least its first `needed` bytes.
    async fn decompressed(&self, entry: u64, needed: usize) -> Result<Arc<Vec<u8>>, Errno> {
        let size = usize::try_from(self.geometry.cluster_size()).map_err(|_| Errno::EIO)?;
        if needed > size {
            return Err(Errno::EINVAL);
        }
        loop {
            let is_enough = |content: &Arc<Vec<u8>>| content.len() >= needed;
            if let Some(content) = self.decompressed.get(entry).filter(is_enough) {
                return Ok(content);
            }
            let Some(_flight) = self.decompressed.under_way.begin(entry).await else {
                continue;
            };
            let kept = self.decompressed.get(entry);
            let needed = match kept {
                Some(content) if is_enough(&content) => return Ok(content),
                // Whoever comes a second time comes for all of it.
                Some(_) => size,
                None => needed,
            };
            let packing = Packing {
                zstd: self.geometry.zstd,
                size,
                needed,
            };
            let _place = self.decompressed.places.acquire().await;
            let packed = self.packed(entry).await?;
            let content = pool::compute(move || unpack(&packed, packing)).await?;
            let content = Arc::new(content);
            self.decompressed.keep(entry, &content);
            return Ok(content);
        }
    }

    /// The compressed data of a cluster, and what follows it in its last sector.
    async fn packed(&self, entry: u64) -> Result<Vec<u8>, Errno> {
        let run = CompressedRun::decode(entry, self.geometry.cluster_bits);
        // At most two clusters: the length field is that wide.
        let len = usize::try_from(run.len).map_err(|_| Errno::EIO)?;
        let buffer = IoBuffer::zeroed(len);
        self.children
            .read(FILE, run.offset, buffer.clone().into())
            .await?;
        Ok(buffer.to_vec())
    }
}
