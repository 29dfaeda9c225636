//! Discards: a hint that is passed on where the node lets it pass.

use std::sync::Arc;

use stord_aio::Errno;

use super::write::note_change;
use crate::driver::Driver;
use crate::graph::Node;

/// Gives the space of the range back, as far as the node's `discard` option and alignment let it.
pub(crate) async fn discard(node: &Arc<Node>, offset: u64, len: u64) -> Result<(), Errno> {
    if node.is_read_only() {
        return Err(Errno::EPERM);
    }
    if !node.options().discard {
        return Ok(());
    }
    let end = offset.checked_add(len).ok_or(Errno::EINVAL)?;
    let mask = u64::from(node.limits().discard_alignment) - 1;
    let start = offset.checked_add(mask).ok_or(Errno::EINVAL)? & !mask;
    let stop = if end == node.size() { end } else { end & !mask };
    if start >= stop {
        return Ok(());
    }
    let result = match node.driver() {
        Driver::Protocol(leaf) => leaf.discard(start, stop - start).await,
        Driver::Format(format) => format.discard(start, stop - start).await,
    };
    node.bitmaps().mark(start, stop - start);
    match result {
        Ok(()) => {
            note_change(node);
            Ok(())
        }
        Err(Errno::ENOTSUP) => Ok(()),
        Err(errno) => Err(errno),
    }
}
