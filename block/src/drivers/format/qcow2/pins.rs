//! Pins: requests in flight hold the space that they were told of. Space that is given up is used again only when every request that
//! may have been told of it has ended.
//!
//! Time is cut into epochs. A request counts itself in, in the epoch of its start, in a counter of its own context. An epoch ends only
//! when nobody is left of the epoch before it; so two epochs after space was given up, nobody is left who started before that.

use std::sync::atomic::{AtomicU64, Ordering};

use stord_aio::{MAX_CONTEXTS, current_index};

/// Requests of one context, by the parity of their epoch. On a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Counters([AtomicU64; 2]);

/// All pins of an image.
#[derive(Debug)]
pub(super) struct Pins {
    epoch: AtomicU64,
    contexts: Box<[Counters]>,
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
        }
    }
}

impl Pins {
    /// Begins a pin.
    pub(super) fn enter(&self) -> u32 {
        let context = current_index() % MAX_CONTEXTS;
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            let parity = (epoch & 1) as usize;
            let counter = &self.contexts[context].0[parity];
            counter.fetch_add(1, Ordering::SeqCst);
            if self.epoch.load(Ordering::SeqCst) == epoch {
                return u32::try_from(2 * context + parity).expect("there are few contexts");
            }
            counter.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Ends a pin.
    pub(super) fn leave(&self, pin: u32) {
        let pin = pin as usize;
        self.contexts[pin / 2 % MAX_CONTEXTS].0[pin % 2].fetch_sub(1, Ordering::SeqCst);
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
        self.epoch.load(Ordering::SeqCst)
    }

    /// Whether nobody is left who may have been told of space with this stamp; ends epochs as far as that can be. Calls must not
    /// overlap.
    pub(super) fn is_over(&self, stamp: u64) -> bool {
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            if epoch >= stamp + 2 {
                return true;
            }
            let before = ((epoch + 1) & 1) as usize;
            if self
                .contexts
                .iter()
                .any(|context| context.0[before].load(Ordering::SeqCst) != 0)
            {
                return false;
            }
            self.epoch.store(epoch + 1, Ordering::SeqCst);
        }
    }
}
