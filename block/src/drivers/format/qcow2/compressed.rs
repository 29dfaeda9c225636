//! Compressed clusters: read, decompressed on the blocking pool, and the last few kept. Several requests for one cluster decompress it
//! once.
//!
//! A cluster's decompressed content is kept under its L2 entry. Entries of compressed clusters never change while they are in use, so
//! what is kept stays right until the space behind an entry is freed ([`Decompressed::forget`]).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use flate2::{Decompress, FlushDecompress, Status};
use stord_aio::{Errno, IoBuffer, IoVec, pool};

use super::Image;
use super::layout::CompressedRun;
use super::single_flight::SingleFlight;
use crate::driver::{BACKING, ExtentKind, FILE, IoFuture, Lookup};

/// Bytes of decompressed clusters to keep.
const KEEP_BYTES: usize = 1 << 20;
/// Clusters to keep at least, however large they are.
const KEEP_CLUSTERS: usize = 2;

/// The last decompressed clusters.
#[derive(Debug, Default)]
pub(super) struct Decompressed {
    kept: Mutex<VecDeque<(u64, Arc<[u8]>)>>,
    under_way: SingleFlight,
}

impl Decompressed {
    fn lock(&self) -> MutexGuard<'_, VecDeque<(u64, Arc<[u8]>)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, entry: u64) -> Option<Arc<[u8]>> {
        let mut kept = self.lock();
        let at = kept.iter().position(|(key, _)| *key == entry)?;
        let found = kept.remove(at)?;
        let content = Arc::clone(&found.1);
        kept.push_back(found);
        Some(content)
    }

    fn keep(&self, entry: u64, content: &Arc<[u8]>) {
        let most = (KEEP_BYTES / content.len().max(1)).max(KEEP_CLUSTERS);
        let mut kept = self.lock();
        kept.push_back((entry, Arc::clone(content)));
        while kept.len() > most {
            kept.pop_front();
        }
    }

    /// Drops everything.
    pub(super) fn clear(&self) {
        self.lock().clear();
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
        let content = self.decompressed(entry).await?;
        let start = usize::try_from(self.geometry.in_cluster(offset)).map_err(|_| Errno::EINVAL)?;
        let len = usize::try_from(dst.len()).map_err(|_| Errno::EINVAL)?;
        let bytes = content
            .get(start..)
            .and_then(|rest| rest.get(..len))
            .ok_or(Errno::EINVAL)?;
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

    async fn decompressed(&self, entry: u64) -> Result<Arc<[u8]>, Errno> {
        loop {
            if let Some(content) = self.decompressed.get(entry) {
                return Ok(content);
            }
            let Some(_flight) = self.decompressed.under_way.begin(entry).await else {
                continue;
            };
            if let Some(content) = self.decompressed.get(entry) {
                return Ok(content);
            }
            let run = CompressedRun::decode(entry, self.geometry.cluster_bits);
            // At most two clusters: the length field is that wide.
            let len = usize::try_from(run.len).map_err(|_| Errno::EIO)?;
            let buffer = IoBuffer::zeroed(len);
            self.children
                .read(FILE, run.offset, buffer.clone().into())
                .await?;
            let packed = buffer.to_vec();
            let size = usize::try_from(self.geometry.cluster_size()).map_err(|_| Errno::EIO)?;
            let zstd = self.geometry.zstd;
            let content: Arc<[u8]> = pool::run(move || unpack(&packed, size, zstd)).await?.into();
            self.decompressed.keep(entry, &content);
            return Ok(content);
        }
    }
}

/// Decompresses one cluster; what follows it in `packed` does not matter.
pub(super) fn unpack(packed: &[u8], size: usize, zstd: bool) -> Result<Vec<u8>, Errno> {
    let mut content = vec![0; size];
    if zstd {
        unzstd(packed, &mut content)
    } else {
        inflate(packed, &mut content)
    }?;
    Ok(content)
}

fn inflate(packed: &[u8], content: &mut [u8]) -> Result<(), Errno> {
    let mut stream = Decompress::new(false);
    let status = stream
        .decompress(packed, content, FlushDecompress::Finish)
        .map_err(|_| Errno::EIO)?;
    let whole = stream.total_out() == content.len() as u64;
    match status {
        Status::Ok | Status::StreamEnd | Status::BufError if whole => Ok(()),
        _ => Err(Errno::EIO),
    }
}

/// Decompresses frame by frame straight into place, so that a frame's window costs no memory.
fn unzstd(packed: &[u8], content: &mut [u8]) -> Result<(), Errno> {
    let mut decompressor = zstd::bulk::Decompressor::new().map_err(|_| Errno::ENOMEM)?;
    let (mut from, mut to) = (0, 0);
    while to < content.len() {
        let rest = packed.get(from..).ok_or(Errno::EIO)?;
        let frame = zstd::zstd_safe::find_frame_compressed_size(rest).map_err(|_| Errno::EIO)?;
        let frame = rest.get(..frame).ok_or(Errno::EIO)?;
        let written = decompressor
            .decompress_to_buffer(frame, &mut content[to..])
            .map_err(|_| Errno::EIO)?;
        if frame.is_empty() || written == 0 {
            return Err(Errno::EIO);
        }
        from += frame.len();
        to += written;
    }
    Ok(())
}
