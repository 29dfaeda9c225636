//! Dirty bitmaps: the commands about them.

use crate::Qapi;

/// Arguments of `block-dirty-bitmap-add`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct BlockDirtyBitmapAdd {
    /// The node.
    pub node: String,
    /// The name of the bitmap.
    pub name: String,
    /// Bytes that a bit stands for, a power of two; default: the image's cluster size within limits, else 64 KiB.
    pub granularity: Option<u32>,
    /// Whether the bitmap is stored with the image; default off.
    pub persistent: Option<bool>,
    /// Whether the bitmap does not record yet; default off.
    pub disabled: Option<bool>,
}

/// Arguments of the commands about one bitmap.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct BlockDirtyBitmap {
    /// The node.
    pub node: String,
    /// The name of the bitmap.
    pub name: String,
}

/// A bitmap of the same node, or of another.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(alternate)]
pub enum BlockDirtyBitmapOrStr {
    /// The name of a bitmap of the same node.
    Local(String),
    /// A bitmap of any node.
    External(BlockDirtyBitmap),
}

/// Arguments of `block-dirty-bitmap-merge`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct BlockDirtyBitmapMerge {
    /// The node of the target.
    pub node: String,
    /// The bitmap to merge into.
    pub target: String,
    /// The bitmaps to merge from.
    pub bitmaps: Vec<BlockDirtyBitmapOrStr>,
}

/// The hash of a bitmap.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct BlockDirtyBitmapSha256 {
    /// SHA-256 of its bits, in hexadecimal.
    pub sha256: String,
}
