//! `qcow2`, versions 2 and 3: a map from guest clusters to clusters of the image file, with reference counts.
//!
//! An image is never corrupt after a crash at any point; at worst it has leaked clusters. The rules that give this:
//! - data is on disk before the L2 entry that shows it, and so is the refcount of its cluster;
//! - a new table or refcount block is on disk before what points to it, a new L1 or refcount table before the header;
//! - a cluster that is given up is used again only when no entry on disk refers to it and no request of that time is left.
//!
//! Where to look: `layout` and `header` are the format; `map` answers lookups from `l1` and `cache` without a lock, `load` fills the
//! cache; `compress`, `compressed`, `snapshot`, `info` and `corrupt` do what they say.

mod alloc;
mod arm;
mod backing_name;
mod bitmaps;
mod cache;
pub mod check;
mod clean;
mod compress;
mod compressed;
mod corrupt;
pub(crate) mod create;
mod frees;
mod header;
mod inflight;
mod info;
mod l1;
mod layout;
mod load;
mod map;
mod meta;
mod open;
mod options;
mod overlap;
mod pins;
mod refcount;
mod reserved;
mod resize;
mod single_flight;
mod snapshot;
mod table;
#[cfg(any(test, fuzzing))]
mod tests;
mod unpack;
mod write;
mod writeback;
mod zero;

#[cfg(fuzzing)]
pub(crate) mod fuzzing {
    pub use super::tests::beside::live_beside_model;
    pub use super::tests::untrusted::use_untrusted;
}

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use arc_swap::ArcSwap;
use stord_aio::sync;
use stord_aio::{Errno, IoVec};
use stord_qmp::Error;
use stord_qmp::schema::create::PreallocMode;

use self::bitmaps::Directory;
use self::cache::SliceCache;
use self::clean::Cleaning;
use self::compressed::Decompressed;
use self::header::Header;
use self::l1::L1;
use self::layout::Geometry;
use self::meta::Meta;
use self::options::Options;
use self::pins::Pins;
use self::single_flight::SingleFlight;
use self::snapshot::Snapshots;
use crate::bitmap::Bitmaps;
use crate::driver::{
    BitmapStore, ChildId, DATA_FILE, Extent, FILE, Format, FormatInfo, InternalSnapshots, IoFuture,
    Limits, Lookup, WritePlan, ZeroFlags,
};
use crate::graph::{Children, Reporter};

pub use self::open::{links, open};

/// The driver of a qcow2 image.
pub struct Qcow2(Arc<Image>);

/// An open image, shared by the driver and by the writes that are prepared.
struct Image {
    children: Children,
    geometry: Geometry,
    options: Options,
    /// The image may be written to.
    writable: bool,
    header: Mutex<Header>,
    /// Held while the header is written, so that the last written is the last made.
    header_writes: sync::Mutex<()>,
    /// A change of the header has failed: what the disk has is not known.
    header_unsure: AtomicBool,
    /// The guest-visible length in bytes.
    size: AtomicU64,
    l1: ArcSwap<L1>,
    slices: SliceCache,
    loading: SingleFlight,
    decompressed: Decompressed,
    snapshots: ArcSwap<Snapshots>,
    /// The node's bitmaps, persistent or not.
    bitmaps: Arc<Bitmaps>,
    /// The bitmaps that are stored in the image.
    directory: ArcSwap<Directory>,
    /// Refcounts and flags on disk may contradict each other: the dirty bit stays.
    unsettled: AtomicBool,
    /// Fatal corruption was found; no more requests.
    unusable: AtomicBool,
    /// What [`Image::holds_unwritten`] found.
    unwritten: OnceLock<bool>,
    corruption_reported: AtomicBool,
    /// Who is told of corruption, once the image is in a graph.
    reporter: OnceLock<Reporter>,
    /// The header says what it must before the first change, so that data may be overwritten.
    armed: AtomicBool,
    /// Counts changes of where metadata lies; what [`cache::Slice::checked`] is compared with.
    metadata_places: AtomicU64,
    meta: Mutex<Meta>,
    pins: Pins,
    loading_refcounts: SingleFlight,
    /// L2 tables that are being copied, by L1 index.
    copying: SingleFlight,
    /// Held by whoever writes metadata back.
    writing_back: sync::Mutex<()>,
    resizing: sync::Mutex<()>,
    cleaning: Cleaning,
}

impl Image {
    fn meta(&self) -> MutexGuard<'_, Meta> {
        self.meta.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn header(&self) -> MutexGuard<'_, Header> {
        self.header.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The child that holds guest data.
    fn data_child(&self) -> ChildId {
        if self.geometry.data_file {
            DATA_FILE
        } else {
            FILE
        }
    }

    /// Changes the header, on disk first: memory has the change once it is durable. A failure leaves memory as it was, and the disk
    /// with either; the next write-back puts that right before it does anything else.
    async fn change_header(&self, change: impl FnOnce(&mut Header)) -> Result<(), Errno> {
        let _order = self.header_writes.lock().await;
        let mut header = self.header().clone();
        change(&mut header);
        self.header_unsure.store(true, Ordering::Release);
        self.put_header(&header).await?;
        *self.header() = header;
        self.header_unsure.store(false, Ordering::Release);
        Ok(())
    }

    /// Makes the header on disk the one in memory, if a change of it has failed.
    async fn settle_header(&self) -> Result<(), Errno> {
        if !self.header_unsure.load(Ordering::Acquire) {
            return Ok(());
        }
        self.change_header(|_| {}).await
    }

    async fn put_header(&self, header: &Header) -> Result<(), Errno> {
        self.children
            .write(FILE, 0, header.to_head().into(), false)
            .await?;
        self.children.flush(FILE).await
    }
}

impl Format for Qcow2 {
    fn limits(&self) -> Limits {
        let cluster = u32::try_from(self.0.geometry.cluster_size()).unwrap_or(u32::MAX);
        let subcluster = u32::try_from(self.0.geometry.subcluster_size()).unwrap_or(u32::MAX);
        Limits {
            zero_alignment: subcluster,
            discard_alignment: cluster,
            ..Limits::default()
        }
    }

    fn length(&self) -> u64 {
        self.0.size.load(Ordering::Acquire)
    }

    fn enter(&self) -> u32 {
        self.0.pins.enter()
    }

    fn leave(&self, pin: u32) {
        self.0.pins.leave(pin);
    }

    fn map_read(&self, offset: u64, len: u64) -> Result<Lookup<Extent>, Errno> {
        self.0.map_read(offset, len)
    }

    fn load<'a>(&'a self, offset: u64) -> IoFuture<'a> {
        Box::pin(self.0.load(offset))
    }

    fn read_special<'a>(&'a self, offset: u64, dst: IoVec) -> IoFuture<'a> {
        Box::pin(self.0.read_compressed(offset, dst))
    }

    fn reserved(&self, offset: u64, len: u64) -> Option<Extent> {
        self.0.reserved(offset, len)
    }

    fn holds_unwritten<'a>(&'a self) -> IoFuture<'a, bool> {
        Box::pin(self.0.holds_unwritten())
    }

    fn map_write(&self, offset: u64, len: u64) -> Result<Lookup<Extent>, Errno> {
        self.0.map_write(offset, len)
    }

    fn prepare_write<'a>(&'a self, offset: u64, len: u64) -> IoFuture<'a, WritePlan> {
        Box::pin(self.0.prepare_write(offset, len))
    }

    fn can_compress(&self) -> bool {
        true
    }

    fn write_compressed<'a>(&'a self, offset: u64, src: IoVec) -> IoFuture<'a> {
        Box::pin(self.0.write_compressed(offset, src))
    }

    fn write_zeroes<'a>(&'a self, offset: u64, len: u64, flags: ZeroFlags) -> IoFuture<'a> {
        Box::pin(self.0.write_zeroes(offset, len, flags))
    }

    fn discard<'a>(&'a self, offset: u64, len: u64) -> IoFuture<'a> {
        Box::pin(self.0.discard(offset, len))
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        if self.0.unusable.load(Ordering::Acquire) {
            // What was written before may not have been linked.
            return Box::pin(async { Err(Errno::ENOMEDIUM) });
        }
        Box::pin(self.0.write_back())
    }

    fn check_resize(&self, size: u64) -> Result<(), Error> {
        self.0.check_resize(size)
    }

    fn truncate<'a>(&'a self, size: u64, exact: bool, preallocation: PreallocMode) -> IoFuture<'a> {
        Box::pin(self.0.truncate(size, exact, preallocation))
    }

    fn change_backing_file<'a>(
        &'a self,
        name: Option<String>,
        format: Option<String>,
    ) -> IoFuture<'a> {
        Box::pin(self.0.change_backing_file(name, format))
    }

    fn close<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(self.0.close())
    }

    fn bitmap_store(&self) -> Option<&dyn BitmapStore> {
        Some(self)
    }

    fn tell(&self, reporter: Reporter) {
        // A node has one driver, and a driver one node.
        let _ = self.0.reporter.set(reporter);
    }

    fn snapshots(&self) -> Option<&dyn InternalSnapshots> {
        Some(self)
    }

    fn info(&self) -> FormatInfo {
        self.0.info()
    }
}
