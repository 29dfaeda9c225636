//! `change-backing-file`: another name for an image's backing file, in the image only. What is open stays open.

use std::sync::Arc;

use stord_aio::Errno;
use stord_qmp::Error;
use stord_qmp::schema::block::{
    BlockdevDriver, BlockdevOptions, BlockdevRefOrNull, ChangeBackingFile,
};

use super::{Graph, Node};
use crate::driver::{BACKING, Driver};

impl Graph {
    /// Has an image call its backing file something else. A read-only image is made writable for the time it takes.
    ///
    /// # Errors
    /// There is no such node, it is not in the chain below `device`, has no backing file, or cannot be written to.
    pub async fn change_backing_file(&self, arguments: &ChangeBackingFile) -> Result<(), Error> {
        let ChangeBackingFile {
            device,
            image_node_name,
            backing_file,
        } = arguments;
        let _change = self.change.lock().await;
        let top = self.referred(device)?;
        if !self.parent_nodes(&top).is_empty() {
            return Err(Error::generic("Need a root block node"));
        }
        let image = self.find(image_node_name)?;
        if image.children().node(BACKING).is_none() {
            return Err(Error::generic(
                "not allowing backing file change on an image without a backing file",
            ));
        }
        if !chain(&top).any(|below| Arc::ptr_eq(&below, &image)) {
            return Err(Error::generic(format!(
                "'{device}' and image file are not in the same chain"
            )));
        }
        if !image.is_read_only() {
            return self.write_backing_name(&image, backing_file).await;
        }
        let original = reopening(&image, true)?;
        self.reopen(vec![reopening(&image, false)?]).await?;
        let written = match self.find(image_node_name) {
            Ok(image) => self.write_backing_name(&image, backing_file).await,
            Err(error) => Err(error),
        };
        self.reopen(vec![original]).await?;
        written
    }

    async fn write_backing_name(&self, image: &Arc<Node>, name: &str) -> Result<(), Error> {
        if !image.is_active() {
            return Err(Error::os(
                format!("Could not change backing file to '{name}'"),
                Errno::EPERM,
            ));
        }
        let wanted = Some(name.to_owned()).filter(|name| !name.is_empty());
        let backing = image.children().node(BACKING);
        let format = backing.map(|backing| backing.driver_name().to_owned());
        let changing = Arc::clone(image);
        let changed = self.on_main(move || async move {
            match changing.driver() {
                Driver::Format(driver) => driver.change_backing_file(wanted, format).await,
                Driver::Protocol(_) => Err(Errno::ENOTSUP),
            }
        });
        changed
            .await?
            .map_err(|errno| Error::os(format!("Could not change backing file to '{name}'"), errno))
    }
}

/// The node and what lies behind it.
fn chain(top: &Arc<Node>) -> impl Iterator<Item = Arc<Node>> {
    std::iter::successors(Some(Arc::clone(top)), |node| node.children().node(BACKING))
}

/// What to reopen the image with, to be read-only or not, with the children it has.
fn reopening(image: &Arc<Node>, read_only: bool) -> Result<BlockdevOptions, Error> {
    let definition = image.definition();
    let definition = definition.ok_or_else(|| Error::generic("The node cannot be opened again"))?;
    let mut options = definition.clone();
    options.node_name = Some(image.name().to_owned());
    options.read_only = Some(read_only);
    if let BlockdevDriver::Qcow2(qcow2) = &mut options.driver {
        qcow2.backing = Some(match image.children().node(BACKING) {
            Some(backing) => BlockdevRefOrNull::Reference(backing.name().to_owned()),
            None => BlockdevRefOrNull::Null,
        });
    }
    Ok(options)
}
