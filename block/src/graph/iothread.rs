//! The iothreads of nodes, for `x-blockdev-set-iothread`.
//!
//! Nodes take requests on every I/O context; what has an iothread here is served by it for users who name none themselves. As in the
//! reference, all nodes that hang together have the same one.

use std::sync::Arc;

use stord_qmp::Error;

use super::{Graph, Node};

impl Graph {
    /// Has an iothread serve the node's users from now on, or none in particular.
    ///
    /// # Errors
    /// There is no such node or iothread, or the node has users, who stay on their threads.
    pub fn set_iothread(
        &self,
        node_name: &str,
        iothread: Option<&str>,
        force: bool,
    ) -> Result<(), Error> {
        let node = self.named(node_name)?;
        let connected = self.connected(&node);
        if !force && self.roots_of(&node).next().is_some() {
            return Err(Error::generic(format!(
                "Node {node_name} is associated with a BlockBackend and could be in use (use force=true to override this check)"
            )));
        }
        if let Some(id) = iothread {
            self.contexts.acquire(id)?;
            self.contexts.release(id);
        }
        let has_users = |node: &Arc<Node>| self.roots_of(node).next().is_some();
        if connected.iter().any(has_users) {
            return Err(Error::generic(
                "Cannot change iothread of active block backend",
            ));
        }
        for node in connected {
            node.set_iothread(iothread.map(str::to_owned));
        }
        Ok(())
    }

    /// The iothread that serves users of the node who name none.
    ///
    /// # Errors
    /// There is no such node.
    pub fn iothread_of(&self, node_name: &str) -> Result<Option<String>, Error> {
        let node = self.find(node_name)?;
        let connected = self.connected(&node);
        Ok(connected.iter().find_map(|node| node.iothread()))
    }

    /// The node and all that can be reached from it over edges in either direction.
    fn connected(&self, node: &Arc<Node>) -> Vec<Arc<Node>> {
        let mut found = vec![Arc::clone(node)];
        let mut next = 0;
        while let Some(node) = found.get(next).cloned() {
            next += 1;
            let children = node.children().edges().iter().filter_map(super::Edge::node);
            for neighbour in children.chain(self.parent_nodes(&node)) {
                if !found.iter().any(|known| Arc::ptr_eq(known, &neighbour)) {
                    found.push(neighbour);
                }
            }
        }
        found
    }
}
