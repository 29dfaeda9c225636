//! Flushes: one serves all that wait for it, and a node that nothing was written to since the last needs none.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::driver::{Driver, IoFuture};
use crate::graph::Node;

/// Makes every write that completed before this call durable.
pub(crate) fn flush<'a>(node: &'a Arc<Node>) -> IoFuture<'a> {
    Box::pin(async move {
        let wanted = node.written.load(Ordering::Acquire);
        let mut flushed = node.flushed.lock().await;
        if *flushed >= wanted {
            return Ok(());
        }
        // Whoever waited for the lock meanwhile is served too.
        let covered = node.written.load(Ordering::Acquire);
        match node.driver() {
            Driver::Protocol(leaf) => {
                if !node.options().no_flush {
                    leaf.flush().await?;
                }
            }
            Driver::Format(format) => {
                format.flush().await?;
                for edge in node.children().edges() {
                    if let Some(child) = edge.node()
                        && !child.is_read_only()
                    {
                        flush(&child).await?;
                    }
                }
            }
        }
        *flushed = covered;
        Ok(())
    })
}

/// Hands everything that completed changes have left in memory of ours to the files below, so that it outlives this process, though
/// not a power failure.
pub(crate) fn settle<'a>(node: &'a Arc<Node>) -> IoFuture<'a> {
    Box::pin(async move {
        if let Driver::Format(format) = node.driver() {
            format.flush().await?;
            for edge in node.children().edges() {
                if let Some(child) = edge.node()
                    && !child.is_read_only()
                {
                    settle(&child).await?;
                }
            }
        }
        Ok(())
    })
}
