//! Adaptive polling: how long a loop spins for new work before it sleeps.
//!
//! Follows the `poll-max-ns`, `poll-grow` and `poll-shrink` properties of an iothread: the time is
//! zero at first, grows while events arrive shortly after the loop went to sleep, and shrinks when
//! they take longer than the maximum.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::time::Duration;

use crate::executor;

/// The first polling time, in ns, when it grows from zero.
const FIRST_NS: u64 = 4000;

/// The iothread's polling properties.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PollParams {
    /// The longest polling time in ns; 0 turns polling off.
    pub max_ns: u64,
    /// The factor by which the time grows; 0 stands for 2.
    pub grow: u64,
    /// The divisor by which the time shrinks; 0 resets it to zero.
    pub shrink: u64,
}

/// The polling time of one loop.
#[derive(Debug, Default)]
pub(crate) struct Polling {
    params: PollParams,
    ns: u64,
}

impl Polling {
    /// Takes over new parameters.
    pub(crate) fn set_params(&mut self, params: PollParams) {
        self.params = params;
        self.ns = self.ns.min(params.max_ns);
    }

    /// Whether polling is turned on at all.
    pub(crate) fn is_on(&self) -> bool {
        self.params.max_ns > 0
    }

    /// How long to spin now.
    pub(crate) fn time(&self) -> Duration {
        Duration::from_nanos(self.ns)
    }

    /// Learns how long it took, from the start of spinning, until there was work.
    pub(crate) fn waited(&mut self, waited: Duration) {
        let waited = u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX);
        let PollParams {
            max_ns,
            grow,
            shrink,
        } = self.params;
        if waited <= self.ns {
            return;
        }
        if waited > max_ns {
            self.ns = self.ns.checked_div(shrink).unwrap_or(0);
        } else if self.ns < max_ns {
            let grown = match self.ns {
                0 => FIRST_NS,
                ns => ns.saturating_mul(if grow == 0 { 2 } else { grow }),
            };
            self.ns = grown.min(max_ns);
        }
    }
}

type Callback = Box<dyn FnMut() -> bool>;

/// The callbacks that look for work while a loop spins.
#[derive(Default)]
pub(crate) struct Spinners {
    callbacks: Vec<(u64, Callback)>,
    made: u64,
}

impl Spinners {
    pub(crate) fn insert(&mut self, callback: Callback) -> Spinner {
        let number = self.made;
        self.made += 1;
        self.callbacks.push((number, callback));
        Spinner {
            number,
            not_send: PhantomData,
        }
    }
}

/// Calls each callback once. True when one of them found work.
pub(crate) fn spin(spinners: &RefCell<Spinners>) -> bool {
    let mut found = false;
    let mut at = 0;
    loop {
        // Taken out while it runs, so that it may add and take away others.
        let taken = {
            let mut all = spinners.borrow_mut();
            if at >= all.callbacks.len() {
                return found;
            }
            let nothing: Callback = Box::new(|| false);
            let (number, callback) = &mut all.callbacks[at];
            (*number, std::mem::replace(callback, nothing))
        };
        let (number, mut callback) = taken;
        found |= callback();
        let mut all = spinners.borrow_mut();
        match all.callbacks.iter().position(|(n, _)| *n == number) {
            Some(place) => {
                all.callbacks[place].1 = callback;
                at = place + 1;
            }
            // It took itself away.
            None => drop(all),
        }
    }
}

/// A spin callback of a context; dropping this takes it away.
#[derive(Debug)]
#[must_use = "the callback is taken away when this is dropped"]
pub struct Spinner {
    number: u64,
    /// Callbacks belong to the thread.
    not_send: PhantomData<*mut ()>,
}

impl Drop for Spinner {
    fn drop(&mut self) {
        let gone = executor::try_with(|local| {
            let all = &mut local.spinners.borrow_mut().callbacks;
            let place = all.iter().position(|(n, _)| *n == self.number);
            place.map(|place| all.remove(place))
        });
        // Outside of the borrow, since what the callback owns may come back here.
        drop(gone);
    }
}

#[cfg(test)]
mod tests;
