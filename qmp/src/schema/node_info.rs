//! What is reported about block nodes and the images in them.

use crate::Qapi;
use crate::schema::Data;
use crate::schema::block::BlockdevDetectZeroesOptions;

/// A block node, as `query-named-block-nodes` reports it.
#[derive(Clone, Debug, PartialEq, Qapi)]
#[qapi(snake_case)]
pub struct BlockDeviceInfo {
    /// The file name of the image.
    pub file: String,
    /// The node's name.
    #[qapi(rename = "node-name")]
    pub node_name: Option<String>,
    /// Whether the node is read-only.
    pub ro: bool,
    /// The driver.
    pub drv: String,
    /// The name of the backing file.
    pub backing_file: Option<String>,
    /// How many images are below in the backing chain.
    pub backing_file_depth: i64,
    /// Whether the node is active.
    pub active: bool,
    /// Whether the image is encrypted.
    pub encrypted: bool,
    /// Whether written zeroes are looked for.
    pub detect_zeroes: BlockdevDetectZeroesOptions,
    /// The throttling of the node.
    #[qapi(flatten)]
    pub limits: BlockIoLimits,
    /// The image.
    pub image: ImageInfo,
    /// How the host's page cache is used.
    pub cache: BlockdevCacheInfo,
    /// The offset in bytes above which a write is reported; 0 for none.
    pub write_threshold: u64,
    /// The dirty bitmaps, if there are any.
    #[qapi(rename = "dirty-bitmaps")]
    pub dirty_bitmaps: Option<Vec<BlockDirtyInfo>>,
}

/// Throttling limits in bytes and operations per second; 0 is no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
#[qapi(snake_case)]
pub struct BlockIoLimits {
    /// Bytes per second.
    pub bps: i64,
    /// Bytes read per second.
    pub bps_rd: i64,
    /// Bytes written per second.
    pub bps_wr: i64,
    /// Operations per second.
    pub iops: i64,
    /// Reads per second.
    pub iops_rd: i64,
    /// Writes per second.
    pub iops_wr: i64,
}

/// How the host's page cache is used.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct BlockdevCacheInfo {
    /// Whether a write is complete before it is on stable storage.
    pub writeback: bool,
    /// Whether the page cache is bypassed.
    pub direct: bool,
    /// Whether flushes are ignored.
    pub no_flush: bool,
}

/// An image.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct ImageInfo {
    /// The file name.
    pub filename: String,
    /// The driver.
    pub format: String,
    /// Whether the image was not closed cleanly.
    pub dirty_flag: Option<bool>,
    /// Bytes it takes on the host.
    pub actual_size: Option<i64>,
    /// Bytes the guest sees.
    pub virtual_size: i64,
    /// Bytes of a cluster.
    pub cluster_size: Option<i64>,
    /// Whether it is encrypted.
    pub encrypted: Option<bool>,
    /// Whether it is compressed.
    pub compressed: Option<bool>,
    /// The backing file as the image names it.
    pub backing_filename: Option<String>,
    /// The backing file with its directory.
    pub full_backing_filename: Option<String>,
    /// The format of the backing file.
    pub backing_filename_format: Option<String>,
    /// The internal snapshots.
    pub snapshots: Option<Vec<SnapshotInfo>>,
    /// What only this format has to say.
    pub format_specific: Option<ImageInfoSpecific>,
    /// The backing image.
    pub backing_image: Option<Box<ImageInfo>>,
}

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct SnapshotInfo {
    /// The unique id.
    pub id: String,
    /// The name.
    pub name: String,
    /// Bytes of the machine's saved state.
    pub vm_state_size: i64,
    /// When it was made, in seconds since 1970 UTC.
    pub date_sec: i64,
    /// The nanoseconds of that second.
    pub date_nsec: i64,
    /// The machine's clock in seconds.
    pub vm_clock_sec: i64,
    /// The nanoseconds of that second.
    pub vm_clock_nsec: i64,
    /// The instruction count, where it was counted.
    pub icount: Option<i64>,
}

/// What only one format has to say about an image.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct ImageInfoSpecific {
    /// The format and what it says.
    #[qapi(union = "type")]
    pub format: ImageInfoSpecificKind,
}

/// A format and what it says.
#[derive(Clone, Debug, PartialEq, Qapi)]
#[qapi(union)]
pub enum ImageInfoSpecificKind {
    /// A qcow2 image.
    Qcow2(Data<ImageInfoSpecificQCow2>),
    /// A regular file.
    File(Data<ImageInfoSpecificFile>),
}

/// What is special about a qcow2 image.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct ImageInfoSpecificQCow2 {
    /// `0.10` for version 2, `1.1` for version 3.
    pub compat: String,
    /// The name of the external data file.
    pub data_file: Option<String>,
    /// Whether the external data file is a valid raw image by itself.
    pub data_file_raw: Option<bool>,
    /// Whether clusters have subclusters.
    pub extended_l2: Option<bool>,
    /// Whether reference counts are written late.
    pub lazy_refcounts: Option<bool>,
    /// Whether the image is marked corrupt.
    pub corrupt: Option<bool>,
    /// The width of a reference count in bits.
    pub refcount_bits: i64,
    /// The persistent bitmaps.
    pub bitmaps: Option<Vec<Qcow2BitmapInfo>>,
    /// The compression of compressed clusters.
    pub compression_type: Qcow2CompressionType,
}

/// The compression of compressed clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum Qcow2CompressionType {
    /// Deflate.
    Zlib,
    /// Zstandard.
    Zstd,
}

/// A persistent bitmap of a qcow2 image.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct Qcow2BitmapInfo {
    /// The name.
    pub name: String,
    /// Bytes per bit.
    pub granularity: u32,
    /// The flags that are set.
    pub flags: Vec<Qcow2BitmapInfoFlags>,
}

/// A flag of a persistent bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum Qcow2BitmapInfoFlags {
    /// It was not saved properly.
    InUse,
    /// It is to be loaded and enabled with the image.
    Auto,
}

/// What is special about a file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct ImageInfoSpecificFile {
    /// The extent size hint in bytes, if the file system has one.
    pub extent_size_hint: Option<i64>,
}

/// A dirty bitmap.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct BlockDirtyInfo {
    /// The name.
    pub name: Option<String>,
    /// Dirty bytes.
    pub count: i64,
    /// Bytes per bit.
    pub granularity: u32,
    /// Whether it records writes.
    pub recording: bool,
    /// Whether an operation uses it.
    pub busy: bool,
    /// Whether it is stored with the image.
    pub persistent: bool,
    /// Whether it was not saved properly and can only be removed.
    pub inconsistent: Option<bool>,
}
