//! Block status: which parts of a node are data, which are zero, which layer says so, and where in which file the bytes are.

use std::sync::Arc;

use stord_aio::Errno;

use super::walk::Path;
use crate::driver::{
    BACKING, BlockStatus, ChildId, Driver, Extent, ExtentKind, Format, IoFuture, Lookup,
};
use crate::graph::Node;

/// Where a run of a node's bytes is, over the whole backing chain.
#[derive(Clone)]
pub struct Location {
    /// Bytes from the queried offset on; at least 1, never beyond the queried range.
    pub len: u64,
    /// The run is stored as data (it may still read as zeroes).
    pub data: bool,
    /// The run reads as zeroes.
    pub zero: bool,
    /// Some layer of the chain says what the run holds, rather than none.
    pub present: bool,
    /// The run is stored compressed.
    pub compressed: bool,
    /// The layer that decides, or the last one asked: 0 is the node itself, 1 what lies behind it.
    pub depth: u32,
    /// Where the bytes are stored, or space is kept for them, as they are.
    pub place: Option<HostPlace>,
}

/// A place in a file below a format.
#[derive(Clone)]
pub struct HostPlace {
    /// The node of the file.
    pub file: Arc<Node>,
    /// Bytes into it.
    pub offset: u64,
}

/// How far a format's word is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// What the format calls data is data.
    Map,
    /// Where a format holds much that was never written, its storage is asked whether it has holes, which read as zeroes.
    Storage,
}

impl Location {
    fn zeroes(len: u64, present: bool) -> Self {
        Self {
            len,
            data: false,
            zero: true,
            present,
            compressed: false,
            depth: 0,
            place: None,
        }
    }

    fn data(len: u64) -> Self {
        Self {
            data: true,
            zero: false,
            ..Self::zeroes(len, true)
        }
    }

    fn at(self, file: &Arc<Node>, offset: u64) -> Self {
        let place = Some(HostPlace {
            file: Arc::clone(file),
            offset,
        });
        Self { place, ..self }
    }
}

/// The status of the beginning of the range, over the whole backing chain. Past the node's end there are zeroes.
pub(crate) async fn block_status(
    node: &Arc<Node>,
    offset: u64,
    len: u64,
) -> Result<BlockStatus, Errno> {
    let location = locate(node, offset, len, Detail::Map).await?;
    Ok(BlockStatus {
        len: location.len,
        data: location.data,
        zero: location.zero,
        allocated: location.present && location.depth == 0,
    })
}

/// Finds where the beginning of the range is. Past the node's end there are zeroes.
pub(crate) fn locate<'a>(
    node: &'a Arc<Node>,
    offset: u64,
    len: u64,
    detail: Detail,
) -> IoFuture<'a, Location> {
    Box::pin(async move {
        if len == 0 {
            return Err(Errno::EINVAL);
        }
        if offset >= node.size() {
            return Ok(Location::zeroes(len, false));
        }
        let len = len.min(node.size() - offset);
        match node.driver() {
            Driver::Protocol(leaf) => {
                let status = leaf.status(offset, len).await?;
                let found = Location {
                    data: status.data,
                    zero: status.zero,
                    ..Location::data(status.len)
                };
                Ok(found.at(node, offset))
            }
            Driver::Format(format) => in_format(node, &**format, offset, len, detail).await,
        }
    })
}

async fn in_format(
    node: &Arc<Node>,
    format: &dyn Format,
    offset: u64,
    len: u64,
    detail: Detail,
) -> Result<Location, Errno> {
    let mut path = Path::default();
    path.pin(node, offset);
    let extent = loop {
        match format.map_read(offset, len)? {
            Lookup::Ready(extent) => break extent,
            Lookup::Load => format.load(offset).await?,
        }
    };
    match extent.kind {
        ExtentKind::Special => Ok(Location {
            compressed: true,
            ..Location::data(extent.len)
        }),
        ExtentKind::Zero { reserved: false } => Ok(Location::zeroes(extent.len, true)),
        ExtentKind::Zero { reserved: true } => reserved(node, format, offset, extent.len),
        ExtentKind::Data { child, offset } => {
            let below = child_of(node, child)?;
            if format.status_of_child() {
                return locate(&below, offset, extent.len, detail).await;
            }
            let mut found = Location::data(extent.len);
            if detail == Detail::Storage && format.holds_unwritten().await? {
                let storage = locate(&below, offset, extent.len, detail).await?;
                found.len = storage.len;
                found.zero = storage.zero;
            }
            Ok(found.at(&below, offset))
        }
        ExtentKind::Unallocated => behind(node, offset, extent.len, detail).await,
    }
}

fn child_of(node: &Node, child: ChildId) -> Result<Arc<Node>, Errno> {
    node.children().node(child).ok_or(Errno::ENOMEDIUM)
}

/// Zeroes that have a place all the same.
fn reserved(node: &Node, format: &dyn Format, offset: u64, len: u64) -> Result<Location, Errno> {
    let Some(Extent {
        kind: ExtentKind::Data { child, offset },
        len,
    }) = format.reserved(offset, len)
    else {
        return Ok(Location::zeroes(len, true));
    };
    Ok(Location::zeroes(len, true).at(&child_of(node, child)?, offset))
}

/// What is not in this layer: in the one behind, if that reaches so far.
async fn behind(node: &Node, offset: u64, len: u64, detail: Detail) -> Result<Location, Errno> {
    match node.children().node(BACKING) {
        Some(below) if offset < below.size() => {
            let found = locate(&below, offset, len, detail).await?;
            Ok(Location {
                depth: found.depth.saturating_add(1),
                ..found
            })
        }
        _ => Ok(Location::zeroes(len, false)),
    }
}
