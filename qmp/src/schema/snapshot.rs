//! Internal snapshots: the commands about them.

use crate::Qapi;

/// Arguments of `blockdev-snapshot-internal-sync`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct BlockdevSnapshotInternal {
    /// The node whose image gets the snapshot.
    pub device: String,
    /// The snapshot's name.
    pub name: String,
}

/// Arguments of `blockdev-snapshot-delete-internal-sync`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct BlockdevSnapshotDeleteInternal {
    /// The node with the snapshot.
    pub device: String,
    /// The snapshot's id.
    pub id: Option<String>,
    /// The snapshot's name.
    pub name: Option<String>,
}
