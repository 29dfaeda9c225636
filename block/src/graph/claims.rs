//! Changes of claims, as a transaction over everything below the change.
//!
//! Claims follow from the top down: what a node's parents claim of it decides what it claims of its children. [`Plan::make`] computes
//! the new claims, checks at every node that its parents agree, and has each leaf prepare (take locks, open for writing). Nothing has
//! changed for anybody until [`Plan::commit`]; dropping the plan instead undoes the preparations.

use std::sync::Arc;

use stord_qmp::Error;

use super::{Claim, Node, Permissions};
use crate::backend::Root;
use crate::driver::{BACKING, ChildId, Driver};

/// What a format that keeps metadata in its file claims of a child; the rules are those of the reference.
pub fn storage_claim(
    child: ChildId,
    wanted: Permissions,
    shared: Permissions,
    writable: bool,
) -> Claim {
    if child == BACKING {
        // Others may change the backing file only if the overlay's users can live with changing data.
        let change = if shared.contains(Permissions::WRITE) {
            Permissions::WRITE | Permissions::RESIZE
        } else {
            Permissions::empty()
        };
        return Claim {
            permissions: wanted & Permissions::CONSISTENT_READ,
            shared: change | Permissions::CONSISTENT_READ | Permissions::WRITE_UNCHANGED,
        };
    }
    let mut permissions = wanted | Permissions::CONSISTENT_READ;
    if writable {
        permissions |= Permissions::WRITE | Permissions::RESIZE;
    }
    Claim {
        permissions,
        shared: shared - Permissions::WRITE - Permissions::RESIZE,
    }
}

/// One user of a node, for the agreement check and its messages.
pub(super) struct Parent {
    /// "node 'x'" or "block export 'y'".
    pub(super) description: String,
    /// The name of the edge: `root`, `file`, `backing`.
    pub(super) role: String,
    pub(super) claim: Claim,
}

/// Where the parents of a node are looked up.
pub(super) trait Parents {
    /// The users of `node`; `planned` gives the claims that differ from the present ones.
    fn parents_of(&self, node: &Arc<Node>, planned: &Plan) -> Vec<Parent>;
}

/// New claims, checked and prepared but not in force.
#[derive(Default)]
pub(super) struct Plan {
    roots: Vec<(Arc<Root>, Claim)>,
    edges: Vec<(Arc<Node>, ChildId, Claim)>,
    prepared: Vec<Arc<Node>>,
}

impl Plan {
    /// Plans the claims for everything below `start`, with `roots` claiming what is given here instead of what they claim now.
    pub(super) fn make(
        graph: &dyn Parents,
        start: &[Arc<Node>],
        roots: Vec<(Arc<Root>, Claim)>,
    ) -> Result<Self, Error> {
        let mut plan = Self::default();
        plan.roots = roots;
        for node in top_down(start) {
            let (permissions, shared) = agree(&node, &graph.parents_of(&node, &plan))?;
            if permissions.intersects(Permissions::WRITABLE | Permissions::RESIZE)
                && node.is_read_only()
            {
                let message = match permissions.intersects(Permissions::WRITABLE) {
                    true => "Block node is read-only",
                    false => "Image is read-only",
                };
                return Err(Error::generic(message));
            }
            let active = node.is_active();
            let writing = permissions & (Permissions::WRITABLE | Permissions::RESIZE);
            if !active && !writing.is_empty() {
                return Err(Error::generic(format!(
                    "Permission '{}' unavailable on inactive node",
                    writing.names()
                )));
            }
            match node.driver() {
                Driver::Protocol(leaf) => {
                    let shared = if node.options().force_share {
                        Permissions::all()
                    } else {
                        shared
                    };
                    leaf.prepare_permissions(permissions, shared)?;
                    plan.prepared.push(node);
                }
                Driver::Format(format) => {
                    for (id, _) in (0u8..).map(ChildId).zip(node.children().edges()) {
                        let writable = active && !node.is_read_only();
                        let mut claim = format.child_claim(id, permissions, shared, writable);
                        if !active {
                            claim.shared |= Permissions::WRITE | Permissions::RESIZE;
                        }
                        if node.options().force_share {
                            claim.shared = Permissions::all();
                        }
                        plan.edges.push((Arc::clone(&node), id, claim));
                    }
                }
            }
        }
        Ok(plan)
    }

    /// The planned claim of a root, if the plan has one.
    pub(super) fn root_claim(&self, root: &Arc<Root>) -> Option<Claim> {
        self.roots
            .iter()
            .find(|(planned, _)| Arc::ptr_eq(planned, root))
            .map(|(_, claim)| *claim)
    }

    /// The planned claim of a node on its child, if the plan has one.
    pub(super) fn edge_claim(&self, node: &Arc<Node>, child: ChildId) -> Option<Claim> {
        self.edges
            .iter()
            .find(|(planned, id, _)| Arc::ptr_eq(planned, node) && *id == child)
            .map(|(_, _, claim)| *claim)
    }

    /// Puts the plan into force.
    pub(super) fn commit(mut self) {
        for (root, claim) in self.roots.drain(..) {
            root.set_claim(claim);
        }
        for (node, child, claim) in self.edges.drain(..) {
            if let Some(edge) = node.children().edges().get(usize::from(child.0)) {
                edge.set_claim(claim);
            }
        }
        for node in self.prepared.drain(..) {
            if let Driver::Protocol(leaf) = node.driver() {
                leaf.commit_permissions();
            }
        }
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        for node in &self.prepared {
            if let Driver::Protocol(leaf) = node.driver() {
                leaf.abort_permissions();
            }
        }
    }
}

/// Everything reachable from `start`, every node after all its parents in that set.
pub(super) fn top_down(start: &[Arc<Node>]) -> Vec<Arc<Node>> {
    fn visit(node: &Arc<Node>, finished: &mut Vec<Arc<Node>>) {
        if finished.iter().any(|done| Arc::ptr_eq(done, node)) {
            return;
        }
        for edge in node.children().edges() {
            if let Some(child) = edge.node() {
                visit(&child, finished);
            }
        }
        finished.push(Arc::clone(node));
    }
    let mut finished = Vec::new();
    for node in start {
        visit(node, &mut finished);
    }
    finished.reverse();
    finished
}

/// What all parents need together and what all of them share, or the first conflict.
fn agree(node: &Node, parents: &[Parent]) -> Result<(Permissions, Permissions), Error> {
    for needing in parents {
        for sharing in parents {
            let refused = needing.claim.permissions - sharing.claim.shared;
            if !std::ptr::eq(needing, sharing) && !refused.is_empty() {
                return Err(Error::generic(format!(
                    "Permission conflict on node '{node}': permissions '{}' are both required by {} (uses node '{node}' as '{}' child) \
                     and unshared by {} (uses node '{node}' as '{}' child).",
                    refused.names(),
                    needing.description,
                    needing.role,
                    sharing.description,
                    sharing.role,
                    node = node.name(),
                )));
            }
        }
    }
    let all = parents.iter().fold(
        (Permissions::empty(), Permissions::all()),
        |(needed, shared), parent| {
            (
                needed | parent.claim.permissions,
                shared & parent.claim.shared,
            )
        },
    );
    Ok(all)
}
