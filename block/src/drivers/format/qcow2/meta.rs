//! Metadata under the image's lock, which is held for moments and never across I/O: what is in flight, what is taken, what has changed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::alloc::Space;
use super::cache::{Slice, State};
use super::frees::Frees;
use super::inflight::InFlight;

/// All of it.
#[derive(Debug, Default)]
pub(super) struct Meta {
    pub(super) inflight: InFlight,
    /// Known once the image is about to be written to.
    pub(super) space: Option<Space>,
    pub(super) l2: L2Changes,
    pub(super) frees: Frees,
}

/// Changes of L1 and L2 tables that have not been handed to the file.
#[derive(Debug, Default)]
pub(super) struct L2Changes {
    pub(super) dirty: Vec<Arc<Slice>>,
    /// Tables that exist only in memory, by L1 index: what is not cached of them is empty. The value says whether the file reads as
    /// zeroes in their place.
    pub(super) new_tables: BTreeMap<usize, bool>,
    /// L1 entries that differ from those on disk.
    pub(super) l1: BTreeSet<usize>,
}

impl L2Changes {
    /// Notes a change of a slice.
    pub(super) fn mark(&mut self, slice: &Arc<Slice>) {
        match slice.state() {
            State::Clean => slice.set_state(State::Dirty),
            State::Writing => slice.set_state(State::WritingDirty),
            State::Dirty | State::WritingDirty => return,
        }
        self.dirty.push(Arc::clone(slice));
    }

    pub(super) fn is_clean(&self) -> bool {
        self.dirty.is_empty() && self.l1.is_empty()
    }
}
