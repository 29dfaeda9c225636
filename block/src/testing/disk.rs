//! A disk in memory. Every request is a task of its own, so a simulation carries requests out in every possible order. The disk
//! records what reaches it, fails chosen requests, and holds chosen requests back until they are released.
//!
//! A request that is to fail may have been carried out all the same, or in part: nobody can tell from an errno.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stord_aio::sync::Notify;
use stord_aio::{Errno, IoVec, spawn_local, sync::oneshot, yield_now};
use stord_qmp::Error;
use stord_qmp::schema::create::PreallocMode;

use crate::driver::{BlockStatus, IoFuture, Limits, Protocol, ZeroFlags};
use crate::graph::Permissions;
use crate::testing::Random;

/// The disk grows no longer than this, unless told otherwise; in bytes.
const LARGEST: u64 = 1 << 30;
/// What a disk writes as a whole or not at all, in bytes.
pub(super) const SECTOR: usize = 512;

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

/// What several disks together have been through, so that they can lose their power at the same moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Journal(Arc<Mutex<Vec<(usize, Operation)>>>);

impl Journal {
    fn lock(&self) -> MutexGuard<'_, Vec<(usize, Operation)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What has arrived so far, and at which disk, in the order of arrival.
    pub(crate) fn operations(&self) -> Vec<(usize, Operation)> {
        self.lock().clone()
    }

    /// How much has arrived so far.
    pub(crate) fn len(&self) -> usize {
        self.lock().len()
    }
}

/// What goes wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Read,
    Write,
    Flush,
    Discard,
    Truncate,
}

/// How much of a request is carried out.
#[derive(Clone, Copy, Debug)]
enum Carry {
    All,
    /// It fails; the number says how much is carried out nevertheless.
    Part(u64),
}

impl Carry {
    /// How many bytes of `len` are carried out: whole sectors of a request that fails.
    fn bytes(self, len: usize) -> usize {
        match self {
            Self::All => len,
            Self::Part(number) => {
                let sectors = len.div_ceil(SECTOR) as u64;
                let some = usize::try_from(number % (sectors + 1)).expect("no more than there are");
                len.min(some * SECTOR)
            }
        }
    }
}

type FaultCheck = Box<dyn FnMut(Fault, u64, u64) -> Option<Errno> + Send>;
type HoldCheck = Box<dyn FnMut(Fault, u64, u64) -> bool + Send>;

#[derive(Default)]
struct Inner {
    bytes: Vec<u8>,
    /// Where operations are recorded, and under which number.
    journal: Option<(usize, Journal)>,
    tear: Option<Random>,
    largest: Option<u64>,
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

    /// Starts recording; this disk is number `disk` in the journal.
    pub(crate) fn record(&self, disk: usize, journal: &Journal) {
        self.lock().journal = Some((disk, journal.clone()));
    }

    /// From now on a request that fails may have been carried out in part.
    pub(crate) fn tear(&self, random: Random) {
        self.lock().tear = Some(random);
    }

    /// Lets `check` fail requests: it is asked with the kind, offset and length of each.
    pub(crate) fn fail(
        &self,
        check: impl FnMut(Fault, u64, u64) -> Option<Errno> + Send + 'static,
    ) {
        self.lock().fault = Some(Box::new(check));
    }

    /// The disk grows no longer than this, in bytes.
    pub(crate) fn limit(&self, largest: u64) {
        self.lock().largest = Some(largest);
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
        work: impl FnOnce(&mut Inner, Carry) -> T + 'static,
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
                    Some(errno) => {
                        if let Some(random) = &mut inner.tear
                            && kind != Fault::Flush
                        {
                            let carry = Carry::Part(random.next());
                            work(&mut inner, carry);
                        }
                        Err(errno)
                    }
                    None if matches!(kind, Fault::Write | Fault::Truncate)
                        && offset.saturating_add(len) > inner.largest.unwrap_or(LARGEST) =>
                    {
                        Err(Errno::EFBIG)
                    }
                    None => Ok(work(&mut inner, Carry::All)),
                }
            };
            let _ = sender.send(result);
        });
        Box::pin(async move { receiver.await.expect("the task answers") })
    }
}

impl Inner {
    fn note(&mut self, operation: impl FnOnce() -> Operation) {
        if let Some((disk, journal)) = &self.journal {
            journal.lock().push((*disk, operation()));
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
        let copied = self.request(Fault::Read, offset, len, move |inner, _| {
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
        self.request(Fault::Write, offset, src.len(), move |inner, carry| {
            let mut data = data;
            data.truncate(carry.bytes(data.len()));
            if !data.is_empty() {
                inner.write(offset, &data);
                inner.note(|| Operation::Write { offset, data });
            }
        })
    }

    fn write_zeroes<'a>(&'a self, offset: u64, len: u64, _flags: ZeroFlags) -> IoFuture<'a> {
        self.request(Fault::Write, offset, len, move |inner, carry| {
            let whole = usize::try_from(len).expect("fits into memory");
            let len = carry.bytes(whole) as u64;
            if len == 0 {
                return;
            }
            let end = usize::try_from(offset + len).expect("fits into memory");
            if inner.bytes.len() < end {
                inner.bytes.resize(end, 0);
            }
            inner.zero(offset, len);
            inner.note(|| Operation::Zero { offset, len });
        })
    }

    fn discard<'a>(&'a self, offset: u64, len: u64) -> IoFuture<'a> {
        self.request(Fault::Discard, offset, len, move |inner, carry| {
            let whole = usize::try_from(len).expect("fits into memory");
            let len = carry.bytes(whole) as u64;
            inner.zero(offset, len);
            inner.note(|| Operation::Zero { offset, len });
        })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        let covers = match &self.lock().journal {
            Some((_, journal)) => journal.len(),
            None => 0,
        };
        self.request(Fault::Flush, 0, 0, move |inner, _| {
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

    fn truncate<'a>(
        &'a self,
        size: u64,
        _exact: bool,
        _preallocation: PreallocMode,
    ) -> IoFuture<'a> {
        self.request(Fault::Truncate, size, 0, move |inner, carry| {
            if matches!(carry, Carry::Part(number) if number % 2 == 0) {
                return;
            }
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
