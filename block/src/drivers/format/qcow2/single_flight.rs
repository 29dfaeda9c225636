//! Lets one task do a piece of work that several want done: the others wait until it has ended, well or badly, and look again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stord_aio::sync::Notify;

/// Work under way, by what it is about.
#[derive(Debug, Default)]
pub(super) struct SingleFlight(Mutex<HashMap<u64, Arc<Notify>>>);

/// The right to do the work for one key; dropping it ends the work and wakes who waits.
#[derive(Debug)]
pub(super) struct Flight<'a> {
    flights: &'a SingleFlight,
    key: u64,
}

impl SingleFlight {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Notify>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins the work, or waits until whoever does it has ended and gives `None`.
    pub(super) async fn begin(&self, key: u64) -> Option<Flight<'_>> {
        let ended = {
            let mut flights = self.lock();
            match flights.get(&key) {
                Some(notify) => Arc::clone(notify).notified_owned(),
                None => {
                    flights.insert(key, Arc::new(Notify::new()));
                    return Some(Flight { flights: self, key });
                }
            }
        };
        ended.await;
        None
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        let ended = self.flights.lock().remove(&self.key);
        if let Some(ended) = ended {
            ended.notify_waiters();
        }
    }
}
