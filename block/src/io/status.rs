//! Block status: which parts of a node are data, which are zero, and which layer says so.

use std::sync::Arc;

use stord_aio::Errno;

use super::walk::Path;
use crate::driver::{BACKING, BlockStatus, Driver, ExtentKind, Format, IoFuture, Lookup};
use crate::graph::Node;

/// The status of the beginning of the range, over the whole backing chain. Past the node's end there are zeroes.
pub(crate) fn block_status<'a>(
    node: &'a Arc<Node>,
    offset: u64,
    len: u64,
) -> IoFuture<'a, BlockStatus> {
    Box::pin(async move {
        if len == 0 {
            return Err(Errno::EINVAL);
        }
        if offset >= node.size() {
            return Ok(BlockStatus {
                len,
                data: false,
                zero: true,
                allocated: false,
            });
        }
        let len = len.min(node.size() - offset);
        match node.driver() {
            Driver::Protocol(leaf) => leaf.status(offset, len).await,
            Driver::Format(format) => of_format(node, &**format, offset, len).await,
        }
    })
}

async fn of_format(
    node: &Arc<Node>,
    format: &dyn Format,
    offset: u64,
    len: u64,
) -> Result<BlockStatus, Errno> {
    let mut path = Path::default();
    path.pin(node, offset);
    let extent = loop {
        match format.map_read(offset, len)? {
            Lookup::Ready(extent) => break extent,
            Lookup::Load => format.load(offset).await?,
        }
    };
    let here = |data, zero| BlockStatus {
        len: extent.len,
        data,
        zero,
        allocated: true,
    };
    match extent.kind {
        ExtentKind::Special => Ok(here(true, false)),
        ExtentKind::Zero { reserved } => Ok(here(reserved, true)),
        ExtentKind::Data { child, offset } if format.status_of_child() => {
            match node.children().node(child) {
                Some(below) => block_status(&below, offset, extent.len).await,
                None => Err(Errno::ENOMEDIUM),
            }
        }
        ExtentKind::Data { .. } => Ok(here(true, false)),
        ExtentKind::Unallocated => match node.children().node(BACKING) {
            Some(below) => {
                let behind = block_status(&below, offset, extent.len).await?;
                Ok(BlockStatus {
                    allocated: false,
                    ..behind
                })
            }
            None => Ok(BlockStatus {
                len: extent.len,
                data: false,
                zero: true,
                allocated: false,
            }),
        },
    }
}
