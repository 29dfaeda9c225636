//! Images for tests: made by `qemu-img`, opened over disks in memory, checked by `qemu-img`.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use stord_aio::{Errno, IoBuffer};
use stord_qmp::Error;
use stord_qmp::schema::block::{BlockdevOptionsQcow2, BlockdevRef};

use super::super::open;
use crate::driver::{BACKING, ChildId, DATA_FILE, Driver, FILE};
use crate::graph::{Children, Node, NodeOptions};
use crate::io;
use crate::testing::{MemoryDisk, leaf, node_options};

/// Runs a tool of QEMU; a missing one fails the test with what to install.
pub(super) fn qemu(program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("cannot run {program} ({error}): install qemu-utils"));
    assert!(
        output.status.success(),
        "{program} {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// An empty image made by `qemu-img create` with these options.
pub(super) fn created(options: &str, size: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("image.qcow2");
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([text(&path), size]);
    qemu("qemu-img", &args);
    std::fs::read(&path).expect("the image")
}

pub(super) fn text(path: &Path) -> &str {
    path.to_str().expect("a name in UTF-8")
}

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

/// Compares without printing megabytes.
#[track_caller]
pub(super) fn assert_same(ours: &[u8], theirs: &[u8], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}: lengths");
    if let Some(at) = ours.iter().zip(theirs).position(|(a, b)| a != b) {
        panic!(
            "{what}: byte {at:#x} is {:#x}, not {:#x}",
            ours[at], theirs[at]
        );
    }
}
