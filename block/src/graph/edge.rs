//! Edges: a node's hold on each of its children.
//!
//! What an edge points to changes only inside a drained section of the roots above it, so a request in flight sees one graph from
//! beginning to end, without a lock.

use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwapOption;
use stord_aio::{Errno, IoVec};
use stord_qmp::schema::create::PreallocMode;

use super::{Node, Permissions};
use crate::driver::{BlockStatus, ChildId, ZeroFlags};
use crate::io;

/// What is asked of a child, and what is tolerated there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// What the holder does.
    pub permissions: Permissions,
    /// What the holder lets others do.
    pub shared: Permissions,
}

impl Claim {
    /// Does nothing, minds nothing.
    pub const NONE: Self = Self {
        permissions: Permissions::empty(),
        shared: Permissions::all(),
    };
}

/// A place for one child.
pub struct Edge {
    name: &'static str,
    node: ArcSwapOption<Node>,
    claim: Mutex<Claim>,
}

impl Edge {
    /// The child's name in the options: `file`, `backing`, `data-file`.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The node at the other end.
    pub fn node(&self) -> Option<Arc<Node>> {
        self.node.load_full()
    }

    pub(crate) fn set_node(&self, node: Option<Arc<Node>>) {
        self.node.store(node);
    }

    /// What the edge claims of its node now.
    pub fn claim(&self) -> Claim {
        *self.claim.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_claim(&self, claim: Claim) {
        *self.claim.lock().unwrap_or_else(PoisonError::into_inner) = claim;
    }
}

/// A node's children, shared between the node and its driver. Requests made here pass through the child's whole request path.
#[derive(Clone)]
pub struct Children(Arc<[Edge]>);

impl Children {
    /// Places for children of these names, all empty; their order gives the [`ChildId`]s.
    pub(crate) fn new(names: &[&'static str]) -> Self {
        let edges = names.iter().map(|name| Edge {
            name,
            node: ArcSwapOption::empty(),
            claim: Mutex::new(Claim::NONE),
        });
        Self(edges.collect())
    }

    /// All places, in the order of their ids.
    pub fn edges(&self) -> &[Edge] {
        &self.0
    }

    /// The child, if there is one.
    pub fn node(&self, child: ChildId) -> Option<Arc<Node>> {
        self.0.get(usize::from(child.0))?.node()
    }

    /// Runs `f` on the child without counting a reference.
    pub(crate) fn with<T>(&self, child: ChildId, f: impl FnOnce(Option<&Arc<Node>>) -> T) -> T {
        match self.0.get(usize::from(child.0)) {
            Some(edge) => f(edge.node.load().as_ref()),
            None => f(None),
        }
    }

    fn held(&self, child: ChildId) -> Result<Arc<Node>, Errno> {
        self.node(child).ok_or(Errno::ENOMEDIUM)
    }

    /// The child's length in bytes; 0 without a child.
    pub fn size(&self, child: ChildId) -> u64 {
        self.with(child, |node| node.map_or(0, |node| node.size()))
    }

    /// Whether the child takes writes.
    pub fn is_writable(&self, child: ChildId) -> bool {
        self.with(child, |node| node.is_some_and(|node| !node.is_read_only()))
    }

    /// Reads all of `dst`; past the child's end there are zeroes.
    ///
    /// # Errors
    /// The child's; `ENOMEDIUM` without a child.
    pub async fn read(&self, child: ChildId, offset: u64, dst: IoVec) -> Result<(), Errno> {
        io::read(&self.held(child)?, offset, dst).await
    }

    /// Writes all of `src`, past the child's end too where it can grow.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub async fn write(
        &self,
        child: ChildId,
        offset: u64,
        src: IoVec,
        durable: bool,
    ) -> Result<(), Errno> {
        io::write(&self.held(child)?, offset, src, durable).await
    }

    /// Writes whole clusters compressed.
    ///
    /// # Errors
    /// As [`read`](Self::read); `ENOTSUP` where the child cannot.
    pub async fn write_compressed(
        &self,
        child: ChildId,
        offset: u64,
        src: IoVec,
    ) -> Result<(), Errno> {
        io::write_compressed(&self.held(child)?, offset, src).await
    }

    /// Makes the range read as zeroes.
    ///
    /// # Errors
    /// As [`read`](Self::read); `ENOTSUP` with `NO_FALLBACK` where only writing data could.
    pub async fn write_zeroes(
        &self,
        child: ChildId,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<(), Errno> {
        io::write_zeroes(&self.held(child)?, offset, len, flags).await
    }

    /// Gives the range back, where the child lets pass discards.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub async fn discard(&self, child: ChildId, offset: u64, len: u64) -> Result<(), Errno> {
        io::discard(&self.held(child)?, offset, len).await
    }

    /// Makes every completed write to the child durable.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub async fn flush(&self, child: ChildId) -> Result<(), Errno> {
        io::flush(&self.held(child)?).await
    }

    /// Changes the child's length, and reserves space for what is new as `preallocation` says.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub async fn truncate(
        &self,
        child: ChildId,
        size: u64,
        exact: bool,
        preallocation: PreallocMode,
    ) -> Result<(), Errno> {
        io::truncate(&self.held(child)?, size, exact, preallocation).await
    }

    /// The status of the beginning of the range.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub async fn status(
        &self,
        child: ChildId,
        offset: u64,
        len: u64,
    ) -> Result<BlockStatus, Errno> {
        io::block_status(&self.held(child)?, offset, len).await
    }
}
