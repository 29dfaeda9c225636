//! Counters of nodes, and the graph as a drawing, for `query-blockstats` and `x-debug-query-block-graph`.

use std::sync::{Arc, Weak};

use stord_qmp::schema::statistics::{
    BlockDeviceStats, BlockPermission, BlockStats, BlockStatsSpecific, BlockStatsSpecificDriver,
    XDbgBlockGraph, XDbgBlockGraphEdge, XDbgBlockGraphNode, XDbgBlockGraphNodeType,
};

use super::{Claim, Graph, Node, Permissions};
use crate::backend::Totals;
use crate::driver::{Driver, FILE};

impl Graph {
    /// The counters of all nodes, the oldest first: what their users from outside the graph have done.
    pub fn query_blockstats(&self) -> Vec<BlockStats> {
        let nodes: Vec<Arc<Node>> = self.nodes.borrow().iter().cloned().collect();
        nodes.iter().map(|node| self.statistics_of(node)).collect()
    }

    fn statistics_of(&self, node: &Arc<Node>) -> BlockStats {
        let below = |child| {
            let child = node.children().node(child)?;
            Some(Box::new(self.statistics_of(&child)))
        };
        BlockStats {
            device: None,
            qdev: None,
            node_name: Some(node.name().to_owned()),
            stats: self.counters_of(node),
            driver_specific: specific(node),
            parent: below(FILE),
            // Told of guests' devices only.
            backing: None,
        }
    }

    fn counters_of(&self, node: &Arc<Node>) -> BlockDeviceStats {
        let mut totals = Totals::default();
        for root in self.roots_of(node) {
            totals += root.totals();
        }
        let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        BlockDeviceStats {
            rd_bytes: signed(totals.reads.bytes),
            rd_operations: signed(totals.reads.operations),
            rd_total_time_ns: signed(totals.reads.time_ns),
            failed_rd_operations: signed(totals.reads.failed),
            wr_bytes: signed(totals.writes.bytes),
            wr_operations: signed(totals.writes.operations),
            wr_total_time_ns: signed(totals.writes.time_ns),
            failed_wr_operations: signed(totals.writes.failed),
            unmap_bytes: signed(totals.unmaps.bytes),
            unmap_operations: signed(totals.unmaps.operations),
            unmap_total_time_ns: signed(totals.unmaps.time_ns),
            failed_unmap_operations: signed(totals.unmaps.failed),
            flush_operations: signed(totals.flushes.operations),
            flush_total_time_ns: signed(totals.flushes.time_ns),
            failed_flush_operations: signed(totals.flushes.failed),
            wr_highest_offset: signed(node.highest_written()),
            ..BlockDeviceStats::default()
        }
    }

    /// Nodes, their users, and who does what with whom.
    pub fn query_block_graph(&self) -> XDbgBlockGraph {
        let mut drawing = XDbgBlockGraph {
            nodes: Vec::new(),
            edges: Vec::new(),
        };
        let nodes = self.nodes.borrow();
        let mut numbers = Numbers::default();
        for root in self.roots.borrow().iter().filter_map(Weak::upgrade) {
            let Some(node) = root.node() else { continue };
            let id = numbers.of(Arc::as_ptr(&root).cast());
            drawing.nodes.push(XDbgBlockGraphNode {
                id,
                r#type: XDbgBlockGraphNodeType::BlockBackend,
                name: String::new(),
            });
            let child = numbers.of(Arc::as_ptr(&node).cast());
            drawing.edges.push(drawn(id, child, "root", root.claim()));
        }
        for node in nodes.iter() {
            let id = numbers.of(Arc::as_ptr(node).cast());
            drawing.nodes.push(XDbgBlockGraphNode {
                id,
                r#type: XDbgBlockGraphNodeType::BlockDriver,
                name: node.name().to_owned(),
            });
            for edge in node.children().edges().iter().rev() {
                if let Some(child) = edge.node() {
                    let child = numbers.of(Arc::as_ptr(&child).cast());
                    drawing
                        .edges
                        .push(drawn(id, child, edge.name(), edge.claim()));
                }
            }
        }
        // The reference lists the newest first.
        drawing.nodes.reverse();
        drawing.edges.reverse();
        drawing
    }
}

/// Numbers from 1 on, in the order in which things are first mentioned.
#[derive(Default)]
struct Numbers(Vec<*const ()>);

impl Numbers {
    fn of(&mut self, thing: *const ()) -> u64 {
        let known = self.0.iter().position(|known| *known == thing);
        let index = known.unwrap_or_else(|| {
            self.0.push(thing);
            self.0.len() - 1
        });
        index as u64 + 1
    }
}

fn drawn(parent: u64, child: u64, name: &str, claim: Claim) -> XDbgBlockGraphEdge {
    XDbgBlockGraphEdge {
        parent,
        child,
        name: name.to_owned(),
        perm: names(claim.permissions),
        shared_perm: names(claim.shared),
    }
}

fn names(permissions: Permissions) -> Vec<BlockPermission> {
    let all = [
        (Permissions::RESIZE, BlockPermission::Resize),
        (
            Permissions::WRITE_UNCHANGED,
            BlockPermission::WriteUnchanged,
        ),
        (Permissions::WRITE, BlockPermission::Write),
        (
            Permissions::CONSISTENT_READ,
            BlockPermission::ConsistentRead,
        ),
    ];
    let held = all
        .into_iter()
        .filter(|(bit, _)| permissions.contains(*bit));
    held.map(|(_, name)| name).collect()
}

fn specific(node: &Node) -> Option<BlockStatsSpecific> {
    let Driver::Protocol(leaf) = node.driver() else {
        return None;
    };
    let counts = leaf.discard_counts()?;
    let driver = match node.driver_name() {
        "host_device" => BlockStatsSpecificDriver::HostDevice(counts),
        _ => BlockStatsSpecificDriver::File(counts),
    };
    Some(BlockStatsSpecific { driver })
}
