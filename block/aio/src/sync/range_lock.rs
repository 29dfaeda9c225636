//! A lock on ranges of bytes. Two holders overlap only if both share; among those that overlap,
//! the lock is granted in the order of asking, so nobody starves.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// Locks ranges of bytes, each exclusively or shared.
#[derive(Debug, Default)]
pub struct RangeLock {
    queue: Mutex<Queue>,
}

/// Holders and those who wait, in the order of asking.
#[derive(Debug, Default)]
struct Queue {
    entries: Vec<Entry>,
    asked: u64,
    waiting: usize,
}

#[derive(Debug)]
struct Entry {
    ticket: u64,
    range: Range<u64>,
    is_shared: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    Granted,
    Waiting(Waker),
}

impl Entry {
    fn conflicts(&self, range: &Range<u64>, is_shared: bool) -> bool {
        !(self.is_shared && is_shared)
            && self.range.start < range.end
            && range.start < self.range.end
    }
}

impl RangeLock {
    /// A lock that nobody holds.
    pub fn new() -> RangeLock {
        RangeLock::default()
    }

    /// Locks `range` so that nobody else holds any byte of it. An empty range conflicts with
    /// nothing.
    pub fn lock(&self, range: Range<u64>) -> RangeLocking<'_> {
        self.ask(range, false)
    }

    /// Locks `range` so that nobody holds any byte of it exclusively.
    pub fn lock_shared(&self, range: Range<u64>) -> RangeLocking<'_> {
        self.ask(range, true)
    }

    fn ask(&self, range: Range<u64>, is_shared: bool) -> RangeLocking<'_> {
        RangeLocking {
            lock: self,
            range,
            is_shared,
            ticket: None,
        }
    }

    /// Whether nobody holds or waits for any range.
    pub fn is_idle(&self) -> bool {
        self.queue().entries.is_empty()
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remove(&self, ticket: u64) {
        let woken = self.queue().remove(ticket);
        // After the queue is unlocked, since a waker may come back to this lock.
        woken.into_iter().for_each(Waker::wake);
    }
}

impl Queue {
    /// Takes an entry out and grants what it was in the way of.
    fn remove(&mut self, ticket: u64) -> Vec<Waker> {
        let Ok(index) = self.entries.binary_search_by_key(&ticket, |e| e.ticket) else {
            return Vec::new();
        };
        let gone = self.entries.remove(index);
        if let State::Waiting(_) = gone.state {
            self.waiting -= 1;
        }
        let mut woken = Vec::new();
        if self.waiting == 0 {
            return woken;
        }
        // Only later entries that conflict with the one that is gone can have waited for it.
        for index in index..self.entries.len() {
            let (earlier, later) = self.entries.split_at_mut(index);
            let entry = &mut later[0];
            if matches!(entry.state, State::Granted)
                || !gone.conflicts(&entry.range, entry.is_shared)
            {
                continue;
            }
            if earlier
                .iter()
                .any(|e| e.conflicts(&entry.range, entry.is_shared))
            {
                continue;
            }
            if let State::Waiting(waker) = std::mem::replace(&mut entry.state, State::Granted) {
                self.waiting -= 1;
                woken.push(waker);
            }
        }
        woken
    }
}

/// Waits for a range to be locked; dropping it gives the place in the queue up.
#[derive(Debug)]
#[must_use = "a range is locked only when this is awaited"]
pub struct RangeLocking<'a> {
    lock: &'a RangeLock,
    range: Range<u64>,
    is_shared: bool,
    ticket: Option<u64>,
}

impl<'a> Future for RangeLocking<'a> {
    type Output = RangeGuard<'a>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<RangeGuard<'a>> {
        let lock = self.lock;
        let mut queue = lock.queue();
        let (ticket, granted) = match self.ticket {
            Some(ticket) => {
                let index = queue
                    .entries
                    .binary_search_by_key(&ticket, |e| e.ticket)
                    .expect("an entry stays until its ticket is given back");
                let entry = &mut queue.entries[index];
                if let State::Waiting(waker) = &mut entry.state {
                    waker.clone_from(cx.waker());
                }
                (ticket, matches!(entry.state, State::Granted))
            }
            None => {
                let granted = !queue
                    .entries
                    .iter()
                    .any(|e| e.conflicts(&self.range, self.is_shared));
                let state = if granted {
                    State::Granted
                } else {
                    queue.waiting += 1;
                    State::Waiting(cx.waker().clone())
                };
                let ticket = queue.asked;
                queue.asked += 1;
                queue.entries.push(Entry {
                    ticket,
                    range: self.range.clone(),
                    is_shared: self.is_shared,
                    state,
                });
                (ticket, granted)
            }
        };
        drop(queue);
        if !granted {
            self.ticket = Some(ticket);
            return Poll::Pending;
        }
        self.ticket = None;
        Poll::Ready(RangeGuard { lock, ticket })
    }
}

impl Drop for RangeLocking<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            self.lock.remove(ticket);
        }
    }
}

/// A locked range; dropping it unlocks.
#[derive(Debug)]
#[must_use = "the range is unlocked when this is dropped"]
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    ticket: u64,
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.lock.remove(self.ticket);
    }
}
