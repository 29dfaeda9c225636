//! The clock and the timers of the context or simulation that the caller runs on.
//!
//! There is no timeout by dropping a future here, on purpose: an operation that was started is
//! waited for.

use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use crate::executor;
use crate::timers::TimerKey;

/// The current time: virtual in a simulation, real elsewhere.
pub fn now() -> Instant {
    executor::try_with(|local| local.now()).unwrap_or_else(Instant::now)
}

/// Waits until `duration` has passed.
///
/// # Panics
///
/// When awaited outside a context or simulation.
pub fn sleep(duration: Duration) -> Sleep {
    sleep_until(now() + duration)
}

/// Waits until the clock reaches `deadline`.
///
/// # Panics
///
/// When awaited outside a context or simulation.
pub fn sleep_until(deadline: Instant) -> Sleep {
    Sleep {
        deadline,
        timer: None,
        not_send: PhantomData,
    }
}

/// The future of [`sleep`] and [`sleep_until`].
#[derive(Debug)]
#[must_use = "a timer waits only when awaited"]
pub struct Sleep {
    deadline: Instant,
    timer: Option<TimerKey>,
    /// A timer belongs to the thread.
    not_send: PhantomData<*mut ()>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        executor::with(|local| {
            if let Some(timer) = self.timer {
                if local.timers.borrow_mut().update(timer, cx.waker()) {
                    return Poll::Pending;
                }
                self.timer = None;
                return Poll::Ready(());
            }
            if self.deadline <= local.now() {
                return Poll::Ready(());
            }
            let waker = cx.waker().clone();
            let timer = local.timers.borrow_mut().insert(self.deadline, waker);
            self.timer = Some(timer);
            Poll::Pending
        })
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(timer) = self.timer {
            executor::try_with(|local| local.timers.borrow_mut().remove(timer));
        }
    }
}
