//! The directory that is the root of a file system with several files. Its entries never change, and nobody can make others.

use stord_aio::{Errno, IoBuffer};
use zerocopy::IntoBytes as _;

use super::abi::{AttrOut, Dirent, EntryOut, OpenOut, ROOT_ID};
use super::attributes::Attributes;
use super::disk_file::{ATTRIBUTES_VALID, BLOCK_SIZE, DiskFile};
use super::request::{Reply, Request, Setattr};

/// So long the kernel remembers which file a name is, in seconds.
const ENTRY_VALID: u64 = 86_400;
/// Entries in a listing begin at multiples of this.
const DIRENT_ALIGNMENT: usize = 8;
// linux/stat.h, as directories list them: the type bits of a mode, shifted right by 12.
const DT_DIR: u32 = 4;
const DT_REG: u32 = 8;

/// A directory of files; their names are in the order of their nodes.
pub(super) struct Directory {
    names: Box<[String]>,
    attributes: Attributes,
}

impl Directory {
    /// The node of the first file; the others follow.
    pub(super) const FIRST_FILE: u64 = ROOT_ID + 1;

    pub(super) fn new(names: Vec<String>, allow_other: bool) -> Self {
        Self {
            names: names.into(),
            attributes: Attributes::of_directory(allow_other),
        }
    }

    pub(super) fn attributes(&self) -> &Attributes {
        &self.attributes
    }

    /// Answers a request for the directory itself if that needs no waiting.
    pub(super) fn try_handle(
        &self,
        request: &Request,
        payload: &IoBuffer,
        files: &[DiskFile],
    ) -> Option<Reply> {
        let reply = match request {
            Request::Lookup(Some(_)) => return None,
            Request::Lookup(None) => Reply::Failed(Errno::ENOENT),
            Request::Getattr => self.getattr(),
            Request::Setattr(change) => self.setattr(change).into(),
            Request::Opendir => Reply::of(&OpenOut::default()),
            Request::Readdir { offset, size } => self.list(*offset, *size, payload).into(),
            Request::Fsync => Reply::Done,
            // The first file is the whole disk.
            Request::Statfs => files
                .first()
                .map_or(Reply::Failed(Errno::ENOSYS), DiskFile::statfs),
            Request::ChangeDirectory => Reply::Failed(Errno::EPERM),
            _ => Reply::Failed(Errno::EISDIR),
        };
        Some(reply)
    }

    /// Looks a name up, which has to ask the storage how much it takes up.
    pub(super) async fn handle(&self, request: Request, files: &[DiskFile]) -> Reply {
        let Request::Lookup(Some(name)) = request else {
            return Reply::Failed(Errno::EISDIR);
        };
        let index = self
            .names
            .iter()
            .position(|known| known.as_bytes() == name.as_bytes());
        let Some(file) = index.and_then(|index| files.get(index)) else {
            return Reply::Failed(Errno::ENOENT);
        };
        Reply::of(&EntryOut {
            nodeid: file.node,
            entry_valid: ENTRY_VALID,
            attr_valid: ATTRIBUTES_VALID,
            attr: file.attributes().await,
            ..EntryOut::default()
        })
    }

    fn getattr(&self) -> Reply {
        Reply::of(&AttrOut {
            attr_valid: ATTRIBUTES_VALID,
            attr: self.attributes.to_wire(ROOT_ID, 0, 0, BLOCK_SIZE),
            ..AttrOut::default()
        })
    }

    fn setattr(&self, change: &Setattr) -> Result<Reply, Errno> {
        self.attributes.check(change)?;
        self.attributes.change(change);
        Ok(self.getattr())
    }

    /// Lists what comes after the first `offset` entries, as far as `size` bytes of the payload hold it.
    fn list(&self, offset: u64, size: u32, payload: &IoBuffer) -> Result<Reply, Errno> {
        let size = usize::try_from(size).map_err(|_| Errno::EINVAL)?;
        if size > payload.len() {
            return Err(Errno::EINVAL);
        }
        let dots = [(ROOT_ID, DT_DIR, "."), (ROOT_ID, DT_DIR, "..")];
        let files = (Self::FIRST_FILE..)
            .zip(&self.names)
            .map(|(node, name)| (node, DT_REG, name.as_str()));
        let entries = (1u64..).zip(dots.into_iter().chain(files));
        let mut at = 0;
        for (next, (ino, kind, name)) in entries.filter(|(next, _)| *next > offset) {
            let header = Dirent {
                ino,
                off: next,
                namelen: u32::try_from(name.len()).map_err(|_| Errno::EINVAL)?,
                r#type: kind,
            };
            let length = size_of::<Dirent>() + name.len();
            let padded = length.next_multiple_of(DIRENT_ALIGNMENT);
            if at + padded > size {
                break;
            }
            payload.write_at(at, header.as_bytes());
            payload.write_at(at + size_of::<Dirent>(), name.as_bytes());
            payload.slice(at + length..at + padded).fill(0);
            at += padded;
        }
        Ok(Reply::Payload(
            u32::try_from(at).map_err(|_| Errno::EINVAL)?,
        ))
    }
}
