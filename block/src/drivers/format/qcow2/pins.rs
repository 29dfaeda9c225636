//! Pins: requests in flight hold the space that they were told of. Space that is given up is used again only when every request that
//! may have been told of it has ended.
//!
//! Time is cut into epochs. A request counts itself in, in the epoch of its start, in a counter of its own context, which nobody else
//! writes. An epoch ends only when nobody is left of the epoch before it; so two epochs after space was given up, nobody is left who
//! started before that.
//!
//! Requests pay for none of the ordering: whoever ends an epoch makes a fence for all of them ([`Fences`]). A request that he does
//! not see in its counter made its look at the epoch, and at the map, after that fence.

use std::sync::atomic::{AtomicU64, Ordering, fence};

use stord_aio::{Fences, MAX_CONTEXTS, current_index};

/// Requests of one context, by the parity of their epoch. On a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Counters([AtomicU64; 2]);

/// All pins of an image.
#[derive(Debug)]
pub(super) struct Pins {
    epoch: AtomicU64,
    contexts: Box<[Counters]>,
    fences: Fences,
}

/// A pin of the driver's own.
#[derive(Debug)]
pub(super) struct Pin<'a> {
    pins: &'a Pins,
    pin: u32,
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        self.pins.leave(self.pin);
    }
}

impl Default for Pins {
    fn default() -> Self {
        Self {
            epoch: AtomicU64::new(2),
            contexts: (0..MAX_CONTEXTS).map(|_| Counters::default()).collect(),
            fences: Fences::new(),
        }
    }
}

impl Counters {
    /// Called on the context that owns them.
    fn add(&self, parity: usize, count: u64) {
        let counter = &self.0[parity];
        let sum = counter.load(Ordering::Relaxed).wrapping_add(count);
        // Release: what a request has done comes before its end.
        counter.store(sum, Ordering::Release);
    }
}

impl Pins {
    /// Begins a pin.
    pub(super) fn enter(&self) -> u32 {
        let context = current_index() % MAX_CONTEXTS;
        let counters = &self.contexts[context];
        loop {
            let epoch = self.epoch.load(Ordering::Acquire);
            let parity = (epoch & 1) as usize;
            counters.add(parity, 1);
            self.fences.light();
            if self.epoch.load(Ordering::Acquire) == epoch {
                return u32::try_from(2 * context + parity).expect("there are few contexts");
            }
            counters.add(parity, u64::MAX);
        }
    }

    /// Ends a pin, on the context where it began.
    pub(super) fn leave(&self, pin: u32) {
        let pin = pin as usize;
        let context = pin / 2 % MAX_CONTEXTS;
        debug_assert_eq!(context, current_index() % MAX_CONTEXTS, "a request stays");
        self.contexts[context].add(pin % 2, u64::MAX);
    }

    /// A pin that ends when it is dropped.
    pub(super) fn hold(&self) -> Pin<'_> {
        Pin {
            pins: self,
            pin: self.enter(),
        }
    }

    /// The stamp for space that no lookup names any more.
    pub(super) fn stamp(&self) -> u64 {
        // That no lookup names it comes before the look at the epoch.
        fence(Ordering::SeqCst);
        self.epoch.load(Ordering::SeqCst)
    }

    /// Ends epochs, as far as that can be now. Nobody is left who may have been told of space with a stamp of this or less. Calls
    /// must not overlap.
    pub(super) fn settle(&self) -> u64 {
        // A stamp given before this call is of the current epoch at most.
        for _ in 0..2 {
            let epoch = self.epoch.load(Ordering::SeqCst);
            let before = ((epoch + 1) & 1) as usize;
            let is_left = |context: &Counters| context.0[before].load(Ordering::Acquire) != 0;
            if !self.fences.heavy() || self.contexts.iter().any(is_left) {
                break;
            }
            self.epoch.store(epoch + 1, Ordering::SeqCst);
        }
        self.epoch.load(Ordering::SeqCst) - 2
    }
}

#[cfg(test)]
mod tests {
    use stord_aio::sim;

    use super::*;

    #[test]
    fn space_is_settled_when_all_who_may_know_it_have_left() {
        sim::run(0, || async {
            let pins = Pins::default();
            let (first, second) = (pins.enter(), pins.enter());
            let stamp = pins.stamp();
            for _ in 0..3 {
                assert!(pins.settle() < stamp);
            }
            pins.leave(first);
            assert!(pins.settle() < stamp);
            // Began after the space was given up.
            let late = pins.enter();
            pins.leave(second);
            assert!(pins.settle() >= stamp);
            pins.leave(late);
        });
    }

    #[test]
    fn later_requests_do_not_keep_space_from_being_settled() {
        sim::run(0, || async {
            let pins = Pins::default();
            let mut held = pins.enter();
            let stamp = pins.stamp();
            let mut rounds = 0;
            // There is always somebody, but never the same for long.
            while pins.settle() < stamp {
                let next = pins.enter();
                pins.leave(std::mem::replace(&mut held, next));
                rounds += 1;
                assert!(rounds < 10);
            }
            pins.leave(held);
        });
    }
}
