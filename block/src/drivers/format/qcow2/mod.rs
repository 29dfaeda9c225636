//! `qcow2`.

use stord_aio::{Errno, IoVec};
use stord_qmp::Error;
use stord_qmp::schema::block::BlockdevOptionsQcow2;

use crate::driver::{Extent, Format, ImageLinks, IoFuture, Limits, Lookup, WritePlan, ZeroFlags};
use crate::graph::{Children, NodeOptions};

/// The driver.
pub struct Qcow2 {}

/// Links.
///
/// # Errors
/// Always.
pub async fn links(_children: &Children) -> Result<ImageLinks, Error> {
    Err(Error::generic("qcow2 is not built yet"))
}

/// Opens.
///
/// # Errors
/// Always.
pub async fn open(
    _children: Children,
    _options: BlockdevOptionsQcow2,
    _common: NodeOptions,
) -> Result<Qcow2, Error> {
    Err(Error::generic("qcow2 is not built yet"))
}

impl Format for Qcow2 {
    fn limits(&self) -> Limits {
        Limits::default()
    }
    fn length(&self) -> u64 {
        0
    }
    fn map_read(&self, _offset: u64, _len: u64) -> Result<Lookup<Extent>, Errno> {
        Err(Errno::ENOTSUP)
    }
    fn load<'a>(&'a self, _offset: u64) -> IoFuture<'a> {
        Box::pin(async { Err(Errno::ENOTSUP) })
    }
    fn read_special<'a>(&'a self, _offset: u64, _dst: IoVec) -> IoFuture<'a> {
        Box::pin(async { Err(Errno::ENOTSUP) })
    }
    fn map_write(&self, _offset: u64, _len: u64) -> Result<Lookup<Extent>, Errno> {
        Err(Errno::ENOTSUP)
    }
    fn prepare_write<'a>(&'a self, _offset: u64, _len: u64) -> IoFuture<'a, WritePlan> {
        Box::pin(async { Err(Errno::ENOTSUP) })
    }
    fn write_zeroes<'a>(&'a self, _offset: u64, _len: u64, _flags: ZeroFlags) -> IoFuture<'a> {
        Box::pin(async { Err(Errno::ENOTSUP) })
    }
    fn discard<'a>(&'a self, _offset: u64, _len: u64) -> IoFuture<'a> {
        Box::pin(async { Err(Errno::ENOTSUP) })
    }
    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async { Err(Errno::ENOTSUP) })
    }
    fn truncate<'a>(&'a self, _size: u64, _exact: bool) -> IoFuture<'a> {
        Box::pin(async { Err(Errno::ENOTSUP) })
    }
}
