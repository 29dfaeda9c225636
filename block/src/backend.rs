//! Backends: where requests enter the graph. An export, a job or any other user of a node holds one.
//!
//! A request counts itself in at its backend and out when it is done. That count is the read lock of the graph: an edit waits in a
//! drained section until it is zero, and requests that come meanwhile wait until the section ends (`gate`). Requests are made on an
//! I/O context, and everything they do happens there.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwapOption;
use stord_aio::sync::Notify;
use stord_aio::{Errno, IoVec, MAX_CONTEXTS};

use crate::driver::{BlockStatus, ZeroFlags};
use crate::graph::{Claim, Node, Permissions};
use crate::io;

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
    claim: Mutex<Claim>,
    gate: Gate,
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
        *self.claim.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_claim(&self, claim: Claim) {
        *self.claim.lock().unwrap_or_else(PoisonError::into_inner) = claim;
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
        Self(Arc::new(Root {
            name,
            node: ArcSwapOption::from(Some(node)),
            claim: Mutex::new(Claim::NONE),
            gate: Gate::default(),
            listener: Mutex::new(None),
        }))
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

    async fn start(&self) -> Result<(Ticket<'_>, Arc<Node>), Errno> {
        let ticket = self.0.gate.enter().await;
        let node = self.0.node().ok_or(Errno::ENOMEDIUM)?;
        Ok((ticket, node))
    }

    /// Reads all of `dst`, at any byte alignment.
    ///
    /// # Errors
    /// `EIO` for a range that is not inside the length; otherwise what the storage says.
    pub async fn read(&self, offset: u64, dst: IoVec) -> Result<(), Errno> {
        let (_ticket, node) = self.start().await?;
        check_range(&node, offset, dst.len())?;
        io::read(&node, offset, dst).await
    }

    /// Reads at once if no waiting is needed; `None` where it is.
    pub fn try_read(&self, offset: u64, dst: &IoVec) -> Option<Result<(), Errno>> {
        let _ticket = self.0.gate.try_enter()?;
        let node = self.0.node.load();
        let node = node.as_ref()?;
        if let Err(errno) = check_range(node, offset, dst.len()) {
            return Some(Err(errno));
        }
        io::try_read(node, offset, dst)
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
        let (_ticket, node) = self.start().await?;
        check_range(&node, offset, src.len())?;
        io::write(&node, offset, src, durable).await
    }

    /// Writes at once if no waiting is needed; `None` where it is: then the whole has to be written again.
    pub fn try_write(&self, offset: u64, src: &IoVec) -> Option<Result<(), Errno>> {
        self.check_writable().ok()?;
        let _ticket = self.0.gate.try_enter()?;
        let node = self.0.node.load();
        let node = node.as_ref()?;
        if let Err(errno) = check_range(node, offset, src.len()) {
            return Some(Err(errno));
        }
        io::try_write(node, offset, src)
    }

    /// Makes the range read as zeroes.
    ///
    /// # Errors
    /// As [`write`](Self::write); `ENOTSUP` with `NO_FALLBACK` where only writing data could.
    pub async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), Errno> {
        self.check_writable()?;
        let (_ticket, node) = self.start().await?;
        check_range(&node, offset, len)?;
        io::write_zeroes(&node, offset, len, flags).await
    }

    /// Gives the space of the range back, as far as the options let it; what it reads as afterwards is undefined.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.check_writable()?;
        let (_ticket, node) = self.start().await?;
        check_range(&node, offset, len)?;
        io::discard(&node, offset, len).await
    }

    /// Makes every write that completed before this call durable.
    ///
    /// # Errors
    /// What the storage says. A failed flush stays due.
    pub async fn flush(&self) -> Result<(), Errno> {
        let (_ticket, node) = self.start().await?;
        if node.is_read_only() {
            return Ok(());
        }
        io::flush(&node).await
    }

    /// The status of the beginning of the range, over the whole backing chain; neighbours of the same status may follow.
    ///
    /// # Errors
    /// `EIO` for a range that is not inside the length; otherwise what the storage says.
    pub async fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus, Errno> {
        let (_ticket, node) = self.start().await?;
        check_range(&node, offset, len)?;
        io::block_status(&node, offset, len).await
    }

    /// Changes the length. `exact` forbids a longer result than asked for. The listener is not called for one's own change.
    ///
    /// # Errors
    /// `EPERM` without the permission to resize; otherwise what the storage says.
    pub async fn truncate(&self, size: u64, exact: bool) -> Result<(), Errno> {
        if !self.0.claim().permissions.contains(Permissions::RESIZE) {
            return Err(Errno::EPERM);
        }
        let (_ticket, node) = self.start().await?;
        io::truncate(&node, size, exact).await
    }

    /// Bytes of storage that the image takes up, without its backing files.
    ///
    /// # Errors
    /// What the storage says.
    pub async fn allocated_size(&self) -> Result<u64, Errno> {
        let (_ticket, node) = self.start().await?;
        io::allocated_size(&node).await
    }
}

fn check_range(node: &Node, offset: u64, len: u64) -> Result<(), Errno> {
    match offset.checked_add(len) {
        Some(end) if end <= node.size() => Ok(()),
        _ => Err(Errno::EIO),
    }
}

/// A counter on a cache line of its own.
#[repr(align(64))]
#[derive(Default)]
struct Counter(AtomicUsize);

/// Counts requests in flight, each context on its own, and holds new ones back during a drained section.
pub(crate) struct Gate {
    in_flight: Box<[Counter]>,
    closed: AtomicUsize,
    opened: Notify,
    left: Notify,
}

impl Default for Gate {
    fn default() -> Self {
        Self {
            in_flight: (0..MAX_CONTEXTS).map(|_| Counter::default()).collect(),
            closed: AtomicUsize::new(0),
            opened: Notify::new(),
            left: Notify::new(),
        }
    }
}

/// A request in flight. Dropping it counts the request out.
pub(crate) struct Ticket<'a> {
    gate: &'a Gate,
    counter: &'a AtomicUsize,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.counter.fetch_sub(1, Ordering::SeqCst);
        if self.gate.closed.load(Ordering::SeqCst) > 0 {
            self.gate.left.notify_waiters();
        }
    }
}

impl Gate {
    /// Counts a request in, unless a drained section is on.
    ///
    /// The count rises before the look at `closed`, and `close` does the reverse: one of the two sees the other (both sequentially
    /// consistent).
    fn try_enter(&self) -> Option<Ticket<'_>> {
        let counter = &self.in_flight.get(stord_aio::current_index())?.0;
        counter.fetch_add(1, Ordering::SeqCst);
        let ticket = Ticket {
            gate: self,
            counter,
        };
        (self.closed.load(Ordering::SeqCst) == 0).then_some(ticket)
    }

    async fn enter(&self) -> Ticket<'_> {
        loop {
            if let Some(ticket) = self.try_enter() {
                return ticket;
            }
            let opened = self.opened.notified();
            if self.closed.load(Ordering::SeqCst) > 0 {
                opened.await;
            }
        }
    }

    /// Holds new requests back. Nests; each call is undone by one `open`.
    pub(crate) fn close(&self) {
        self.closed.fetch_add(1, Ordering::SeqCst);
    }

    /// Lets requests in again.
    pub(crate) fn open(&self) {
        if self.closed.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.opened.notify_waiters();
        }
    }

    /// Waits until no request is in flight. Only sensible while closed.
    pub(crate) async fn idle(&self) {
        loop {
            let left = self.left.notified();
            if self
                .in_flight
                .iter()
                .all(|counter| counter.0.load(Ordering::SeqCst) == 0)
            {
                return;
            }
            left.await;
        }
    }
}
