//! Drained sections: while one lasts, no request is in flight in the nodes it covers, and none starts.

use std::sync::Arc;

use super::{Graph, Node};
use crate::backend::Root;

/// A drained section; it ends when this is dropped. Sections nest.
pub struct DrainedSection {
    roots: Vec<Arc<Root>>,
}

impl Drop for DrainedSection {
    fn drop(&mut self) {
        for root in self.roots.iter().rev() {
            root.gate().open();
            if let Some(listener) = root.listener() {
                listener.drained_end();
            }
        }
    }
}

impl Graph {
    /// Begins a drained section over `nodes`: holds new requests back at every root above them, then waits for those in flight.
    pub async fn drain(&self, nodes: &[Arc<Node>]) -> DrainedSection {
        let roots = self.roots_above(nodes);
        for root in &roots {
            if let Some(listener) = root.listener() {
                listener.drained_begin();
            }
            root.gate().close();
        }
        let section = DrainedSection { roots };
        for root in &section.roots {
            root.gate().idle().await;
        }
        section
    }

    /// Every root from which a request can reach one of `nodes`.
    pub(super) fn roots_above(&self, nodes: &[Arc<Node>]) -> Vec<Arc<Root>> {
        let roots: Vec<Arc<Root>> = self
            .roots
            .borrow()
            .iter()
            .filter_map(std::sync::Weak::upgrade)
            .collect();
        roots
            .into_iter()
            .filter(|root| {
                root.node().is_some_and(|top| {
                    super::claims::top_down(&[top])
                        .iter()
                        .any(|below| nodes.iter().any(|node| Arc::ptr_eq(node, below)))
                })
            })
            .collect()
    }
}
