//! A disk in memory. Every request is a task of its own, so a simulation carries requests out in every possible order. The disk
//! records what reaches it, fails chosen requests, and holds chosen requests back until they are released.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stord_aio::sync::Notify;
use stord_aio::{Errno, IoVec, spawn_local, sync::oneshot, yield_now};
use stord_qmp::Error;

use crate::driver::{BlockStatus, IoFuture, Limits, Protocol, ZeroFlags};
use crate::graph::Permissions;

/// The disk grows no longer than this, in bytes.
const LARGEST: u64 = 1 << 30;

/// A change that reached the disk, in the order of arrival.
#[derive(Clone, Debug)]
pub(crate) enum Operation {
    Write {
        offset: u64,
        data: Vec<u8>,
    },
    Zero {
        offset: u64,
        len: u64,
    },
    Truncate {
        size: u64,
    },
    /// Made everything durable that had arrived before it began: that many operations.
    Flush {
        covers: usize,
    },
}

/// What goes wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Read,
    Write,
    Flush,
    Discard,
}

type FaultCheck = Box<dyn FnMut(Fault, u64, u64) -> Option<Errno> + Send>;
type HoldCheck = Box<dyn FnMut(Fault, u64, u64) -> bool + Send>;

#[derive(Default)]
struct Inner {
    bytes: Vec<u8>,
    journal: Option<Vec<Operation>>,
    fault: Option<FaultCheck>,
    hold: Option<HoldCheck>,
    /// Requests held back so far.
    held: usize,
}

/// The disk; clones are the same disk.
#[derive(Clone, Default)]
pub(crate) struct MemoryDisk {
    inner: Arc<Mutex<Inner>>,
    released: Arc<Notify>,
}

impl MemoryDisk {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        let disk = Self::default();
        disk.lock().bytes = bytes;
        disk
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is on the disk now.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.lock().bytes.clone()
    }

    pub(crate) fn len(&self) -> u64 {
        self.lock().bytes.len() as u64
    }

    /// Starts recording.
    pub(crate) fn record(&self) {
        self.lock().journal = Some(Vec::new());
    }

    /// What has been recorded so far.
    pub(crate) fn journal(&self) -> Vec<Operation> {
        self.lock().journal.clone().unwrap_or_default()
    }

    /// How many operations have been recorded so far.
    pub(crate) fn journal_len(&self) -> usize {
        self.lock().journal.as_ref().map_or(0, Vec::len)
    }

    /// Lets `check` fail requests: it is asked with the kind, offset and length of each.
    pub(crate) fn fail(
        &self,
        check: impl FnMut(Fault, u64, u64) -> Option<Errno> + Send + 'static,
    ) {
        self.lock().fault = Some(Box::new(check));
    }

    /// No more failures.
    pub(crate) fn heal(&self) {
        self.lock().fault = None;
    }

    /// Holds back the requests for which `check` says so, by kind, offset and length, until `release`.
    pub(crate) fn hold(&self, check: impl FnMut(Fault, u64, u64) -> bool + Send + 'static) {
        self.lock().hold = Some(Box::new(check));
    }

    /// Waits until that many requests are held back.
    pub(crate) async fn wait_held(&self, count: usize) {
        while self.lock().held < count {
            yield_now().await;
        }
    }

    /// Lets go of all requests held back, and holds back no more.
    pub(crate) fn release(&self) {
        {
            let mut inner = self.lock();
            inner.hold = None;
            inner.held = 0;
        }
        self.released.notify_waiters();
    }

    /// Runs `work` on the disk as a task of its own.
    fn request<'a, T: 'static>(
        &'a self,
        kind: Fault,
        offset: u64,
        len: u64,
        work: impl FnOnce(&mut Inner) -> T + 'static,
    ) -> IoFuture<'a, T> {
        let disk = self.clone();
        let (sender, receiver) = oneshot::channel();
        spawn_local(async move {
            yield_now().await;
            let held = {
                let mut inner = disk.lock();
                let hold = inner
                    .hold
                    .as_mut()
                    .is_some_and(|hold| hold(kind, offset, len));
                hold.then(|| {
                    inner.held += 1;
                    Arc::clone(&disk.released).notified_owned()
                })
            };
            if let Some(released) = held {
                released.await;
            }
            let result = {
                let mut inner = disk.lock();
                match inner
                    .fault
                    .as_mut()
                    .and_then(|fault| fault(kind, offset, len))
                {
                    Some(errno) => Err(errno),
                    None if kind == Fault::Write && offset.saturating_add(len) > LARGEST => {
                        Err(Errno::EFBIG)
                    }
                    None => Ok(work(&mut inner)),
                }
            };
            let _ = sender.send(result);
        });
        Box::pin(async move { receiver.await.expect("the task answers") })
    }
}

impl Inner {
    fn note(&mut self, operation: impl FnOnce() -> Operation) {
        if let Some(journal) = &mut self.journal {
            journal.push(operation());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let start = usize::try_from(offset).expect("fits into memory");
        let end = start + data.len();
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[start..end].copy_from_slice(data);
    }

    /// The part of a range that lies on the disk.
    fn inside(&self, offset: u64, len: u64) -> (usize, usize) {
        let clip =
            |at: u64| usize::try_from(at.min(self.bytes.len() as u64)).expect("fits into memory");
        (clip(offset), clip(offset.saturating_add(len)))
    }

    fn zero(&mut self, offset: u64, len: u64) {
        let (start, end) = self.inside(offset, len);
        self.bytes[start..end].fill(0);
    }
}

impl Protocol for MemoryDisk {
    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn length(&self) -> u64 {
        self.len()
    }

    fn read<'a>(&'a self, offset: u64, dst: IoVec) -> IoFuture<'a> {
        let len = dst.len();
        // The task cannot keep the buffers, which the caller may look at only once this is done.
        let copied = self.request(Fault::Read, offset, len, move |inner| {
            let (start, end) = inner.inside(offset, len);
            inner.bytes[start..end].to_vec()
        });
        Box::pin(async move {
            let mut bytes = copied.await?;
            bytes.resize(usize::try_from(dst.len()).expect("fits into memory"), 0);
            dst.write_at(0, &bytes);
            Ok(())
        })
    }

    fn write<'a>(&'a self, offset: u64, src: IoVec, _durable: bool) -> IoFuture<'a> {
        let data = src.to_vec();
        self.request(Fault::Write, offset, src.len(), move |inner| {
            inner.write(offset, &data);
            inner.note(|| Operation::Write { offset, data });
        })
    }

    fn write_zeroes<'a>(&'a self, offset: u64, len: u64, _flags: ZeroFlags) -> IoFuture<'a> {
        self.request(Fault::Write, offset, len, move |inner| {
            let end = usize::try_from(offset + len).expect("fits into memory");
            if inner.bytes.len() < end {
                inner.bytes.resize(end, 0);
            }
            inner.zero(offset, len);
            inner.note(|| Operation::Zero { offset, len });
        })
    }

    fn discard<'a>(&'a self, offset: u64, len: u64) -> IoFuture<'a> {
        self.request(Fault::Discard, offset, len, move |inner| {
            inner.zero(offset, len);
            inner.note(|| Operation::Zero { offset, len });
        })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        let covers = self.journal_len();
        self.request(Fault::Flush, 0, 0, move |inner| {
            inner.note(|| Operation::Flush { covers });
        })
    }

    fn status<'a>(&'a self, offset: u64, len: u64) -> IoFuture<'a, BlockStatus> {
        let inside = self.len().saturating_sub(offset).min(len);
        let status = BlockStatus {
            len: if inside == 0 { len } else { inside },
            data: inside > 0,
            zero: inside == 0,
            allocated: true,
        };
        Box::pin(async move { Ok(status) })
    }

    fn truncate<'a>(&'a self, size: u64, _exact: bool) -> IoFuture<'a> {
        self.request(Fault::Write, size, 0, move |inner| {
            inner
                .bytes
                .resize(usize::try_from(size).expect("fits into memory"), 0);
            inner.note(|| Operation::Truncate { size });
        })
    }

    fn allocated_size<'a>(&'a self) -> IoFuture<'a, u64> {
        let len = self.len();
        Box::pin(async move { Ok(len) })
    }

    fn prepare_permissions(
        &self,
        _permissions: Permissions,
        _shared: Permissions,
    ) -> Result<(), Error> {
        Ok(())
    }

    fn filename(&self) -> String {
        "memory".to_owned()
    }
}
