//! Making images: what `blockdev-create` takes.

use crate::Qapi;

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
    /// A file.
    File(BlockdevCreateOptionsFile),
    /// Devices are there or not.
    #[qapi(rename = "host_device")]
    HostDevice,
    /// Holds nothing.
    NullAio,
    /// Holds nothing.
    NullCo,
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
    pub size: i64,
    /// How its space is reserved; default `off`.
    pub preallocation: Option<PreallocMode>,
    /// Turn copy on write off, where the file system has it; default off.
    pub nocow: Option<bool>,
    /// The extent size hint in bytes, where the file system has it; default 1 MiB, 0 for none.
    pub extent_size_hint: Option<i64>,
}
