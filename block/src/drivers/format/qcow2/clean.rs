//! Drops metadata and decompressed clusters that nobody has used for a while (`cache-clean-interval`), so that an idle image gives its
//! caches' memory back to the system.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::{Arc, Weak};
use std::task::Poll;
use std::time::Duration;

use stord_aio::sync::Notify;
use stord_aio::{pool, return_free_memory, spawn_local, time};

use super::Image;

/// Ends the cleaning when it is dropped or told so.
#[derive(Debug, Default)]
pub(super) struct Cleaning(Arc<Notify>);

impl Cleaning {
    /// Ends the cleaning.
    pub(super) fn end(&self) {
        self.0.notify_one();
    }
}

impl Drop for Cleaning {
    fn drop(&mut self) {
        self.end();
    }
}

impl Image {
    /// Starts to clean the cache, on the calling context, until the image closes.
    pub(super) fn start_cleaning(self: &Arc<Self>) {
        if self.options.clean_interval == 0 {
            return;
        }
        let interval = Duration::from_secs(self.options.clean_interval);
        spawn_local(clean(
            Arc::downgrade(self),
            Arc::clone(&self.cleaning.0),
            interval,
        ));
    }
}

async fn clean(image: Weak<Image>, ended: Arc<Notify>, interval: Duration) {
    loop {
        let mut sleep = pin!(time::sleep(interval));
        let mut ended = pin!(ended.notified());
        let is_ended = poll_fn(|cx| {
            if ended.as_mut().poll(cx).is_ready() {
                return Poll::Ready(true);
            }
            sleep.as_mut().poll(cx).map(|()| false)
        })
        .await;
        let Some(image) = image.upgrade().filter(|_| !is_ended) else {
            return;
        };
        let dropped = image.drop_unused();
        drop(image);
        if dropped >= WORTH_RETURNING {
            pool::run(return_free_memory).await;
        }
    }
}

/// So many bytes, freed here and there, are worth the time it takes to hand them to the system.
const WORTH_RETURNING: usize = 1 << 20;

impl Image {
    /// Drops what has not been used since the last call; gives about how many bytes that was.
    fn drop_unused(&self) -> usize {
        let slices = {
            let mut meta = self.meta();
            if let Some(space) = &mut meta.space {
                space.refcounts.drop_unused();
            }
            self.slices.drop_unused()
        };
        (slices << self.options.slice_bits) + self.decompressed.drop_unused()
    }

    /// Slices of refcount blocks in memory.
    #[cfg(test)]
    pub(super) fn refcount_slices(&self) -> usize {
        let meta = self.meta();
        let space = meta.space.as_ref();
        space.map_or(0, |space| space.refcounts.slices())
    }
}
