//! The file system: one regular file, which is the root itself and whose content is a block node.
//!
//! Knows nothing of transports. A request is first tried without waiting ([`FileSystem::try_handle`]); what cannot be answered so is
//! handled as a task of its own ([`FileSystem::handle`]), so that it holds nobody up. Both move the payload straight between the
//! transport's memory and the storage.
//!
//! Rules: a read ends at the image's end; a write past the end makes a growable export longer first, and is cut off there, or fails
//! if it begins there, in any other. O_TRUNC does not truncate, so that a program that "creates" the file does not empty the disk.

use std::sync::atomic::{AtomicBool, Ordering};

use stord_aio::sync::Mutex;
use stord_aio::{Errno, IoBuffer, IoVec};
use stord_block::Backend;

use super::abi::{AttrOut, OpenFlags, OpenOut, SetattrValid, StatfsOut, WriteOut};
use super::attributes::Attributes;
use super::request::{Reply, Request, Setattr};
use super::resize::Resizer;

/// So long the kernel answers stat(2) by itself, in seconds. It asks anew after every write.
const ATTRIBUTES_VALID: u64 = 1;
/// What stat(2) gives as the size for good transfers, at least.
const BLOCK_SIZE: u32 = 4096;
/// What statfs(2) counts in.
const SECTOR: u32 = 512;
const NAME_MAX: u32 = 255;

/// How the image is shown.
#[derive(Clone, Copy, Debug)]
pub(super) struct Presentation {
    pub(super) writable: bool,
    /// Writes past the end make the image longer.
    pub(super) growable: bool,
    /// A write completes when it is on stable storage.
    pub(super) writethrough: bool,
    pub(super) allow_other: bool,
}

/// The file system of one export.
pub(super) struct FileSystem {
    pub(super) backend: Backend,
    pub(super) attributes: Attributes,
    presentation: Presentation,
    open_flags: OpenFlags,
    /// One change of the length at a time.
    resizer: Mutex<Resizer>,
    /// Something was written since the last flush.
    dirty: AtomicBool,
}

impl FileSystem {
    /// A file system showing `backend`.
    pub(super) fn new(backend: Backend, presentation: Presentation, resizer: Resizer) -> Self {
        Self {
            backend,
            attributes: Attributes::new(presentation.writable, presentation.allow_other),
            presentation,
            open_flags: OpenFlags::DIRECT_IO | OpenFlags::PARALLEL_DIRECT_WRITES,
            resizer: Mutex::new(resizer),
            dirty: AtomicBool::new(false),
        }
    }

    /// Answers a request if that needs no waiting. `payload` is where a READ puts its bytes and a WRITE has them.
    pub(super) fn try_handle(&self, request: &Request, payload: &IoBuffer) -> Option<Reply> {
        match *request {
            Request::Read { offset, size } => self.try_read(offset, size, payload),
            Request::Write { offset, size } => self.try_write(offset, size, payload),
            Request::Open => Some(Reply::of(&OpenOut {
                open_flags: self.open_flags.bits(),
                ..OpenOut::default()
            })),
            Request::Flush if !self.dirty.load(Ordering::Acquire) => Some(Reply::Done),
            Request::Release => Some(Reply::Done),
            Request::Statfs => Some(self.statfs()),
            Request::Lookup => Some(Reply::Failed(Errno::ENOENT)),
            Request::Forget => Some(Reply::Silence),
            Request::Malformed => Some(Reply::Failed(Errno::EINVAL)),
            Request::Unknown => Some(Reply::Failed(Errno::ENOSYS)),
            Request::Flush
            | Request::Getattr
            | Request::Setattr(_)
            | Request::Fsync
            | Request::Fallocate { .. }
            | Request::Lseek { .. } => None,
        }
    }

    /// Answers a request, however long it takes.
    pub(super) async fn handle(&self, request: Request, payload: IoBuffer) -> Reply {
        if let Some(reply) = self.try_handle_without_data(&request, &payload) {
            return reply;
        }
        let result = match request {
            Request::Read { offset, size } => self.read(offset, size, payload).await,
            Request::Write { offset, size } => self.write(offset, size, payload).await,
            Request::Getattr => self.getattr().await,
            Request::Setattr(change) => self.setattr(&change).await,
            // Data alone is all there is to sync: the attributes live as long as the export.
            Request::Flush | Request::Fsync => self.flush().await,
            Request::Fallocate {
                offset,
                length,
                mode,
            } => self.fallocate(offset, length, mode).await,
            Request::Lseek { offset, whence } => self.lseek(offset, whence).await,
            Request::Open
            | Request::Release
            | Request::Statfs
            | Request::Lookup
            | Request::Forget
            | Request::Malformed
            | Request::Unknown => Ok(Reply::Done),
        };
        result.into()
    }

    /// `try_handle`, unless the request moves data: that has been tried.
    fn try_handle_without_data(&self, request: &Request, payload: &IoBuffer) -> Option<Reply> {
        match request {
            Request::Read { .. } | Request::Write { .. } => None,
            other => self.try_handle(other, payload),
        }
    }

    /// Where a READ puts its bytes: cut off at the image's end. `None` when nothing is left.
    fn read_target(
        &self,
        offset: u64,
        size: u32,
        payload: &IoBuffer,
    ) -> Result<Option<(IoVec, u32)>, Errno> {
        let left = self.backend.size().saturating_sub(offset);
        let size = u32::try_from(left).map_or(size, |left| size.min(left));
        if size == 0 {
            return Ok(None);
        }
        Ok(Some((front(payload, size)?, size)))
    }

    fn try_read(&self, offset: u64, size: u32, payload: &IoBuffer) -> Option<Reply> {
        match self.read_target(offset, size, payload) {
            Err(errno) => Some(Reply::Failed(errno)),
            Ok(None) => Some(Reply::Payload(0)),
            Ok(Some((target, size))) => match self.backend.try_read(offset, &target)? {
                Ok(()) => Some(Reply::Payload(size)),
                Err(errno) => Some(Reply::Failed(errno)),
            },
        }
    }

    async fn read(&self, offset: u64, size: u32, payload: IoBuffer) -> Result<Reply, Errno> {
        let Some((target, size)) = self.read_target(offset, size, &payload)? else {
            return Ok(Reply::Payload(0));
        };
        self.backend.read(offset, target).await?;
        Ok(Reply::Payload(size))
    }

    fn try_write(&self, offset: u64, size: u32, payload: &IoBuffer) -> Option<Reply> {
        if !self.presentation.writable {
            return Some(Reply::Failed(Errno::EACCES));
        }
        let end = offset.checked_add(size.into())?;
        if self.presentation.writethrough || end > self.backend.size() {
            return None;
        }
        let source = match front(payload, size) {
            Ok(source) => source,
            Err(errno) => return Some(Reply::Failed(errno)),
        };
        self.note_write();
        match self.backend.try_write(offset, &source)? {
            Ok(()) => Some(written(size)),
            Err(errno) => Some(Reply::Failed(errno)),
        }
    }

    async fn write(&self, offset: u64, size: u32, payload: IoBuffer) -> Result<Reply, Errno> {
        if !self.presentation.writable {
            return Err(Errno::EACCES);
        }
        let end = offset.checked_add(size.into()).ok_or(Errno::EFBIG)?;
        let size = if end <= self.backend.size() {
            size
        } else if self.presentation.growable {
            self.grow(end).await?;
            size
        } else {
            // Past the end there is nothing to write to.
            match u32::try_from(self.backend.size().saturating_sub(offset)) {
                Ok(0) => return Err(Errno::EIO),
                Ok(left) => size.min(left),
                Err(_) => size,
            }
        };
        let source = front(&payload, size)?;
        self.note_write();
        let durable = self.presentation.writethrough;
        self.backend.write(offset, source, durable).await?;
        Ok(written(size))
    }

    /// Makes the image reach to `end`, unless it does.
    pub(super) async fn grow(&self, end: u64) -> Result<(), Errno> {
        let resizer = self.resizer.lock().await;
        if end > self.backend.size() {
            resizer.resize(&self.backend, end, false).await?;
        }
        Ok(())
    }

    /// To be called before the content changes.
    pub(super) fn note_write(&self) {
        if !self.dirty.load(Ordering::Relaxed) {
            self.dirty.store(true, Ordering::Release);
        }
        self.attributes.touch();
    }

    pub(super) fn check_writable(&self) -> Result<(), Errno> {
        if self.presentation.writable {
            Ok(())
        } else {
            Err(Errno::EACCES)
        }
    }

    async fn flush(&self) -> Result<Reply, Errno> {
        let was_dirty = self.dirty.swap(false, Ordering::AcqRel);
        if let Err(errno) = self.backend.flush().await {
            if was_dirty {
                self.dirty.store(true, Ordering::Release);
            }
            return Err(errno);
        }
        Ok(Reply::Done)
    }

    async fn getattr(&self) -> Result<Reply, Errno> {
        let size = self.backend.size();
        // Storage that cannot tell takes up what it shows.
        let allocated = self.backend.allocated_size().await.unwrap_or(size);
        Ok(Reply::of(&AttrOut {
            attr_valid: ATTRIBUTES_VALID,
            attr: self.attributes.to_wire(
                size,
                allocated,
                self.backend.alignment().max(BLOCK_SIZE),
            ),
            ..AttrOut::default()
        }))
    }

    async fn setattr(&self, change: &Setattr) -> Result<Reply, Errno> {
        self.attributes.check(change)?;
        if change.valid.contains(SetattrValid::SIZE) {
            self.check_writable()?;
            let size = change.values.size;
            let resizer = self.resizer.lock().await;
            if size != self.backend.size() {
                self.note_write();
                resizer.resize(&self.backend, size, true).await?;
            }
        }
        self.attributes.change(change);
        self.getattr().await
    }

    fn statfs(&self) -> Reply {
        let blocks = self.backend.size().div_ceil(SECTOR.into());
        Reply::of(&StatfsOut {
            blocks,
            files: 1,
            bsize: SECTOR,
            frsize: SECTOR,
            namelen: NAME_MAX,
            ..StatfsOut::default()
        })
    }
}

/// The first `size` bytes of the payload.
///
/// # Errors
/// `EINVAL` when there are not so many.
fn front(payload: &IoBuffer, size: u32) -> Result<IoVec, Errno> {
    let size = usize::try_from(size).map_err(|_| Errno::EINVAL)?;
    if size > payload.len() {
        return Err(Errno::EINVAL);
    }
    Ok(payload.slice(0..size).into())
}

fn written(size: u32) -> Reply {
    Reply::of(&WriteOut {
        size,
        ..WriteOut::default()
    })
}
