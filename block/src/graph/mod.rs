//! The graph of nodes: who is a child of whom, who claims what of whom, and every change of that.
//!
//! [`Graph`] lives on the control thread and is the only writer. Its changes are transactions: they prepare, and then either commit or
//! leave everything as it was. What I/O contexts see of the graph (`edge`, [`crate::Backend`]) changes only in drained sections.

mod activity;
mod backing_name;
mod bitmaps;
mod claims;
mod drain;
mod edge;
mod event;
mod info;
mod iothread;
mod node;
mod open;
mod permission;
mod reopen;
mod snapshots;
mod statistics;
mod threshold;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::{Arc, Weak};

use stord_aio::sync;
use stord_credentials::Credentials;
use stord_qmp::schema::block::{BlockdevOptions, BlockdevRef};
use stord_qmp::schema::create::PreallocMode;
use stord_qmp::{Error, ErrorClass};

pub use bitmaps::{BitmapSource, NewBitmap};
pub use claims::storage_claim;
pub use drain::DrainedSection;
pub use edge::{Children, Claim, Edge};
pub(crate) use event::Events;
pub use event::{BlockEvent, Reporter};
pub use node::{DetectZeroes, Node, NodeOptions};
pub use permission::Permissions;
pub(crate) use reopen::cannot_change;

use crate::backend::{Backend, Failures, Root};
use crate::contexts::Contexts;
use crate::driver::{BACKING, Driver};
use crate::io;
use claims::{Parent, Parents, Plan};

/// The longest node, in bytes: what is left of 63 bits when lengths are rounded up to 1 GiB.
pub(crate) const MAX_LENGTH: u64 = i64::MAX as u64 & !((1 << 30) - 1);

/// The nodes and their users.
pub struct Graph {
    contexts: Rc<Contexts>,
    /// What drivers that speak with others prove themselves by.
    credentials: Arc<Credentials>,
    /// Every node, in the order of opening.
    nodes: RefCell<Vec<Arc<Node>>>,
    /// The nodes that `blockdev-add` made and `blockdev-del` may remove.
    monitor_owned: RefCell<Vec<Arc<Node>>>,
    roots: RefCell<Vec<Weak<Root>>>,
    /// Children held by nodes that are still opening.
    opening: RefCell<Vec<(String, Children)>>,
    unnamed: Cell<u64>,
    events: Events,
    /// The other end of `events`, until somebody takes it.
    happenings: RefCell<Option<sync::mpsc::UnboundedReceiver<BlockEvent>>>,
    /// One change at a time.
    change: sync::Mutex<()>,
}

impl Graph {
    /// An empty graph whose drivers find no credentials.
    pub fn new(contexts: Rc<Contexts>) -> Self {
        Self::with_credentials(contexts, Arc::default())
    }

    /// Where drivers find credentials.
    pub fn credentials(&self) -> &Arc<Credentials> {
        &self.credentials
    }

    /// An empty graph.
    pub fn with_credentials(contexts: Rc<Contexts>, credentials: Arc<Credentials>) -> Self {
        let (events, happenings) = Events::channel();
        Self {
            contexts,
            credentials,
            nodes: RefCell::default(),
            monitor_owned: RefCell::default(),
            roots: RefCell::default(),
            opening: RefCell::default(),
            unnamed: Cell::new(0),
            events,
            happenings: RefCell::new(Some(happenings)),
            change: sync::Mutex::new(()),
        }
    }

    /// What happens in the graph by itself; for one listener, once.
    pub fn take_events(&self) -> Option<sync::mpsc::UnboundedReceiver<BlockEvent>> {
        self.happenings.borrow_mut().take()
    }

    /// Asks for a [`BlockEvent::WriteThreshold`] when a write to the node goes past `offset`; 0 for none.
    ///
    /// # Errors
    /// There is no such node.
    pub fn set_write_threshold(&self, node_name: &str, offset: u64) -> Result<(), Error> {
        let node = self
            .lookup(node_name)
            .ok_or_else(|| Error::generic(format!("Device '{node_name}' not found")))?;
        node.threshold().set(offset);
        Ok(())
    }

    /// The node of this name.
    ///
    /// # Errors
    /// There is none.
    pub fn find(&self, node_name: &str) -> Result<Arc<Node>, Error> {
        self.lookup(node_name).ok_or_else(|| {
            Error::generic(format!("Cannot find device='' nor node-name='{node_name}'"))
        })
    }

    /// The node that a reference names.
    fn referred(&self, name: &str) -> Result<Arc<Node>, Error> {
        self.lookup(name).ok_or_else(|| {
            Error::generic(format!(
                "Cannot find device='{name}' nor node-name='{name}'"
            ))
        })
    }

    fn named(&self, node_name: &str) -> Result<Arc<Node>, Error> {
        self.lookup(node_name).ok_or_else(|| {
            Error::generic(format!("Failed to find node with node-name='{node_name}'"))
        })
    }

    fn lookup(&self, node_name: &str) -> Option<Arc<Node>> {
        self.nodes
            .borrow()
            .iter()
            .find(|node| node.name() == node_name)
            .cloned()
    }

    /// Opens a node and everything it needs; the node stays until [`blockdev_del`](Self::blockdev_del).
    ///
    /// # Errors
    /// What is wrong with the options, the image or the permissions. Nothing is left open then.
    pub async fn blockdev_add(&self, options: BlockdevOptions) -> Result<(), Error> {
        let _change = self.change.lock().await;
        if options.node_name.is_none() {
            return Err(Error::generic(
                "'node-name' must be specified for the root node",
            ));
        }
        let node = self.open(options).await?;
        self.monitor_owned.borrow_mut().push(node);
        Ok(())
    }

    /// Closes a node that `blockdev_add` made, and its children that nobody else uses.
    ///
    /// # Errors
    /// There is no such node, it is in use, or it belongs to another node.
    pub async fn blockdev_del(&self, node_name: &str) -> Result<(), Error> {
        let _change = self.change.lock().await;
        let node = self.named(node_name)?;
        if self.roots_of(&node).next().is_some() {
            return Err(Error::generic(format!("Node {node_name} is in use")));
        }
        let owned = self
            .monitor_owned
            .borrow()
            .iter()
            .position(|owned| Arc::ptr_eq(owned, &node));
        let Some(owned) = owned else {
            return Err(Error::generic(format!(
                "Node {node_name} is not owned by the monitor"
            )));
        };
        if let Some(overlay) = self.overlay_of(&node) {
            return Err(Error::generic(format!(
                "Node '{node_name}' is busy: node is used as backing hd of '{}'",
                overlay.name()
            )));
        }
        if self.has_parent_nodes(&node) {
            return Err(Error::generic(format!(
                "Block device {node_name} is in use"
            )));
        }
        self.monitor_owned.borrow_mut().remove(owned);
        self.close_unused(node).await;
        Ok(())
    }

    /// Closes every node that no backend holds; for the end of the process.
    pub async fn close_all(&self) {
        let _change = self.change.lock().await;
        loop {
            let owned = self.monitor_owned.borrow().iter().rposition(|node| {
                self.roots_of(node).next().is_none() && !self.has_parent_nodes(node)
            });
            let Some(at) = owned else { return };
            let node = self.monitor_owned.borrow_mut().remove(at);
            self.close_unused(node).await;
        }
    }

    /// Attaches a new user to a node.
    ///
    /// `description` names the user in messages, as in "block export 'x'".
    ///
    /// # Errors
    /// There is no such node, or another user of it does not share what this one needs.
    pub async fn attach(
        &self,
        node_name: &str,
        description: &str,
        claim: Claim,
    ) -> Result<Backend, Error> {
        let _change = self.change.lock().await;
        let node = self.find(node_name)?;
        self.attach_node(node, description, claim).await
    }

    /// Attaches a new user to a node given by its name or by a definition; a node opened here closes with its last user.
    ///
    /// # Errors
    /// As [`attach`](Self::attach), and what is wrong with the definition.
    pub async fn attach_ref(
        &self,
        reference: BlockdevRef,
        description: &str,
        claim: Claim,
    ) -> Result<Backend, Error> {
        let _change = self.change.lock().await;
        let node = match reference {
            BlockdevRef::Reference(name) => self.referred(&name)?,
            BlockdevRef::Definition(options) => self.open(*options).await?,
        };
        let attached = self
            .attach_node(Arc::clone(&node), description, claim)
            .await;
        if attached.is_err() && !self.is_used(&node) {
            self.close_unused(node).await;
        }
        attached
    }

    /// Attaches a user who goes along with the node being inactive: while it is, the user has no claims.
    ///
    /// # Errors
    /// As [`attach`](Self::attach).
    pub async fn attach_even_inactive(
        &self,
        node_name: &str,
        description: &str,
        claim: Claim,
    ) -> Result<Backend, Error> {
        let _change = self.change.lock().await;
        let node = self.find(node_name)?;
        if node.is_active() {
            let backend = self.attach_node(node, description, claim).await?;
            backend.root().allow_inactive();
            return Ok(backend);
        }
        let backend = self.attach_node(node, description, Claim::NONE).await?;
        backend.root().allow_inactive();
        backend.root().suspend(true);
        backend.root().set_claim(claim);
        Ok(backend)
    }

    /// Reports requests of the backend that fail as [`BlockEvent::Failed`] of `id`.
    pub fn report_failures(&self, backend: &Backend, id: &str) {
        backend.report_failures(Failures::new(
            id.to_owned(),
            backend.node_name(),
            self.events.clone(),
        ));
    }

    async fn attach_node(
        &self,
        node: Arc<Node>,
        description: &str,
        claim: Claim,
    ) -> Result<Backend, Error> {
        let backend = Backend::new(description.to_owned(), Arc::clone(&node));
        self.roots.borrow_mut().push(Arc::downgrade(backend.root()));
        let _drained = self.drain(std::slice::from_ref(&node)).await;
        let plan = Plan::make(self, &[node], vec![(Arc::clone(backend.root()), claim)]);
        match plan {
            Ok(plan) => plan.commit(),
            Err(error) => {
                backend.root().set_node(None);
                return Err(error);
            }
        }
        Ok(backend)
    }

    /// Ends a user: waits for its requests, flushes, and gives its claims back.
    pub async fn detach(&self, backend: Backend) {
        let _change = self.change.lock().await;
        let Some(node) = backend.root().node() else {
            return;
        };
        let _drained = self.drain(std::slice::from_ref(&node)).await;
        if !node.is_read_only() {
            self.flush(&node).await;
        }
        backend.root().set_node(None);
        self.roots
            .borrow_mut()
            .retain(|root| root.upgrade().is_some_and(|root| root.node().is_some()));
        self.release_claims(&[Arc::clone(&node)]);
        drop(_drained);
        if !self.is_used(&node) {
            self.close_unused(node).await;
        }
    }

    /// Changes a node's length, for `block_resize`.
    ///
    /// # Errors
    /// There is no such node, it is read-only, a user of it forbids it, or the driver cannot.
    pub async fn resize(&self, node_name: &str, size: u64) -> Result<(), Error> {
        self.resize_preallocating(node_name, size, PreallocMode::Off)
            .await
    }

    /// Changes a node's length and reserves space for what is new.
    ///
    /// # Errors
    /// As [`resize`](Self::resize), and the space cannot be reserved that way, or at all; the length is as it was then.
    pub async fn resize_preallocating(
        &self,
        node_name: &str,
        size: u64,
        preallocation: PreallocMode,
    ) -> Result<(), Error> {
        let claim = Claim {
            permissions: Permissions::RESIZE,
            shared: Permissions::all(),
        };
        if size > MAX_LENGTH {
            return Err(Error::generic(format!(
                "offset({size}) exceeds maximum({MAX_LENGTH})"
            )));
        }
        if self.find(node_name)?.is_read_only() {
            return Err(Error::generic("Image is read-only"));
        }
        let user = "an unnamed block device";
        let backend = self.attach(node_name, user, claim).await?;
        let result = self.resize_drained(&backend, size, preallocation).await;
        self.detach(backend).await;
        result
    }

    async fn resize_drained(
        &self,
        backend: &Backend,
        size: u64,
        preallocation: PreallocMode,
    ) -> Result<(), Error> {
        let _change = self.change.lock().await;
        let node = backend
            .root()
            .node()
            .ok_or_else(|| Error::generic("The node has gone"))?;
        if preallocation != PreallocMode::Off && size < node.size() {
            return Err(Error::generic(
                "Preallocation can only be used for growing images",
            ));
        }
        if let Driver::Format(format) = node.driver() {
            format.check_resize(size)?;
        }
        let _drained = self.drain(std::slice::from_ref(&node)).await;
        let resized = {
            let node = Arc::clone(&node);
            self.contexts
                .main()
                .run(move || async move { io::truncate(&node, size, true, preallocation).await })
                .await
        };
        match resized {
            Ok(Ok(())) => {
                for root in self.roots_above(std::slice::from_ref(&node)) {
                    if let (Some(listener), Some(node)) = (root.listener(), root.node()) {
                        listener.resized(node.size());
                    }
                }
                Ok(())
            }
            Ok(Err(stord_aio::Errno::ENOTSUP)) if preallocation != PreallocMode::Off => {
                Err(Error::generic(format!(
                    "Unsupported preallocation mode: {}",
                    preallocation.name()
                )))
            }
            Ok(Err(stord_aio::Errno::ENOTSUP)) => Err(Error::generic(
                "Image format driver does not support resize",
            )),
            Ok(Err(errno)) => Err(Error::os(
                format!("Could not resize '{}'", node.name()),
                errno,
            )),
            Err(gone) => Err(Error::generic(gone.to_string())),
        }
    }

    async fn flush(&self, node: &Arc<Node>) {
        let flushed = {
            let node = Arc::clone(node);
            self.contexts
                .main()
                .run(move || async move { io::flush(&node).await })
                .await
        };
        if let Ok(Err(errno)) = flushed {
            tracing::error!(node = node.name(), %errno, "flush failed: written data may be lost");
        }
    }

    /// Closes a node and then, from the top down, each child that nobody uses any more.
    async fn close_unused(&self, node: Arc<Node>) {
        let mut unused = vec![node];
        while let Some(node) = unused.pop() {
            // The image of an inactive node is another's by now.
            if !node.is_read_only() && node.is_active() {
                self.flush(&node).await;
            }
            if let Driver::Format(_) = node.driver()
                && node.is_active()
            {
                self.close_image(&node).await;
            }
            self.nodes
                .borrow_mut()
                .retain(|held| !Arc::ptr_eq(held, &node));
            unused.extend(self.let_go(node.children()));
        }
    }

    /// Empties all places for children; gives those children that have no other user.
    fn let_go(&self, children: &Children) -> Vec<Arc<Node>> {
        let mut orphans = Vec::new();
        for edge in children.edges() {
            let Some(child) = edge.node() else { continue };
            edge.set_node(None);
            edge.set_claim(Claim::NONE);
            if self.is_used(&child) {
                self.release_claims(&[child]);
            } else {
                orphans.push(child);
            }
        }
        orphans
    }

    /// Works the claims below `start` out anew after a user has gone. Claims only shrink here, so a failure means no more than that
    /// locks are held which are not needed.
    fn release_claims(&self, start: &[Arc<Node>]) {
        match Plan::make(self, start, Vec::new()) {
            Ok(plan) => plan.commit(),
            Err(error) => tracing::warn!(%error, "could not give up permissions"),
        }
    }

    fn is_used(&self, node: &Arc<Node>) -> bool {
        self.monitor_owned
            .borrow()
            .iter()
            .any(|owned| Arc::ptr_eq(owned, node))
            || self.roots_of(node).next().is_some()
            || self.has_parent_nodes(node)
    }

    /// A node that has this one behind it.
    fn overlay_of(&self, node: &Arc<Node>) -> Option<Arc<Node>> {
        let is_behind = |parent: &&Arc<Node>| {
            let backing = parent.children().node(BACKING);
            backing.is_some_and(|backing| Arc::ptr_eq(&backing, node))
        };
        self.nodes.borrow().iter().find(is_behind).cloned()
    }

    fn has_parent_nodes(&self, node: &Arc<Node>) -> bool {
        let holds = |children: &Children| {
            children
                .edges()
                .iter()
                .any(|edge| edge.node().is_some_and(|child| Arc::ptr_eq(&child, node)))
        };
        self.nodes
            .borrow()
            .iter()
            .any(|parent| holds(parent.children()))
            || self
                .opening
                .borrow()
                .iter()
                .any(|(_, children)| holds(children))
    }

    fn roots_of(&self, node: &Arc<Node>) -> impl Iterator<Item = Arc<Root>> {
        let roots: Vec<Arc<Root>> = self
            .roots
            .borrow()
            .iter()
            .filter_map(Weak::upgrade)
            .collect();
        roots
            .into_iter()
            .filter(move |root| root.node().is_some_and(|held| Arc::ptr_eq(&held, node)))
            .collect::<Vec<_>>()
            .into_iter()
    }
}

impl Parents for Graph {
    fn parents_of(&self, node: &Arc<Node>, planned: &Plan) -> Vec<Parent> {
        let mut parents: Vec<Parent> = self
            .roots_of(node)
            .map(|root| Parent {
                description: root.name().to_owned(),
                role: "root".to_owned(),
                claim: planned.root_claim(&root).unwrap_or_else(|| root.claim()),
            })
            .collect();
        let is_node = |edge: &Edge| edge.node().is_some_and(|child| Arc::ptr_eq(&child, node));
        for parent in self.nodes.borrow().iter() {
            for (id, edge) in (0u8..)
                .map(crate::driver::ChildId)
                .zip(parent.children().edges())
            {
                if is_node(edge) {
                    parents.push(Parent {
                        description: format!("node '{}'", parent.name()),
                        role: edge.name().to_owned(),
                        claim: planned
                            .edge_claim(parent, id)
                            .unwrap_or_else(|| edge.claim()),
                    });
                }
            }
        }
        for (name, children) in self.opening.borrow().iter() {
            for edge in children.edges().iter().filter(|edge| is_node(edge)) {
                parents.push(Parent {
                    description: format!("node '{name}'"),
                    role: edge.name().to_owned(),
                    claim: edge.claim(),
                });
            }
        }
        parents
    }
}

/// The error for a node name that cannot be used or is used.
fn name_error(message: String) -> Error {
    Error::new(ErrorClass::GenericError, message)
}
