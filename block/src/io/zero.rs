//! Zero writes: by the driver where it can, as data where it cannot.

use std::sync::Arc;

use stord_aio::{Errno, IoBuffer};

use super::write::{note_write, write_as_is};
use super::{block_status, flush};
use crate::driver::{Driver, ZeroFlags};
use crate::graph::Node;

/// Zeroes written as data go out in pieces of this many bytes, all from one buffer.
const DATA_PIECE: u64 = 1 << 20;

/// Makes the range read as zeroes.
pub(crate) async fn write_zeroes(
    node: &Arc<Node>,
    offset: u64,
    len: u64,
    mut flags: ZeroFlags,
) -> Result<(), Errno> {
    if node.is_read_only() {
        return Err(Errno::EPERM);
    }
    if len == 0 {
        return Ok(());
    }
    if !node.options().discard {
        flags.remove(ZeroFlags::MAY_UNMAP);
    }
    let end = offset.checked_add(len).ok_or(Errno::EINVAL)?;
    let zeroed = parts(node, offset, end, flags).await;
    node.bitmaps().mark(offset, len);
    zeroed?;
    if flags.contains(ZeroFlags::DURABLE) {
        flush(node).await
    } else {
        Ok(())
    }
}

async fn parts(node: &Arc<Node>, offset: u64, end: u64, flags: ZeroFlags) -> Result<(), Errno> {
    let (start, stop) = aligned_part(node, offset, end);
    if start >= stop {
        return edge(node, offset, end, flags).await;
    }
    edge(node, offset, start, flags).await?;
    body(node, start, stop, flags).await?;
    edge(node, stop, end, flags).await
}

/// The part of the range that the driver takes: aligned, or reaching the node's end.
fn aligned_part(node: &Node, offset: u64, end: u64) -> (u64, u64) {
    let mask = u64::from(node.limits().zero_alignment) - 1;
    let start = offset.checked_add(mask).map_or(end, |start| start & !mask);
    let stop = if end == node.size() { end } else { end & !mask };
    (start, stop)
}

async fn body(node: &Arc<Node>, start: u64, end: u64, flags: ZeroFlags) -> Result<(), Errno> {
    let below = flags - ZeroFlags::DURABLE;
    let result = match node.driver() {
        Driver::Protocol(leaf) => {
            let align = u64::from(node.limits().request_alignment);
            if align > 1 {
                let _range = node.serialising.lock_shared(start..end).await;
                leaf.write_zeroes(start, end - start, below).await
            } else {
                leaf.write_zeroes(start, end - start, below).await
            }
        }
        Driver::Format(format) => format.write_zeroes(start, end - start, below).await,
    };
    match result {
        Ok(()) => {
            note_write(node, end);
            Ok(())
        }
        Err(Errno::ENOTSUP) if !flags.contains(ZeroFlags::NO_FALLBACK) => {
            as_data(node, start, end).await
        }
        Err(errno) => Err(errno),
    }
}

/// Zeroes a part of an alignment unit, unless it reads as zeroes already.
async fn edge(node: &Arc<Node>, start: u64, end: u64, flags: ZeroFlags) -> Result<(), Errno> {
    let mut at = start;
    while at < end {
        let status = block_status(node, at, end - at).await?;
        if !status.zero {
            if flags.contains(ZeroFlags::NO_FALLBACK) {
                return Err(Errno::ENOTSUP);
            }
            as_data(node, at, at + status.len).await?;
        }
        at += status.len;
    }
    Ok(())
}

/// Zeroes the range by writing data.
pub(super) async fn as_data(node: &Arc<Node>, start: u64, end: u64) -> Result<(), Errno> {
    let piece = usize::try_from((end - start).min(DATA_PIECE)).map_err(|_| Errno::ENOMEM)?;
    let buffer = IoBuffer::zeroed(piece);
    let mut at = start;
    while at < end {
        let len = (end - at).min(DATA_PIECE);
        let len_in_memory = usize::try_from(len).map_err(|_| Errno::ENOMEM)?;
        // Past `detect-zeroes`, which would bring the piece back here.
        Box::pin(write_as_is(
            node,
            at,
            buffer.slice(0..len_in_memory).into(),
            false,
        ))
        .await?;
        at += len;
    }
    Ok(())
}
