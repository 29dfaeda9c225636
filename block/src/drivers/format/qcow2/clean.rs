//! Drops L2 slices that nobody has used for a while (`cache-clean-interval`), so that an idle image gives its cache's memory back.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::{Arc, Weak};
use std::task::Poll;
use std::time::Duration;

use stord_aio::sync::Notify;
use stord_aio::{spawn_local, time};

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
        let _meta = image.meta();
        image.slices.drop_unused();
    }
}
