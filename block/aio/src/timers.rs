//! The timers of one executor, in the order in which they expire.

use std::collections::BTreeMap;
use std::task::Waker;
use std::time::Instant;

/// Names a timer: its deadline, and a number that tells timers of one deadline apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TimerKey(Instant, u64);

/// Deadlines and who waits for them.
#[derive(Default)]
pub(crate) struct Timers {
    waiting: BTreeMap<TimerKey, Waker>,
    made: u64,
}

impl Timers {
    /// Adds a timer.
    pub(crate) fn insert(&mut self, deadline: Instant, waker: Waker) -> TimerKey {
        let key = TimerKey(deadline, self.made);
        self.made += 1;
        self.waiting.insert(key, waker);
        key
    }

    /// Changes who is woken. False when the timer has expired.
    pub(crate) fn update(&mut self, key: TimerKey, waker: &Waker) -> bool {
        match self.waiting.get_mut(&key) {
            Some(old) => {
                old.clone_from(waker);
                true
            }
            None => false,
        }
    }

    /// Forgets a timer that nobody waits for.
    pub(crate) fn remove(&mut self, key: TimerKey) {
        self.waiting.remove(&key);
    }

    /// The earliest deadline.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.waiting.first_key_value().map(|(key, _)| key.0)
    }

    /// Takes out one timer that has expired at `now`.
    pub(crate) fn expired(&mut self, now: Instant) -> Option<Waker> {
        let first = self.waiting.first_entry()?;
        (first.key().0 <= now).then(|| first.remove())
    }
}
