//! Images opened over disks in memory.

use std::sync::Arc;

use stord_aio::{Errno, IoBuffer};
use stord_qmp::Error;
use stord_qmp::schema::block::{BlockdevOptionsQcow2, BlockdevRef};

use super::super::open;
use crate::driver::{BACKING, ChildId, DATA_FILE, Driver, FILE};
use crate::graph::{Children, Node, NodeOptions};
use crate::io;
use crate::testing::{MemoryDisk, leaf, node_options};

/// The driver's options with all at their defaults, but the cleaning of caches.
pub(super) fn defaults() -> BlockdevOptionsQcow2 {
    let mut options = BlockdevOptionsQcow2::new(BlockdevRef::Reference("file".to_owned()));
    // A timer would hide a deadlock from the simulation.
    options.cache_clean_interval = Some(0);
    options
}

/// Files below an image, and how to open it.
#[derive(Clone, Default)]
pub(super) struct Setup {
    pub(super) file: MemoryDisk,
    pub(super) backing: Option<Arc<Node>>,
    pub(super) data_file: Option<MemoryDisk>,
    pub(super) options: Option<BlockdevOptionsQcow2>,
    pub(super) common: Option<NodeOptions>,
}

impl Setup {
    pub(super) fn new(file: &MemoryDisk) -> Self {
        Self {
            file: file.clone(),
            ..Self::default()
        }
    }

    pub(super) async fn open(self) -> Result<Image, Error> {
        let children = Children::new(&["file", "backing", "data-file"]);
        let put = |child: ChildId, node: Option<Arc<Node>>| {
            children.edges()[usize::from(child.0)].set_node(node);
        };
        put(FILE, Some(leaf(&self.file)));
        put(BACKING, self.backing);
        put(DATA_FILE, self.data_file.as_ref().map(leaf));
        let common = self.common.unwrap_or_else(node_options);
        let driver = open(
            children.clone(),
            self.options.unwrap_or_else(defaults),
            common.clone(),
        )
        .await?;
        let read_only = common.read_only;
        let driver = Driver::Format(Box::new(driver));
        let node = Node::new(
            "image".to_owned(),
            "qcow2",
            driver,
            children,
            common,
            read_only,
        );
        Ok(Image(Arc::new(node)))
    }
}

/// An open image.
#[derive(Clone)]
pub(super) struct Image(pub(super) Arc<Node>);

impl Image {
    pub(super) fn format(&self) -> &dyn crate::driver::Format {
        match self.0.driver() {
            Driver::Format(format) => &**format,
            Driver::Protocol(_) => panic!("an image is a format"),
        }
    }

    pub(super) async fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, Errno> {
        let buffer = IoBuffer::zeroed(len);
        io::read(&self.0, offset, buffer.clone().into()).await?;
        Ok(buffer.to_vec())
    }

    pub(super) async fn read_all(&self) -> Result<Vec<u8>, Errno> {
        self.read(0, usize::try_from(self.0.size()).expect("fits into memory"))
            .await
    }

    pub(super) async fn write(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        io::write(&self.0, offset, IoBuffer::copy_of(data).into(), false).await
    }

    pub(super) async fn flush(&self) -> Result<(), Errno> {
        io::flush(&self.0).await
    }

    pub(super) async fn close(self) -> Result<(), Errno> {
        self.format().close().await
    }
}
