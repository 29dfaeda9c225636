//! Notices when a queue has been without requests for a while, so that it can give memory back.

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use stord_aio::sync::Notify;
use stord_aio::{spawn_local, time};

/// A queue without requests for so long is idle.
const IDLE: Duration = Duration::from_secs(1);

/// Watches one queue.
#[derive(Default)]
pub(super) struct IdleWatch {
    /// Counts requests.
    requests: Cell<u64>,
    watching: Cell<bool>,
    over: Notify,
}

impl IdleWatch {
    /// Notes a request.
    pub(super) fn note(&self) {
        self.requests.set(self.requests.get().wrapping_add(1));
    }

    /// Calls `then` once the queue is idle or has ended, unless it is watched already. Starts a task.
    pub(super) fn watch(self: &Rc<Self>, then: impl FnOnce() + 'static) {
        if self.watching.replace(true) {
            return;
        }
        let watch = Rc::clone(self);
        spawn_local(async move {
            loop {
                let before = watch.requests.get();
                let is_over = watch.sleep().await;
                if is_over || watch.requests.get() == before {
                    break;
                }
            }
            watch.watching.set(false);
            then();
        });
    }

    /// The queue has ended, and so does the watch.
    pub(super) fn finish(&self) {
        self.over.notify_one();
    }

    /// True when the queue ended meanwhile.
    async fn sleep(&self) -> bool {
        let mut over = pin!(self.over.notified());
        let mut slept = pin!(time::sleep(IDLE));
        poll_fn(|cx| {
            if over.as_mut().poll(cx).is_ready() {
                return Poll::Ready(true);
            }
            slept.as_mut().poll(cx).map(|()| false)
        })
        .await
    }
}
