//! Guest clusters with an allocation in flight. Ranges never overlap: who wants a cluster that is taken waits.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use stord_aio::sync::Notify;

/// The ranges in flight, in guest clusters.
#[derive(Debug, Default)]
pub(super) struct InFlight(BTreeMap<u64, (u64, Option<Arc<Notify>>)>);

impl InFlight {
    /// The start of the first range in flight that begins at or after `cluster`.
    pub(super) fn next_after(&self, cluster: u64) -> Option<u64> {
        self.0.range(cluster..).next().map(|(start, _)| *start)
    }

    /// What to wait for before `cluster` can be taken: the end of the range that holds it.
    pub(super) fn holder_of(&mut self, cluster: u64) -> Option<Arc<Notify>> {
        let (_, (end, ended)) = self.0.range_mut(..=cluster).next_back()?;
        (cluster < *end).then(|| Arc::clone(ended.get_or_insert_with(Arc::default)))
    }

    /// Takes a range that is free.
    pub(super) fn take(&mut self, clusters: Range<u64>) {
        self.0.insert(clusters.start, (clusters.end, None));
    }

    /// Gives a range back that was taken, and wakes who waits for it.
    pub(super) fn give_back(&mut self, start: u64) {
        if let Some((_, Some(ended))) = self.0.remove(&start) {
            ended.notify_waiters();
        }
    }
}
