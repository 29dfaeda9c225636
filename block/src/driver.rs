//! What a driver promises the block layer, and what the block layer promises a driver.
//!
//! There are two kinds. A [`Protocol`] is a leaf: it takes whole requests and does them. A [`Format`] answers where bytes are;
//! the generic request path (`crate::io`) moves them, straight between the caller's memory and the leaf.
//!
//! A driver may rely on this for every request it gets:
//! - it lies on the node's [`Limits`]: aligned to `request_alignment`, at most `max_transfer` bytes, never empty;
//! - no write, zero, discard or truncate reaches a node that is read-only;
//! - `close` and changes of permissions come when no request is in flight;
//! - it may be called from every I/O context at once.
//!
//! A driver must do this:
//! - never block the calling thread (the blocking pool is `stord_aio::pool`);
//! - never panic on anything an image or a peer contains;
//! - report a failure as an errno on the request, and keep its own state consistent after it.

use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;

use bitflags::bitflags;
use smallvec::SmallVec;
use stord_aio::{Errno, IoVec};
use stord_qmp::Error;
use stord_qmp::schema::block::BlockdevDriver;
use stord_qmp::schema::create::PreallocMode;
use stord_qmp::schema::node_info::SnapshotInfo;

use crate::bitmap::Bitmaps;
use crate::graph::{Claim, NodeOptions, Permissions, Reporter, storage_claim};

/// The future of a request inside the block layer; it stays on the context that made it.
pub type IoFuture<'a, T = ()> = Pin<Box<dyn Future<Output = Result<T, Errno>> + 'a>>;

/// The future of something that is asked of a driver on behalf of the user, whose failure is told in words.
pub type DriverFuture<'a, T = ()> = Pin<Box<dyn Future<Output = Result<T, Error>> + 'a>>;

/// The driver of a node.
pub enum Driver {
    /// A leaf that takes whole requests.
    Protocol(Box<dyn Protocol>),
    /// A map from guest offsets to extents of children.
    Format(Box<dyn Format>),
}

bitflags! {
    /// How zeroes are to be written.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ZeroFlags: u8 {
        /// The range may be deallocated as long as it reads as zeroes.
        const MAY_UNMAP = 1;
        /// Fail with `ENOTSUP` rather than write buffers full of zeroes.
        const NO_FALLBACK = 2;
        /// Durable when the request completes.
        const DURABLE = 4;
    }
}

/// What requests a node takes without help from the generic layer; all in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Offsets and lengths of reads and writes are multiples of this power of two.
    pub request_alignment: u32,
    /// Memory addresses are multiples of this power of two.
    pub memory_alignment: u32,
    /// No single read or write is longer; 0 is no limit.
    pub max_transfer: u32,
    /// `write_zeroes` is called with multiples of this power of two; the rest is written as data.
    pub zero_alignment: u32,
    /// `discard` is called with multiples of this power of two; the rest is left as it is.
    pub discard_alignment: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            request_alignment: 1,
            memory_alignment: 1,
            max_transfer: 0,
            zero_alignment: 1,
            discard_alignment: 1,
        }
    }
}

/// What is known of the bytes at an offset, and for how many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockStatus {
    /// Bytes from the queried offset on that share this status; at least 1, never beyond the queried range.
    pub len: u64,
    /// The range is stored as data (it may still read as zeroes).
    pub data: bool,
    /// The range reads as zeroes.
    pub zero: bool,
    /// The layer asked decides the content, rather than one behind it.
    pub allocated: bool,
}

/// A leaf of the graph: it takes whole requests.
pub trait Protocol: Send + Sync {
    /// The limits of the leaf as it is now.
    fn limits(&self) -> Limits;

    /// The length in bytes when the node opens; the node keeps it from then on.
    fn length(&self) -> u64;

    /// Reads into all of `dst`; bytes past the end of the file read as zeroes.
    fn read<'a>(&'a self, offset: u64, dst: IoVec) -> IoFuture<'a>;

    /// Reads at once if that needs no waiting; `None` where it would.
    fn try_read(&self, offset: u64, dst: &IoVec) -> Option<Result<(), Errno>> {
        let _ = (offset, dst);
        None
    }

    /// Writes all of `src`, extending the file where it ends earlier.
    fn write<'a>(&'a self, offset: u64, src: IoVec, durable: bool) -> IoFuture<'a>;

    /// Writes at once if that needs no waiting; `None` where it would: then the whole has to be written again.
    fn try_write(&self, offset: u64, src: &IoVec) -> Option<Result<(), Errno>> {
        let _ = (offset, src);
        None
    }

    /// Makes the range read as zeroes, or fails with `ENOTSUP` if only writing data could.
    fn write_zeroes<'a>(&'a self, offset: u64, len: u64, flags: ZeroFlags) -> IoFuture<'a>;

    /// Gives the range's space back; what it reads as afterwards is undefined. `ENOTSUP` counts as done.
    fn discard<'a>(&'a self, offset: u64, len: u64) -> IoFuture<'a>;

    /// Makes every completed write durable.
    fn flush<'a>(&'a self) -> IoFuture<'a>;

    /// The status of the range's beginning.
    fn status<'a>(&'a self, offset: u64, len: u64) -> IoFuture<'a, BlockStatus>;

    /// Changes the length. `exact` forbids a longer result than asked for. Space for what is new is reserved as `preallocation` says,
    /// which is never `Full`: the generic layer writes the zeroes. `ENOTSUP` where that cannot be; a failure leaves the length as it was.
    fn truncate<'a>(&'a self, size: u64, exact: bool, preallocation: PreallocMode) -> IoFuture<'a>;

    /// Bytes the storage takes up in fact, where the leaf knows.
    fn allocated_size<'a>(&'a self) -> IoFuture<'a, u64>;

    /// Makes ready for these permissions, before any node of the transaction commits. Runs on the control thread and does not
    /// wait.
    ///
    /// # Errors
    /// The permissions cannot be had: a lock is held elsewhere, the file cannot be opened for writing.
    fn prepare_permissions(
        &self,
        permissions: Permissions,
        shared: Permissions,
    ) -> Result<(), Error> {
        let _ = (permissions, shared);
        Ok(())
    }

    /// Takes over what `prepare_permissions` made ready.
    fn commit_permissions(&self) {}

    /// Forgets what `prepare_permissions` made ready.
    fn abort_permissions(&self) {}

    /// A regular file that holds the leaf's bytes one for one, opened anew for reading only, and whether it is to be read past the page
    /// cache.
    fn plain_file(&self) -> Option<(OwnedFd, bool)> {
        None
    }

    /// What the leaf has discarded, where it counts that.
    fn discard_counts(&self) -> Option<stord_qmp::schema::statistics::BlockStatsSpecificFile> {
        None
    }

    /// A second leaf on the same storage, for other options; this one stays as it is. Runs on the control thread, in a drained
    /// section.
    ///
    /// # Errors
    /// An option cannot be changed, or the storage cannot be opened as the options want.
    fn reopened(
        &self,
        driver: &BlockdevDriver,
        options: &NodeOptions,
    ) -> Result<Box<dyn Protocol>, Error> {
        let _ = (driver, options);
        Err(Error::generic("The driver does not support reopening"))
    }

    /// Takes note that others may have changed the storage: forgets what is cached of it, and gives its length. Comes when the node
    /// becomes active, in a drained section.
    fn refresh<'a>(&'a self) -> Pin<Box<dyn Future<Output = Result<u64, Error>> + 'a>> {
        Box::pin(async { Ok(self.length()) })
    }

    /// The file name that leads here, as `query-named-block-nodes` reports it.
    fn filename(&self) -> String;

    /// Whether an open file other than this node's would be this node's file: the file system's device and inode numbers.
    fn identity(&self) -> Option<(u64, u64)> {
        None
    }
}

/// The number of a child within its node, in the order the driver declares its children.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChildId(pub u8);

/// The child that holds a format's image file.
pub const FILE: ChildId = ChildId(0);
/// The child behind a format: what it does not hold itself is read from here.
pub const BACKING: ChildId = ChildId(1);
/// The child that holds guest data where a format keeps it apart from its metadata.
pub const DATA_FILE: ChildId = ChildId(2);

/// Where a run of guest bytes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// In the child, from this offset on.
    Data {
        /// The child that holds the bytes.
        child: ChildId,
        /// The child's byte offset of the first of them.
        offset: u64,
    },
    /// Nowhere: the bytes are zero.
    Zero {
        /// Space is reserved for them in the image all the same.
        reserved: bool,
    },
    /// Not in this layer: ask the backing child, or take zeroes where there is none.
    Unallocated,
    /// Only the driver can make the bytes (compressed clusters): call [`Format::read_special`].
    Special,
}

/// A run of guest bytes that are found in one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where the bytes are.
    pub kind: ExtentKind,
    /// How many bytes, from the queried offset on: at least 1, at most as many as asked for.
    pub len: u64,
}

/// An answer from a map whose metadata may not be in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup<T> {
    /// The answer.
    Ready(T),
    /// The metadata has to be read first: await [`Format::load`], or take the slow way.
    Load,
}

/// From where a piece of a write takes its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PieceSource {
    /// From the request.
    Payload,
    /// From what the guest reads there now (copy on write).
    Existing,
    /// Zeroes.
    Zeroes,
}

/// A piece of a write: guest bytes that go to one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WritePiece {
    /// The guest offset of the first byte.
    pub guest: u64,
    /// Bytes.
    pub len: u64,
    /// The child to write to.
    pub child: ChildId,
    /// The child's offset.
    pub offset: u64,
    /// Where the bytes come from.
    pub source: PieceSource,
}

/// How a write is to be done: write every piece, then commit. Dropping the plan without committing undoes the allocation.
pub struct WritePlan {
    /// The pieces, ascending in guest order; pieces adjacent in the child are written as one.
    pub pieces: SmallVec<[WritePiece; 3]>,
    /// Request bytes that the plan covers, from the request's start on: at least 1.
    pub len: u64,
    /// What to call when all pieces are written; `None` when no metadata changes.
    pub commit: Option<Box<dyn WriteCommit>>,
}

/// A prepared allocation. Until it ends, other writes, zeroes and discards of the same clusters wait for it. Dropping it undoes
/// the allocation.
pub trait WriteCommit {
    /// Links the written clusters into the map.
    fn commit(self: Box<Self>) -> IoFuture<'static>;
}

/// What an image says of the files it needs beside itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageLinks {
    /// The name of the backing file as stored in the image.
    pub backing_file: Option<String>,
    /// The format of the backing file as stored in the image.
    pub backing_format: Option<String>,
    /// The image keeps its data in another file; the name may be missing.
    pub data_file: Option<Option<String>>,
}

/// A map from guest offsets to extents.
///
/// Reads ask [`map_read`](Format::map_read). Writes ask [`map_write`](Format::map_write) first, which answers for clusters that can be
/// overwritten in place, and otherwise [`prepare_write`](Format::prepare_write). The caller holds a pin (`enter`/`leave`) from before
/// the first question until the last byte has moved: space freed meanwhile is not used again before all pins of that time are gone.
pub trait Format: Send + Sync {
    /// The limits of the format itself, not of what lies below.
    fn limits(&self) -> Limits;

    /// The guest-visible length in bytes when the node opens; the node keeps it from then on.
    fn length(&self) -> u64;

    /// Whether every byte is at the same offset of the file child.
    fn is_plain(&self) -> bool {
        false
    }

    /// Pins the space that later answers name; the result goes to `leave`.
    fn enter(&self) -> u32 {
        0
    }

    /// Ends a pin.
    fn leave(&self, pin: u32) {
        let _ = pin;
    }

    /// Says where the bytes from `offset` on are, for at most `len` bytes.
    ///
    /// # Errors
    /// `EIO` for metadata that cannot be right.
    fn map_read(&self, offset: u64, len: u64) -> Result<Lookup<Extent>, Errno>;

    /// Reads the metadata that `map_read` of this offset needs.
    fn load<'a>(&'a self, offset: u64) -> IoFuture<'a>;

    /// Makes the bytes of an [`ExtentKind::Special`] extent. The range lies within that extent.
    fn read_special<'a>(&'a self, offset: u64, dst: IoVec) -> IoFuture<'a> {
        let _ = (offset, dst);
        Box::pin(async { Err(Errno::ENOTSUP) })
    }

    /// Where space is kept for the bytes from `offset` on, which `map_read` has just called zero and reserved: always `Data`. `None` if
    /// that is not in memory any more.
    fn reserved(&self, offset: u64, len: u64) -> Option<Extent> {
        let _ = (offset, len);
        None
    }

    /// Whether much of what the map calls data was never written, so that it is worth asking the child whether it has holes there.
    fn holds_unwritten<'a>(&'a self) -> IoFuture<'a, bool> {
        Box::pin(async { Ok(false) })
    }

    /// Says where bytes can be overwritten in place without a change of metadata: always `Data`. `Load` for everything else.
    ///
    /// # Errors
    /// `EIO` for metadata that cannot be right.
    fn map_write(&self, offset: u64, len: u64) -> Result<Lookup<Extent>, Errno>;

    /// Allocates for a write. Waits for writes in flight to the same clusters.
    fn prepare_write<'a>(&'a self, offset: u64, len: u64) -> IoFuture<'a, WritePlan>;

    /// Whether the format can store data compressed.
    fn can_compress(&self) -> bool {
        false
    }

    /// Writes whole clusters compressed; the last may be cut off by the disk's end. What does not get smaller is written as it is.
    /// `EINVAL` for parts of clusters, `ENOTSUP` where the image cannot hold compressed data.
    fn write_compressed<'a>(&'a self, offset: u64, src: IoVec) -> IoFuture<'a> {
        let _ = (offset, src);
        Box::pin(async { Err(Errno::ENOTSUP) })
    }

    /// Whether writes are taken whole, by [`write`](Format::write), rather than mapped: a filter that does something with them.
    fn takes_writes(&self) -> bool {
        false
    }

    /// Takes a write, where [`takes_writes`](Format::takes_writes).
    fn write<'a>(&'a self, offset: u64, src: IoVec) -> IoFuture<'a> {
        let _ = (offset, src);
        Box::pin(async { Err(Errno::ENOTSUP) })
    }

    /// Makes the range, aligned to `zero_alignment` or reaching the end, read as zeroes. `ENOTSUP` asks for data to be written.
    fn write_zeroes<'a>(&'a self, offset: u64, len: u64, flags: ZeroFlags) -> IoFuture<'a>;

    /// Gives the range, aligned to `discard_alignment` or reaching the end, back.
    fn discard<'a>(&'a self, offset: u64, len: u64) -> IoFuture<'a>;

    /// Hands all metadata of completed writes to the children, in the order that keeps the image consistent. The caller flushes
    /// the children afterwards.
    fn flush<'a>(&'a self) -> IoFuture<'a>;

    /// Whether the status of data is to be asked from the child that holds it (true where the format is a window on it).
    fn status_of_child(&self) -> bool {
        false
    }

    /// Says why the guest-visible length cannot become `size` bytes, as far as that is known before trying.
    ///
    /// # Errors
    /// In the reference's wording.
    fn check_resize(&self, size: u64) -> Result<(), Error> {
        let _ = size;
        Ok(())
    }

    /// Changes the guest-visible length. What is new reads as zeroes; space for it is reserved as `preallocation` says, `ENOTSUP` where
    /// that cannot be.
    fn truncate<'a>(&'a self, size: u64, exact: bool, preallocation: PreallocMode) -> IoFuture<'a>;

    /// What the node claims of `child`, given what its own parents want and share. The default is for formats with metadata in their
    /// file.
    fn child_claim(
        &self,
        child: ChildId,
        wanted: Permissions,
        shared: Permissions,
        writable: bool,
    ) -> Claim {
        storage_claim(child, wanted, shared, writable)
    }

    /// Changes what the image calls its backing file, and the format of that; `None` for no backing file.
    fn change_backing_file<'a>(
        &'a self,
        name: Option<String>,
        format: Option<String>,
    ) -> IoFuture<'a> {
        let _ = (name, format);
        Box::pin(async { Err(Errno::ENOTSUP) })
    }

    /// Called when the node closes or becomes inactive, after its last request: writes everything out and leaves the image clean.
    fn close<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async { Ok(()) })
    }

    /// The internal snapshots; `None` for a format that has no such thing.
    fn snapshots(&self) -> Option<&dyn InternalSnapshots> {
        None
    }

    /// Where bitmaps are stored; `None` for a format that cannot.
    fn bitmap_store(&self) -> Option<&dyn BitmapStore> {
        None
    }

    /// Learns, when the node joins a graph, whom to tell of what it finds.
    fn tell(&self, reporter: Reporter) {
        let _ = reporter;
    }

    /// What `query-named-block-nodes` tells of the image beyond the generic members.
    fn info(&self) -> FormatInfo {
        FormatInfo::default()
    }
}

/// An image that stores bitmaps: those of its node that are persistent are loaded when it opens and stored when it closes.
pub trait BitmapStore: Send + Sync {
    /// The node's bitmaps: the driver puts in what it loads, the graph what users add.
    fn bitmaps(&self) -> Arc<Bitmaps>;

    /// Checks whether one more bitmap could be stored.
    ///
    /// # Errors
    /// Why not.
    fn check_new(&self, name: &str, granularity_bits: u32) -> Result<(), Error>;

    /// Removes what is stored of a bitmap. Runs on an I/O context, in a drained section.
    fn remove<'a>(&'a self, name: &'a str) -> DriverFuture<'a>;
}

/// What is known of an internal snapshot before it is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSnapshot {
    /// The name.
    pub name: String,
    /// When it is made, in seconds since 1970 UTC.
    pub date_sec: u32,
    /// The nanoseconds of that second.
    pub date_nsec: u32,
    /// The machine's clock in nanoseconds.
    pub vm_clock_nsec: u64,
}

/// Snapshots inside an image. They change only in a drained section, on an I/O context; nobody but the control thread, which is in that
/// section, asks for changes, so that an index stays good between the list and the change.
pub trait InternalSnapshots: Send + Sync {
    /// All of them, in the order of the image.
    ///
    /// # Errors
    /// `ENOTSUP` for an image that cannot have any.
    fn list(&self) -> Result<Vec<SnapshotInfo>, Errno>;

    /// The length in bytes that the disk had in a snapshot.
    fn disk_size(&self, index: usize) -> Option<u64>;

    /// Makes a snapshot of the present content. It is on disk when this returns.
    fn create<'a>(&'a self, new: NewSnapshot) -> IoFuture<'a>;

    /// Deletes a snapshot and gives back the space that only it used.
    fn delete<'a>(&'a self, index: usize) -> DriverFuture<'a>;

    /// Makes a snapshot's content and length the present ones, and forgets those. The snapshot stays.
    fn apply<'a>(&'a self, index: usize) -> IoFuture<'a>;
}

/// What a format tells of its image.
#[derive(Clone, Debug, Default)]
pub struct FormatInfo {
    /// Bytes in a cluster; `None` where the format has none.
    pub cluster_size: Option<u64>,
    /// The image was not closed cleanly.
    pub dirty: Option<bool>,
    /// The stored name of the backing file.
    pub backing_file: Option<String>,
    /// The stored format of the backing file.
    pub backing_format: Option<String>,
    /// The internal snapshots, if there are any.
    pub snapshots: Option<Vec<SnapshotInfo>>,
    /// `ImageInfoSpecific` of the format.
    pub specific: Option<stord_qmp::schema::node_info::ImageInfoSpecific>,
}
