//! A regular file of the file system, whose content is a block node.
//!
//! Rules: a read ends at the image's end; a write past the end makes a growable export longer first, and is cut off there, or fails
//! if it begins there, in any other. O_TRUNC does not truncate, so that a program that "creates" the file does not empty the disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use stord_aio::sync::Mutex;
use stord_aio::{Errno, IoBuffer, IoVec};
use stord_block::{Backend, ZeroFlags};

use super::abi::{Attr, AttrOut, SetattrValid, StatfsOut, WriteOut};
use super::attributes::Attributes;
use super::passthrough::{BackingDevice, Passthrough};
use super::request::{Reply, Request, Setattr};
use super::resize::Resizer;

/// So long the kernel answers stat(2) by itself, in seconds. It asks anew after every write.
pub(super) const ATTRIBUTES_VALID: u64 = 1;
/// What stat(2) gives as the size for good transfers, at least.
pub(super) const BLOCK_SIZE: u32 = 4096;
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
    /// A change is acknowledged when it would outlive this process: when nothing about it is in memory of ours only.
    pub(super) outlives: bool,
    pub(super) allow_other: bool,
}

/// A file.
pub(super) struct DiskFile {
    /// By which the kernel knows it.
    pub(super) node: u64,
    pub(super) backend: Backend,
    pub(super) attributes: Attributes,
    presentation: Presentation,
    passthrough: Passthrough,
    /// One change of the length at a time.
    resizer: Mutex<Resizer>,
    /// Something was written since the last flush.
    dirty: AtomicBool,
    /// The kernel has attributes that are out of date.
    stale: AtomicBool,
    /// Changes under way that may leave something in memory of ours only.
    unsettled: AtomicUsize,
}

/// A change that is under way.
pub(super) struct Change<'a>(&'a AtomicUsize);

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl DiskFile {
    /// A file showing `backend`.
    pub(super) fn new(
        node: u64,
        backend: Backend,
        presentation: Presentation,
        resizer: Resizer,
    ) -> Self {
        Self {
            node,
            backend,
            attributes: Attributes::of_file(presentation.writable, presentation.allow_other),
            presentation,
            passthrough: Passthrough::default(),
            resizer: Mutex::new(resizer),
            dirty: AtomicBool::new(false),
            stale: AtomicBool::new(false),
            unsettled: AtomicUsize::new(0),
        }
    }

    /// Answers a request if that needs no waiting. `payload` is where a READ puts its bytes and a WRITE has them.
    pub(super) fn try_handle(&self, request: &Request, payload: &IoBuffer) -> Option<Reply> {
        match *request {
            Request::Read { offset, size } => self.try_read(offset, size, payload),
            Request::Write { offset, size } => self.try_write(offset, size, payload),
            Request::Open { flags } => Some(self.open(flags).into()),
            Request::Close { handle } => {
                self.passthrough.close(handle);
                Some(Reply::Done)
            }
            Request::Flush if !self.dirty.load(Ordering::Acquire) => Some(Reply::Done),
            Request::Statfs => Some(self.statfs()),
            Request::Ioctl { command } => Some(self.ioctl(command).into()),
            Request::Lookup(_) => Some(Reply::Failed(Errno::ENOENT)),
            Request::Opendir | Request::Readdir { .. } | Request::ChangeDirectory => {
                Some(Reply::Failed(Errno::ENOTDIR))
            }
            // The file system has answered these.
            Request::Release
            | Request::Forget
            | Request::Malformed
            | Request::Unknown
            | Request::CopyFileRange(_) => Some(Reply::Failed(Errno::ENOSYS)),
            Request::Flush
            | Request::Getattr
            | Request::Setattr(_)
            | Request::Fsync
            | Request::Fallocate { .. }
            | Request::Lseek { .. } => None,
        }
    }

    /// Answers a request that [`try_handle`](Self::try_handle) did not, however long it takes.
    pub(super) async fn handle(&self, request: Request, payload: IoBuffer) -> Reply {
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
            // These do not come here: they have been answered.
            Request::Open { .. }
            | Request::Close { .. }
            | Request::Release
            | Request::CopyFileRange(_)
            | Request::Ioctl { .. }
            | Request::Statfs
            | Request::Lookup(_)
            | Request::Opendir
            | Request::Readdir { .. }
            | Request::ChangeDirectory
            | Request::Forget
            | Request::Malformed
            | Request::Unknown => Err(Errno::ENOSYS),
        };
        result.into()
    }

    /// Lets the kernel read the image's file by itself where it can.
    pub(super) fn with_passthrough(mut self, device: Arc<BackingDevice>) -> Self {
        self.passthrough = Passthrough::new(Some(device));
        self
    }

    /// Whether the kernel reads the image's file by itself.
    pub(super) fn is_read_past_us(&self) -> bool {
        self.passthrough.is_on()
    }

    fn open(&self, flags: u32) -> Result<Reply, Errno> {
        let writable = self.presentation.writable;
        let opened = self.passthrough.open(flags, &self.backend, writable)?;
        Ok(Reply::of(&opened))
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
        // Bytes in a place that another change has allocated and not settled would be lost with this process.
        if self.is_unsettled() {
            return None;
        }
        self.note_write();
        let result = self.backend.try_write(offset, &source)?;
        // Such a change may have begun meanwhile: then this write is done again, and waits for it.
        if self.is_unsettled() {
            return None;
        }
        match result {
            Ok(()) => Some(written(size)),
            Err(errno) => Some(Reply::Failed(errno)),
        }
    }

    async fn write(&self, offset: u64, size: u32, payload: IoBuffer) -> Result<Reply, Errno> {
        if !self.presentation.writable {
            return Err(Errno::EACCES);
        }
        let change = self.begin_change();
        let room = self.make_room(offset, size.into()).await?;
        let size = u32::try_from(room).map_err(|_| Errno::EINVAL)?;
        let source = front(&payload, size)?;
        self.note_write();
        let durable = self.presentation.writethrough;
        self.backend.write(offset, source, durable).await?;
        self.settle(change).await?;
        Ok(written(size))
    }

    fn is_unsettled(&self) -> bool {
        self.unsettled.load(Ordering::Acquire) > 0
    }

    /// To be called before anything but the content of allocated space changes, and followed by [`settle`](Self::settle). `None`
    /// where it does not matter.
    pub(super) fn begin_change(&self) -> Option<Change<'_>> {
        self.presentation.outlives.then(|| {
            self.unsettled.fetch_add(1, Ordering::AcqRel);
            Change(&self.unsettled)
        })
    }

    /// Returns when the change would outlive this process.
    pub(super) async fn settle(&self, change: Option<Change<'_>>) -> Result<(), Errno> {
        if change.is_some() {
            self.backend.settle().await?;
        }
        drop(change);
        Ok(())
    }

    /// Sees to it that bytes can be written at `offset`; gives how many of the `length` wanted.
    ///
    /// # Errors
    /// `EIO` past the end of a file that does not grow: there is nothing to write to.
    pub(super) async fn make_room(&self, offset: u64, length: u64) -> Result<u64, Errno> {
        let end = offset.checked_add(length).ok_or(Errno::EFBIG)?;
        if end <= self.backend.size() {
            return Ok(length);
        }
        if self.presentation.growable {
            self.grow(end).await?;
            return Ok(length);
        }
        match self.backend.size().saturating_sub(offset) {
            0 => Err(Errno::EIO),
            left => Ok(left.min(length)),
        }
    }

    /// Makes the image reach to `end`, unless it does.
    pub(super) async fn grow(&self, end: u64) -> Result<(), Errno> {
        let resizer = self.resizer.lock().await;
        if end > self.backend.size() {
            resizer.resize(&self.backend, end, false).await?;
        }
        Ok(())
    }

    /// Notes that there may be something to flush.
    pub(super) fn note_unflushed(&self) {
        self.dirty.store(true, Ordering::Release);
    }

    /// To be called before the content changes.
    pub(super) fn note_write(&self) {
        if !self.dirty.load(Ordering::Relaxed) {
            self.dirty.store(true, Ordering::Release);
        }
        self.attributes.touch();
    }

    /// Whether a write completes only when it is on stable storage.
    pub(super) fn is_writethrough(&self) -> bool {
        self.presentation.writethrough
    }

    /// The flags for zeroing in this file.
    pub(super) fn durability(&self, flags: ZeroFlags) -> ZeroFlags {
        if self.presentation.writethrough {
            flags | ZeroFlags::DURABLE
        } else {
            flags
        }
    }

    /// Notes that the kernel's attributes are out of date.
    pub(super) fn note_stale(&self) {
        self.stale.store(true, Ordering::Release);
    }

    /// Whether they are; says so once.
    pub(super) fn take_stale(&self) -> bool {
        self.stale.load(Ordering::Relaxed) && self.stale.swap(false, Ordering::AcqRel)
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

    /// All attributes, on the wire.
    pub(super) async fn attributes(&self) -> Attr {
        let size = self.backend.size();
        // Storage that cannot tell takes up what it shows.
        let allocated = self.backend.allocated_size().await.unwrap_or(size);
        let block_size = self.backend.alignment().max(BLOCK_SIZE);
        self.attributes
            .to_wire(self.node, size, allocated, block_size)
    }

    async fn getattr(&self) -> Result<Reply, Errno> {
        Ok(Reply::of(&AttrOut {
            attr_valid: ATTRIBUTES_VALID,
            attr: self.attributes().await,
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
                let resizing = self.begin_change();
                resizer.resize(&self.backend, size, true).await?;
                self.settle(resizing).await?;
            }
        }
        self.attributes.change(change);
        self.getattr().await
    }

    pub(super) fn statfs(&self) -> Reply {
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
