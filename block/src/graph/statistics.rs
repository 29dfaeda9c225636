//! Counters of nodes, and the graph as a drawing, for `query-blockstats` and `x-debug-query-block-graph`.

use std::sync::Arc;

use stord_qmp::schema::statistics::{
    BlockDeviceStats, BlockPermission, BlockStats, BlockStatsSpecific, BlockStatsSpecificDriver,
    XDbgBlockGraph, XDbgBlockGraphEdge, XDbgBlockGraphNode, XDbgBlockGraphNodeType,
};

use super::{Claim, Graph, Node, Permissions};
use crate::backend::Totals;
use crate::driver::{BACKING, Driver, FILE};

impl Graph {
    /// The counters of all nodes, the newest first: what their users from outside the graph have done.
    pub fn query_blockstats(&self) -> Vec<BlockStats> {
        let nodes: Vec<Arc<Node>> = self.nodes.borrow().iter().rev().cloned().collect();
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
            backing: below(BACKING),
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
        let number = |node: &Arc<Node>| {
            let at = nodes.iter().position(|held| Arc::ptr_eq(held, node))?;
            Some(at as u64 + 1)
        };
        for node in nodes.iter() {
            let id = number(node).unwrap_or(0);
            drawing.nodes.push(XDbgBlockGraphNode {
                id,
                r#type: XDbgBlockGraphNodeType::BlockDriver,
                name: node.name().to_owned(),
            });
            for edge in node.children().edges() {
                if let Some(child) = edge.node().as_ref().and_then(number) {
                    drawing
                        .edges
                        .push(drawn(id, child, edge.name(), edge.claim()));
                }
            }
        }
        let mut id = nodes.len() as u64;
        for node in nodes.iter() {
            for root in self.roots_of(node) {
                id += 1;
                drawing.nodes.push(XDbgBlockGraphNode {
                    id,
                    r#type: XDbgBlockGraphNodeType::BlockBackend,
                    name: String::new(),
                });
                let child = number(node).unwrap_or(0);
                drawing.edges.push(drawn(id, child, "root", root.claim()));
            }
        }
        drawing
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
        (
            Permissions::CONSISTENT_READ,
            BlockPermission::ConsistentRead,
        ),
        (Permissions::WRITE, BlockPermission::Write),
        (
            Permissions::WRITE_UNCHANGED,
            BlockPermission::WriteUnchanged,
        ),
        (Permissions::RESIZE, BlockPermission::Resize),
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
