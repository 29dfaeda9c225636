//! The file system: one regular file that is the root itself, or a directory of several files.
//!
//! Knows nothing of transports. A request is first tried without waiting ([`FileSystem::try_handle`]); what cannot be answered so is
//! handled as a task of its own ([`FileSystem::handle`]), so that it holds nobody up. Both move the payload straight between the
//! transport's memory and the storage.

use serde_json::Value;
use stord_aio::{Errno, IoBuffer};

use super::abi::{CopyFileRangeOut, ROOT_ID, WriteOut};
use super::attributes::Attributes;
use super::copy::copy;
use super::directory::Directory;
use super::disk_file::DiskFile;
use super::request::{CopyFileRange, Reply, Request};

/// The file system of one export.
pub(super) struct FileSystem {
    /// In the order of their nodes.
    files: Box<[DiskFile]>,
    /// `None` where the only file is the root.
    directory: Option<Directory>,
}

impl FileSystem {
    /// One file that is the root.
    pub(super) fn of_file(file: DiskFile) -> Self {
        Self {
            files: Box::new([file]),
            directory: None,
        }
    }

    /// A directory of files, in the order of their nodes.
    pub(super) fn of_directory(directory: Directory, files: Vec<DiskFile>) -> Self {
        Self {
            files: files.into(),
            directory: Some(directory),
        }
    }

    /// The files.
    pub(super) fn files(&self) -> &[DiskFile] {
        &self.files
    }

    /// The file that the kernel calls `node`.
    pub(super) fn file(&self, node: u64) -> Option<&DiskFile> {
        let first = match self.directory {
            None => ROOT_ID,
            Some(_) => Directory::FIRST_FILE,
        };
        let index = usize::try_from(node.checked_sub(first)?).ok()?;
        self.files.get(index)
    }

    /// Mode, owner and times of the root, and then of each file in a directory.
    pub(super) fn save_attributes(&self) -> Vec<Value> {
        self.all_attributes().map(Attributes::save).collect()
    }

    /// Goes on where another process has left: with its attributes, and with what it may not have flushed.
    pub(super) fn take_over(&self, attributes: &[Value]) {
        for (attributes, saved) in self.all_attributes().zip(attributes) {
            attributes.restore(saved);
        }
        for file in &self.files {
            file.note_unflushed();
        }
    }

    fn all_attributes(&self) -> impl Iterator<Item = &Attributes> {
        let directory = self.directory.iter().map(Directory::attributes);
        directory.chain(self.files.iter().map(|file| &file.attributes))
    }

    /// Answers a request if that needs no waiting. `payload` is where a READ puts its bytes and a WRITE has them.
    pub(super) fn try_handle(
        &self,
        node: u64,
        request: &Request,
        payload: &IoBuffer,
    ) -> Option<Reply> {
        match request {
            // These concern no file.
            Request::Forget => Some(Reply::Silence),
            Request::Release => Some(Reply::Done),
            Request::Malformed => Some(Reply::Failed(Errno::EINVAL)),
            Request::Unknown => Some(Reply::Failed(Errno::ENOSYS)),
            Request::CopyFileRange(_) => None,
            _ => match (self.file(node), &self.directory) {
                (Some(file), _) => file.try_handle(request, payload),
                (None, Some(directory)) if node == ROOT_ID => {
                    directory.try_handle(request, payload, &self.files)
                }
                (None, _) => Some(Reply::Failed(Errno::ENOENT)),
            },
        }
    }

    /// Answers a request that [`try_handle`](Self::try_handle) did not, however long it takes.
    pub(super) async fn handle(&self, node: u64, request: Request, payload: IoBuffer) -> Reply {
        if let Request::CopyFileRange(request) = request {
            return self.copy_file_range(node, &request).await.into();
        }
        match (self.file(node), &self.directory) {
            (Some(file), _) => file.handle(request, payload).await,
            (None, Some(directory)) => directory.handle(request, &self.files).await,
            (None, None) => Reply::Failed(Errno::ENOENT),
        }
    }

    async fn copy_file_range(&self, node: u64, request: &CopyFileRange) -> Result<Reply, Errno> {
        let source = self.file(node).ok_or(Errno::EISDIR)?;
        let target = self.file(request.target).ok_or(Errno::EISDIR)?;
        let copied = copy(source, request.from, target, request.to, request.length).await?;
        Ok(if request.wide {
            Reply::of(&CopyFileRangeOut {
                bytes_copied: copied,
            })
        } else {
            Reply::of(&WriteOut {
                size: u32::try_from(copied).map_err(|_| Errno::EOVERFLOW)?,
                ..WriteOut::default()
            })
        })
    }
}
