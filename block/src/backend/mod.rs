//! Backends: where requests enter the graph. An export, a job or any other user of a node holds one.
//!
//! A request counts itself in at its backend and out when it is done. That count is the read lock of the graph: an edit waits in a
//! drained section until it is zero, and requests that come meanwhile wait until the section ends (`gate`). Requests are made on an
//! I/O context, and everything they do happens there.

mod bypass;
mod failures;
mod gate;
mod statistics;

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use arc_swap::ArcSwapOption;
use stord_aio::{Errno, IoVec};
use stord_qmp::schema::create::PreallocMode;

use crate::driver::{BlockStatus, ZeroFlags};
use crate::graph::{Claim, Node, Permissions};
use crate::io::{self, Detail, Location};

pub use bypass::Bypass;
pub use failures::{Failure, Failures};
pub(crate) use gate::Gate;
use gate::Ticket;
use statistics::Kind;
pub use statistics::{Total, Totals};

/// What the user of a backend wants to hear of. Called on the control thread.
pub trait BackendListener: Send + Sync {
    /// New requests will wait until `drained_end`; stop fetching them.
    fn drained_begin(&self) {}
    /// The drained section is over.
    fn drained_end(&self) {}
    /// The node has another length now.
    fn resized(&self, size: u64) {
        let _ = size;
    }
}

/// A handle on the root of a graph, for requests. Cloning gives another handle on the same root.
#[derive(Clone)]
pub struct Backend(Arc<Root>);

pub(crate) struct Root {
    name: String,
    node: ArcSwapOption<Node>,
    /// The permissions and, in the upper byte, what is shared.
    claim: AtomicU16,
    /// The claim is given up while the node is inactive.
    suspended: AtomicBool,
    /// The user goes along with the node becoming inactive although it writes.
    allows_inactive: AtomicBool,
    failures: OnceLock<Failures>,
    gate: Gate,
    /// How many read the file themselves.
    bypasses: AtomicUsize,
    listener: Mutex<Option<Arc<dyn BackendListener>>>,
}

impl Root {
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn node(&self) -> Option<Arc<Node>> {
        self.node.load_full()
    }

    pub(crate) fn set_node(&self, node: Option<Arc<Node>>) {
        self.node.store(node);
    }

    pub(crate) fn claim(&self) -> Claim {
        if self.suspended.load(Ordering::Acquire) {
            return Claim::NONE;
        }
        let [permissions, shared] = self.claim.load(Ordering::Acquire).to_le_bytes();
        Claim {
            permissions: Permissions::from_bits_retain(permissions),
            shared: Permissions::from_bits_retain(shared),
        }
    }

    pub(crate) fn set_claim(&self, claim: Claim) {
        let packed = u16::from_le_bytes([claim.permissions.bits(), claim.shared.bits()]);
        self.claim.store(packed, Ordering::Release);
    }

    /// Gives the claim up, or takes it up again, which has to be planned for first.
    pub(crate) fn suspend(&self, suspended: bool) {
        self.suspended.store(suspended, Ordering::Release);
    }

    pub(crate) fn allow_inactive(&self) {
        self.allows_inactive.store(true, Ordering::Release);
    }

    /// Whether the node may become inactive as far as this user goes.
    pub(crate) fn lets_inactivate(&self) -> bool {
        self.allows_inactive.load(Ordering::Acquire)
            || !self.claim().permissions.intersects(Permissions::WRITABLE)
    }

    pub(crate) fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        for statistics in self.gate.statistics() {
            totals.add(statistics);
        }
        totals
    }

    pub(crate) fn gate(&self) -> &Gate {
        &self.gate
    }

    pub(crate) fn listener(&self) -> Option<Arc<dyn BackendListener>> {
        self.listener
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Backend {
    pub(crate) fn new(name: String, node: Arc<Node>) -> Self {
        let backend = Self(Arc::new(Root {
            name,
            node: ArcSwapOption::from(Some(node)),
            claim: AtomicU16::new(0),
            suspended: AtomicBool::new(false),
            allows_inactive: AtomicBool::new(false),
            failures: OnceLock::new(),
            gate: Gate::default(),
            bypasses: AtomicUsize::new(0),
            listener: Mutex::new(None),
        }));
        backend.0.set_claim(Claim::NONE);
        backend
    }

    pub(crate) fn root(&self) -> &Arc<Root> {
        &self.0
    }

    /// The name its user gave it, for messages.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The name of the node it is attached to; empty once detached.
    pub fn node_name(&self) -> String {
        self.0
            .node()
            .map_or_else(String::new, |node| node.name().to_owned())
    }

    /// Tells `listener` of drained sections and changes of length from now on.
    pub fn set_listener(&self, listener: Arc<dyn BackendListener>) {
        *self
            .0
            .listener
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(listener);
    }

    /// Whether the node may be used; while it may not, writes get `EPERM`.
    pub fn is_active(&self) -> bool {
        self.0.node().is_none_or(|node| node.is_active())
    }

    /// The length in bytes.
    pub fn size(&self) -> u64 {
        self.0.node().map_or(0, |node| node.size())
    }

    /// Requests aligned to this many bytes go through without read-modify-write.
    pub fn alignment(&self) -> u32 {
        self.0
            .node()
            .map_or(1, |node| node.limits().request_alignment)
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.0.node().is_none_or(|node| node.is_read_only())
            || !self.0.claim().permissions.contains(Permissions::WRITE)
    }

    /// Whether discards reach the storage (`discard=unmap` at the node).
    pub fn passes_discard(&self) -> bool {
        self.0.node().is_some_and(|node| node.options().discard)
    }

    pub(crate) fn report_failures(&self, failures: Failures) {
        // Whoever came first keeps being told.
        let _ = self.0.failures.set(failures);
    }

    pub(crate) async fn start(&self) -> Result<Request<'_>, Errno> {
        let ticket = self.0.gate.enter().await;
        let node = self.0.node().ok_or(Errno::ENOMEDIUM)?;
        let begun = Instant::now();
        Ok(Request {
            root: &self.0,
            ticket,
            node,
            begun,
        })
    }

    fn try_start(&self) -> Option<Request<'_>> {
        let ticket = self.0.gate.try_enter()?;
        let node = self.0.node()?;
        let begun = Instant::now();
        Some(Request {
            root: &self.0,
            ticket,
            node,
            begun,
        })
    }

    /// What all requests came to, on every context.
    pub fn totals(&self) -> Totals {
        self.0.totals()
    }

    /// Reads all of `dst`, at any byte alignment.
    ///
    /// # Errors
    /// `EIO` for a range that is not inside the length; otherwise what the storage says.
    pub async fn read(&self, offset: u64, dst: IoVec) -> Result<(), Errno> {
        let request = self.start().await?;
        let len = dst.len();
        request.check_range(offset, len)?;
        let result = io::read(&request.node, offset, dst).await;
        request.finish(Kind::Read, len, result)
    }

    /// Reads at once if no waiting is needed; `None` where it is.
    pub fn try_read(&self, offset: u64, dst: &IoVec) -> Option<Result<(), Errno>> {
        let request = self.try_start()?;
        if let Err(errno) = request.check_range(offset, dst.len()) {
            return Some(Err(errno));
        }
        let result = io::try_read(&request.node, offset, dst)?;
        Some(request.finish(Kind::Read, dst.len(), result))
    }

    fn check_writable(&self) -> Result<(), Errno> {
        if self.0.claim().permissions.contains(Permissions::WRITE) {
            Ok(())
        } else {
            Err(Errno::EPERM)
        }
    }

    /// Writes all of `src`, at any byte alignment. `durable` makes it survive a power failure once this returns.
    ///
    /// # Errors
    /// `EIO` for a range that is not inside the length, `EPERM` without the permission; otherwise what the storage says.
    pub async fn write(&self, offset: u64, src: IoVec, durable: bool) -> Result<(), Errno> {
        self.check_writable()?;
        let request = self.start().await?;
        let len = src.len();
        request.check_range(offset, len)?;
        let result = io::write(&request.node, offset, src, durable).await;
        request.finish(Kind::Write, len, result)
    }

    /// Writes whole clusters compressed; the last may be cut off by the node's end. What does not get smaller is written as it is.
    ///
    /// # Errors
    /// As [`write`](Self::write); `ENOTSUP` where the format has no compression or the image cannot hold compressed data, `EINVAL`
    /// for parts of clusters.
    pub async fn write_compressed(&self, offset: u64, src: IoVec) -> Result<(), Errno> {
        self.check_writable()?;
        let request = self.start().await?;
        let len = src.len();
        request.check_range(offset, len)?;
        let result = io::write_compressed(&request.node, offset, src).await;
        request.finish(Kind::Write, len, result)
    }

    /// Writes at once if no waiting is needed; `None` where it is: then the whole has to be written again.
    pub fn try_write(&self, offset: u64, src: &IoVec) -> Option<Result<(), Errno>> {
        self.check_writable().ok()?;
        let request = self.try_start()?;
        if let Err(errno) = request.check_range(offset, src.len()) {
            return Some(Err(errno));
        }
        let result = io::try_write(&request.node, offset, src)?;
        Some(request.finish(Kind::Write, src.len(), result))
    }

    /// Makes the range read as zeroes.
    ///
    /// # Errors
    /// As [`write`](Self::write); `ENOTSUP` with `NO_FALLBACK` where only writing data could.
    pub async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), Errno> {
        self.check_writable()?;
        let request = self.start().await?;
        request.check_range(offset, len)?;
        let result = io::write_zeroes(&request.node, offset, len, flags).await;
        request.finish(Kind::Write, len, result)
    }

    /// Gives the space of the range back, as far as the options let it; what it reads as afterwards is undefined.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.check_writable()?;
        let request = self.start().await?;
        request.check_range(offset, len)?;
        let result = io::discard(&request.node, offset, len).await;
        request.finish(Kind::Unmap, len, result)
    }

    /// Makes every write that completed before this call durable.
    ///
    /// # Errors
    /// What the storage says. A failed flush stays due.
    pub async fn flush(&self) -> Result<(), Errno> {
        let request = self.start().await?;
        if request.node.is_read_only() {
            return Ok(());
        }
        let result = io::flush(&request.node).await;
        request.finish(Kind::Flush, 0, result)
    }

    /// Returns when every change that completed before this call would outlive the process, as if it were killed now.
    ///
    /// # Errors
    /// What the storage says.
    pub async fn settle(&self) -> Result<(), Errno> {
        let request = self.start().await?;
        if request.node.is_read_only() {
            return Ok(());
        }
        io::settle(&request.node).await
    }

    /// The status of the beginning of the range, over the whole backing chain; neighbours of the same status may follow.
    ///
    /// # Errors
    /// `EIO` for a range that is not inside the length; otherwise what the storage says.
    pub async fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus, Errno> {
        let request = self.start().await?;
        request.check_range(offset, len)?;
        io::block_status(&request.node, offset, len).await
    }

    /// Where the beginning of the range is stored, over the whole backing chain; neighbours that go on there may follow.
    ///
    /// # Errors
    /// `EIO` for a range that is not inside the length; otherwise what the storage says.
    pub async fn locate(&self, offset: u64, len: u64, detail: Detail) -> Result<Location, Errno> {
        let request = self.start().await?;
        request.check_range(offset, len)?;
        io::locate(&request.node, offset, len, detail).await
    }

    /// Changes the length. `exact` forbids a longer result than asked for. The listener is not called for one's own change.
    ///
    /// # Errors
    /// `EPERM` without the permission to resize; otherwise what the storage says.
    pub async fn truncate(&self, size: u64, exact: bool) -> Result<(), Errno> {
        if !self.0.claim().permissions.contains(Permissions::RESIZE) {
            return Err(Errno::EPERM);
        }
        let request = self.start().await?;
        io::truncate(&request.node, size, exact, PreallocMode::Off).await
    }

    /// Bytes of storage that the image takes up, without its backing files.
    ///
    /// # Errors
    /// What the storage says.
    pub async fn allocated_size(&self) -> Result<u64, Errno> {
        let request = self.start().await?;
        io::allocated_size(&request.node).await
    }
}

/// A request that has been counted in.
pub(crate) struct Request<'a> {
    root: &'a Root,
    ticket: Ticket<'a>,
    pub(crate) node: Arc<Node>,
    begun: Instant,
}

impl Request<'_> {
    fn check_range(&self, offset: u64, len: u64) -> Result<(), Errno> {
        match offset.checked_add(len) {
            Some(end) if end <= self.node.size() => Ok(()),
            _ => Err(Errno::EIO),
        }
    }

    /// Takes the result into the statistics.
    fn finish(self, kind: Kind, len: u64, result: Result<(), Errno>) -> Result<(), Errno> {
        self.ticket
            .statistics()
            .account(kind, len, self.begun, result);
        if let Err(errno) = result
            && let Some(failures) = self.root.failures.get()
        {
            failures.report(kind, errno);
        }
        result
    }
}
