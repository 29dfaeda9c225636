//! The commands about snapshots inside images.

use std::rc::Rc;

use stord_qmp::command::Registry;
use stord_qmp::schema::snapshot::{BlockdevSnapshotDeleteInternal, BlockdevSnapshotInternal};

use crate::daemon::Daemon;

/// Adds the commands.
pub fn add(registry: &mut Registry<Daemon>) {
    registry.add(
        "blockdev-snapshot-internal-sync",
        |daemon: Rc<Daemon>, arguments: BlockdevSnapshotInternal| async move {
            let BlockdevSnapshotInternal { device, name } = arguments;
            daemon.graph.create_snapshot(&device, &name).await
        },
    );
    registry.add(
        "blockdev-snapshot-delete-internal-sync",
        |daemon: Rc<Daemon>, arguments: BlockdevSnapshotDeleteInternal| async move {
            let BlockdevSnapshotDeleteInternal { device, id, name } = arguments;
            daemon
                .graph
                .delete_snapshot(&device, id.as_deref(), name.as_deref())
                .await
        },
    );
}
