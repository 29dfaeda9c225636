//! Reads.

use std::sync::Arc;

use stord_aio::{Errno, IoVec};

use super::walk::{self, Path, Place, leaf_driver};
use super::{align, join_pieces};
use crate::driver::{BACKING, Driver, ExtentKind, Format, IoFuture, Lookup};
use crate::graph::Node;

/// Reads all of `dst`; past the node's end there are zeroes.
pub(crate) async fn read(node: &Arc<Node>, offset: u64, dst: IoVec) -> Result<(), Errno> {
    if dst.is_empty() {
        return Ok(());
    }
    let mut path = Path::default();
    match walk::to_read(node, offset, dst.len(), &mut path)? {
        Place::Leaf(leaf, offset) => align::read(&leaf, offset, dst).await,
        Place::Zero => {
            dst.fill(0);
            Ok(())
        }
        Place::Scattered => scattered(node, offset, dst).await,
    }
}

/// Reads at once if all metadata is in memory and the leaf can answer without waiting.
pub(crate) fn try_read(node: &Arc<Node>, offset: u64, dst: &IoVec) -> Option<Result<(), Errno>> {
    let mut path = Path::default();
    match walk::to_read(node, offset, dst.len(), &mut path) {
        Ok(Place::Leaf(leaf, offset)) if align::fits(&leaf, offset, dst) => {
            leaf_driver(&leaf)?.try_read(offset, dst)
        }
        Ok(Place::Zero) => {
            dst.fill(0);
            Some(Ok(()))
        }
        Ok(_) => None,
        Err(errno) => Some(Err(errno)),
    }
}

/// Reads a range of a format node extent by extent. The caller holds the pin.
fn scattered<'a>(node: &'a Arc<Node>, offset: u64, dst: IoVec) -> IoFuture<'a> {
    Box::pin(async move {
        let Driver::Format(format) = node.driver() else {
            return Err(Errno::EINVAL);
        };
        let inside = node.size().saturating_sub(offset).min(dst.len());
        dst.slice(inside..dst.len()).fill(0);
        let mut pieces: Vec<IoFuture<'a>> = Vec::new();
        let mut done = 0;
        while done < inside {
            let at = offset + done;
            let extent = loop {
                match format.map_read(at, inside - done)? {
                    Lookup::Ready(extent) => break extent,
                    Lookup::Load => format.load(at).await?,
                }
            };
            let piece = dst.slice(done..done + extent.len);
            if let Some(piece) = read_extent(node, &**format, at, extent.kind, piece)? {
                pieces.push(piece);
            }
            done += extent.len;
        }
        join_pieces(pieces).await
    })
}

fn read_extent<'a>(
    node: &'a Arc<Node>,
    format: &'a dyn Format,
    at: u64,
    kind: ExtentKind,
    dst: IoVec,
) -> Result<Option<IoFuture<'a>>, Errno> {
    let (child, offset) = match kind {
        ExtentKind::Zero { .. } => {
            dst.fill(0);
            return Ok(None);
        }
        ExtentKind::Special => return Ok(Some(format.read_special(at, dst))),
        ExtentKind::Unallocated => (BACKING, at),
        ExtentKind::Data { child, offset } => (child, offset),
    };
    match node.children().node(child) {
        Some(below) => Ok(Some(Box::pin(
            async move { read(&below, offset, dst).await },
        ))),
        None if child == BACKING => {
            dst.fill(0);
            Ok(None)
        }
        None => Err(Errno::ENOMEDIUM),
    }
}
