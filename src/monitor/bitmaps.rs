//! The commands about dirty bitmaps.

use std::rc::Rc;

use stord_block::graph::{BitmapSource, NewBitmap};
use stord_qmp::command::Registry;
use stord_qmp::schema::bitmap::{
    BlockDirtyBitmap, BlockDirtyBitmapAdd, BlockDirtyBitmapMerge, BlockDirtyBitmapOrStr,
    BlockDirtyBitmapSha256,
};

use crate::daemon::Daemon;

/// Adds the commands.
pub fn add(registry: &mut Registry<Daemon>) {
    registry.add(
        "block-dirty-bitmap-add",
        |daemon: Rc<Daemon>, arguments: BlockDirtyBitmapAdd| async move {
            let new = NewBitmap {
                name: arguments.name,
                granularity: arguments.granularity,
                persistent: arguments.persistent.unwrap_or(false),
                disabled: arguments.disabled.unwrap_or(false),
            };
            daemon.graph.add_bitmap(&arguments.node, new).await
        },
    );
    registry.add(
        "block-dirty-bitmap-remove",
        |daemon: Rc<Daemon>, BlockDirtyBitmap { node, name }| async move {
            daemon.graph.remove_bitmap(&node, &name).await
        },
    );
    registry.add(
        "block-dirty-bitmap-clear",
        |daemon: Rc<Daemon>, BlockDirtyBitmap { node, name }| async move {
            daemon.graph.clear_bitmap(&node, &name).await
        },
    );
    registry.add(
        "block-dirty-bitmap-enable",
        |daemon: Rc<Daemon>, BlockDirtyBitmap { node, name }| async move {
            daemon.graph.enable_bitmap(&node, &name, true).await
        },
    );
    registry.add(
        "block-dirty-bitmap-disable",
        |daemon: Rc<Daemon>, BlockDirtyBitmap { node, name }| async move {
            daemon.graph.enable_bitmap(&node, &name, false).await
        },
    );
    registry.add(
        "block-dirty-bitmap-merge",
        |daemon: Rc<Daemon>, arguments: BlockDirtyBitmapMerge| async move {
            let BlockDirtyBitmapMerge {
                node,
                target,
                bitmaps,
            } = arguments;
            let sources = bitmaps.into_iter().map(|source| match source {
                BlockDirtyBitmapOrStr::Local(name) => BitmapSource { node: None, name },
                BlockDirtyBitmapOrStr::External(BlockDirtyBitmap { node, name }) => BitmapSource {
                    node: Some(node),
                    name,
                },
            });
            daemon
                .graph
                .merge_bitmaps(&node, &target, sources.collect())
                .await
        },
    );
    registry
        .add(
            "x-debug-block-dirty-bitmap-sha256",
            |daemon: Rc<Daemon>, BlockDirtyBitmap { node, name }| async move {
                let sha256 = daemon.graph.hash_bitmap(&node, &name).await?;
                Ok(BlockDirtyBitmapSha256 { sha256 })
            },
        )
        .features(&["unstable"]);
}
