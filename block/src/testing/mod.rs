//! What tests of drivers are made with: a leaf in memory that records, fails and holds requests, and nodes without a graph.

mod disk;
mod power_cut;

use std::sync::Arc;

pub(crate) use disk::{Fault, Journal, MemoryDisk, Operation};
pub(crate) use power_cut::after_power_cut;

use crate::driver::Driver;
use crate::graph::{Children, DetectZeroes, Node, NodeOptions};

/// Numbers that belong to a seed (SplitMix64).
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not zero.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// True once in `n` times.
    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// Options of a node that may be written to and discards.
pub(crate) fn node_options() -> NodeOptions {
    NodeOptions {
        discard: true,
        direct: false,
        no_flush: false,
        active: None,
        read_only: false,
        auto_read_only: false,
        force_share: false,
        detect_zeroes: DetectZeroes::Off,
    }
}

/// A leaf node over a disk in memory.
pub(crate) fn leaf(disk: &MemoryDisk) -> Arc<Node> {
    let driver = Driver::Protocol(Box::new(disk.clone()));
    Arc::new(Node::new(
        "disk".to_owned(),
        "memory",
        driver,
        Children::new(&[]),
        node_options(),
        false,
    ))
}
