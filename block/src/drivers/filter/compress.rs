//! `compress`: whatever is written through this node is stored compressed by the format below.
//!
//! A format compresses whole clusters. What covers a cluster only in part is put together with what is there, and as nothing else may
//! change it in between, every change of the node holds its clusters: whole ones shared, others alone.

use std::ops::Range;

use stord_aio::sync::RangeLock;
use stord_aio::{Errno, IoBuffer, IoVec};
use stord_qmp::Error;
use stord_qmp::schema::create::PreallocMode;

use crate::driver::{
    ChildId, Driver, Extent, ExtentKind, FILE, Format, IoFuture, Limits, Lookup, WritePlan,
    ZeroFlags,
};
use crate::graph::{Children, Claim, Permissions};

/// The `compress` driver.
pub struct Compress {
    children: Children,
    /// Bytes of a cluster of the format below.
    cluster: u64,
    changes: RangeLock,
}

impl Compress {
    /// Puts the filter over its child, which is in place.
    ///
    /// # Errors
    /// The child stores nothing compressed.
    pub fn open(children: Children) -> Result<Self, Error> {
        let cluster = children.with(FILE, |node| {
            let node = node.ok_or_else(|| Error::generic("The file node has gone"))?;
            let refused = || {
                Error::generic(format!(
                    "Compression is not supported for underlying format: {}",
                    node.driver_name()
                ))
            };
            match node.driver() {
                Driver::Format(format) if format.can_compress() => {
                    format.info().cluster_size.ok_or_else(refused)
                }
                _ => Err(refused()),
            }
        })?;
        Ok(Self {
            children,
            cluster,
            changes: RangeLock::default(),
        })
    }

    /// The clusters that a range touches, the last cut off by the node's end.
    fn clusters(&self, offset: u64, len: u64) -> Result<Range<u64>, Errno> {
        let end = offset.checked_add(len).ok_or(Errno::EINVAL)?;
        let rounded = end.checked_next_multiple_of(self.cluster);
        let rounded = rounded.ok_or(Errno::EINVAL)?;
        let start = offset - offset % self.cluster;
        Ok(start..rounded.min(self.children.size(FILE)).max(end))
    }

    async fn write_all(&self, offset: u64, src: IoVec) -> Result<(), Errno> {
        let (end, whole) = (offset + src.len(), self.clusters(offset, src.len())?);
        if whole == (offset..end) {
            let _held = self.changes.lock_shared(whole).await;
            return self.children.write_compressed(FILE, offset, src).await;
        }
        let _held = self.changes.lock(whole.clone()).await;
        let mut content = self.present(whole.start..offset).await?;
        content.append(src);
        content.append(self.present(end..whole.end).await?);
        self.children
            .write_compressed(FILE, whole.start, content)
            .await
    }

    async fn present(&self, range: Range<u64>) -> Result<IoVec, Errno> {
        if range.is_empty() {
            return Ok(IoVec::default());
        }
        let len = usize::try_from(range.end - range.start).map_err(|_| Errno::ENOMEM)?;
        let content = IoVec::from(IoBuffer::zeroed(len));
        self.children
            .read(FILE, range.start, content.clone())
            .await?;
        Ok(content)
    }
}

impl Format for Compress {
    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn length(&self) -> u64 {
        self.children.size(FILE)
    }

    fn map_read(&self, offset: u64, len: u64) -> Result<Lookup<Extent>, Errno> {
        let kind = ExtentKind::Data {
            child: FILE,
            offset,
        };
        Ok(Lookup::Ready(Extent { kind, len }))
    }

    fn load<'a>(&'a self, _offset: u64) -> IoFuture<'a> {
        Box::pin(async { Ok(()) })
    }

    /// Nothing is overwritten in place: `write` takes it all.
    fn map_write(&self, _offset: u64, _len: u64) -> Result<Lookup<Extent>, Errno> {
        Ok(Lookup::Load)
    }

    fn prepare_write<'a>(&'a self, _offset: u64, _len: u64) -> IoFuture<'a, WritePlan> {
        Box::pin(async { Err(Errno::EINVAL) })
    }

    fn takes_writes(&self) -> bool {
        true
    }

    fn write<'a>(&'a self, offset: u64, src: IoVec) -> IoFuture<'a> {
        Box::pin(self.write_all(offset, src))
    }

    fn can_compress(&self) -> bool {
        true
    }

    fn write_compressed<'a>(&'a self, offset: u64, src: IoVec) -> IoFuture<'a> {
        Box::pin(self.write_all(offset, src))
    }

    fn write_zeroes<'a>(&'a self, offset: u64, len: u64, flags: ZeroFlags) -> IoFuture<'a> {
        Box::pin(async move {
            let _held = self.changes.lock_shared(self.clusters(offset, len)?).await;
            self.children.write_zeroes(FILE, offset, len, flags).await
        })
    }

    fn discard<'a>(&'a self, offset: u64, len: u64) -> IoFuture<'a> {
        Box::pin(async move {
            let _held = self.changes.lock_shared(self.clusters(offset, len)?).await;
            self.children.discard(FILE, offset, len).await
        })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async { Ok(()) })
    }

    fn status_of_child(&self) -> bool {
        true
    }

    fn truncate<'a>(&'a self, size: u64, exact: bool, preallocation: PreallocMode) -> IoFuture<'a> {
        Box::pin(async move {
            self.children
                .truncate(FILE, size, exact, preallocation)
                .await
        })
    }

    /// Without metadata of its own, it needs and shares just what its parents do.
    fn child_claim(
        &self,
        _child: ChildId,
        wanted: Permissions,
        shared: Permissions,
        _writable: bool,
    ) -> Claim {
        Claim {
            permissions: wanted,
            shared,
        }
    }
}
