//! The `virtio-blk-vhost-user` driver: a disk that a vhost-user back end has.
//!
//! ```text
//! mod        the driver: requests as the device takes them
//!   lanes      which queue takes a request, and how a back end that went comes back
//!     vhost_user connecting: from a path to queues               (on a thread of the pool; message: what is said)
//!     control    the socket while requests are served            (on the main context)
//!     queue      one queue on one context                        (ring: the virtqueue; arena: memory for data)
//! config     what the device says of itself
//! ```
//!
//! The back end gets descriptors of memory made for it, and of nothing else: buffers of requests are anybody's memory, and what has no
//! descriptor cannot be given. So data is copied once, between the request's memory and that of the queue. This costs a tenth of a
//! microsecond for 4 KiB, and it is also what makes a back end harmless: it can change neither what was checked already, nor anything of
//! ours that it should not see.

mod arena;
mod config;
mod control;
mod lanes;
mod message;
mod queue;
mod ring;
mod vhost_user;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::json;
use stord_aio::{Context, Errno, IoVec, join_all, pool};
use stord_qmp::Error;
use stord_qmp::schema::block::BlockdevOptionsVirtioBlkVhostUser;
use stord_qmp::schema::create::PreallocMode;

use self::config::Terms;
use self::lanes::Lanes;
use self::queue::Ask;
use crate::driver::{BlockStatus, IoFuture, Limits, Protocol, ZeroFlags};
use crate::graph::{NodeOptions, Permissions};

/// The most pieces of a long range that are asked for at a time.
const PIECES: usize = 16;

/// The `virtio-blk-vhost-user` driver.
pub struct VirtioBlk {
    lanes: Arc<Lanes>,
    /// What the device has by now.
    capacity: AtomicU64,
    filename: String,
}

impl VirtioBlk {
    /// Connects to a back end. `main` watches the connection.
    ///
    /// # Errors
    /// Nobody listens at the path, or not a disk that can be worked with; the disk is read-only, and the node must not be.
    pub async fn open(
        options: &BlockdevOptionsVirtioBlkVhostUser,
        node: &NodeOptions,
        main: &Context,
    ) -> Result<Self, Error> {
        if !node.direct {
            return Err(
                Error::generic("cache.direct=off is not supported").with_hint(
                    "the page cache has no part in this: open the node with 'cache.direct=on'",
                ),
            );
        }
        let path = options.path.clone();
        let connected = pool::run(move || vhost_user::connect(&path))
            .await
            .map_err(|error| match error.raw_os_error() {
                Some(_) => Error::generic(format!(
                    "blkio_connect failed: Failed to connect to '{}': {}",
                    options.path,
                    plain(&error)
                )),
                None => Error::generic(format!("blkio_connect failed: {error}")),
            })?;
        let terms = connected.terms;
        if terms.is_read_only && !node.read_only && !node.auto_read_only {
            return Err(Error::generic(
                "blkio_start failed: Device is read-only: Read-only file system",
            )
            .with_hint("open it with 'read-only=on'"));
        }
        let delay = Duration::from_secs(options.reconnect_delay.unwrap_or(0).into());
        let description = json!({"driver": "virtio-blk-vhost-user", "path": options.path});
        Ok(Self {
            lanes: Lanes::start(options.path.clone(), connected, delay, main),
            capacity: AtomicU64::new(terms.capacity),
            filename: format!("json:{}", stord_qmp::json::to_compact(&description)),
        })
    }

    /// Whether the device refuses writes.
    pub fn is_read_only(&self) -> bool {
        self.terms().is_read_only
    }

    fn terms(&self) -> &Terms {
        self.lanes.terms()
    }

    async fn flush_cache(&self) -> Result<(), Errno> {
        if self.terms().has_cache {
            self.lanes.request(Ask::Flush).await
        } else {
            Ok(())
        }
    }

    /// Asks for a range without data in pieces as long as the device takes them.
    async fn ask_in_pieces(
        &self,
        offset: u64,
        len: u64,
        most: u64,
        ask: impl Fn(u64, u64) -> Ask,
    ) -> Result<(), Errno> {
        let mut done = 0;
        while done < len {
            let mut pieces = Vec::new();
            while done < len && pieces.len() < PIECES {
                let part = (len - done).min(most);
                pieces.push(self.lanes.request(ask(offset + done, part)));
                done += part;
            }
            let answers: Result<(), Errno> = join_all(pieces).await.into_iter().collect();
            answers?;
        }
        Ok(())
    }
}

/// What the system calls an error, without its number.
fn plain(error: &std::io::Error) -> String {
    error.raw_os_error().map_or_else(
        || error.to_string(),
        |number| Errno::from_raw(number).desc().to_owned(),
    )
}

impl Drop for VirtioBlk {
    fn drop(&mut self) {
        self.lanes.close();
    }
}

impl Protocol for VirtioBlk {
    fn limits(&self) -> Limits {
        self.terms().limits
    }

    fn length(&self) -> u64 {
        self.capacity.load(Ordering::Acquire)
    }

    fn read<'a>(&'a self, offset: u64, dst: IoVec) -> IoFuture<'a> {
        Box::pin(async move {
            let inside = self.length().saturating_sub(offset).min(dst.len());
            let to = if inside < dst.len() {
                dst.slice(inside..dst.len()).fill(0);
                dst.slice(0..inside)
            } else {
                dst
            };
            if to.is_empty() {
                return Ok(());
            }
            self.lanes.request(Ask::Read { offset, to }).await
        })
    }

    fn write<'a>(&'a self, offset: u64, src: IoVec, durable: bool) -> IoFuture<'a> {
        Box::pin(async move {
            let inside = self.length().saturating_sub(offset);
            let from = if inside < src.len() {
                // Blocks may go beyond the end, which is that of a sector.
                src.slice(0..inside)
            } else {
                src
            };
            if !from.is_empty() {
                self.lanes.request(Ask::Write { offset, from }).await?;
            }
            if durable {
                self.flush_cache().await?;
            }
            Ok(())
        })
    }

    fn write_zeroes<'a>(&'a self, offset: u64, len: u64, flags: ZeroFlags) -> IoFuture<'a> {
        Box::pin(async move {
            let most = self.terms().zeroes.ok_or(Errno::ENOTSUP)?;
            let unmap = flags.contains(ZeroFlags::MAY_UNMAP) && self.terms().zeroes_may_unmap;
            let len = self.length().saturating_sub(offset).min(len);
            self.ask_in_pieces(offset, len, most, |offset, len| Ask::Zeroes {
                offset,
                len,
                unmap,
            })
            .await?;
            if flags.contains(ZeroFlags::DURABLE) {
                self.flush_cache().await?;
            }
            Ok(())
        })
    }

    fn discard<'a>(&'a self, offset: u64, len: u64) -> IoFuture<'a> {
        Box::pin(async move {
            let most = self.terms().discard.ok_or(Errno::ENOTSUP)?;
            let len = self.length().saturating_sub(offset).min(len);
            self.ask_in_pieces(offset, len, most, |offset, len| Ask::Discard {
                offset,
                len,
            })
            .await
        })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(self.flush_cache())
    }

    fn status<'a>(&'a self, _offset: u64, len: u64) -> IoFuture<'a, BlockStatus> {
        Box::pin(async move {
            Ok(BlockStatus {
                len,
                data: true,
                zero: false,
                allocated: true,
            })
        })
    }

    /// The device's length cannot be changed from here; a node can take over the one that the device has by now.
    fn truncate<'a>(&'a self, size: u64, exact: bool, preallocation: PreallocMode) -> IoFuture<'a> {
        Box::pin(async move {
            if preallocation != PreallocMode::Off {
                return Err(Errno::ENOTSUP);
            }
            let capacity = self.lanes.capacity().await?;
            if size > capacity {
                return Err(Errno::EINVAL);
            }
            if exact && size != capacity {
                return Err(Errno::ENOTSUP);
            }
            self.capacity.store(capacity, Ordering::Release);
            Ok(())
        })
    }

    fn allocated_size<'a>(&'a self) -> IoFuture<'a, u64> {
        Box::pin(async { Err(Errno::ENOTSUP) })
    }

    fn prepare_permissions(
        &self,
        permissions: Permissions,
        _shared: Permissions,
    ) -> Result<(), Error> {
        if permissions.contains(Permissions::WRITE) && self.is_read_only() {
            return Err(Error::generic("Device is read-only"));
        }
        Ok(())
    }

    fn filename(&self) -> String {
        self.filename.clone()
    }
}
