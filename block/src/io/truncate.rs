//! Changes of length, and the space that a node takes up.

use std::sync::Arc;

use stord_aio::Errno;
use stord_qmp::schema::create::PreallocMode;

use super::write::note_change;
use super::zero::as_data;
use crate::driver::{BACKING, ChildId, Driver, IoFuture};
use crate::graph::Node;

/// Changes the node's length. `exact` forbids a longer result than asked for. Space for what is new is reserved as `preallocation` says.
pub(crate) async fn truncate(
    node: &Arc<Node>,
    size: u64,
    exact: bool,
    preallocation: PreallocMode,
) -> Result<(), Errno> {
    if node.is_read_only() {
        return Err(Errno::EACCES);
    }
    if i64::try_from(size).is_err() {
        return Err(Errno::EFBIG);
    }
    match node.driver() {
        Driver::Protocol(leaf) if preallocation == PreallocMode::Full => {
            let old = node.size();
            leaf.truncate(size, exact, PreallocMode::Off).await?;
            if let Err(errno) = write_zeroes(node, old, size).await {
                // What the first failure left; that this fails, too, changes nothing about it.
                let _ = leaf.truncate(old, exact, PreallocMode::Off).await;
                node.set_size(old);
                return Err(errno);
            }
        }
        Driver::Protocol(leaf) => leaf.truncate(size, exact, preallocation).await?,
        Driver::Format(format) => {
            if let Err(errno) = format.truncate(size, exact, preallocation).await {
                // It may have changed before something else failed.
                node.set_size(format.length());
                note_change(node);
                return Err(errno);
            }
        }
    }
    node.set_size(size);
    note_change(node);
    Ok(())
}

/// Writes zeroes as data up to `end`.
async fn write_zeroes(node: &Arc<Node>, start: u64, end: u64) -> Result<(), Errno> {
    if start < end {
        as_data(node, start, end).await
    } else {
        Ok(())
    }
}

/// Bytes of storage that the node and what it is made of take up; a backing file is not part of it.
pub(crate) fn allocated_size<'a>(node: &'a Arc<Node>) -> IoFuture<'a, u64> {
    Box::pin(async move {
        let edges = match node.driver() {
            Driver::Protocol(leaf) => return leaf.allocated_size().await,
            Driver::Format(_) => node.children().edges(),
        };
        let mut sum = 0u64;
        for (id, edge) in (0u8..).map(ChildId).zip(edges) {
            if id != BACKING
                && let Some(child) = edge.node()
            {
                sum = sum.saturating_add(allocated_size(&child).await?);
            }
        }
        Ok(sum)
    })
}
