//! `null-co` and `null-aio`: a disk that forgets what is written and reads as zeroes, for measuring everything else.

use std::time::Duration;

use stord_aio::{Errno, IoVec, time};
use stord_qmp::Error;
use stord_qmp::schema::block::{BlockdevDriver, BlockdevOptionsNull};
use stord_qmp::schema::create::PreallocMode;

use crate::driver::{BlockStatus, IoFuture, Limits, Protocol, ZeroFlags};
use crate::graph::{NodeOptions, cannot_change};

/// The size in bytes where the user gives none.
const DEFAULT_SIZE: i64 = 1 << 30;

/// The `null-co` and `null-aio` drivers.
pub struct Null {
    size: u64,
    latency: Duration,
    /// Tells that everything is zero, rather than data that happens to be.
    zeroes: bool,
}

impl Null {
    /// Makes a disk as described.
    ///
    /// # Errors
    /// The size is negative, or the latency beyond what a signed number holds.
    pub fn open(options: &BlockdevOptionsNull) -> Result<Self, Error> {
        let size = options.size.unwrap_or(DEFAULT_SIZE);
        let latency = options.latency_ns.unwrap_or(0);
        if i64::try_from(latency).is_err() {
            return Err(Error::generic("latency-ns is invalid"));
        }
        Ok(Self {
            size: u64::try_from(size)
                .map_err(|_| Error::generic("Parameter 'size' expects a non-negative number"))?,
            latency: Duration::from_nanos(latency),
            zeroes: options.read_zeroes.unwrap_or(false),
        })
    }

    fn respond<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async move {
            if !self.latency.is_zero() {
                time::sleep(self.latency).await;
            }
            Ok(())
        })
    }
}

impl Protocol for Null {
    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn length(&self) -> u64 {
        self.size
    }

    fn read<'a>(&'a self, _offset: u64, dst: IoVec) -> IoFuture<'a> {
        // Filled also without `read-zeroes`: buffers are used again, and their old content is nobody's business.
        dst.fill(0);
        self.respond()
    }

    fn try_read(&self, _offset: u64, dst: &IoVec) -> Option<Result<(), Errno>> {
        self.latency.is_zero().then(|| {
            dst.fill(0);
            Ok(())
        })
    }

    fn write<'a>(&'a self, _offset: u64, _src: IoVec, _durable: bool) -> IoFuture<'a> {
        self.respond()
    }

    fn try_write(&self, _offset: u64, _src: &IoVec) -> Option<Result<(), Errno>> {
        self.latency.is_zero().then_some(Ok(()))
    }

    fn write_zeroes<'a>(&'a self, _offset: u64, _len: u64, _flags: ZeroFlags) -> IoFuture<'a> {
        self.respond()
    }

    fn discard<'a>(&'a self, _offset: u64, _len: u64) -> IoFuture<'a> {
        self.respond()
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        self.respond()
    }

    fn status<'a>(&'a self, _offset: u64, len: u64) -> IoFuture<'a, BlockStatus> {
        Box::pin(async move {
            Ok(BlockStatus {
                len,
                data: !self.zeroes,
                zero: self.zeroes,
                allocated: true,
            })
        })
    }

    fn truncate<'a>(
        &'a self,
        _size: u64,
        _exact: bool,
        _preallocation: PreallocMode,
    ) -> IoFuture<'a> {
        Box::pin(async { Err(Errno::ENOTSUP) })
    }

    fn allocated_size<'a>(&'a self) -> IoFuture<'a, u64> {
        Box::pin(async { Ok(0) })
    }

    fn reopened(
        &self,
        driver: &BlockdevDriver,
        _options: &NodeOptions,
    ) -> Result<Box<dyn Protocol>, Error> {
        let (BlockdevDriver::NullCo(options) | BlockdevDriver::NullAio(options)) = driver else {
            return Err(cannot_change("driver"));
        };
        let other = Self::open(options)?;
        if other.size != self.size {
            return Err(cannot_change("size"));
        }
        Ok(Box::new(other))
    }

    fn filename(&self) -> String {
        "null-co://".to_owned()
    }
}
