//! The walk from a node down to the leaf, as far as metadata in memory leads, without a future.

use std::sync::Arc;

use smallvec::SmallVec;
use stord_aio::Errno;

use crate::driver::{BACKING, Driver, ExtentKind, Format, Lookup, Protocol};
use crate::graph::Node;

struct Passed {
    node: Arc<Node>,
    pin: u32,
    /// Where the request is in this node, in bytes.
    offset: u64,
}

/// The format nodes that a request has passed, with their space pinned until the path is dropped.
#[derive(Default)]
pub(super) struct Path {
    passed: SmallVec<[Passed; 2]>,
}

impl Path {
    /// Pins the format's space. Does nothing for a leaf.
    pub(super) fn pin(&mut self, node: &Arc<Node>, offset: u64) {
        if let Driver::Format(format) = node.driver() {
            self.passed.push(Passed {
                node: Arc::clone(node),
                pin: format.enter(),
                offset,
            });
        }
    }

    /// The nodes passed, from the top down, and where the request is in each.
    pub(super) fn nodes(&self) -> impl Iterator<Item = (&Node, u64)> {
        self.passed
            .iter()
            .map(|passed| (&*passed.node, passed.offset))
    }
}

impl Drop for Path {
    fn drop(&mut self) {
        for Passed { node, pin, .. } in self.passed.drain(..) {
            if let Driver::Format(format) = node.driver() {
                format.leave(pin);
            }
        }
    }
}

/// Where a walk ended.
pub(super) enum Place {
    /// All the bytes are in this leaf, from this offset on.
    Leaf(Arc<Node>, u64),
    /// All the bytes are zero.
    Zero,
    /// The bytes are in several places, or it takes waiting to find out.
    Scattered,
}

/// The leaf's driver. Walks end only at leaves.
pub(super) fn leaf_driver(node: &Node) -> Option<&dyn Protocol> {
    match node.driver() {
        Driver::Protocol(leaf) => Some(&**leaf),
        Driver::Format(_) => None,
    }
}

enum Question {
    Read,
    Overwrite,
}

/// Finds the place to read `len` bytes from.
pub(super) fn to_read(
    node: &Arc<Node>,
    offset: u64,
    len: u64,
    path: &mut Path,
) -> Result<Place, Errno> {
    walk(node, offset, len, path, &Question::Read)
}

/// Finds the place to overwrite `len` bytes in, where that changes no metadata.
pub(super) fn to_overwrite(
    node: &Arc<Node>,
    offset: u64,
    len: u64,
    path: &mut Path,
) -> Result<Place, Errno> {
    walk(node, offset, len, path, &Question::Overwrite)
}

fn walk(
    node: &Arc<Node>,
    mut offset: u64,
    len: u64,
    path: &mut Path,
    question: &Question,
) -> Result<Place, Errno> {
    let mut held;
    let mut node = node;
    loop {
        let format: &dyn Format = match node.driver() {
            Driver::Protocol(_) => return Ok(Place::Leaf(Arc::clone(node), offset)),
            Driver::Format(format) => &**format,
        };
        path.pin(node, offset);
        let end = offset.checked_add(len).ok_or(Errno::EINVAL)?;
        if end > node.size() {
            return Ok(match question {
                Question::Read if offset >= node.size() => Place::Zero,
                _ => Place::Scattered,
            });
        }
        let answer = match question {
            Question::Read => format.map_read(offset, len)?,
            Question::Overwrite => format.map_write(offset, len)?,
        };
        let extent = match answer {
            Lookup::Ready(extent) if extent.len >= len => extent,
            _ => return Ok(Place::Scattered),
        };
        let (child, next) = match (extent.kind, question) {
            (ExtentKind::Data { child, offset }, _) => (child, offset),
            (ExtentKind::Unallocated, Question::Read) => (BACKING, offset),
            (ExtentKind::Zero { .. }, Question::Read) => return Ok(Place::Zero),
            _ => return Ok(Place::Scattered),
        };
        match node.children().node(child) {
            Some(below) => held = below,
            None if child == BACKING => return Ok(Place::Zero),
            None => return Err(Errno::ENOMEDIUM),
        }
        node = &held;
        offset = next;
        if matches!(question, Question::Overwrite) && node.is_read_only() {
            return Err(Errno::EPERM);
        }
    }
}
