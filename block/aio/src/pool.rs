//! Threads for what blocks or computes for long: opening files, name resolution, compression, key
//! derivation, and the operations of a context without a ring.
//!
//! The threads belong to the process; they end after 10 s without work. A thread is started when
//! work waits and no thread is about to look for some, so a user who waits for each job before the
//! next keeps to one thread.
//!
//! Jobs come in lanes: one for each context, one for everybody else, one for computations. A lane
//! has limits: so many of its jobs run at a time, the others wait, and start in the order in which
//! they came. There are never more threads than the widest lane has places.

mod lanes;
#[cfg(test)]
mod tests;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;

use self::lanes::{LANES, Lanes};
use crate::executor;
use crate::sim;
use crate::task::ExecutorId;

const IDLE: Duration = Duration::from_secs(10);
const STACK: usize = 256 << 10;

/// The limits of a context's blocking jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolLimits {
    /// So many threads are kept when there is nothing to do.
    pub min: usize,
    /// So many jobs run at a time; at least 1.
    pub max: usize,
}

impl PoolLimits {
    /// No thread is kept, and 64 jobs run at a time.
    pub const DEFAULT: PoolLimits = PoolLimits { min: 0, max: 64 };
}

impl Default for PoolLimits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// What a thread of the pool does.
pub(crate) trait Job: Send {
    /// Does it. Does not panic.
    fn run(&mut self);

    /// Tells who waits for it, without waiting itself. By then the thread is ready for the next
    /// job.
    fn deliver(self: Box<Self>);
}

struct Pool {
    state: Mutex<State>,
    work: Condvar,
}

struct State {
    lanes: Lanes,
    threads: usize,
    /// Threads that will look for work before they sleep or end.
    delivering: usize,
    sleeping: usize,
}

static POOL: Pool = Pool::new();

/// Runs `f` on a thread that may block and gives its result; in a simulation, `f` runs at once.
/// Can be awaited anywhere. Dropping the future does not stop `f`.
///
/// # Panics
///
/// When `f` does.
pub async fn run<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    POOL.run(lane(), f).await
}

/// The same for work that keeps a processor busy: as many of these run at a time as there are
/// processors, or four.
///
/// # Panics
///
/// When `f` does.
pub async fn compute<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    POOL.run(lanes::COMPUTING, f).await
}

/// Queues a job of a context.
pub(crate) fn start(context: ExecutorId, job: Box<dyn Job>) {
    POOL.start(usize::from(context.index), job);
}

/// Sets the limits of a context's jobs.
pub(crate) fn set_limits(context: ExecutorId, limits: PoolLimits) {
    POOL.set_limits(usize::from(context.index), limits);
}

/// Forgets the limits of a context that has ended.
pub(crate) fn reset_limits(context: ExecutorId) {
    POOL.lock().lanes.reset_limits(usize::from(context.index));
}

/// The lane of the caller.
fn lane() -> usize {
    executor::try_with(|local| usize::from(local.id.index)).unwrap_or(lanes::NO_CONTEXT)
}

impl Pool {
    const fn new() -> Pool {
        Pool {
            state: Mutex::new(State {
                lanes: Lanes::new(),
                threads: 0,
                delivering: 0,
                sleeping: 0,
            }),
            work: Condvar::new(),
        }
    }

    async fn run<T: Send + 'static>(
        &'static self,
        lane: usize,
        f: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        if sim::is_active() {
            crate::yield_now().await;
            return f();
        }
        let (sender, receiver) = oneshot::channel();
        self.start(
            lane,
            Box::new(Call {
                f: Some(f),
                result: None,
                sender,
            }),
        );
        match receiver.await.expect("the job always answers") {
            Ok(result) => result,
            Err(panic) => resume_unwind(panic),
        }
    }

    fn start(&'static self, lane: usize, job: Box<dyn Job>) {
        debug_assert!(lane < LANES, "a lane for each context");
        let mut state = self.lock();
        state.lanes.push(lane, job);
        let ready = state.lanes.ready();
        if state.delivering >= ready {
            return;
        }
        if state.delivering + state.sleeping >= ready {
            drop(state);
            self.work.notify_one();
            return;
        }
        self.add_thread(state);
    }

    /// Starts another thread, unless there are as many as there may be.
    fn add_thread(&'static self, mut state: MutexGuard<'_, State>) {
        if state.threads >= state.lanes.most_threads() {
            return;
        }
        state.threads += 1;
        state.delivering += 1;
        drop(state);
        let spawned = thread::Builder::new()
            .name("pool".into())
            .stack_size(STACK)
            .spawn(move || self.work());
        if let Err(error) = spawned {
            let mut state = self.lock();
            state.threads -= 1;
            state.delivering -= 1;
            assert!(
                state.threads > 0,
                "cannot start a thread for blocking work: {error}"
            );
        }
    }

    fn set_limits(&'static self, lane: usize, limits: PoolLimits) {
        let mut state = self.lock();
        state.lanes.set_limits(lane, limits);
        let missing = state.lanes.fewest_threads().saturating_sub(state.threads);
        let looking = state.delivering + state.sleeping;
        let wanted = missing.max(state.lanes.ready().saturating_sub(looking));
        drop(state);
        // Those that are too many end by themselves.
        self.work.notify_all();
        for _ in 0..wanted {
            let state = self.lock();
            if state.threads < state.lanes.fewest_threads() || state.lanes.ready() > 0 {
                self.add_thread(state);
            }
        }
    }

    /// What a thread does; it begins counted among those that will look for work.
    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some((lane, mut job)) = state.lanes.pop() {
                state.delivering -= 1;
                drop(state);
                job.run();
                let mut ended = self.lock();
                ended.lanes.end(lane);
                // Before anybody hears of the result, and asks for more.
                ended.delivering += 1;
                drop(ended);
                job.deliver();
                state = self.lock();
                continue;
            }
            state.delivering -= 1;
            if state.threads > state.lanes.most_threads() {
                state.threads -= 1;
                return;
            }
            state.sleeping += 1;
            let (woken, timeout) = self
                .work
                .wait_timeout(state, IDLE)
                .unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.sleeping -= 1;
            let is_needed =
                state.lanes.ready() > 0 || state.threads <= state.lanes.fewest_threads();
            if timeout.timed_out() && !is_needed {
                state.threads -= 1;
                return;
            }
            state.delivering += 1;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A function whose result somebody waits for.
struct Call<T, F> {
    f: Option<F>,
    result: Option<thread::Result<T>>,
    sender: oneshot::Sender<thread::Result<T>>,
}

impl<T: Send, F: FnOnce() -> T + Send> Job for Call<T, F> {
    fn run(&mut self) {
        if let Some(f) = self.f.take() {
            self.result = Some(catch_unwind(AssertUnwindSafe(f)));
        }
    }

    fn deliver(self: Box<Self>) {
        if let Some(result) = self.result {
            // Nobody waits when the future was dropped.
            let _ = self.sender.send(result);
        }
    }
}
