//! The request handler over real images, without a kernel.

mod data;
mod directory;
mod metadata;

use std::fs::File;
use std::rc::Rc;
use std::sync::Arc;

use serde_json::json;
use stord_aio::{Errno, IoBuffer};
use stord_block::graph::Claim;
use stord_block::{Contexts, Graph, Permissions};
use stord_qmp::from_json;
use tempfile::NamedTempFile;
use zerocopy::FromBytes;

use super::abi::ROOT_ID;
use super::abi::{AttrOut, LseekOut, SetattrIn, SetattrValid, WriteOut};
use super::directory::Directory;
use super::disk_file::{DiskFile, Presentation};
use super::file_system::FileSystem;
use super::request::{Reply, Request, Setattr};
use super::resize::Resizer;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

const READ_ONLY: Presentation = Presentation {
    writable: false,
    growable: false,
    writethrough: false,
    outlives: false,
    allow_other: false,
};
const WRITABLE: Presentation = Presentation {
    writable: true,
    ..READ_ONLY
};
const GROWABLE: Presentation = Presentation {
    growable: true,
    ..WRITABLE
};

/// A file system over one raw image or several.
struct Fixture {
    images: Vec<NamedTempFile>,
    contexts: Rc<Contexts>,
    file_system: Arc<FileSystem>,
    /// Holds the nodes.
    graph: Graph,
}

/// What a request came to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    Payload(Vec<u8>),
    Bytes(Vec<u8>),
    Failed(Errno),
    Silence,
}

impl Fixture {
    /// Shows an image of `size` zero bytes, with `discard=unmap`.
    async fn new(size: u64, presentation: Presentation) -> Self {
        let mut fixture = Self::empty();
        let file = fixture.add_file(ROOT_ID, size, presentation).await;
        fixture.file_system = Arc::new(FileSystem::of_file(file));
        fixture
    }

    /// Shows a directory without files.
    fn empty() -> Self {
        let contexts = Rc::new(Contexts::start().unwrap());
        let directory = Directory::new(Vec::new(), false);
        Self {
            images: Vec::new(),
            graph: Graph::new(Rc::clone(&contexts)),
            contexts,
            file_system: Arc::new(FileSystem::of_directory(directory, Vec::new())),
        }
    }

    /// Makes another image, and gives the file that shows it.
    async fn add_file(&mut self, node: u64, size: u64, presentation: Presentation) -> DiskFile {
        let image = NamedTempFile::new().unwrap();
        image.as_file().set_len(size).unwrap();
        let name = format!("n{node}");
        let options = json!({
            "driver": "file", "node-name": name, "filename": image.path(), "discard": "unmap",
            "read-only": !presentation.writable,
        });
        let added = self.graph.blockdev_add(from_json(options).unwrap());
        added.await.unwrap();
        self.images.push(image);
        let mut permissions = Permissions::CONSISTENT_READ;
        if presentation.writable {
            permissions |= Permissions::WRITE | Permissions::RESIZE;
        }
        let claim = Claim {
            permissions,
            shared: Permissions::all(),
        };
        let backend = self.graph.attach(&name, "test", claim).await.unwrap();
        DiskFile::new(node, backend, presentation, Resizer::Own)
    }

    /// Asks the root.
    async fn ask(&self, request: Request, payload: Vec<u8>) -> Outcome {
        self.ask_node(ROOT_ID, request, payload).await
    }

    /// Handles a request as a transport does: at once if possible, else as a task.
    async fn ask_node(&self, node: u64, request: Request, payload: Vec<u8>) -> Outcome {
        let file_system = Arc::clone(&self.file_system);
        self.contexts
            .main()
            .run(move || async move {
                let payload = IoBuffer::copy_of(&payload);
                let reply = match file_system.try_handle(node, &request, &payload) {
                    Some(reply) => reply,
                    None => file_system.handle(node, request, payload.clone()).await,
                };
                match reply {
                    Reply::Done => Outcome::Done,
                    Reply::Payload(len) => {
                        Outcome::Payload(payload.slice(0..len as usize).to_vec())
                    }
                    Reply::Bytes(bytes) => Outcome::Bytes(bytes.as_slice().to_vec()),
                    Reply::Failed(errno) => Outcome::Failed(errno),
                    Reply::Silence => Outcome::Silence,
                }
            })
            .await
            .unwrap()
    }

    async fn read(&self, offset: u64, size: u32) -> Outcome {
        self.ask(Request::Read { offset, size }, vec![0xaa; size as usize])
            .await
    }

    /// Bytes written, or the failure.
    async fn write(&self, offset: u64, bytes: Vec<u8>) -> Result<u32, Errno> {
        let size = u32::try_from(bytes.len()).unwrap();
        let outcome = self.ask(Request::Write { offset, size }, bytes).await;
        outcome.structure::<WriteOut>().map(|written| written.size)
    }

    async fn getattr(&self) -> AttrOut {
        let outcome = self.ask(Request::Getattr, Vec::new()).await;
        outcome.structure().unwrap()
    }

    async fn setattr(&self, valid: SetattrValid, values: SetattrIn) -> Result<AttrOut, Errno> {
        let change = Setattr {
            valid,
            unknown: 0,
            values,
        };
        self.ask(Request::Setattr(change), Vec::new())
            .await
            .structure()
    }

    async fn truncate(&self, size: u64) -> Result<u64, Errno> {
        let values = SetattrIn {
            size,
            ..SetattrIn::default()
        };
        let attributes = self.setattr(SetattrValid::SIZE, values).await?;
        Ok(attributes.attr.size)
    }

    async fn fallocate(&self, offset: u64, length: u64, mode: u32) -> Result<(), Errno> {
        let request = Request::Fallocate {
            offset,
            length,
            mode,
        };
        match self.ask(request, Vec::new()).await {
            Outcome::Done => Ok(()),
            Outcome::Failed(errno) => Err(errno),
            other => panic!("a strange outcome: {other:?}"),
        }
    }

    async fn lseek(&self, offset: u64, whence: u32) -> Result<u64, Errno> {
        let outcome = self
            .ask(Request::Lseek { offset, whence }, Vec::new())
            .await;
        outcome.structure::<LseekOut>().map(|found| found.offset)
    }

    fn image(&self) -> Vec<u8> {
        std::fs::read(self.images[0].path()).unwrap()
    }

    fn image_file(&self) -> &File {
        self.images[0].as_file()
    }
}

impl Outcome {
    fn structure<T: FromBytes>(&self) -> Result<T, Errno> {
        match self {
            Self::Bytes(bytes) => Ok(T::read_from_bytes(bytes).expect("a reply of another size")),
            Self::Failed(errno) => Err(*errno),
            other => panic!("a strange outcome: {other:?}"),
        }
    }
}
