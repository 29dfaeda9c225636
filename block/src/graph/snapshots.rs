//! Internal snapshots of a node's image: found, made, deleted and brought back while no request is in flight.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use stord_aio::Errno;
use stord_qmp::Error;
use stord_qmp::schema::node_info::SnapshotInfo;

use super::{Claim, Graph, Node, Permissions};
use crate::driver::{Driver, DriverFuture, FILE, InternalSnapshots, NewSnapshot};

/// The longest name in bytes, as the reference cuts it.
const MAX_NAME: usize = 255;

/// A node and the node with the image that holds its snapshots.
struct Subject {
    device: String,
    node: Arc<Node>,
    image: Arc<Node>,
}

fn snapshots_of(node: &Node) -> Option<&dyn InternalSnapshots> {
    match node.driver() {
        Driver::Format(format) => format.snapshots(),
        Driver::Protocol(_) => None,
    }
}

/// The node itself, or the image that it is a window on.
fn image_of(node: &Arc<Node>) -> Arc<Node> {
    let mut image = Arc::clone(node);
    while image.driver_name() == "raw" {
        match image.children().node(FILE) {
            Some(below) => image = below,
            None => break,
        }
    }
    if snapshots_of(&image).is_some() {
        image
    } else {
        Arc::clone(node)
    }
}

impl Subject {
    fn list(&self) -> Result<Vec<SnapshotInfo>, Error> {
        let list = match snapshots_of(&self.image) {
            Some(snapshots) => snapshots.list(),
            None => Err(Errno::ENOTSUP),
        };
        list.map_err(|errno| Error::os("Failed to get a snapshot list".to_owned(), errno))
    }
}

impl Graph {
    /// The snapshots inside a node's image.
    ///
    /// # Errors
    /// There is no such node, or it cannot have snapshots.
    pub fn snapshots(&self, device: &str) -> Result<Vec<SnapshotInfo>, Error> {
        self.subject(device)?.list()
    }

    /// Makes a snapshot of what a node holds now.
    ///
    /// # Errors
    /// There is no such node, it is read-only or cannot have snapshots, the name is empty or taken, or the image cannot be written.
    pub async fn create_snapshot(&self, device: &str, name: &str) -> Result<(), Error> {
        let _change = self.change.lock().await;
        let subject = self.subject(device)?;
        let _drained = self.drain(std::slice::from_ref(&subject.image)).await;
        if subject.node.is_read_only() {
            return Err(Error::generic(format!("Device '{device}' is read only")));
        }
        if snapshots_of(&subject.image).is_none() {
            return Err(Error::generic(format!(
                "Block format '{}' used by device '{device}' does not support internal snapshots",
                subject.node.driver_name()
            )));
        }
        if name.is_empty() {
            return Err(Error::generic("Name is empty"));
        }
        if find(&subject.list()?, None, Some(name)).is_some() {
            return Err(Error::generic(format!(
                "Snapshot with name '{name}' already exists on device '{device}'"
            )));
        }
        let new = new_snapshot(name);
        let failed = format!("Failed to create snapshot '{name}' on device '{device}'");
        self.change_snapshots(&subject, move |snapshots| {
            Box::pin(async move {
                let created = snapshots.create(new).await;
                created.map_err(|errno| Error::os(failed, errno))
            })
        })
        .await
    }

    /// Deletes a snapshot with this id, this name, or both, and gives what it was.
    ///
    /// # Errors
    /// There is no such node or snapshot, or the image cannot be written.
    pub async fn delete_snapshot(
        &self,
        device: &str,
        id: Option<&str>,
        name: Option<&str>,
    ) -> Result<SnapshotInfo, Error> {
        let _change = self.change.lock().await;
        let subject = self.subject(device)?;
        let _drained = self.drain(std::slice::from_ref(&subject.image)).await;
        if id.is_none() && name.is_none() {
            return Err(Error::generic("Name or id must be provided"));
        }
        let list = subject.list()?;
        let Some((index, found)) = find(&list, id, name) else {
            return Err(Error::generic(format!(
                "Snapshot with id '{}' and name '{}' does not exist on device '{device}'",
                id.unwrap_or("null"),
                name.unwrap_or("null")
            )));
        };
        let found = found.clone();
        self.change_snapshots(&subject, move |snapshots| snapshots.delete(index))
            .await?;
        Ok(found)
    }

    /// Makes the content of the snapshot with this id the node's content; what that was is lost.
    ///
    /// # Errors
    /// There is no such node or snapshot, a user of the node forbids the change, or the image cannot be written.
    pub async fn apply_snapshot(&self, device: &str, id: &str) -> Result<(), Error> {
        let claim = Claim {
            permissions: Permissions::WRITE | Permissions::RESIZE,
            shared: Permissions::all(),
        };
        let node = image_of(&self.find(device)?);
        let backend = self.attach(node.name(), "snapshot", claim).await?;
        let result = self.apply_claimed(device, id).await;
        self.detach(backend).await;
        result
    }

    async fn apply_claimed(&self, device: &str, id: &str) -> Result<(), Error> {
        let _change = self.change.lock().await;
        let subject = self.subject(device)?;
        let _drained = self.drain(std::slice::from_ref(&subject.image)).await;
        if !subject.image.bitmaps().list().is_empty() {
            return Err(Error::generic("Device has active dirty bitmaps"));
        }
        let list = subject.list()?;
        let Some((index, _)) = find(&list, Some(id), None) else {
            return Err(Error::generic("Can't find snapshot"));
        };
        let size = snapshots_of(&subject.image).and_then(|snapshots| snapshots.disk_size(index));
        self.change_snapshots(&subject, move |snapshots| {
            Box::pin(async move {
                let applied = snapshots.apply(index).await;
                applied.map_err(|errno| Error::os("Could not open snapshot".to_owned(), errno))
            })
        })
        .await?;
        if let Some(size) = size {
            subject.image.set_size(size);
            for root in self.roots_above(std::slice::from_ref(&subject.image)) {
                if let (Some(listener), Some(node)) = (root.listener(), root.node()) {
                    listener.resized(node.size());
                }
            }
        }
        Ok(())
    }

    fn subject(&self, device: &str) -> Result<Subject, Error> {
        let node = self.lookup(device).ok_or_else(|| {
            Error::generic(format!(
                "Cannot find device='{device}' nor node-name='{device}'"
            ))
        })?;
        if self.has_parent_nodes(&node) {
            return Err(Error::generic("Need a root block node"));
        }
        Ok(Subject {
            device: device.to_owned(),
            image: image_of(&node),
            node,
        })
    }

    async fn change_snapshots(
        &self,
        subject: &Subject,
        change: impl FnOnce(&dyn InternalSnapshots) -> DriverFuture<'_> + Send + 'static,
    ) -> Result<(), Error> {
        let image = Arc::clone(&subject.image);
        if !image.is_active() {
            return Err(Error::generic(
                "Permission 'write' unavailable on inactive node",
            ));
        }
        let changed = self
            .on_main(move || async move {
                match snapshots_of(&image) {
                    Some(snapshots) => change(snapshots).await,
                    None => Err(Error::os("no snapshots".to_owned(), Errno::ENOTSUP)),
                }
            })
            .await;
        changed?.inspect_err(|error| {
            tracing::warn!(node = subject.device, %error, "changing snapshots failed");
        })
    }
}

/// The first snapshot with this id, this name, or both.
fn find<'a>(
    list: &'a [SnapshotInfo],
    id: Option<&str>,
    name: Option<&str>,
) -> Option<(usize, &'a SnapshotInfo)> {
    list.iter().enumerate().find(|(_, snapshot)| {
        id.is_none_or(|id| snapshot.id == id) && name.is_none_or(|name| snapshot.name == name)
    })
}

/// A snapshot made now. As in the reference's daemon, the clock of the machine that is not there tells the time of day.
fn new_snapshot(name: &str) -> NewSnapshot {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    let mut end = name.len().min(MAX_NAME);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    NewSnapshot {
        name: name[..end].to_owned(),
        date_sec: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
        date_nsec: now.subsec_nanos(),
        vm_clock_nsec: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
    }
}
