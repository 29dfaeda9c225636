//! The part of a context or simulation that its tasks run on: tasks, ready queue, timers and
//! operations of one thread.
//!
//! Everything in [`Local`] is touched by its own thread only. No borrow of its cells is held while
//! a future is polled or dropped, a waker is woken, or a buffer's owner is dropped, because each
//! of these may come back here.

// UNSAFETY: the thread-local pointer to the running executor.
#![expect(
    unsafe_code,
    reason = "a thread-local pointer is the cheapest way to the executor"
)]

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::panic::Location;
use std::ptr;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use crate::engine::Engine;
use crate::op::Slots;
use crate::polling::{Polling, Spinners};
use crate::remote::{self, Message};
use crate::task::{self, ExecutorId, TaskFuture, TaskKey, Tasks};
use crate::timers::Timers;

/// One thread's executor.
pub(crate) struct Local {
    pub(crate) id: ExecutorId,
    pub(crate) tasks: RefCell<Tasks>,
    pub(crate) ready: RefCell<VecDeque<TaskKey>>,
    pub(crate) timers: RefCell<Timers>,
    // Before the slots, so that it ends first.
    pub(crate) engine: Engine,
    pub(crate) slots: RefCell<Slots>,
    /// Waits for descriptors end with ECANCELED, because the context is to end.
    pub(crate) stopping: Cell<bool>,
    pub(crate) polling: RefCell<Polling>,
    /// How many bytes the running task may still transfer at once before others have their turn.
    budget: Cell<u64>,
    pub(crate) spinners: RefCell<Spinners>,
    /// How often the engine has been asked for events.
    pub(crate) turns: Cell<u64>,
    /// The virtual clock of a simulation.
    pub(crate) clock: Option<VirtualClock>,
}

/// Bytes that a task may transfer at once in one poll, and what the smallest transfer counts: 64
/// small ones take about 50 us.
const BUDGET: u64 = 4 << 20;
const SMALLEST_COST: u64 = BUDGET / 64;

/// Whether a transfer may be done at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GoOn {
    /// Yes.
    Now,
    /// When the other tasks have had their turn.
    AfterOthers,
    /// No: a simulation decides when it is done.
    ByEngine,
}

/// A clock that only moves when told.
pub(crate) struct VirtualClock {
    start: Instant,
    passed: Cell<Duration>,
}

impl VirtualClock {
    pub(crate) fn new() -> VirtualClock {
        VirtualClock {
            start: Instant::now(),
            passed: Cell::new(Duration::ZERO),
        }
    }

    fn now(&self) -> Instant {
        self.start + self.passed.get()
    }

    pub(crate) fn advance_to(&self, time: Instant) {
        self.passed.set(
            self.passed
                .get()
                .max(time.saturating_duration_since(self.start)),
        );
    }
}

thread_local! {
    /// The executor that runs on this thread, or null.
    static CURRENT: Cell<*const Local> = const { Cell::new(ptr::null()) };
}

/// Calls `f` with the executor of this thread, if there is one.
#[inline]
pub(crate) fn try_with<R>(f: impl FnOnce(&Local) -> R) -> Option<R> {
    let current = CURRENT.get();
    if current.is_null() {
        return None;
    }
    // SAFETY: `Local::enter` sets the pointer on this thread only, to a `Local` that it borrows
    // until the pointer is reset, and the reference does not outlive this call.
    Some(f(unsafe { &*current }))
}

/// Calls `f` with the executor of this thread.
#[inline]
#[track_caller]
pub(crate) fn with<R>(f: impl FnOnce(&Local) -> R) -> R {
    match try_with(f) {
        Some(result) => result,
        None => panic!("this must be called on an I/O context or in a simulation"),
    }
}

/// Wakes a task, from any thread.
pub(crate) fn wake(executor: ExecutorId, task: TaskKey) {
    let local = try_with(|local| {
        let is_ours = local.id == executor;
        if is_ours {
            local.wake(task);
        }
        is_ours
    });
    if local != Some(true) {
        // A context that has ended has no task left to wake.
        let _ = remote::send(executor, Message::Wake(task));
    }
}

impl Local {
    pub(crate) fn new(id: ExecutorId, engine: Engine, clock: Option<VirtualClock>) -> Local {
        Local {
            id,
            tasks: RefCell::default(),
            ready: RefCell::default(),
            timers: RefCell::default(),
            slots: RefCell::default(),
            engine,
            stopping: Cell::new(false),
            polling: RefCell::default(),
            budget: Cell::new(0),
            spinners: RefCell::default(),
            turns: Cell::new(0),
            clock,
        }
    }

    /// Makes this the executor of the thread while `f` runs.
    ///
    /// # Panics
    ///
    /// When the thread has one already.
    pub(crate) fn enter<R>(&self, f: impl FnOnce() -> R) -> R {
        struct Reset;
        impl Drop for Reset {
            fn drop(&mut self) {
                CURRENT.set(ptr::null());
            }
        }
        assert!(
            CURRENT.get().is_null(),
            "this thread runs a context or a simulation already"
        );
        CURRENT.set(self);
        let _reset = Reset;
        f()
    }

    /// The current time.
    pub(crate) fn now(&self) -> Instant {
        match &self.clock {
            Some(clock) => clock.now(),
            None => Instant::now(),
        }
    }

    /// Puts a task of this executor into the ready queue.
    #[inline]
    pub(crate) fn wake(&self, task: TaskKey) {
        if self.tasks.borrow_mut().wake(task) {
            self.ready.borrow_mut().push_back(task);
        }
    }

    /// Starts a task: polls it once, and keeps it when it is not done.
    pub(crate) fn spawn(&self, future: TaskFuture, spawned_at: &'static Location<'static>) {
        let task = self.tasks.borrow_mut().insert(spawned_at);
        self.poll(task, future);
    }

    /// Polls a task of the ready queue.
    #[inline]
    pub(crate) fn run(&self, task: TaskKey) {
        let future = self.tasks.borrow_mut().take(task);
        self.refill_budget();
        if let Some(future) = future {
            self.poll(task, future);
        }
    }

    /// Gives what runs next its full budget of transfers at once.
    pub(crate) fn refill_budget(&self) {
        self.budget.set(BUDGET);
    }

    /// Whether the running task may transfer so many bytes at once, without the engine.
    pub(crate) fn may_go_on(&self, bytes: u64) -> GoOn {
        if self.clock.is_some() {
            return GoOn::ByEngine;
        }
        let cost = bytes.max(SMALLEST_COST);
        match self.budget.get().checked_sub(cost) {
            Some(left) => {
                self.budget.set(left);
                GoOn::Now
            }
            None if self.budget.get() == BUDGET => {
                self.budget.set(0);
                GoOn::Now
            }
            None => GoOn::AfterOthers,
        }
    }

    fn poll(&self, task: TaskKey, mut future: TaskFuture) {
        let waker = task::waker(self.id, task);
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Pending => self.tasks.borrow_mut().park(task, future),
            Poll::Ready(()) => {
                drop(future);
                self.tasks.borrow_mut().remove(task);
            }
        }
    }

    /// Wakes everybody whose timer has expired. Gives the time until the next timer.
    pub(crate) fn run_timers(&self) -> Option<Duration> {
        let next = self.timers.borrow().next()?;
        let now = self.now();
        if now < next {
            return Some(next - now);
        }
        loop {
            let expired = self.timers.borrow_mut().expired(now);
            match expired {
                Some(waker) => waker.wake(),
                None => break,
            }
        }
        let next = self.timers.borrow().next()?;
        Some(next - now)
    }
}

/// Starts a task on the context or simulation that the caller runs on. It is polled once before
/// this returns. It is never cancelled: the context ends after its tasks.
///
/// # Panics
///
/// Outside a context or simulation.
#[track_caller]
pub fn spawn_local(future: impl Future<Output = ()> + 'static) {
    let spawned_at = Location::caller();
    with(|local| local.spawn(Box::pin(future), spawned_at));
}

/// Counts the turns of the loop that the caller runs on: what two tasks find the same number in has
/// arrived together.
///
/// # Panics
///
/// Outside a context or simulation.
#[track_caller]
pub fn turns() -> u64 {
    with(|local| local.turns.get())
}

/// Hands everything submitted on this context to the kernel now, not at the end of the turn.
///
/// # Panics
///
/// Outside a context or simulation.
#[track_caller]
pub fn submit_now() {
    with(|local| local.engine.submit_now());
}

/// Whether everything submitted on this context is with the kernel, and everything that the kernel
/// has completed is known here. Then an operation that has not completed is one whose memory the
/// kernel has not filled; it does that only in the loop's next turn.
///
/// # Panics
///
/// Outside a context or simulation.
#[track_caller]
pub fn is_quiet() -> bool {
    with(|local| !local.engine.has_events())
}

/// Lets all other tasks that are ready run first.
pub fn yield_now() -> impl Future<Output = ()> {
    let mut yielded = false;
    poll_fn(move |cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
}
