//! `file`, `host_device` and `io_uring`: a file of the host's, read and written by the context's own I/O.
//!
//! - The file is opened once by its name. What needs another access mode later opens the same file again through its descriptor, so
//!   that a mount over the name, or another file under it, changes nothing.
//! - Locks (`lock`) are held for exactly the permissions that the node's users have and refuse; they belong to the first descriptor.
//! - With `auto-read-only` the file is open for writing only while a user writes.
//! - With `drop-cache`, what the page cache has of the file is dropped when the node becomes active: until then another host may have
//!   written to it, where the file system is shared and its cache is not.
//! - After a failed flush of a cached file every later flush fails: the kernel drops the pages it could not write, so that no later
//!   success would mean that the data is safe.

mod alignment;
mod cache;
pub(crate) mod create;
mod lock;
mod open;
pub mod own_mounts;
mod resize;
mod status;
pub mod supplied;

use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use nix::sys::stat::fstat;
use stord_aio::{Errno, Fallocate, File, IoVec, pool};
use stord_qmp::Error;
use stord_qmp::schema::block::{BlockdevDriver, OnOffAuto};
use stord_qmp::schema::create::PreallocMode;
use stord_qmp::schema::statistics::BlockStatsSpecificFile;

use crate::driver::{BlockStatus, IoFuture, Limits, Protocol, ZeroFlags};
use crate::graph::{NodeOptions, Permissions};

pub(crate) use open::{by_io_uring, open};

/// The `file` and `host_device` drivers.
pub struct FileDriver {
    filename: String,
    file: ArcSwap<File>,
    access: Access,
    /// The other descriptor that `prepare_permissions` opened, until commit or abort.
    prepared: Mutex<Option<File>>,
    locks: Arc<lock::Locks>,
    discards: Arc<Discards>,
    limits: Limits,
    length: AtomicU64,
    is_device: bool,
    identity: (u64, u64),
    found: status::Found,
    /// Requests that the file system refused once and will refuse again.
    no_zero_range: AtomicBool,
    no_punch_hole: AtomicBool,
    /// A flush failed, and pages were lost.
    flush_failed: AtomicBool,
}

/// How the file may be opened.
struct Access {
    engine: stord_aio::Engine,
    batch: u32,
    drop_cache: bool,
    /// Fails where the page cache still has something of the file after that.
    check_dropped: bool,
    locking: Option<OnOffAuto>,
    direct: bool,
    /// Opens for writing when the first writer comes, and for reading only when the last has gone.
    dynamic: bool,
    writable: AtomicBool,
    read_only: bool,
}

/// Counts discards.
#[derive(Default)]
struct Discards {
    ok: AtomicU64,
    failed: AtomicU64,
    bytes: AtomicU64,
}

impl Discards {
    fn count(&self, len: u64, result: Result<(), Errno>) {
        if result.is_ok() {
            self.ok.fetch_add(1, Ordering::Relaxed);
            self.bytes.fetch_add(len, Ordering::Relaxed);
        } else {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn get(&self) -> BlockStatsSpecificFile {
        BlockStatsSpecificFile {
            discard_nb_ok: self.ok.load(Ordering::Relaxed),
            discard_nb_failed: self.failed.load(Ordering::Relaxed),
            discard_bytes_ok: self.bytes.load(Ordering::Relaxed),
        }
    }
}

impl FileDriver {
    /// Whether the node can only be read.
    pub fn is_read_only(&self) -> bool {
        self.access.read_only
    }

    fn take_prepared(&self) -> Option<File> {
        self.prepared
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    fn file(&self) -> Arc<File> {
        self.file.load_full()
    }

    async fn on_pool<T: Send + 'static>(
        &self,
        f: impl FnOnce(&File) -> Result<T, Errno> + Send + 'static,
    ) -> Result<T, Errno> {
        let file = self.file();
        pool::run(move || f(&file)).await
    }

    async fn punch_hole(&self, offset: u64, len: u64) -> Result<(), Errno> {
        try_once(
            &self.no_punch_hole,
            self.file().fallocate(Fallocate::PunchHole, offset, len),
        )
        .await
    }

    async fn zero_range(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let mode = Fallocate::ZeroRange {
            keep_size: self.is_device,
        };
        try_once(
            &self.no_zero_range,
            self.file().fallocate(mode, offset, len),
        )
        .await
    }

    async fn zero(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), Errno> {
        let inside = self.is_device || offset + len <= self.length.load(Ordering::Acquire);
        if flags.contains(ZeroFlags::MAY_UNMAP) && inside {
            match self.punch_hole(offset, len).await {
                Err(Errno::ENOTSUP) => {}
                done => return done,
            }
        }
        match self.zero_range(offset, len).await {
            Err(Errno::ENOTSUP) => {}
            done => {
                self.grow_to(offset + len);
                return done;
            }
        }
        // tmpfs and others: a hole, filled again so that the space stays reserved.
        if self.is_device {
            return Err(Errno::ENOTSUP);
        }
        self.punch_hole(offset, len).await?;
        let mode = Fallocate::Allocate { keep_size: false };
        self.file()
            .fallocate(mode, offset, len)
            .await
            .map_err(unsupported)?;
        self.grow_to(offset + len);
        Ok(())
    }

    fn grow_to(&self, end: u64) {
        self.length.fetch_max(end, Ordering::AcqRel);
    }
}

/// Runs an operation unless it was refused as unsupported before.
async fn try_once(
    refused: &AtomicBool,
    operation: impl Future<Output = Result<(), Errno>>,
) -> Result<(), Errno> {
    if refused.load(Ordering::Relaxed) {
        return Err(Errno::ENOTSUP);
    }
    let result = operation.await.map_err(unsupported);
    if result == Err(Errno::ENOTSUP) {
        refused.store(true, Ordering::Relaxed);
    }
    result
}

/// Gives the many ways of saying "not here" one name.
fn unsupported(errno: Errno) -> Errno {
    match errno {
        Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ENODEV | Errno::ENOTTY | Errno::EINVAL => {
            Errno::ENOTSUP
        }
        other => other,
    }
}

impl Protocol for FileDriver {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn length(&self) -> u64 {
        self.length.load(Ordering::Acquire)
    }

    fn read<'a>(&'a self, offset: u64, dst: IoVec) -> IoFuture<'a> {
        Box::pin(async move {
            let len = dst.len();
            let tail = dst.clone();
            let read = self.file().read(offset, dst).await?;
            if read < len {
                tail.slice(read..len).fill(0);
            }
            Ok(())
        })
    }

    fn try_read(&self, offset: u64, dst: &IoVec) -> Option<Result<(), Errno>> {
        let read = match self.file.load().try_read(offset, dst)? {
            Ok(read) => read,
            Err(errno) => return Some(Err(errno)),
        };
        if read < dst.len() {
            // Either the end of the file or of what is cached; only waiting tells.
            return None;
        }
        Some(Ok(()))
    }

    fn write<'a>(&'a self, offset: u64, src: IoVec, durable: bool) -> IoFuture<'a> {
        Box::pin(async move {
            let end = offset.checked_add(src.len()).ok_or(Errno::EFBIG)?;
            self.file().write(offset, src, durable).await?;
            self.grow_to(end);
            Ok(())
        })
    }

    fn try_write(&self, offset: u64, src: &IoVec) -> Option<Result<(), Errno>> {
        let end = offset.checked_add(src.len())?;
        let result = self.file.load().try_write(offset, src)?;
        if result.is_ok() {
            self.grow_to(end);
        }
        Some(result)
    }

    fn write_zeroes<'a>(&'a self, offset: u64, len: u64, flags: ZeroFlags) -> IoFuture<'a> {
        Box::pin(async move {
            let result = self.zero(offset, len, flags).await;
            self.found.forget();
            result
        })
    }

    fn discard<'a>(&'a self, offset: u64, len: u64) -> IoFuture<'a> {
        Box::pin(async move {
            let result = self.punch_hole(offset, len).await;
            self.found.forget();
            self.discards.count(len, result);
            result
        })
    }

    fn discard_counts(&self) -> Option<BlockStatsSpecificFile> {
        Some(self.discards.get())
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async move {
            if self.flush_failed.load(Ordering::Acquire) {
                return Err(Errno::EIO);
            }
            let result = self.file().fsync(true).await;
            if result.is_err() && !self.access.direct {
                self.flush_failed.store(true, Ordering::Release);
            }
            result
        })
    }

    fn status<'a>(&'a self, offset: u64, len: u64) -> IoFuture<'a, BlockStatus> {
        Box::pin(async move {
            if self.is_device {
                return Ok(status::data(len));
            }
            let changes = match self.found.look_up(offset, len) {
                Ok(known) => return Ok(known),
                Err(changes) => changes,
            };
            let seek = move |file: &File| status::seek(file.fd(), offset, len);
            let (status, stretch) = self.on_pool(seek).await?;
            self.found.note(stretch, changes);
            Ok(status)
        })
    }

    fn truncate<'a>(&'a self, size: u64, exact: bool, preallocation: PreallocMode) -> IoFuture<'a> {
        Box::pin(async move {
            let length = self.length();
            if self.is_device {
                return match size {
                    _ if preallocation != PreallocMode::Off => Err(Errno::ENOTSUP),
                    _ if exact && size != length => Err(Errno::ENOTSUP),
                    _ if size > length => Err(Errno::EINVAL),
                    _ => Ok(()),
                };
            }
            let resize = move |file: &File| resize::resize(file.fd(), length, size, preallocation);
            let resized = self.on_pool(resize).await;
            self.found.forget();
            resized?;
            self.length.store(size, Ordering::Release);
            Ok(())
        })
    }

    fn allocated_size<'a>(&'a self) -> IoFuture<'a, u64> {
        Box::pin(async move {
            let stat = self.on_pool(|file| fstat(file.fd())).await?;
            Ok(u64::try_from(stat.st_blocks)
                .unwrap_or(0)
                .saturating_mul(512))
        })
    }

    fn prepare_permissions(
        &self,
        permissions: Permissions,
        shared: Permissions,
    ) -> Result<(), Error> {
        let writes = permissions.intersects(Permissions::WRITABLE | Permissions::RESIZE);
        if self.access.dynamic && writes != self.access.writable.load(Ordering::Acquire) {
            let other = self.open_again(writes)?;
            *self.prepared.lock().unwrap_or_else(PoisonError::into_inner) = Some(other);
        }
        let prepared = self.locks.prepare(permissions, shared, &self.filename);
        if prepared.is_err() {
            drop(self.take_prepared());
        }
        prepared
    }

    fn commit_permissions(&self) {
        let prepared = self.take_prepared();
        if let Some(other) = prepared {
            self.file.store(Arc::new(other));
            self.access.writable.fetch_xor(true, Ordering::AcqRel);
        }
        self.locks.commit();
    }

    fn abort_permissions(&self) {
        drop(self.take_prepared());
        self.locks.abort();
    }

    fn plain_file(&self) -> Option<(OwnedFd, bool)> {
        if self.is_device {
            return None;
        }
        let file = open::reopen(self.file().fd().as_fd(), false, false).ok()?;
        Some((file, self.access.direct))
    }

    fn reopened(
        &self,
        driver: &BlockdevDriver,
        options: &NodeOptions,
    ) -> Result<Box<dyn Protocol>, Error> {
        Ok(Box::new(open::reopened(self, driver, options)?))
    }

    fn refresh<'a>(&'a self) -> Pin<Box<dyn Future<Output = Result<u64, Error>> + 'a>> {
        Box::pin(async move {
            let (drop_cache, check) = (self.access.drop_cache, self.access.check_dropped);
            let (file, old_length) = (self.file(), self.length());
            let is_device = self.is_device;
            let length = pool::run(move || {
                if drop_cache {
                    cache::drop_pages(&file, check)?;
                }
                match is_device {
                    true => Ok(old_length),
                    false => fstat(file.fd())
                        .map(|stat| u64::try_from(stat.st_size).unwrap_or(0))
                        .map_err(|errno| Error::os("Could not get file size", errno)),
                }
            });
            let length = length.await?;
            self.length.store(length, Ordering::Release);
            self.found.forget();
            Ok(length)
        })
    }

    fn filename(&self) -> String {
        self.filename.clone()
    }

    fn identity(&self) -> Option<(u64, u64)> {
        Some(self.identity)
    }
}

impl FileDriver {
    /// Opens the same file with another access mode.
    fn open_again(&self, writable: bool) -> Result<File, Error> {
        let fd: OwnedFd = open::reopen(self.file().fd().as_fd(), writable, self.access.direct)
            .map_err(|errno| Error::os(format!("Could not open '{}'", self.filename), errno))?;
        Ok(File::new(fd, self.access.engine).with_batch(self.access.batch))
    }
}
