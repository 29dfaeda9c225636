//! The gate of a backend: counts requests in flight, each context on its own, and holds new ones back during a drained section.

use std::sync::atomic::{AtomicUsize, Ordering};

use stord_aio::MAX_CONTEXTS;
use stord_aio::sync::Notify;

use super::statistics::Statistics;

/// What one context knows of a backend, on cache lines of its own.
#[repr(align(64))]
#[derive(Default)]
struct Lane {
    in_flight: AtomicUsize,
    statistics: Statistics,
}

/// Counts requests in flight, and holds new ones back while closed.
pub(crate) struct Gate {
    lanes: Box<[Lane]>,
    closed: AtomicUsize,
    opened: Notify,
    left: Notify,
}

impl Default for Gate {
    fn default() -> Self {
        Self {
            lanes: (0..MAX_CONTEXTS).map(|_| Lane::default()).collect(),
            closed: AtomicUsize::new(0),
            opened: Notify::new(),
            left: Notify::new(),
        }
    }
}

/// A request in flight. Dropping it counts the request out.
pub(crate) struct Ticket<'a> {
    gate: &'a Gate,
    lane: &'a Lane,
}

impl Ticket<'_> {
    /// The statistics of the context that the request runs on.
    pub(super) fn statistics(&self) -> &Statistics {
        &self.lane.statistics
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.lane.in_flight.fetch_sub(1, Ordering::SeqCst);
        if self.gate.closed.load(Ordering::SeqCst) > 0 {
            self.gate.left.notify_waiters();
        }
    }
}

impl Gate {
    /// Counts a request in, unless a drained section is on.
    ///
    /// The count rises before the look at `closed`, and `close` does the reverse: one of the two sees the other (both sequentially
    /// consistent).
    pub(super) fn try_enter(&self) -> Option<Ticket<'_>> {
        let lane = self.lanes.get(stord_aio::current_index())?;
        lane.in_flight.fetch_add(1, Ordering::SeqCst);
        let ticket = Ticket { gate: self, lane };
        (self.closed.load(Ordering::SeqCst) == 0).then_some(ticket)
    }

    /// Counts a request in, after the drained section if one is on.
    pub(super) async fn enter(&self) -> Ticket<'_> {
        loop {
            if let Some(ticket) = self.try_enter() {
                return ticket;
            }
            let opened = self.opened.notified();
            if self.closed.load(Ordering::SeqCst) > 0 {
                opened.await;
            }
        }
    }

    /// Holds new requests back. Nests; each call is undone by one `open`.
    pub(crate) fn close(&self) {
        self.closed.fetch_add(1, Ordering::SeqCst);
    }

    /// Lets requests in again.
    pub(crate) fn open(&self) {
        if self.closed.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.opened.notify_waiters();
        }
    }

    /// Waits until no request is in flight. Only sensible while closed.
    pub(crate) async fn idle(&self) {
        loop {
            let left = self.left.notified();
            let busy = |lane: &Lane| lane.in_flight.load(Ordering::SeqCst) != 0;
            if !self.lanes.iter().any(busy) {
                return;
            }
            left.await;
        }
    }

    /// The statistics of every context.
    pub(super) fn statistics(&self) -> impl Iterator<Item = &Statistics> {
        self.lanes.iter().map(|lane| &lane.statistics)
    }
}
