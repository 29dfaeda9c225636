//! Activity: whether this process may use an image, or leaves it to another one.
//!
//! - A node becomes inactive after its parents and before its children; it becomes active after its children.
//! - An inactive node has nothing left to write, its users have no claims, and other processes may write to its file. What it reads is
//!   only as good as what it had in memory.
//! - A format becomes active by being opened once more, from what its file holds then.

use std::sync::Arc;

use stord_aio::Errno;
use stord_qmp::Error;

use super::claims::{Plan, top_down};
use super::reopen::Target;
use super::{Graph, Node};
use crate::bitmap::BitmapState;
use crate::driver::Driver;

impl Graph {
    /// Makes a node, or all, active or inactive, for `blockdev-set-active`.
    ///
    /// # Errors
    /// There is no such node, a user of it does not let go, an active node needs it, or an image cannot be written back or opened.
    pub async fn set_active(&self, node_name: Option<&str>, active: bool) -> Result<(), Error> {
        let _change = self.change.lock().await;
        let Some(name) = node_name else {
            return self.set_all_active(active).await;
        };
        let node = self.named(name)?;
        if active {
            return self.activate_with_children(&node).await;
        }
        if self.has_active_parents(&node) {
            return Err(Error::generic("Node has active parent node"));
        }
        let inactivated = self.inactivate_with_children(&node).await;
        inactivated.map_err(|errno| Error::os("Failed to inactivate node", errno))
    }

    /// Makes a node active for a user who needs it so.
    ///
    /// # Errors
    /// There is no such node, or its image cannot be opened.
    pub async fn activate(&self, node_name: &str) -> Result<(), Error> {
        let _change = self.change.lock().await;
        let node = self.find(node_name)?;
        self.activate_with_children(&node).await
    }

    async fn set_all_active(&self, active: bool) -> Result<(), Error> {
        let mut nodes = self.nodes.borrow().clone();
        // Those that most likely stay as they are come first.
        nodes.sort_by_key(|node| self.roots_of(node).next().is_none());
        let is_top = |node: &&Arc<Node>| self.parent_nodes(node).is_empty();
        for node in nodes.iter().filter(is_top) {
            if active {
                self.activate_with_children(node).await?;
            } else {
                let inactivated = self.inactivate_with_children(node).await;
                inactivated.map_err(|errno| Error::os("Failed to inactivate all nodes", errno))?;
            }
        }
        Ok(())
    }

    pub(super) fn parent_nodes(&self, node: &Arc<Node>) -> Vec<Arc<Node>> {
        let holds = |parent: &&Arc<Node>| {
            let edges = parent.children().edges().iter();
            edges
                .filter_map(super::Edge::node)
                .any(|child| Arc::ptr_eq(&child, node))
        };
        self.nodes.borrow().iter().filter(holds).cloned().collect()
    }

    fn has_active_parents(&self, node: &Arc<Node>) -> bool {
        let parents = self.parent_nodes(node);
        parents.iter().any(|parent| parent.is_active())
    }

    async fn inactivate_with_children(&self, node: &Arc<Node>) -> Result<(), Errno> {
        let nodes = top_down(std::slice::from_ref(node));
        let _drained = self.drain(&nodes).await;
        for node in nodes {
            if node.is_active() && !self.has_active_parents(&node) {
                self.inactivate(&node).await?;
            }
        }
        Ok(())
    }

    /// Runs in a drained section.
    async fn inactivate(&self, node: &Arc<Node>) -> Result<(), Errno> {
        if !self.roots_of(node).all(|root| root.lets_inactivate()) {
            return Err(Errno::EPERM);
        }
        self.finish_image(node).await?;
        if !node.is_read_only() {
            let flushed = Arc::clone(node);
            let flush = self.on_main(move || async move { crate::io::flush(&flushed).await });
            flush.await.map_err(|_| Errno::EIO)??;
        }
        node.set_active(false);
        // What is stored in the image goes with it.
        for bitmap in node.bitmaps().list().iter() {
            if bitmap.is(BitmapState::PERSISTENT) {
                node.bitmaps().remove(bitmap.name());
            }
        }
        for root in self.roots_of(node) {
            root.suspend(true);
        }
        self.release_claims(std::slice::from_ref(node));
        Ok(())
    }

    async fn activate_with_children(&self, node: &Arc<Node>) -> Result<(), Error> {
        let mut nodes = top_down(std::slice::from_ref(node));
        nodes.retain(|node| !node.is_active());
        if nodes.is_empty() {
            return Ok(());
        }
        let _drained = self.drain(&nodes).await;
        for node in nodes.iter().rev() {
            match node.driver() {
                Driver::Protocol(_) => self.activate_leaf(node).await?,
                Driver::Format(_) => self.activate_format(node).await?,
            }
        }
        Ok(())
    }

    /// Makes the node's users claim again what they did, which has to be possible.
    fn resume(&self, node: &Arc<Node>) -> Result<(), Error> {
        node.set_active(true);
        for root in self.roots_of(node) {
            root.suspend(false);
        }
        let planned = Plan::make(self, std::slice::from_ref(node), Vec::new());
        planned
            .map(Plan::commit)
            .inspect_err(|_| self.suspend(node))
    }

    fn suspend(&self, node: &Arc<Node>) {
        node.set_active(false);
        for root in self.roots_of(node) {
            root.suspend(true);
        }
    }

    async fn activate_leaf(&self, node: &Arc<Node>) -> Result<(), Error> {
        self.resume(node)?;
        let leaf = Arc::clone(node);
        let refreshed = self.on_main(move || async move {
            match leaf.driver() {
                Driver::Protocol(driver) => driver.refresh().await,
                Driver::Format(_) => Ok(leaf.size()),
            }
        });
        match refreshed.await? {
            Ok(size) => {
                node.set_size(size);
                Ok(())
            }
            Err(error) => {
                self.suspend(node);
                self.release_claims(std::slice::from_ref(node));
                Err(error)
            }
        }
    }

    async fn activate_format(&self, node: &Arc<Node>) -> Result<(), Error> {
        let target = Target::same(node, true)?;
        let replacement = self.replacement(&target).await?;
        self.swap(&replacement.old, &replacement.new);
        if let Err(error) = self.resume(&replacement.new) {
            self.put_back(replacement);
            return Err(error);
        }
        for orphan in self.let_go(replacement.old.children()) {
            self.close_unused(orphan).await;
        }
        Ok(())
    }
}
