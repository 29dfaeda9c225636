//! Space that has been given up and waits to be used again.
//!
//! Its refcount goes down only when nothing on disk refers to it any more and no request in flight may touch it; until then the
//! allocator sees it as taken. A crash before that leaks it.

use std::collections::VecDeque;

use super::options::FreeReason;

/// A run of clusters whose refcounts go down by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Free {
    pub(super) cluster: u64,
    pub(super) count: u64,
    /// Discards in the file what becomes free, for this reason.
    pub(super) discard: Option<FreeReason>,
    /// The write-back that takes the last reference off the disk.
    pub(super) generation: u64,
    /// For [`super::pins::Pins`].
    pub(super) stamp: u64,
}

/// All of it, in the order in which it was given up.
#[derive(Debug)]
pub(super) struct Frees {
    waiting: VecDeque<Free>,
    /// The write-back that changes made now will be part of.
    pub(super) generation: u64,
    /// Up to here, changes have been written.
    pub(super) written: u64,
    /// Up to here, changes are on disk.
    pub(super) durable: u64,
}

impl Default for Frees {
    fn default() -> Self {
        Self {
            waiting: VecDeque::new(),
            generation: 1,
            written: 0,
            durable: 0,
        }
    }
}

impl Frees {
    /// Gives up clusters that entries on disk refer to until the next write-back.
    pub(super) fn push(
        &mut self,
        cluster: u64,
        count: u64,
        discard: Option<FreeReason>,
        stamp: u64,
    ) {
        self.push_free(Free {
            cluster,
            count,
            discard,
            generation: self.generation,
            stamp,
        });
    }

    /// Gives up clusters that nothing on disk has ever referred to.
    pub(super) fn push_unlinked(&mut self, cluster: u64, count: u64, stamp: u64) {
        self.push_free(Free {
            cluster,
            count,
            discard: None,
            generation: 0,
            stamp,
        });
    }

    fn push_free(&mut self, free: Free) {
        if let Some(last) = self.waiting.back_mut() {
            let same = last.discard == free.discard
                && last.generation == free.generation
                && last.stamp == free.stamp;
            if same && last.cluster + last.count == free.cluster {
                last.count += free.count;
                return;
            }
        }
        self.waiting.push_back(free);
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether a flush would let something go on.
    pub(super) fn wait_for_flush(&self) -> bool {
        self.durable < self.written
            && self
                .waiting
                .iter()
                .any(|free| free.generation > self.durable && free.generation <= self.written)
    }

    /// Takes out what nothing on disk refers to any more and no request is left of, because its stamp is `settled` or less.
    pub(super) fn take_ready(&mut self, settled: u64) -> Vec<Free> {
        let durable = self.durable;
        let mut ready = Vec::new();
        self.waiting.retain(|free| {
            let take = free.generation <= durable && free.stamp <= settled;
            if take {
                ready.push(*free);
            }
            !take
        });
        ready
    }

    /// Puts back what could not be dealt with.
    pub(super) fn put_back(&mut self, frees: impl IntoIterator<Item = Free>) {
        self.waiting.extend(frees);
    }
}
