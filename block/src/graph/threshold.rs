//! Write thresholds: a word to the user when a write goes past an offset, once.

use std::sync::atomic::{AtomicU64, Ordering};

use super::event::{BlockEvent, Events};

/// A node's threshold.
#[derive(Default)]
pub(crate) struct WriteThreshold {
    /// The offset in bytes; 0 for none.
    offset: AtomicU64,
    events: Events,
}

impl WriteThreshold {
    pub(super) fn new(events: Events) -> Self {
        Self {
            offset: AtomicU64::new(0),
            events,
        }
    }

    pub(super) fn set(&self, offset: u64) {
        self.offset.store(offset, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.offset.load(Ordering::Relaxed)
    }

    /// Looks at a write that reached as far as `end`.
    #[inline]
    pub(super) fn check(&self, node_name: &str, end: u64) {
        let threshold = self.offset.load(Ordering::Relaxed);
        if threshold == 0 || end <= threshold {
            return;
        }
        // Of several writes that pass it at once, one reports.
        let off = self
            .offset
            .compare_exchange(threshold, 0, Ordering::Relaxed, Ordering::Relaxed);
        if off.is_ok() {
            self.events.send(BlockEvent::WriteThreshold {
                node_name: node_name.to_owned(),
                threshold,
                exceeded: end - threshold,
            });
        }
    }
}
