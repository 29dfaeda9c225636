//! What a backend has done, for `query-blockstats`.
//!
//! Each context counts on its own and nobody else writes there, so counting needs no locked instructions; a reader adds them up.

use std::ops::AddAssign;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use stord_aio::Errno;

/// The kinds of request that are counted apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    /// Discards.
    Unmap,
    Flush,
}

/// Counts of one kind, of one context or summed up.
#[derive(Default)]
struct Counts {
    operations: AtomicU64,
    bytes: AtomicU64,
    time_ns: AtomicU64,
    failed: AtomicU64,
}

/// What one context has done.
#[derive(Default)]
pub(super) struct Statistics {
    kinds: [Counts; 4],
}

/// Only the context that owns the counter calls this.
fn add(counter: &AtomicU64, amount: u64) {
    counter.store(
        counter.load(Ordering::Relaxed).wrapping_add(amount),
        Ordering::Relaxed,
    );
}

impl Statistics {
    fn counts(&self, kind: Kind) -> &Counts {
        let [reads, writes, unmaps, flushes] = &self.kinds;
        match kind {
            Kind::Read => reads,
            Kind::Write => writes,
            Kind::Unmap => unmaps,
            Kind::Flush => flushes,
        }
    }

    /// Counts a request of `len` bytes that began at `begun`, on the context that owns these.
    pub(super) fn account(&self, kind: Kind, len: u64, begun: Instant, result: Result<(), Errno>) {
        let counts = self.counts(kind);
        if result.is_err() {
            add(&counts.failed, 1);
            return;
        }
        add(&counts.operations, 1);
        add(&counts.bytes, len);
        add(
            &counts.time_ns,
            u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX),
        );
    }
}

/// What requests of one kind came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Total {
    /// Requests that succeeded.
    pub operations: u64,
    /// Their bytes.
    pub bytes: u64,
    /// The time they took, in nanoseconds; those in flight together count each.
    pub time_ns: u64,
    /// Requests that failed.
    pub failed: u64,
}

impl AddAssign for Total {
    fn add_assign(&mut self, other: Self) {
        self.operations += other.operations;
        self.bytes += other.bytes;
        self.time_ns += other.time_ns;
        self.failed += other.failed;
    }
}

impl AddAssign for Totals {
    fn add_assign(&mut self, other: Self) {
        self.reads += other.reads;
        self.writes += other.writes;
        self.unmaps += other.unmaps;
        self.flushes += other.flushes;
    }
}

impl Total {
    fn add(&mut self, counts: &Counts) {
        self.operations += counts.operations.load(Ordering::Relaxed);
        self.bytes += counts.bytes.load(Ordering::Relaxed);
        self.time_ns += counts.time_ns.load(Ordering::Relaxed);
        self.failed += counts.failed.load(Ordering::Relaxed);
    }
}

/// What all requests came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Reads.
    pub reads: Total,
    /// Writes and zero writes.
    pub writes: Total,
    /// Discards.
    pub unmaps: Total,
    /// Flushes.
    pub flushes: Total,
}

impl Totals {
    /// Adds what one context has done.
    pub(super) fn add(&mut self, statistics: &Statistics) {
        self.reads.add(statistics.counts(Kind::Read));
        self.writes.add(statistics.counts(Kind::Write));
        self.unmaps.add(statistics.counts(Kind::Unmap));
        self.flushes.add(statistics.counts(Kind::Flush));
    }
}
