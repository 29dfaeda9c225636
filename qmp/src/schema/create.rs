//! Making images: what `blockdev-create` takes.

use crate::Qapi;
use crate::schema::block::BlockdevRef;
use crate::schema::node_info::Qcow2CompressionType;

/// Arguments of `blockdev-create`.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct BlockdevCreate {
    /// The id of the job that makes the image.
    pub job_id: String,
    /// The image.
    pub options: BlockdevCreateOptions,
}

/// An image to make.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct BlockdevCreateOptions {
    /// The driver and what it is to make.
    #[qapi(union = "driver")]
    pub driver: BlockdevCreateDriver,
}

/// A driver and what it is to make. Drivers without content make nothing; they are known so that the error can say so.
#[derive(Clone, Debug, PartialEq, Qapi)]
#[qapi(union)]
pub enum BlockdevCreateDriver {
    /// Stores nothing itself.
    Compress,
    /// A file.
    File(BlockdevCreateOptionsFile),
    /// Devices are there or not.
    #[qapi(rename = "host_device")]
    HostDevice,
    /// Holds nothing.
    NullAio,
    /// Holds nothing.
    NullCo,
    /// A qcow2 image.
    Qcow2(BlockdevCreateOptionsQcow2),
    /// Takes its file as it is.
    Raw,
}

/// How the space of an image is reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum PreallocMode {
    /// Not at all.
    Off,
    /// Its metadata only.
    Metadata,
    /// By allocating it.
    Falloc,
    /// By writing it.
    Full,
}

/// A file to make.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct BlockdevCreateOptionsFile {
    /// Its path.
    pub filename: String,
    /// Its size in bytes.
    pub size: u64,
    /// How its space is reserved; default `off`.
    pub preallocation: Option<PreallocMode>,
    /// Turn copy on write off, where the file system has it; default off.
    pub nocow: Option<bool>,
    /// The extent size hint in bytes, where the file system has it; default 1 MiB, 0 for none.
    pub extent_size_hint: Option<i64>,
}

/// Versions of qcow2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum BlockdevQcow2Version {
    /// Version 2, `compat=0.10`.
    V2,
    /// Version 3, `compat=1.1`.
    V3,
}

/// The drivers that may be named as the format of a backing file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum BackingDriver {
    /// Stores nothing itself.
    Compress,
    /// A file as it is.
    File,
    /// A device as it is.
    #[qapi(rename = "host_device")]
    HostDevice,
    /// Nothing.
    NullAio,
    /// Nothing.
    NullCo,
    /// A qcow2 image.
    Qcow2,
    /// A raw image.
    Raw,
}

/// A qcow2 image to make.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct BlockdevCreateOptionsQcow2 {
    /// The node to make it on.
    pub file: BlockdevRef,
    /// The node that is to hold the guest's data; default the same.
    pub data_file: Option<BlockdevRef>,
    /// Keep the data file a valid raw image; default off.
    pub data_file_raw: Option<bool>,
    /// Extended L2 entries, with subclusters; default off.
    pub extended_l2: Option<bool>,
    /// The size the guest sees, in bytes.
    pub size: u64,
    /// The version; default `v3`.
    pub version: Option<BlockdevQcow2Version>,
    /// The name of the backing file.
    pub backing_file: Option<String>,
    /// The format of the backing file.
    pub backing_fmt: Option<BackingDriver>,
    /// Bytes of a cluster; default 65536.
    pub cluster_size: Option<i64>,
    /// How its space is reserved; default `off`.
    pub preallocation: Option<PreallocMode>,
    /// Write reference counts late; default off.
    pub lazy_refcounts: Option<bool>,
    /// The width of a reference count in bits; default 16.
    pub refcount_bits: Option<i64>,
    /// The compression of compressed clusters; default `zlib`.
    pub compression_type: Option<Qcow2CompressionType>,
}

impl BlockdevCreateOptionsQcow2 {
    /// An image of `size` bytes on that node with every option at its default.
    pub fn new(file: BlockdevRef, size: u64) -> Self {
        Self {
            file,
            data_file: None,
            data_file_raw: None,
            extended_l2: None,
            size,
            version: None,
            backing_file: None,
            backing_fmt: None,
            cluster_size: None,
            preallocation: None,
            lazy_refcounts: None,
            refcount_bits: None,
            compression_type: None,
        }
    }
}
